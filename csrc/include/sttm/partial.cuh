// Sums of a block over its span of rows, and what becomes of those of all spans.
#pragma once

#include "sequences.cuh"

namespace sttm {

// Of the panel of a block whose span has `spans.rows` of `count` other rows.
inline int span_width(DType dtype, const Spans& spans, int count) {
    return min(min(spans.rows, span_panel(dtype)), ceil_div(count, 16) * 16);
}

// The sums of a row over a span: features, and what there is beside them.
__device__ __forceinline__ float* partial_row(const Partial& p, int span, int64_t row) {
    return p.data + (span * p.rows + row) * p.pitch;
}

// A tile of the groups of an item, and a span of its tokens.
struct SpanTile {
    Item item;
    int first, begin, end;  // group; tokens, from -1 on if there are none
    int span, set;          // of the partial sums

    __device__ __forceinline__ bool there() const { return begin >= 0; }
    // Of the partial sums, that of the first group.
    __device__ __forceinline__ int64_t row(int K) const { return int64_t(set) * K + first; }
};

template <int ROWS, class Arguments>
__device__ __forceinline__ SpanTile span_tile(const Arguments& a, const Partial& p, int span_rows, int block) {
    const int tiles = ceil_div(a.K, ROWS);
    if (a.sequences == nullptr) {
        const int span = block % p.spans, first = block / p.spans % tiles * ROWS, begin = span * span_rows;
        const Item item = batch_item(static_cast<int>(block / (int64_t(p.spans) * tiles)), a.N);
        return {item, first, begin, min(a.N - begin, span_rows) + begin, span, item.set};
    }
    const int tile = block / tiles, first = block % tiles * ROWS, entry = sequence_of_tile(a.sequences, a.B, tile);
    const Item item = sequence_item(a.sequences, entry, a.B, a.N, a.K);
    const Spans spans = spans_of(a.dtype, a.K, item.N);
    const int span = tile - min(max(a.sequences[entry].first_tile, 0), tile);
    if (span >= spans.count || item.N == 0) return {item, first, -1, -1, tile, 0};
    return {item, first, span * spans.rows, min(item.N - span * spans.rows, spans.rows) + span * spans.rows, tile, 0};
}

// The tile of a block that owns tokens, with all other rows, or that owns groups.
template <bool TOKENS, int ROWS, class Arguments>
__device__ __forceinline__ auto tile_of(const Arguments& a, const Partial& p, int span_rows, int block) {
    if constexpr (TOKENS) {
        return token_tile<ROWS>(a, block);
    } else {
        return span_tile<ROWS>(a, p, span_rows, block);
    }
}

// What is launched for sums over spans of the tokens of all items, for tiles of kSpanOwners groups.
struct SpanLaunch {
    Partial partial;
    int rows, width;  // of a span, and of the panel of a block
    int64_t blocks;
    bool joins;  // whether a second launch makes the results, at least of some items
};

template <class Arguments>
SpanLaunch span_launch(const Arguments& a, int columns, int more) {
    const bool packed = a.sequences != nullptr;
    const Spans spans = spans_of(a.dtype, a.K, a.N);
    const Partial partial = partial_of(a.scratch, packed, a.dtype, a.B, a.K, a.N, columns, more);
    const int width = packed ? span_panel(a.dtype) : span_width(a.dtype, spans, a.N);
    const int64_t blocks = times(times(packed ? 1 : a.B, ceil_div(a.K, kSpanOwners)), partial.spans);
    return {partial, spans.rows, width, blocks, packed || a.N > width};
}

// The spans that a row of results is the sum of: numbers [first, end) of row `row` of the partial sums. `out` is -1 if
// a block has made the result.
struct Summed {
    int64_t out, row;
    int first, end;
};

template <class Arguments>
__device__ __forceinline__ Summed summed(const Arguments& a, const Partial& p, int64_t row) {
    if (a.sequences == nullptr) return {row, row, 0, p.spans};
    const int entry = static_cast<int>(row / a.K), k = static_cast<int>(row % a.K);
    const Item item = sequence_item(a.sequences, entry, a.B, a.N, a.K);
    const int64_t out = int64_t(item.set) * a.K + k;
    if (item.N == 0) return {out, k, 0, 0};
    if (item.N <= span_panel(a.dtype)) return {-1, k, 0, 0};
    const int first = min(max(a.sequences[entry].first_tile, 0), p.spans);
    return {out, k, first, min(first + spans_of(a.dtype, a.K, item.N).count, p.spans)};
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

// The sum over its spans of what lies at `at` of the partial sums of a row.
__device__ __forceinline__ float sum_of_spans(const Partial& p, const Summed& of, int64_t at) {
    float sum = 0;
    for (int span = of.first; span < of.end; ++span) sum += partial_row(p, span, of.row)[at];
    return sum;
}

constexpr int kJoinWarps = 4;

// Calls store(of, column, values, of_row), `of` from store.summed(row), for every row that is not there yet and 16
// bytes' worth of its `columns` features, a warp for each row and slice of them; all lanes of it call
// store.begin(of, slice) before, which returns `of_row`.
template <typename T, typename Store>
__global__ void __launch_bounds__(kJoinWarps* kWarpSize, 4)
    join_spans_kernel(const Partial p, int64_t rows, int columns, int slices, Store store) {
    constexpr int kSize = Vec<T>::size;
    const int64_t task = int64_t(blockIdx.x) * kJoinWarps + warp_index(), row = task / slices;
    if (row >= rows) return;
    const Summed of = store.summed(row);
    if (of.out < 0) return;
    const int slice = static_cast<int>(task % slices), column = (slice * kWarpSize + lane_index()) * kSize;
    const float of_row = store.begin(of, slice);
    if (column >= columns) return;
    float value[kSize] = {};
    for (int span = of.first; span < of.end; ++span) {
        const float* from = partial_row(p, span, of.row) + column;
        STTM_UNROLL
        for (int e = 0; e < kSize; e += 4) {
            const Vec<float> v = Vec<float>::load(from + e);
            STTM_UNROLL
            for (int i = 0; i < 4; ++i) value[e + i] += v.value[i];
        }
    }
    store(of, column, value, of_row);
}

template <typename T, typename Store>
cudaError_t join_spans(const Partial& p, int64_t rows, int columns, const Store& store, cudaStream_t stream) {
    const int slices = ceil_div(columns, Vec<T>::size * kWarpSize);
    return launch(join_spans_kernel<T, Store>, Grid{ceil_div64(times(rows, slices), kJoinWarps)},
                  kJoinWarps * kWarpSize, 0, stream, p, rows, columns, slices, store);
}

}  // namespace sttm
