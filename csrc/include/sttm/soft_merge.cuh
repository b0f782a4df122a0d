// soft_merge: every token is merged into every meta token by its softmax weight; the weights exist a panel at a time,
// which all slices of C use. Sizes and positions ride along.
//
// Tokens are split into spans. Where there are several, or several panels of one, sums go through scratch, and a second
// kernel adds up those of all spans.
#pragma once

#include "partial.cuh"
#include "soft_weights.cuh"

namespace sttm {

// Beside the features of a row of partial sums: its mass, the sum of the weights as the product took them, moments.
constexpr int kMassAt = 0, kRoundedAt = 1, kMomentsAt = 2;

// One block per tile of meta tokens, span of tokens and share of the slices of C; lse was found before.
template <typename T, bool EXACT>
__global__ void __launch_bounds__(kSoftThreads, 2)
    soft_merge_kernel(const SoftMergeArguments a, const SoftFeatures f, const Partial partial, int width, int span_rows,
                      int parts) {
    using Panel = WeightPanel<T, EXACT, kSpanOwners>;
    const int num_tiles = ceil_div(a.K, Panel::OWN);
    // Worked out again at the end, rather than kept in registers until then.
    const auto item_of = [&](int block) { return block / (int64_t(parts) * partial.spans * num_tiles); };
    const auto first_of = [&](int block) { return block / parts / partial.spans % num_tiles * Panel::OWN; };
    const int span = blockIdx.x / parts % partial.spans, first = first_of(blockIdx.x);
    const int64_t item = item_of(blockIdx.x);
    const int begin = span * span_rows, end = min(a.N - begin, span_rows) + begin;
    const auto whole = [&] { return a.N <= width; };
    const StridedRows<T> metas = rows_of<T>(a.meta, Mask{}, item, a.K);
    const StridedRows<T> tokens = rows_of<T>(a.q, a.mask, item, a.N);
    const StridedRows<T> values = rows_of<T>(metric_of(a.x), a.mask, item, a.N);

    STTM_SHARED(SoftTerm, own_terms, [Panel::OWN]);
    STTM_SHARED(SoftTerm, terms, [Panel::OTHER]);
    STTM_SHARED(float, mass_sums, [Panel::COLUMN_WARPS * Panel::OWN]);
    STTM_SHARED(float, moment_sums, [Moments<Panel>::FLOATS]);
    const int thread = static_cast<int>(threadIdx.x);
    Panel panel(shared_memory<unsigned char>(), width, true);
    const auto moments = [&] { return Moments<Panel>(moment_sums, a.positions, a.P, blockIdx.x % anew(parts)); };
    if (thread < Panel::OWN) own_terms[thread] = soft_meta(a, a.lse, item, first + thread);
    const auto make_weights = [&](int from, int until, int) {
        int start = from;
        do {
            float W[2][Panel::NT][4], mass[2][2] = {}, rounded[2][2] = {};
            const int count = min(Panel::OTHER, until - start);
            panel.multiply(W, metas, f.meta, first, tokens, f.q, start, count, a.similarity, [&] {
                if (thread < Panel::OTHER) terms[thread] = soft_token(a, a.lse, nullptr, item, start + thread);
            });
            panel.to_similarities(W, count, a.similarity, a.inverse_temperature);
            float level[2][2];
            Panel::of_own_rows([&](int i, int r, int row) { level[i][r] = own_terms[row].level; });
            const auto others = [&](int column) { return SoftTerms{{terms[column], terms[column + 1]}}; };
            Panel::each(count, others, [&](int i, int j, int r, int row, int column, const SoftTerms& other) {
                STTM_UNROLL
                for (int e = 0; e < 2; ++e) {
                    const SoftTerm& term = other.of[e];
                    float& weight = W[i][j][2 * r + e];
                    weight = attention(weight, level[i][r], term) * term.scale;
                    mass[i][r] += weight;
                }
                const Pair taken = panel.weigh(row, start - from + column, Pair{W[i][j][2 * r], W[i][j][2 * r + 1]});
                rounded[i][r] += taken.value[0] + taken.value[1];
            });
            Panel::add_up(mass_sums, mass, start > begin);
            Panel::add_up(panel.sums, rounded, start > begin);
            moments().add(W, a.positions, item, start, count, terms, start > begin);
            start += Panel::OTHER;
        } while (start < until);
        if (whole()) Panel::reduce(panel.sums);
    };
    panel.for_each_panel(values, f.x, begin, end, blockIdx.x % parts, parts, make_weights, [&](int part, bool before) {
        panel.finish(a.K - first, a.C - part, [&](int row, int column, float (&value)[Vec<T>::size]) {
            const int c = part + column;
            if (whole()) {
                mean_of(value, panel.sums[row]);
                store_features(static_cast<T*>(a.y) + (item * a.K + first + row) * a.C + c, value, a.C - c, 1.0f);
            } else {
                accumulate(partial_row(partial, span, item * a.K + first + row) + c, value, before);
            }
        });
    });

    __syncthreads();
    const int block = anew(blockIdx.x), mine = block % parts, rows = min(Panel::OWN, a.K - first_of(block));
    const int64_t out = item_of(block) * a.K + first_of(block);
    if (whole()) {
        if (mine == 0 && thread < rows) a.size_out[out + thread] = Panel::sum_of(mass_sums, thread);
        moments().finish(rows, [&](int row, int axis, float value) {
            const float mass = Panel::sum_of(mass_sums, row);
            a.positions_out[(out + row) * a.P + axis] = mass == 0 ? 0.0f : value / mass;
        });
        return;
    }
    const auto more_of = [&](int row) { return partial_row(partial, span, out + row) + partial.more_at; };
    if (mine == 0 && thread < rows) {
        more_of(thread)[kMassAt] = Panel::sum_of(mass_sums, thread);
        more_of(thread)[kRoundedAt] = Panel::sum_of(panel.sums, thread);
    }
    moments().finish(rows, [&](int row, int axis, float value) { more_of(row)[kMomentsAt + axis] = value; });
}

// A row of the results, of the sums of all spans.
template <typename T>
struct StoreSoftMerge {
    SoftMergeArguments a;
    Partial p;

