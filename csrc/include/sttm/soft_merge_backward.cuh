// Gradients of soft_merge, which works its weights out again. Every row of a gradient has one owner.
#pragma once

#include "partial.cuh"
#include "soft_weights.cuh"

namespace sttm {

__device__ __forceinline__ SoftTerm soft_meta(const SoftMergeBackwardArguments& a, int64_t set, int k) {
    SoftTerm term = soft_meta(a, a.lse, set, k);
    if (!term.real) return term;
    const float mass = a.mass[set * a.K + k];
    term.scale = mass == 0 ? 0.0f : 1.0f / (kUp * mass);
    if (a.shift != nullptr) term.common = a.shift[set * a.K + k];
    if (a.grad_size.data != nullptr) {
        term.grad_size = a.grad_size.data[set * a.grad_size.stride_b + k * a.grad_size.stride_n];
        if (!a.over_meta) term.centre = mass * term.grad_size;
    }
    return term;
}

// dL/dx_n = sum_k W[n, k] g_k / mass_k, and dL/dp_n alike: one block per tile of tokens and share of the slices of C.
template <typename T, bool EXACT, int ROWS>
__global__ void __launch_bounds__(kSoftThreads, 2)
    soft_merge_grad_x_kernel(const SoftMergeBackwardArguments a, const SoftFeatures f, int width, int parts) {
    using Panel = WeightPanel<T, EXACT, ROWS>;
    const int mine = blockIdx.x % parts;
    const TokenTile tile = token_tile<ROWS>(a, blockIdx.x / parts);
    if (!tile.there()) return;
    const Item& item = tile.item;
    const int first = tile.first;
    const StridedRows<T> metas = rows_of<T>(a.meta, Mask{}, item.set, a.K);
    const StridedRows<T> tokens = token_rows<T>(a.q, a.mask, item);
    const StridedRows<T> values = rows_of<T>(metric_of(a.grad_y), Mask{}, item.set, a.grad_y.data == nullptr ? 0 : a.K);

    STTM_SHARED(SoftTerm, own_terms, [Panel::OWN]);
    STTM_SHARED(SoftTerm, terms, [Panel::OTHER]);
    STTM_SHARED(float, moment_sums, [Moments<Panel>::FLOATS]);
    const int thread = static_cast<int>(threadIdx.x);
    Panel panel(shared_memory<unsigned char>(), width, width >= a.K);
    Moments<Panel> moments(moment_sums, a.grad_positions, a.grad_positions_in == nullptr ? 0 : a.P, mine);
    if (thread < Panel::OWN) own_terms[thread] = soft_token(a, a.lse, nullptr, item, first + thread);
    const auto make_weights = [&](int from, int end, int part) {
        STTM_NO_UNROLL
        for (int start = from; start < end; start += Panel::OTHER) {
            float W[2][Panel::NT][4];
            const int count = min(Panel::OTHER, end - start);
            panel.multiply(W, tokens, f.q, first, metas, f.meta, start, count, a.similarity, [&] {
                if (thread < Panel::OTHER) terms[thread] = soft_meta(a, item.set, start + thread);
            });
            panel.to_similarities(W, count, a.similarity, a.inverse_temperature);
            float level[2][2], scale[2][2];
            Panel::of_own_rows([&](int i, int r, int row) {
                level[i][r] = own_terms[row].level;
                scale[i][r] = own_terms[row].scale;
            });
            const auto others = [&](int column) { return SoftTerms{{terms[column], terms[column + 1]}}; };
            Panel::each(count, others, [&](int i, int j, int r, int row, int column, const SoftTerms& other) {
                STTM_UNROLL
                for (int e = 0; e < 2; ++e) {
                    const SoftTerm& meta = other.of[e];
                    float& weight = W[i][j][2 * r + e];
                    weight = over_mass(attention(weight, level[i][r], meta) * scale[i][r], meta);
                }
                panel.weigh(row, start - from + column, Pair{W[i][j][2 * r], W[i][j][2 * r + 1]});
            });
            if (part < parts * Panel::SLICE) moments.add(W, a.grad_positions, item.set, start, count, terms, start > 0);
        }
    };
    Features features = f.grad_y;
    if (a.grad_x == nullptr) features.D = 0;
    panel.for_each_slice(values, features, a.K, mine, parts, make_weights, [&](int part, bool) {
        panel.finish(item.N - first, features.D - part, [&](int row, int column, float (&value)[Vec<T>::size]) {
            const int c = part + column;
            if (!own_terms[row].real) {
                STTM_UNROLL
                for (int e = 0; e < Vec<T>::size; ++e) value[e] = 0;
            }
            T* const to = static_cast<T*>(a.grad_x) + (item.first_row() + first + row) * a.C + c;
            store_features(to, value, a.C - c, 1.0f);
        });
    });
    if (a.grad_positions_in == nullptr) return;
    const bool none = a.grad_positions.data == nullptr || a.K == 0;
    if (none) moments.count = min(kAxes, a.P - moments.first);
    moments.finish(min(Panel::OWN, item.N - first), [&](int row, int axis, float value) {
        const int64_t n = item.first_row() + first + row;
        a.grad_positions_in[n * a.P + axis] = none || !own_terms[row].real ? 0.0f : value;
    });
}

// shift_k = -<g_k, y_k> - <dL/dp_k, p_k>. A warp per meta token.
template <typename T>
__global__ void __launch_bounds__(kSoftThreads) soft_merge_shift_kernel(const SoftMergeBackwardArguments a) {
    const int64_t row = int64_t(blockIdx.x) * (kSoftThreads / kWarpSize) + warp_index(), item = row / a.K;
    if (item >= a.B) return;
    const int k = static_cast<int>(row % a.K);
    float dot = 0;
    if (a.grad_y.data != nullptr) {
        const T* g = row_of<T>(a.grad_y, item, k);
        const T* y = static_cast<const T*>(a.y) + row * a.C;
        for (int c = lane_index(); c < a.C; c += kWarpSize) dot += to_float(g[c * a.grad_y.stride_c]) * to_float(y[c]);
    }
    if (a.grad_positions.data != nullptr) {
        for (int axis = lane_index(); axis < a.P; axis += kWarpSize) {
            dot += axis_of(a.grad_positions, item, k, axis) * a.positions_out[row * a.P + axis];
        }
    }
    dot = warp_sum(dot);
    if (lane_index() == 0) a.shift[row] = -dot;
}

// dL/dS of a token or a meta token and another, less what centres it over tokens if `sizes`: then it is a term of
// dL/dsize_n = sum_k A (T / mass_k + dL/dsize'_k), which is also the mean that centres it over meta tokens.
template <bool TOKENS>
__device__ __forceinline__ float soft_gradient(float S, float U, const SoftTerm& own, const SoftTerm& other,
                                               bool sizes) {
    const auto &token = TOKENS ? own : other, &meta = TOKENS ? other : own;
    const float A = attention(S, own.level, other), weight = sizes ? A : A * token.scale;
    const float grad = over_mass(weight, meta) * (U + meta.common) + weight * (meta.grad_size - token.centre);
    return sizes ? grad : grad - A * meta.centre;
}

// What is asked for of soft_merge_grad_metric_kernel.
struct SoftMetricWork {
    bool sizes;   // dL/dsize_n, of tokens
    bool metric;  // dL/dq or dL/dmeta; over meta tokens with `sizes` in the same launch or with them at hand
};

// dL/dsize_n and dL/dq by tiles of tokens (TOKENS), or dL/dmeta by tiles of meta tokens and spans of tokens; `parts`
// blocks share the slices of D.
template <typename T, bool EXACT, bool TOKENS, int ROWS>
__global__ void __launch_bounds__(kSoftThreads, 2)
    soft_merge_grad_metric_kernel(const SoftMergeBackwardArguments a, const SoftFeatures f, const Partial partial,
                                  int width, int span_rows, int parts, const SoftMetricWork work) {
    using Panel = WeightPanel<T, EXACT, ROWS>;
    const auto tile = tile_of<TOKENS, ROWS>(a, partial, span_rows, blockIdx.x / parts);
    if (!tile.there()) return;
    STTM_SHARED(Item, items, [1]);  // where it takes no registers
    if (threadIdx.x == 0) items[0] = tile.item;
    __syncthreads();
    const Item& item = items[0];
    const int num_own = TOKENS ? item.N : a.K, num_other = TOKENS ? a.K : item.N;
    const int first = tile.first, begin = tile.begin;
    const StridedRows<T> metas = rows_of<T>(a.meta, Mask{}, item.set, a.K);
    const StridedRows<T> tokens = token_rows<T>(a.q, a.mask, item);
    const StridedRows<T> g = rows_of<T>(metric_of(a.grad_y), Mask{}, item.set, a.K);
    const StridedRows<T> x = token_rows<T>(metric_of(a.x), a.mask, item);
    const auto& own = either<TOKENS>(tokens, metas);
    const auto& other = either<TOKENS>(metas, tokens);
    const Features& own_features = TOKENS ? f.q : f.meta;
    Features other_features = TOKENS ? f.meta : f.q;

    STTM_SHARED(SoftTerm, own_terms, [Panel::OWN]);
    STTM_SHARED(SoftTerm, terms, [Panel::OTHER]);
    STTM_SHARED(float, size_sums, [Panel::COLUMN_WARPS * Panel::OWN]);
    const int thread = static_cast<int>(threadIdx.x);
    Panel panel(shared_memory<unsigned char>(), width, !TOKENS || width >= num_other);
    const auto term_of = [&](bool token, int row) {
        return token ? soft_token(a, a.lse, work.sizes ? nullptr : a.grad_size_in, item, row)
                     : soft_meta(a, item.set, row);
    };
    if (thread < Panel::OWN) own_terms[thread] = term_of(TOKENS, first + thread);
    const auto make_weights = [&](int from, int until, int) {
        STTM_NO_UNROLL
        for (int start = from; start < until; start += Panel::OTHER) {
            float dot[2][Panel::NT][4], U[2][Panel::NT][4];  // U[n, k] = <g_k, x_n> + <dL/dp_k, p_n>
            const int count = min(Panel::OTHER, until - start);
            panel.multiply(dot, own, own_features, first, other, TOKENS ? f.meta : f.q, start, count, a.similarity,
                           [&] {
                               if (thread < Panel::OTHER) terms[thread] = term_of(!TOKENS, start + thread);
                           });
            clear(U);
            if (a.grad_y.data != nullptr) {
                panel.template multiply<false>(U, either<TOKENS>(x, g), TOKENS ? f.x : f.grad_y, first,
                                               either<TOKENS>(g, x), TOKENS ? f.grad_y : f.x, start, count,
                                               Similarity::dot, [] {});
            }
            if (a.grad_positions.data != nullptr) {
                const Rows& own_positions = TOKENS ? a.positions : a.grad_positions;
                const Rows& other_positions = TOKENS ? a.grad_positions : a.positions;
                const int own_item = TOKENS ? item.tokens : item.set, own_first = (TOKENS ? item.start : 0) + first;
                const int other_item = TOKENS ? item.set : item.tokens, other_start = TOKENS ? 0 : item.start;
                STTM_NO_UNROLL
                for (int axis = 0; axis < a.P; ++axis) {
                    const int from = anew(other_start + start);
                    float mine[2][2];
                    Panel::of_own_rows([&](int i, int r, int row) {
                        const bool real = own_terms[row].real;
                        mine[i][r] = real ? axis_of(own_positions, own_item, own_first + row, axis) : 0.0f;
                    });
                    Panel::each(count, neighbours(terms, other_positions, other_item, from, axis),
                                [&](int i, int j, int r, int, int, const Pair& value) {
                                    STTM_UNROLL
                                    for (int e = 0; e < 2; ++e) U[i][j][2 * r + e] += mine[i][r] * value.value[e];
                                });
                }
            }
            const auto terms_of = [&](int column) { return SoftTerms{{terms[column], terms[column + 1]}}; };
            const auto gradient = [&](int i, int j, int e, int row, int column, const SoftTerm& other, bool sizes) {
                const float S = similarity_of(dot[i][j][e], panel.own_term[row], panel.other_term[column],
                                              a.inverse_temperature, a.similarity);
                return soft_gradient<TOKENS>(S, U[i][j][e], own_terms[row], other, sizes);
            };
            if (TOKENS && work.sizes) {
                float sizes[2][2] = {};
                Panel::each(count, terms_of, [&](int i, int j, int r, int row, int column, const SoftTerms& others) {
                    STTM_UNROLL
                    for (int e = 0; e < 2; ++e) {
                        sizes[i][r] += gradient(i, j, 2 * r + e, row, column + e, others.of[e], true);
                    }
                });
                Panel::add_up(size_sums, sizes, start > 0);
            }
            if (!work.metric) continue;
            if (TOKENS && work.sizes && a.over_meta) {
                __syncthreads();
                if (thread < Panel::OWN && own_terms[thread].scale != 0) {
                    own_terms[thread].centre = Panel::sum_of(size_sums, thread);
                }
                __syncthreads();
            }
            Panel::each(count, terms_of, [&](int i, int j, int r, int row, int column, const SoftTerms& others) {
                STTM_UNROLL
                for (int e = 0; e < 2; ++e) {
                    U[i][j][2 * r + e] = gradient(i, j, 2 * r + e, row, column + e, others.of[e], false);
                }
            });
            panel.pull_back(dot, start - from, count, a.similarity, start > begin,
                            [&](int i, int j, int e, int, int) { return U[i][j][e] * a.inverse_temperature; });
        }
    };

    T* const grad = static_cast<T*>(TOKENS ? a.grad_q : a.grad_meta);
    const auto is_constant = [&] { return !a.over_meta && item.N == 1; };  // a softmax over one token is 1
    if constexpr (TOKENS) {
        if (!work.metric) other_features.D = 0;
        panel.for_each_slice(
            other, other_features, a.K, blockIdx.x % parts, parts, make_weights, [&](int part, bool fresh) {
                if (!work.metric) return;
                if (is_constant()) panel.forget();
                if (fresh) panel.find_shares(own, first, a.similarity);
                panel.store_gradient(grad, item.tokens, a.N, item.start, own, num_own, own_features, first, part,
                                     a.similarity);
            });
        if (!work.sizes || blockIdx.x % anew(parts) != 0) return;
        __syncthreads();
        if (thread < Panel::OWN && first + thread < item.N) {
            const float sum = a.K == 0 || !own_terms[thread].real ? 0.0f : Panel::sum_of(size_sums, thread);
            a.grad_size_in[item.first_row() + first + thread] = sum;
        }
    } else {
        panel.store_span(grad, own, num_own, own_features, a.similarity, other, other_features,
                         Span{partial, tile, static_cast<int>(blockIdx.x % parts), parts}, make_weights, is_constant);
    }
}

template <typename T, bool EXACT>
cudaError_t launch_soft_merge_grad_tokens(const SoftMergeBackwardArguments& a, const SoftFeatures& f,
                                          const SoftMetricWork& work, cudaStream_t stream) {
    const auto kernel_of = [](auto rows) {
        return soft_merge_grad_metric_kernel<T, EXACT, true, decltype(rows)::value>;
    };
    return with_panel<T, EXACT>(a.K, kernel_of, [&](auto rows, int width) {
        using Panel = WeightPanel<T, EXACT, decltype(rows)::value>;
        const int64_t tiles = token_tiles(a, Panel::OWN);
        const int parts = work.metric ? soft_shares(tiles, ceil_div(a.D, Panel::SLICE), 0) : 1;
        return launch(kernel_of(rows), Grid{times(tiles, parts)}, kSoftThreads, Panel::bytes(width, width >= a.K),
                      stream, a, f, Partial{}, width, 0, parts, work);
    });
}

template <typename T, bool EXACT>
cudaError_t launch_soft_merge_grad_meta(const SoftMergeBackwardArguments& a, const SoftFeatures& f,
                                        cudaStream_t stream) {
    using Panel = WeightPanel<T, EXACT, kSpanOwners>;
    const SpanLaunch spans = span_launch(a, a.D, 1);
    const int parts = soft_shares(spans.blocks, ceil_div(a.D, Panel::SLICE), 0);
    const cudaError_t error = launch(soft_merge_grad_metric_kernel<T, EXACT, false, kSpanOwners>,
                                     Grid{times(spans.blocks, parts)}, kSoftThreads, Panel::bytes(spans.width, true),
                                     stream, a, f, spans.partial, spans.width, spans.rows, parts,
                                     SoftMetricWork{false, true});
    if (error != cudaSuccess || !spans.joins) return error;
    using Store = StoreMetaGradient<T, SoftMergeBackwardArguments>;
    return join_spans<T>(spans.partial, times(a.B, a.K), a.D, Store{a, f.meta, spans.partial}, stream);
}

template <typename T, bool EXACT>
cudaError_t launch_soft_merge_backward(const SoftMergeBackwardArguments& a, cudaStream_t stream) {
    const SoftFeatures f = soft_features<T>(a, a.grad_y);
    cudaError_t error = cudaSuccess;
    if (a.grad_x != nullptr || a.grad_positions_in != nullptr) {
        const auto kernel_of = [](auto rows) { return soft_merge_grad_x_kernel<T, EXACT, decltype(rows)::value>; };
        error = with_panel<T, EXACT>(a.K, kernel_of, [&](auto rows, int width) {
            using Panel = WeightPanel<T, EXACT, decltype(rows)::value>;
            const int64_t tiles = token_tiles(a, Panel::OWN);
            const int parts = soft_shares(tiles, ceil_div(a.C, Panel::SLICE), a.P);
            return launch(kernel_of(rows), Grid{times(tiles, parts)}, kSoftThreads, Panel::bytes(width, width >= a.K),
                          stream, a, f, width, parts);
        });
    }
    if (error == cudaSuccess && a.shift != nullptr) {
        const Grid grid{ceil_div64(int64_t(a.B) * a.K, kSoftThreads / kWarpSize)};
        error = launch(soft_merge_shift_kernel<T>, grid, kSoftThreads, 0, stream, a);
    }
    // Over more meta tokens than a product takes at a time, their mean must be there before the first weight.
    const SoftMetricWork all{a.grad_size_in != nullptr, a.grad_q != nullptr};
    const bool apart = a.over_meta && all.metric && a.K > WeightPanel<T, EXACT, kSpanOwners>::OTHER;
    const auto of_tokens = [&](const SoftMetricWork& work) {
        if (error == cudaSuccess) error = launch_soft_merge_grad_tokens<T, EXACT>(a, f, work, stream);
    };
    if (apart) {
        of_tokens({true, false});
        of_tokens({false, true});
    } else if (all.sizes || all.metric) {
        of_tokens(all);
    }
    if (error == cudaSuccess && a.grad_meta != nullptr) error = launch_soft_merge_grad_meta<T, EXACT>(a, f, stream);
    return error;
}

}  // namespace sttm
