// soft_merge: every token is merged into every meta token by its softmax weight; the weights exist a tile at a time.
//
// C is split over blocks, and the tile of weights is worked out again for every slice of it; the slices of one tile run
// side by side and share its rows in the L2 cache. Sizes and positions ride along.
#pragma once

#include "soft_weights.cuh"

namespace sttm {

// One block per tile of meta tokens and slice of C; lse was found before.
template <typename T, bool EXACT>
__global__ void __launch_bounds__(kSoftThreads, 2)
    soft_merge_kernel(const SoftMergeArguments a, const SoftFeatures f, int slices) {
    using Sum = WeightedSum<T, EXACT, kSlice<T>>;
    const int num_tiles = ceil_div(a.K, Sum::OWN), slice = blockIdx.x % slices, part = slice * Sum::SLICE;
    const int first = blockIdx.x / slices % num_tiles * Sum::OWN;
    const int64_t item = blockIdx.x / (int64_t(slices) * num_tiles);
    const StridedRows<T> metas = rows_of<T>(a.meta, Mask{}, item, a.K);
    const StridedRows<T> tokens = rows_of<T>(a.q, a.mask, item, a.N);
    const StridedRows<T> values = rows_of<T>(metric_of(a.x), a.mask, item, a.N);

    STTM_SHARED(SoftTerm, own_terms, [Sum::OWN]);
    STTM_SHARED(SoftTerm, terms, [Sum::OTHER]);
    const int thread = static_cast<int>(threadIdx.x);
    STTM_SHARED(float, moment_sums, [2 * Moments::own * kAxes]);
    Sum sum(shared_memory<unsigned char>());
    auto& tiles = sum.tiles;
    Moments moments(moment_sums, a.positions, a.P, slice);
    if (thread < Sum::OWN) own_terms[thread] = soft_meta(a, a.lse, item, first + thread);
    float mass[2] = {0, 0}, rounded[2] = {0, 0};
    for (int start = 0; start < a.N; start += Sum::OTHER) {
        float W[1][4][4];
        clear(W);
        tiles.multiply(W, metas, f.meta, first, tokens, f.q, start, a.similarity, start + Sum::OTHER < a.N, [&] {
            sum.load_values(values, f.x, start, part);
            if (thread < Sum::OTHER) terms[thread] = soft_token(a, a.lse, nullptr, item, start + thread);
        });
        STTM_UNROLL
        for (int j = 0; j < 4; ++j) {
            STTM_UNROLL
            for (int e = 0; e < 4; ++e) {
                const int row = tiles.row(0, e), column = tiles.column(j, e);
                const float S = similarity_of(W[0][j][e], tiles.own_term[row], tiles.other_term[column],
                                              a.inverse_temperature, a.similarity);
                const float A = attention(S, own_terms[row], terms[column]);
                W[0][j][e] = terms[column].real ? A * terms[column].scale : 0.0f;
                mass[e / 2] += W[0][j][e];
                rounded[e / 2] += sum.weigh(row, column, W[0][j][e]);
            }
        }
        moments.add(tiles, W, a.positions, item, start, terms);
        sum.add(a.N - start, a.C - part);
    }

    const int rows = min(Sum::OWN, a.K - first);
    const int64_t out = item * a.K + first;
    sum.reduce(mass);
    if (slice == 0 && thread < rows) a.size_out[out + thread] = sum.sum_of(thread);
    moments.finish(rows, [&](int row, int axis, float value) {
        const float mass = sum.sum_of(row);
        a.positions_out[(out + row) * a.P + axis] = mass == 0 ? 0.0f : value / mass;
    });
    sum.reduce(rounded);  // the weights that made `out`, so that it is a mean
    sum.finish(rows, a.C - part, [&](int row, int column, float (&value)[Vec<T>::size]) {
        const float mass = sum.sum_of(row);
        STTM_UNROLL
        for (int e = 0; e < Vec<T>::size; ++e) value[e] = mass == 0 ? 0.0f : value[e] / mass;
        const int c = part + column;
        store_features(static_cast<T*>(a.y) + (out + row) * a.C + c, value, a.C - c, 1.0f);
    });
}

template <typename T, bool EXACT>
cudaError_t launch_soft_merge(const SoftMergeArguments& a, cudaStream_t stream) {
    using Sum = WeightedSum<T, EXACT, kSlice<T>>;
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
    const cudaError_t error = assign(lse, stream);
    if (error != cudaSuccess) return error;
    const int slices = max(ceil_div(a.C, Sum::SLICE), ceil_div(a.P, kAxes));
    return launch(soft_merge_kernel<T, EXACT>, soft_grid(a, a.K, Sum::OWN, slices), kSoftThreads, Sum::BYTES, stream, a,
                  soft_features<T>(a, Rows{}), slices);
}

}  // namespace sttm