    __device__ __forceinline__ float sum_of(int64_t row, int at) const { return sum_of_spans(p, row, p.more_at + at); }

    // Returns the sum of the weights that made `out`, so that it becomes a mean.
    __device__ __forceinline__ float begin(int64_t row, int slice) const {
        if (slice == 0) {
            const float mass = sum_of(row, kMassAt);
            if (lane_index() == 0) a.size_out[row] = mass;
            for (int axis = lane_index(); axis < a.P; axis += kWarpSize) {
                a.positions_out[row * a.P + axis] = mass == 0 ? 0.0f : sum_of(row, kMomentsAt + axis) / mass;
            }
        }
        return sum_of(row, kRoundedAt);
    }
    __device__ __forceinline__ void operator()(int64_t row, int column, float (&value)[Vec<T>::size],
                                               float rounded) const {
        mean_of(value, rounded);
        store_features(static_cast<T*>(a.y) + row * a.C + column, value, a.C - column, 1.0f);
    }
};

template <typename T, bool EXACT>
cudaError_t launch_soft_merge(const SoftMergeArguments& a, cudaStream_t stream) {
    AssignArguments lse{};
    lse.dtype = a.dtype;
    lse.tf32 = a.tf32;
    lse.similarity = a.similarity;
    lse.inverse_temperature = a.inverse_temperature;
    lse.B = a.B, lse.D = a.D;
    lse.N = a.over_meta ? a.N : a.K;
    lse.K = a.over_meta ? a.K : a.N;
    lse.q = a.over_meta ? a.q : a.meta;
    lse.meta = a.over_meta ? a.meta : a.q;
    (a.over_meta ? lse.mask : lse.meta_mask) = a.mask;
    lse.lse = a.lse;
    cudaError_t error = assign(lse, stream);
    if (error != cudaSuccess) return error;
    using Panel = WeightPanel<T, EXACT, kSpanOwners>;
    const Spans spans = spans_of(a.dtype, a.K, a.N);
    const Partial partial = partial_of(a.scratch, int64_t(a.B) * a.K, spans.count, a.C, kMomentsAt + a.P);
    const int64_t blocks = times(times(a.B, ceil_div(a.K, Panel::OWN)), spans.count);
    const int parts = soft_shares(blocks, ceil_div(a.C, Panel::SLICE), a.P), width = span_width(a.dtype, spans, a.N);
    error = launch(soft_merge_kernel<T, EXACT>, Grid{times(blocks, parts)}, kSoftThreads, Panel::bytes(width, true),
                   stream, a, soft_features<T>(a, Rows{}), partial, width, spans.rows, parts);
    if (error != cudaSuccess || a.N <= width) return error;
    return join_spans<T>(partial, a.C, StoreSoftMerge<T>{a, partial}, stream);
}

}  // namespace sttm
