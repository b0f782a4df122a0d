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
    // Worked out again at the end, rather than kept in registers until then.
    const auto tile_of = [&](int block) { return span_tile<Panel::OWN>(a, partial, span_rows, block / parts); };
    const SpanTile tile = tile_of(blockIdx.x);
    if (!tile.there()) return;
    const Item& item = tile.item;
    const int first = tile.first, begin = tile.begin;
    const auto whole = [&] { return item.N <= width; };
    const StridedRows<T> metas = rows_of<T>(a.meta, Mask{}, item.set, a.K);
    const StridedRows<T> tokens = token_rows<T>(a.q, a.mask, item);
    const StridedRows<T> values = token_rows<T>(metric_of(a.x), a.mask, item);

    STTM_SHARED(SoftTerm, own_terms, [Panel::OWN]);
    STTM_SHARED(SoftTerm, terms, [Panel::OTHER]);
    STTM_SHARED(float, mass_sums, [Panel::COLUMN_WARPS * Panel::OWN]);
    STTM_SHARED(float, moment_sums, [Moments<Panel>::FLOATS]);
    const int thread = static_cast<int>(threadIdx.x);
    Panel panel(shared_memory<unsigned char>(), width, true);
    const auto moments = [&] { return Moments<Panel>(moment_sums, a.positions, a.P, blockIdx.x % anew(parts)); };
    if (thread < Panel::OWN) own_terms[thread] = soft_meta(a, a.lse, item.set, first + thread);
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
            moments().add(W, a.positions, item.tokens, item.start + start, count, terms, start > begin);
            start += Panel::OTHER;
        } while (start < until);
        if (whole()) Panel::reduce(panel.sums);
    };
    const int end = tile.end;
    panel.for_each_panel(values, f.x, begin, end, blockIdx.x % parts, parts, make_weights, [&](int part, bool before) {
        panel.finish(a.K - first, a.C - part, [&](int row, int column, float (&value)[Vec<T>::size]) {
            const int c = part + column;
            if (whole()) {
                mean_of(value, panel.sums[row]);
                const int64_t out = int64_t(item.set) * a.K + first + row;
                store_features(static_cast<T*>(a.y) + out * a.C + c, value, a.C - c, 1.0f);
            } else {
                accumulate(partial_row(partial, tile.span, tile.row(a.K) + row) + c, value, before);
            }
        });
    });

    __syncthreads();
    const int block = anew(blockIdx.x), mine = block % parts;
    const SpanTile same = tile_of(block);
    const int rows = min(Panel::OWN, a.K - same.first);
    if (same.item.N <= width) {
        const int64_t out = int64_t(same.item.set) * a.K + same.first;
        if (mine == 0 && thread < rows) a.size_out[out + thread] = Panel::sum_of(mass_sums, thread);
        moments().finish(rows, [&](int row, int axis, float value) {
            const float mass = Panel::sum_of(mass_sums, row);
            a.positions_out[(out + row) * a.P + axis] = mass == 0 ? 0.0f : value / mass;
        });
        return;
    }
    const auto more_of = [&](int row) {
        return partial_row(partial, same.span, same.row(a.K) + row) + partial.more_at;
    };
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

    __device__ __forceinline__ Summed summed(int64_t row) const { return sttm::summed(a, p, row); }
    __device__ __forceinline__ float sum_of(const Summed& of, int at) const {
        return sum_of_spans(p, of, p.more_at + at);
    }

    // Returns the sum of the weights that made `out`, so that it becomes a mean.
    __device__ __forceinline__ float begin(const Summed& of, int slice) const {
        if (slice == 0) {
            const float mass = sum_of(of, kMassAt);
            if (lane_index() == 0) a.size_out[of.out] = mass;
            for (int axis = lane_index(); axis < a.P; axis += kWarpSize) {
                a.positions_out[of.out * a.P + axis] = mass == 0 ? 0.0f : sum_of(of, kMomentsAt + axis) / mass;
            }
        }
        return sum_of(of, kRoundedAt);
    }
    __device__ __forceinline__ void operator()(const Summed& of, int column, float (&value)[Vec<T>::size],
                                               float rounded) const {
        mean_of(value, rounded);
        store_features(static_cast<T*>(a.y) + of.out * a.C + column, value, a.C - column, 1.0f);
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
    lse.sequences = a.sequences;
    lse.swapped = a.sequences != nullptr && !a.over_meta;
    lse.N = a.over_meta ? a.N : a.K;
    lse.K = a.over_meta ? a.K : a.N;
    lse.q = a.over_meta ? a.q : a.meta;
    lse.meta = a.over_meta ? a.meta : a.q;
    (a.over_meta ? lse.mask : lse.meta_mask) = a.mask;
    lse.lse = a.lse;
    cudaError_t error = assign(lse, stream);
    if (error != cudaSuccess) return error;
    using Panel = WeightPanel<T, EXACT, kSpanOwners>;
    const SpanLaunch spans = span_launch(a, a.C, kMomentsAt + a.P);
    const int parts = soft_shares(spans.blocks, ceil_div(a.C, Panel::SLICE), a.P);
    error = launch(soft_merge_kernel<T, EXACT>, Grid{times(spans.blocks, parts)}, kSoftThreads,
                   Panel::bytes(spans.width, true), stream, a, soft_features<T>(a, Rows{}), spans.partial, spans.width,
                   spans.rows, parts);
    if (error != cudaSuccess || !spans.joins) return error;
    return join_spans<T>(spans.partial, times(a.B, a.K), a.C, StoreSoftMerge<T>{a, spans.partial}, stream);
}

}  // namespace sttm
