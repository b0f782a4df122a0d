// Gradients of soft_merge, which works its weights out again. Every row of a gradient has one owner.
#pragma once

#include "partial.cuh"
#include "soft_weights.cuh"

namespace sttm {

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

// dL/dx_n = sum_k W[n, k] g_k / mass_k, and dL/dp_n alike: one block per tile of tokens and share of the slices of C.
template <typename T, bool EXACT, int ROWS>
__global__ void __launch_bounds__(kSoftThreads, 2)
    soft_merge_grad_x_kernel(const SoftMergeBackwardArguments a, const SoftFeatures f, int width, int parts) {
    using Panel = WeightPanel<T, EXACT, ROWS>;
    const int num_tiles = ceil_div(a.N, Panel::OWN), mine = blockIdx.x % parts;
    const int first = blockIdx.x / parts % num_tiles * Panel::OWN;
    const int64_t item = blockIdx.x / (int64_t(parts) * num_tiles);
    const StridedRows<T> metas = rows_of<T>(a.meta, Mask{}, item, a.K);
    const StridedRows<T> tokens = rows_of<T>(a.q, a.mask, item, a.N);
    const StridedRows<T> values = rows_of<T>(metric_of(a.grad_y), Mask{}, item, a.grad_y.data == nullptr ? 0 : a.K);

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
                if (thread < Panel::OTHER) terms[thread] = soft_meta(a, item, start + thread);
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
            if (part < parts * Panel::SLICE) moments.add(W, a.grad_positions, item, start, count, terms, start > 0);
        }
    };
    Features features = f.grad_y;
    if (a.grad_x == nullptr) features.D = 0;
    panel.for_each_slice(values, features, a.K, mine, parts, make_weights, [&](int part, bool) {
        panel.finish(a.N - first, features.D - part, [&](int row, int column, float (&value)[Vec<T>::size]) {
            const int c = part + column;
            if (!own_terms[row].real) {
                STTM_UNROLL
                for (int e = 0; e < Vec<T>::size; ++e) value[e] = 0;
            }
            store_features(static_cast<T*>(a.grad_x) + (item * a.N + first + row) * a.C + c, value, a.C - c, 1.0f);
        });
    });
    if (a.grad_positions_in == nullptr) return;
    const bool none = a.grad_positions.data == nullptr || a.K == 0;
    if (none) moments.count = min(kAxes, a.P - moments.first);
    moments.finish(min(Panel::OWN, a.N - first), [&](int row, int axis, float value) {
        a.grad_positions_in[(item * a.N + first + row) * a.P + axis] = none || !own_terms[row].real ? 0.0f : value;
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
    const int num_own = TOKENS ? a.N : a.K, num_other = TOKENS ? a.K : a.N;
    const int num_tiles = ceil_div(num_own, Panel::OWN), spans = TOKENS ? 1 : partial.spans;
    const int span = blockIdx.x / parts % spans, first = blockIdx.x / parts / spans % num_tiles * Panel::OWN;
    const int64_t item = blockIdx.x / (int64_t(parts) * spans * num_tiles);
    const int begin = span * span_rows, end = TOKENS ? num_other : min(num_other - begin, span_rows) + begin;
    const StridedRows<T> metas = rows_of<T>(a.meta, Mask{}, item, a.K);
    const StridedRows<T> tokens = rows_of<T>(a.q, a.mask, item, a.N);
    const StridedRows<T> g = rows_of<T>(metric_of(a.grad_y), Mask{}, item, a.K);
    const StridedRows<T> x = rows_of<T>(metric_of(a.x), a.mask, item, a.N);
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
        return token ? soft_token(a, a.lse, work.sizes ? nullptr : a.grad_size_in, item, row) : soft_meta(a, item, row);
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
                STTM_NO_UNROLL
                for (int axis = 0; axis < a.P; ++axis) {
                    const int from = anew(start);
                    float mine[2][2];
                    Panel::of_own_rows([&](int i, int r, int row) {
                        mine[i][r] = own_terms[row].real ? axis_of(own_positions, item, first + row, axis) : 0.0f;
                    });
                    Panel::each(count, neighbours(terms, other_positions, item, from, axis),
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
    if constexpr (TOKENS) {
        if (!work.metric) other_features.D = 0;
        panel.for_each_slice(
            other, other_features, a.K, blockIdx.x % parts, parts, make_weights, [&](int part, bool fresh) {
                if (!work.metric) return;
                if (fresh) Panel::reduce(panel.sums);
                panel.store_gradient(grad, item, own, num_own, own_features, first, part, a.similarity);
            });
        if (!work.sizes || blockIdx.x % anew(parts) != 0) return;
        __syncthreads();
        if (thread < Panel::OWN && first + thread < a.N) {
            const float sum = a.K == 0 || !own_terms[thread].real ? 0.0f : Panel::sum_of(size_sums, thread);
            a.grad_size_in[item * a.N + first + thread] = sum;
        }
    } else {
        panel.store_span(grad, item, own, num_own, own_features, first, a.similarity, other, other_features, num_other,
                         Span{partial, span, begin, end, static_cast<int>(blockIdx.x % parts), parts}, make_weights);
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
        const int64_t tiles = times(a.B, ceil_div(a.N, Panel::OWN));
        const int parts = work.metric ? soft_shares(tiles, ceil_div(a.D, Panel::SLICE), 0) : 1;
        return launch(kernel_of(rows), Grid{times(tiles, parts)}, kSoftThreads, Panel::bytes(width, width >= a.K),
                      stream, a, f, Partial{}, width, 0, parts, work);
    });
}

template <typename T, bool EXACT>
cudaError_t launch_soft_merge_grad_meta(const SoftMergeBackwardArguments& a, const SoftFeatures& f,
                                        cudaStream_t stream) {
    using Panel = WeightPanel<T, EXACT, kSpanOwners>;
    const Spans spans = spans_of(a.dtype, a.K, a.N);
    const Partial partial = partial_of(a.scratch, int64_t(a.B) * a.K, spans.count, a.D, 1);
    const int64_t blocks = times(times(a.B, ceil_div(a.K, Panel::OWN)), spans.count);
    const int parts = soft_shares(blocks, ceil_div(a.D, Panel::SLICE), 0), width = span_width(a.dtype, spans, a.N);
    const cudaError_t error =
        launch(soft_merge_grad_metric_kernel<T, EXACT, false, kSpanOwners>, Grid{times(blocks, parts)}, kSoftThreads,
               Panel::bytes(width, true), stream, a, f, partial, width, spans.rows, parts, SoftMetricWork{false, true});
    if (error != cudaSuccess || a.N <= width) return error;
    return join_spans<T>(partial, a.D, StoreMetaGradient<T, SoftMergeBackwardArguments>{a, f.meta, partial}, stream);
}

template <typename T, bool EXACT>
cudaError_t launch_soft_merge_backward(const SoftMergeBackwardArguments& a, cudaStream_t stream) {
    const SoftFeatures f = soft_features<T>(a, a.grad_y);
    cudaError_t error = cudaSuccess;
    if (a.grad_x != nullptr || a.grad_positions_in != nullptr) {
        const auto kernel_of = [](auto rows) { return soft_merge_grad_x_kernel<T, EXACT, decltype(rows)::value>; };
        error = with_panel<T, EXACT>(a.K, kernel_of, [&](auto rows, int width) {
            using Panel = WeightPanel<T, EXACT, decltype(rows)::value>;
            const int64_t tiles = times(a.B, ceil_div(a.N, Panel::OWN));
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
