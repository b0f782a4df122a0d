// Gradients of assign: every row of a gradient has one owner, which works its similarities out again, once.
#pragma once

#include "weight_panel.cuh"

namespace sttm {

constexpr int kAssignBackwardThreads = 256;

template <typename T, bool EXACT, int ROWS>
using AssignPanel = WeightPanel<T, EXACT, ROWS, true>;

__device__ __forceinline__ float at(const Column& column, const Item& item, int n) {
    if (column.data == nullptr) return 0;
    return column.data[item.tokens * column.stride_b + (item.start + n) * column.stride_n];
}

// Tokens that have a group; the others are not read.
template <typename T>
struct AssignedRows {
    const T* data;
    int64_t stride;
    int count;
    const int32_t* index;
    int first_group, K;

    // The meta token of a row, K or more if it has none.
    __device__ __forceinline__ unsigned chosen(int row) const { return unsigned(index[row]) - unsigned(first_group); }
    __device__ __forceinline__ bool there(int row) const { return row < count && chosen(row) < unsigned(K); }
    __device__ __forceinline__ const T* operator()(int row) const { return there(row) ? data + row * stride : nullptr; }
};

template <typename T>
__device__ __forceinline__ AssignedRows<T> assigned_rows(const AssignBackwardArguments& a, const Item& item) {
    const StridedRows<T> rows = token_rows<T>(a.q, Mask{}, item);
    return {rows.data, rows.stride, item.N, a.index + item.first_row(), item.first_group, a.K};
}

// Of a token: index, dL/dscore, dL/dlse, lse; index -1 if it has no group. What comes by weight = exp(score - lse) is in
// both gradients.
struct TokenTerm {
    int chosen;
    float score_grad, lse_grad, level;
};

__device__ __forceinline__ TokenTerm token_term(const AssignBackwardArguments& a, const Item& item, int n) {
    TokenTerm term{-1, 0, 0, 0};
    if (n >= item.N) return term;
    const unsigned chosen = unsigned(a.index[item.first_row() + n]) - unsigned(item.first_group);
    if (chosen >= unsigned(a.K)) return term;
    const int64_t row = item.first_row() + n;
    const float through = at(a.grad_weight, item, n) * (a.weight == nullptr ? 1.0f : a.weight[row]);
    return {int(chosen), at(a.grad_score, item, n) + through, at(a.grad_lse, item, n) - through, a.lse[row]};
}

// Of a token that was merged, too: its group, -1 if it has none, and its share of it.
struct alignas(8) MergedTerm {
    int group;
    float share;
};

__device__ __forceinline__ MergedTerm merged_term(const AssignBackwardArguments& a, const Item& item, int n,
                                                  int chosen) {
    if (a.grad_merged == nullptr || chosen < 0) return {-1, 0};
    const int64_t row = item.first_row() + n;
    const float size = a.size == nullptr ? 1.0f : a.size[row], mass = a.mass[int64_t(item.set) * a.K + chosen];
    return {chosen, mass == 0 ? 0.0f : size * (a.weight == nullptr ? 1.0f : a.weight[row]) / mass};
}

// What is added to the gradients of tokens: shares of the rows of dL/dy.
template <typename T>
struct MergedRows {
    static constexpr bool kAny = true;
    const T* grad;  // of the first group of the item
    int D;
    const MergedTerm* terms;  // of the own rows of a tile

