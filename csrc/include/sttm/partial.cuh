// Sums of a block over its span of rows, and what becomes of those of all spans.
#pragma once

#include "platform.cuh"
#include "spans.hpp"

namespace sttm {

// Of the panel of a block whose span has `spans.rows` of `count` other rows.
inline int span_width(DType dtype, const Spans& spans, int count) {
    return min(min(spans.rows, span_panel(dtype)), ceil_div(count, 16) * 16);
}

// The sums of a row over a span: features, and what there is beside them.
__device__ __forceinline__ float* partial_row(const Partial& p, int span, int64_t row) {
    return p.data + (span * p.rows + row) * p.pitch;
}

// Sets the floats at `to`, 16 bytes at a time, or adds to them if there were some `before`.
template <int COUNT>
__device__ __forceinline__ void accumulate(float* to, const float (&value)[COUNT], bool before) {
    STTM_UNROLL
    for (int e = 0; e < COUNT; e += 4) {
        Vec<float> v = before ? Vec<float>::load(to + e) : Vec<float>::filled(0);
        STTM_UNROLL
        for (int i = 0; i < 4; ++i) v.value[i] += value[e + i];
        v.store(to + e);
    }
}

// The sum over all spans of what lies at `at` of the partial sums of a row.
__device__ __forceinline__ float sum_of_spans(const Partial& p, int64_t row, int64_t at) {
    float sum = 0;
    for (int span = 0; span < p.spans; ++span) sum += partial_row(p, span, row)[at];
    return sum;
}

constexpr int kJoinWarps = 4;

// Calls store(row, column, values, of_row) for every row and 16 bytes' worth of its `columns` features, a warp for each
// row and slice of them; all lanes of it call store.begin(row, slice) before, which returns `of_row`.
template <typename T, typename Store>
__global__ void __launch_bounds__(kJoinWarps* kWarpSize, 4)
    join_spans_kernel(const Partial p, int columns, int slices, Store store) {
    constexpr int kSize = Vec<T>::size;
    const int64_t task = int64_t(blockIdx.x) * kJoinWarps + warp_index(), row = task / slices;
    if (row >= p.rows) return;
    const int slice = static_cast<int>(task % slices), column = (slice * kWarpSize + lane_index()) * kSize;
    const float of_row = store.begin(row, slice);
    if (column >= columns) return;
    float value[kSize] = {};
    for (int span = 0; span < p.spans; ++span) {
        const float* from = partial_row(p, span, row) + column;
        STTM_UNROLL
        for (int e = 0; e < kSize; e += 4) {
            const Vec<float> v = Vec<float>::load(from + e);
            STTM_UNROLL
            for (int i = 0; i < 4; ++i) value[e + i] += v.value[i];
        }
    }
    store(row, column, value, of_row);
}

template <typename T, typename Store>
cudaError_t join_spans(const Partial& p, int columns, const Store& store, cudaStream_t stream) {
    const int slices = ceil_div(columns, Vec<T>::size * kWarpSize);
    return launch(join_spans_kernel<T, Store>, Grid{ceil_div64(times(p.rows, slices), kJoinWarps)},
                  kJoinWarps * kWarpSize, 0, stream, p, columns, slices, store);
}

}  // namespace sttm
