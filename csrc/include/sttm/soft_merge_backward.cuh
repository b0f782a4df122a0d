// Gradients of soft_merge, which works its weights out again. Every row of a gradient has one owner.
#pragma once

#include "soft_weights.cuh"

namespace sttm {

// Columns of the gradient of a metric, beside which two tiles of products are kept.
template <typename T>
constexpr int kMetricSlice = sizeof(T) == 2 ? 96 : 64;

__device__ __forceinline__ SoftTerm soft_meta(const SoftMergeBackwardArguments& a, int64_t item, int k) {
    SoftTerm term = soft_meta(a, a.lse, item, k);
    if (!term.real) return term;
    const float mass = a.mass[item * a.K + k];
    term.scale = mass == 0 ? 0.0f : 1.0f / (kUp * mass);
    if (a.shift != nullptr) term.common = a.shift[item * a.K + k];
    if (a.grad_size.data != nullptr) {
        term.grad_size = a.grad_size.data[item * a.grad_size.stride_b + k * a.grad_size.stride_n];
        if (!a.over_meta) term.centre = mass * term.grad_size;
    }
    return term;
}

// dL/dx_n = sum_k W[n, k] g_k / mass_k, and dL/dp_n alike: one block per tile of tokens and slice of C.
template <typename T, bool EXACT>
__global__ void __launch_bounds__(kSoftThreads, 2)
    soft_merge_grad_x_kernel(const SoftMergeBackwardArguments a, const SoftFeatures f, int slices) {
    using Sum = WeightedSum<T, EXACT, kSlice<T>>;
    const int num_tiles = ceil_div(a.N, Sum::OWN), slice = blockIdx.x % slices, part = slice * Sum::SLICE;
    const int first = blockIdx.x / slices % num_tiles * Sum::OWN;
    const int64_t item = blockIdx.x / (int64_t(slices) * num_tiles);
    const StridedRows<T> metas = rows_of<T>(a.meta, Mask{}, item, a.K);
    const StridedRows<T> tokens = rows_of<T>(a.q, a.mask, item, a.N);
    const StridedRows<T> values = rows_of<T>(metric_of(a.grad_y), Mask{}, item, a.K);
    const bool through_y = a.grad_y.data != nullptr && a.grad_x != nullptr;

    STTM_SHARED(SoftTerm, own_terms, [Sum::OWN]);
    STTM_SHARED(SoftTerm, terms, [Sum::OTHER]);
    const int thread = static_cast<int>(threadIdx.x);
    STTM_SHARED(float, moment_sums, [2 * Moments::own * kAxes]);
    Sum sum(shared_memory<unsigned char>());
    auto& tiles = sum.tiles;
    const Rows& grad_positions = a.grad_positions;
    Moments moments(moment_sums, grad_positions, a.grad_positions_in == nullptr ? 0 : a.P, slice);
    if (thread < Sum::OWN) own_terms[thread] = soft_token(a, a.lse, nullptr, item, first + thread);
    for (int start = 0; start < a.K; start += Sum::OTHER) {
        float W[1][4][4];
        clear(W);
        tiles.multiply(W, tokens, f.q, first, metas, f.meta, start, a.similarity, start + Sum::OTHER < a.K, [&] {
            if (through_y) sum.load_values(values, f.grad_y, start, part);
            if (thread < Sum::OTHER) terms[thread] = soft_meta(a, item, start + thread);
        });
        STTM_UNROLL
        for (int j = 0; j < 4; ++j) {
            STTM_UNROLL
            for (int e = 0; e < 4; ++e) {
                const int row = tiles.row(0, e), column = tiles.column(j, e);
                const float S = similarity_of(W[0][j][e], tiles.own_term[row], tiles.other_term[column],
                                              a.inverse_temperature, a.similarity);
                const SoftTerm& term = terms[column];
                W[0][j][e] = over_mass(attention(S, own_terms[row], term) * own_terms[row].scale, term);
                sum.weigh(row, column, W[0][j][e]);
            }
        }
        moments.add(tiles, W, grad_positions, item, start, terms);
        if (through_y) sum.add(a.K - start, a.C - part);
    }

    __syncthreads();
    const int rows = min(Sum::OWN, a.N - first);
    const int64_t out = item * a.N + first;
    if (a.grad_positions_in != nullptr) {
        if (a.grad_positions.data == nullptr) moments.count = min(kAxes, a.P - moments.first);
        moments.finish(rows,
                       [&](int row, int axis, float value) { a.grad_positions_in[(out + row) * a.P + axis] = value; });
    }
    if (a.grad_x == nullptr) return;
    sum.finish(rows, a.C - part, [&](int row, int column, float (&value)[Vec<T>::size]) {
        const int c = part + column;
        store_features(static_cast<T*>(a.grad_x) + (out + row) * a.C + c, value, a.C - c, 1.0f);
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

// dL/dsize_n (`sizes`), dL/dq by tiles of tokens (TOKENS), or dL/dmeta by tiles of meta tokens; one block per tile and
// slice of D. dL/dsize_n = sum_k A (T / mass_k + dL/dsize'_k) is also the mean that centres it over meta tokens.
template <typename T, bool EXACT, bool TOKENS>
__global__ void __launch_bounds__(kSoftThreads, 2)
    soft_merge_grad_metric_kernel(const SoftMergeBackwardArguments a, const SoftFeatures f, int slices, bool sizes) {
    using Sum = WeightedSum<T, EXACT, kMetricSlice<T>, false>;
    const int num_own = TOKENS ? a.N : a.K, num_other = TOKENS ? a.K : a.N;
    const int num_tiles = ceil_div(num_own, Sum::OWN), part = blockIdx.x % slices * Sum::SLICE;
    const int first = blockIdx.x / slices % num_tiles * Sum::OWN;
    const int64_t item = blockIdx.x / (int64_t(slices) * num_tiles);
    const StridedRows<T> metas = rows_of<T>(a.meta, Mask{}, item, a.K);
    const StridedRows<T> tokens = rows_of<T>(a.q, a.mask, item, a.N);
    const StridedRows<T> g = rows_of<T>(metric_of(a.grad_y), Mask{}, item, a.K);
    const StridedRows<T> x = rows_of<T>(metric_of(a.x), a.mask, item, a.N);
    const auto& own = either<TOKENS>(tokens, metas);
    const auto& other = either<TOKENS>(metas, tokens);
    const Features& own_features = TOKENS ? f.q : f.meta;
    const Features& other_features = TOKENS ? f.meta : f.q;
    const Rows& own_positions = TOKENS ? a.positions : a.grad_positions;
    const Rows& other_positions = TOKENS ? a.grad_positions : a.positions;
    const float* mean = sizes ? nullptr : a.grad_size_in;
    const auto term_of = [&](bool token, int row) {
        return token ? soft_token(a, a.lse, mean, item, row) : soft_meta(a, item, row);
    };

    STTM_SHARED(SoftTerm, own_terms, [Sum::OWN]);
    STTM_SHARED(SoftTerm, terms, [Sum::OTHER]);
    const int thread = static_cast<int>(threadIdx.x);
    Sum sum(shared_memory<unsigned char>());
    auto& tiles = sum.tiles;
    if (thread < Sum::OWN) own_terms[thread] = term_of(TOKENS, first + thread);
    for (int start = 0; start < num_other; start += Sum::OTHER) {
        float dot[1][4][4], U[1][4][4];  // U[n, k] = <g_k, x_n> + <dL/dp_k, p_n>
        clear(U);
        STTM_NO_UNROLL
        for (int of_features = 0; of_features <= int(a.grad_y.data != nullptr); ++of_features) {
            const StridedRows<T>& n_rows = of_features ? x : tokens;
            const StridedRows<T>& k_rows = of_features ? g : metas;
            const Features& n_features = of_features ? f.x : f.q;
            const Features& k_features = of_features ? f.grad_y : f.meta;
            tiles.multiply(U, TOKENS ? n_rows : k_rows, TOKENS ? n_features : k_features, first,
                           TOKENS ? k_rows : n_rows, TOKENS ? k_features : n_features, start,
                           of_features ? Similarity::dot : a.similarity, false, [&] {
                               if (of_features) return;
                               if (!sizes) sum.load_values(other, other_features, start, part);
                               if (thread < Sum::OTHER) terms[thread] = term_of(!TOKENS, start + thread);
                           });
            if (of_features) break;
            STTM_UNROLL
            for (int j = 0; j < 4; ++j) {
                STTM_UNROLL
                for (int e = 0; e < 4; ++e) dot[0][j][e] = U[0][j][e];
            }
            clear(U);
        }
        if (a.grad_positions.data != nullptr) {
            STTM_NO_UNROLL
            for (int axis = 0; axis < a.P; ++axis) {
                float mine_at[2];
                const int from = anew(start);
                STTM_UNROLL
                for (int r = 0; r < 2; ++r) {
                    const int row = first + tiles.row(0, 2 * r);
                    const bool real = own_terms[row - first].real;
                    mine_at[r] = real ? axis_of(own_positions, item, row, axis) : 0.0f;
                }
                STTM_UNROLL
                for (int j = 0; j < 4; ++j) {
                    STTM_UNROLL
                    for (int e = 0; e < 4; ++e) {
                        const int column = tiles.column(j, e);
                        if (!terms[column].real) continue;
                        U[0][j][e] += mine_at[e / 2] * axis_of(other_positions, item, from + column, axis);
                    }
                }
            }
        }
        const auto times_attention = [&](int row, int column, float dot, float U) {
            const SoftTerm& token = TOKENS ? own_terms[row] : terms[column];
            const SoftTerm& meta = TOKENS ? terms[column] : own_terms[row];
            if (!token.real || !meta.real) return 0.0f;
            const float S =
                similarity_of(dot, tiles.own_term[row], tiles.other_term[column], a.inverse_temperature, a.similarity);
            const float A = attention(S, token, meta), weight = sizes ? A : A * token.scale;
            const float grad = over_mass(weight, meta) * (U + meta.common) + weight * (meta.grad_size - token.centre);
            return sizes ? grad : grad - A * meta.centre;
        };
        const int here = anew(thread);
        STTM_UNROLL
        for (int j = 0; j < 4; ++j) {
            STTM_UNROLL
            for (int e = 0; e < 4; ++e) {
                const int row = tiles.row(0, e, here), column = tiles.column(j, e, here);
                U[0][j][e] = times_attention(row, column, dot[0][j][e], U[0][j][e]);
                if (sizes) sum.along[e / 2] += U[0][j][e];
            }
        }
        if (sizes) continue;
        sum.pull_back(dot, a.similarity, [&](int j, int e, int, int) { return U[0][j][e] * a.inverse_temperature; });
        sum.add(num_other - start, a.D - part);
    }

    if (sizes) {
        sum.reduce(sum.along);
        if (thread < Sum::OWN && first + thread < a.N) {
            a.grad_size_in[item * a.N + first + thread] = sum.sum_of(thread);
        }
    } else {
        sum.store_gradient(static_cast<T*>(TOKENS ? a.grad_q : a.grad_meta), item, own, num_own, own_features, first,
                           part, a.similarity);
    }
}

template <typename T, bool EXACT>
cudaError_t launch_soft_merge_backward(const SoftMergeBackwardArguments& a, cudaStream_t stream) {
    using Sum = WeightedSum<T, EXACT, kSlice<T>>;
    using MetricSum = WeightedSum<T, EXACT, kMetricSlice<T>, false>;
    const SoftFeatures f = soft_features<T>(a, a.grad_y);
    const int slices = max(ceil_div(a.C, Sum::SLICE), ceil_div(a.P, kAxes)), parts = ceil_div(a.D, MetricSum::SLICE);
    const auto grad_metric = [&](auto tokens, int parts, bool sizes) {
        constexpr bool kTokens = decltype(tokens)::value;
        return launch(soft_merge_grad_metric_kernel<T, EXACT, kTokens>,
                      soft_grid(a, kTokens ? a.N : a.K, MetricSum::OWN, parts), kSoftThreads, MetricSum::BYTES, stream,
                      a, f, parts, sizes);
    };
    cudaError_t error = cudaSuccess;
    if (a.grad_x != nullptr || a.grad_positions_in != nullptr) {
        error = launch(soft_merge_grad_x_kernel<T, EXACT>, soft_grid(a, a.N, Sum::OWN, slices), kSoftThreads,
                       Sum::BYTES, stream, a, f, slices);
    }
    if (error == cudaSuccess && a.shift != nullptr) {
        const Grid grid{ceil_div64(int64_t(a.B) * a.K, kSoftThreads / kWarpSize)};
        error = launch(soft_merge_shift_kernel<T>, grid, kSoftThreads, 0, stream, a);
    }
    if (error == cudaSuccess && a.grad_size_in != nullptr) error = grad_metric(std::true_type(), 1, true);
    if (error == cudaSuccess && a.grad_q != nullptr) error = grad_metric(std::true_type(), parts, false);
    if (error == cudaSuccess && a.grad_meta != nullptr) error = grad_metric(std::false_type(), parts, false);
    return error;
}

}  // namespace sttm