    __device__ __forceinline__ MergedRows(const AssignBackwardArguments& a, const Item& item, const MergedTerm* terms)
        : grad(static_cast<const T*>(a.grad_merged)), D(a.D), terms(terms) {
        if (grad != nullptr) grad += int64_t(item.set) * a.K * D;
    }
    __device__ __forceinline__ bool aligned() const { return is_aligned(grad); }
    __device__ __forceinline__ MergedTerm term(int own) const { return terms[own]; }
    __device__ __forceinline__ const T* row(const MergedTerm& term) const {
        return term.group < 0 ? nullptr : grad + int64_t(term.group) * D;
    }
};

// Where there are fewer blocks than kFewBlocks, up to kMostParts share the slices of a tile, each with weights of its
// own: two products in a row become one and a part of the other.
constexpr int kFewBlocks = 32, kMostParts = 4;

// dL/dq by tiles of tokens (TOKENS) or dL/dmeta by tiles of meta tokens and spans of tokens, `parts` blocks each:
// dS[n, k] = g_n [k = index_n] + h_n exp(S[n, k] - lse_n) times the other side's features. Where a panel has no room
// for all meta tokens, every slice of D works all of them out.
template <typename T, bool EXACT, bool TOKENS, int ROWS>
__global__ void __launch_bounds__(kAssignBackwardThreads, 2)
    assign_backward_kernel(const AssignBackwardArguments a, const Features q_features, const Features m_features,
                           const Partial partial, int width, int span_rows, int parts) {
    using Panel = AssignPanel<T, EXACT, ROWS>;
    const int mine = blockIdx.x % parts;
    const auto tile = tile_of<TOKENS, ROWS>(a, partial, span_rows, blockIdx.x / parts);
    if (!tile.there()) return;
    STTM_SHARED(Item, items, [1]);  // where it takes no registers
    if (threadIdx.x == 0) items[0] = tile.item;
    __syncthreads();
    const Item& item = items[0];
    const int num_own = TOKENS ? item.N : a.K, num_other = TOKENS ? a.K : item.N, first = tile.first;
    const int begin = tile.begin;
    const AssignedRows<T> tokens = assigned_rows<T>(a, item);
    const StridedRows<T> metas = rows_of<T>(a.meta, Mask{}, item.set, a.K);
    const auto& own = either<TOKENS>(tokens, metas);
    const auto& other = either<TOKENS>(metas, tokens);
    const Features& own_features = TOKENS ? q_features : m_features;
    const Features& other_features = TOKENS ? m_features : q_features;

    STTM_SHARED(TokenTerm, terms, [Panel::OTHER]);  // of the tokens, own or other
    STTM_SHARED(MergedTerm, merged_terms, [TOKENS ? ROWS : 1]);
    const int thread = static_cast<int>(threadIdx.x);
    Panel panel(shared_memory<unsigned char>(), width, !TOKENS || width >= num_other);
    if (TOKENS && thread < ROWS) {
        terms[thread] = token_term(a, item, first + thread);
        merged_terms[thread] = merged_term(a, item, first + thread, terms[thread].chosen);
    }
    const auto make_weights = [&](int from, int end, int) {
        STTM_NO_UNROLL
        for (int start = from; start < end; start += Panel::OTHER) {
            float dot[2][Panel::NT][4];
            const int count = min(Panel::OTHER, end - start);
            panel.multiply(dot, own, own_features, first, other, other_features, start, count, a.similarity, [&] {
                if (!TOKENS && thread < Panel::OTHER) terms[thread] = token_term(a, item, start + thread);
            });
            panel.pull_back(
                dot, start - from, count, a.similarity, start > begin, [&](int i, int j, int e, int row, int column) {
                    const TokenTerm& term = terms[TOKENS ? row : column];
                    const int k = TOKENS ? start + column : first + row;
                    float dS = 0;
                    if (term.chosen >= 0 && k < a.K) {
                        const float S = similarity_of(dot[i][j][e], panel.own_term[row], panel.other_term[column],
                                                      a.inverse_temperature, a.similarity);
                        dS = term.lse_grad * expf(S - term.level);
                        if (k == term.chosen) dS += term.score_grad;
                    }
                    return dS * a.inverse_temperature;
                });
        }
    };
    T* const grad = static_cast<T*>(TOKENS ? a.grad_q : a.grad_meta);
    if constexpr (TOKENS) {
        const MergedRows<T> merged(a, item, merged_terms);
        panel.for_each_slice(other, other_features, num_other, mine, parts, make_weights, [&](int part, bool fresh) {
            if (fresh) panel.find_shares(own, first, a.similarity);
            panel.store_gradient(grad, item.tokens, a.N, item.start, own, num_own, own_features, first, part,
                                 a.similarity, merged);
        });
    } else {
        panel.store_span(grad, own, num_own, own_features, a.similarity, other, other_features,
                         Span{partial, tile, mine, parts}, make_weights, [] { return false; });
    }
}

constexpr int kAssignWarps = 4;
constexpr int kMemberPieces = 2;  // of 16 bytes a lane

// dL/dq where only score has a gradient, a warp per token: dS is g at the chosen meta token alone.
template <typename T>
__global__ void __launch_bounds__(kAssignWarps* kWarpSize, 4)
    assign_gather_kernel(const AssignBackwardArguments a, const Features q_features, const Features m_features) {
    constexpr int kSize = Vec<T>::size;
    const int64_t token = int64_t(blockIdx.x) * kAssignWarps + warp_index();
    if (token >= tokens_of(a)) return;
    const int n = static_cast<int>(token % a.N), heads = q_features.heads;
    Item item = batch_item(static_cast<int>(token / a.N), a.N);
    if (a.sequences != nullptr) {  // the index says whose token it is
        item.set = min(max(a.index[token], 0) / a.K, a.B - 1);
        item.first_group = item.set * a.K;
    }
    const AssignedRows<T> tokens = assigned_rows<T>(a, item);
    const T* q = tokens(n);
    const int chosen = q == nullptr ? -1 : static_cast<int>(tokens.chosen(n));
    const T* m = q == nullptr ? q : rows_of<T>(a.meta, Mask{}, item.set, a.K)(chosen);
    const MergedTerm term = merged_term(a, item, n, chosen);
    const T* const merged = MergedRows<T>(a, item, nullptr).row(term);
    float of_q = 0, of_m = 0;  // the gradient is of_m * m - of_q * q, and what comes from the merge
    if (q != nullptr) {
        of_m = of_q = at(a.grad_score, item, n) * a.inverse_temperature;
        if (a.similarity == Similarity::cosine) {
            const float inverse = inverse_norm(sum_of_squares(q, q_features));
            of_m *= inverse * inverse_norm(sum_of_squares(m, m_features));
            of_q *= is_normalised(inverse) ? inverse * inverse * (a.score[token] / a.inverse_temperature) : 0.0f;
        } else if (a.similarity == Similarity::l2) {
            of_m *= 2, of_q *= 2;
        } else {
            of_q = 0;
        }
    }
    T* grad = static_cast<T*>(a.grad_q) + (int64_t(item.tokens) * heads * a.N + n) * a.D;
    for (int d = lane_index() * kSize; d < a.D; d += kWarpSize * kSize) {
        float value[kSize] = {};
        if (q != nullptr) {
            const Vec<T> q_part = features(q, q_features, d), m_part = features(m, m_features, d);
            STTM_UNROLL
            for (int e = 0; e < kSize; ++e) {
                value[e] = of_m * to_float(m_part.value[e]);
                if (of_q != 0) value[e] -= of_q * to_float(q_part.value[e]);
            }
            add_share(value, merged, d, a.D, term.share);
        }
        for (int h = 0; h < heads; ++h) {
            store_features(grad + h * int64_t(a.N) * a.D + d, value, a.D - d, 1.0f / heads);
        }
    }
}

// dL/dmeta where only score has a gradient, a warp per meta token and slice of D: it looks for its tokens and adds
// them up in their order. A token's features reach its own meta token alone, whatever they are.
template <typename T>
__global__ void __launch_bounds__(kAssignWarps* kWarpSize, 4)
    assign_members_kernel(const AssignBackwardArguments a, const Features q_features, const Features m_features) {
    constexpr int kSize = Vec<T>::size, kPieces = kMemberPieces, kSlice = kPieces * kSize * kWarpSize;
    const int slices = ceil_div(a.D, kSlice);
    const int64_t task = int64_t(blockIdx.x) * kAssignWarps + warp_index(), row = task / slices;
    if (row >= int64_t(a.B) * a.K) return;
    const int at_item = static_cast<int>(row / a.K), k = static_cast<int>(row % a.K);
    const int part = static_cast<int>(task % slices) * kSlice;
    const Item item = a.sequences == nullptr ? batch_item(at_item, a.N)
                                             : sequence_item(a.sequences, at_item, a.B, a.N, a.K);
    const AssignedRows<T> tokens = assigned_rows<T>(a, item);
    const T* m = rows_of<T>(a.meta, Mask{}, item.set, a.K)(k);
    const bool cosine = a.similarity == Similarity::cosine;

    float acc[kPieces][kSize] = {}, along = 0;
    for (int start = 0; start < item.N; start += kWarpSize) {
        const int lane_n = start + lane_index();
        unsigned members = ballot(lane_n < item.N && tokens.chosen(min(lane_n, item.N - 1)) == unsigned(k));
        for (; members != 0; members &= members - 1) {
            const int n = start + __ffs(static_cast<int>(members)) - 1;
            const T* q = tokens(n);
            float weight = at(a.grad_score, item, n) * a.inverse_temperature;
            if (cosine) {
                along += weight * (a.score[item.first_row() + n] / a.inverse_temperature);
                weight *= inverse_norm(sum_of_squares(q, q_features));
            } else {
                along += weight;
            }
            STTM_UNROLL
            for (int p = 0; p < kPieces; ++p) {
                const int d = part + (p * kWarpSize + lane_index()) * kSize;
                if (d >= a.D) continue;
                const Vec<T> v = features(q, q_features, d);
                STTM_UNROLL
                for (int e = 0; e < kSize; ++e) acc[p][e] += weight * to_float(v.value[e]);
            }
        }
    }

    const float inverse = cosine ? inverse_norm(sum_of_squares(m, m_features)) : 1.0f;
    STTM_UNROLL
    for (int p = 0; p < kPieces; ++p) {
        const int d = part + (p * kWarpSize + lane_index()) * kSize;
        if (d >= a.D) continue;
        const Vec<T> v = features(m, m_features, d);
        STTM_UNROLL
        for (int e = 0; e < kSize; ++e) {
            const float own = to_float(v.value[e]);
            if (cosine) {
                if (is_normalised(inverse)) acc[p][e] -= along * inverse * own;
                acc[p][e] *= inverse;
            } else if (a.similarity == Similarity::l2) {
                acc[p][e] = 2 * (acc[p][e] - along * own);
            }
        }
        T* const grad = static_cast<T*>(a.grad_meta) + (int64_t(item.set) * a.K + k) * a.D;
        store_features(grad + d, acc[p], a.D - d, 1.0f);
    }
}

template <typename T, bool EXACT>
cudaError_t launch_assign_grad_q(const AssignBackwardArguments& a, const Features& q_features,
                                 const Features& m_features, cudaStream_t stream) {
    const auto kernel_of = [](auto rows) { return assign_backward_kernel<T, EXACT, true, decltype(rows)::value>; };
    return with_panel<T, EXACT>(a.K, kernel_of, [&](auto rows, int width) {
        using Panel = AssignPanel<T, EXACT, decltype(rows)::value>;
        const int64_t tiles = token_tiles(a, Panel::OWN);
        const int parts = shares(tiles, ceil_div(a.D, Panel::SLICE), kFewBlocks, kMostParts);
        return launch(kernel_of(rows), Grid{times(tiles, parts)}, kAssignBackwardThreads,
                      Panel::bytes(width, width >= a.K), stream, a, q_features, m_features, Partial{}, width, 0, parts);
    });
}

template <typename T, bool EXACT>
cudaError_t launch_assign_grad_meta(const AssignBackwardArguments& a, const Features& q_features,
                                    const Features& m_features, cudaStream_t stream) {
    using Panel = AssignPanel<T, EXACT, kSpanOwners>;
    const SpanLaunch spans = span_launch(a, a.D, 1);
    const int parts = shares(spans.blocks, ceil_div(a.D, Panel::SLICE), kFewBlocks, kMostParts);
    const cudaError_t error = launch(assign_backward_kernel<T, EXACT, false, kSpanOwners>,
                                     Grid{times(spans.blocks, parts)}, kAssignBackwardThreads,
                                     Panel::bytes(spans.width, true), stream, a, q_features, m_features, spans.partial,
                                     spans.width, spans.rows, parts);
    if (error != cudaSuccess || !spans.joins) return error;
    using Store = StoreMetaGradient<T, AssignBackwardArguments>;
    return join_spans<T>(spans.partial, times(a.B, a.K), a.D, Store{a, m_features, spans.partial}, stream);
}

template <typename T, bool EXACT>
cudaError_t launch_assign_backward(const AssignBackwardArguments& a, cudaStream_t stream) {
    const Features q_features = features_of<T>(a.q, a.D), m_features = features_of<T>(a.meta, a.D);
    const bool soft = is_soft(a);
    const auto by_warps = [&](auto kernel, int64_t tasks) {
        return launch(kernel, Grid{ceil_div64(tasks, kAssignWarps)}, kAssignWarps * kWarpSize, 0, stream, a, q_features,
                      m_features);
    };
    cudaError_t error = cudaSuccess;
    if (a.grad_q != nullptr)
        error = soft ? launch_assign_grad_q<T, EXACT>(a, q_features, m_features, stream)
                     : by_warps(assign_gather_kernel<T>, tokens_of(a));
    if (error != cudaSuccess || a.grad_meta == nullptr) return error;
    if (soft) return launch_assign_grad_meta<T, EXACT>(a, q_features, m_features, stream);
    const int slices = ceil_div(a.D, kMemberPieces * Vec<T>::size * kWarpSize);
    return by_warps(assign_members_kernel<T>, times(int64_t(a.B) * a.K, slices));
}

}  // namespace sttm
