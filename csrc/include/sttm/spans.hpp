// How sums over many rows are split into spans, which are blocks of their own and whose sums are added in their order.
// It depends on the extents of one item alone, so that an item has the same bits in any batch.
#pragma once

#include "arguments.hpp"

#if defined(STTM_CPU)
#define STTM_ANYWHERE
#else
#define STTM_ANYWHERE __host__ __device__
#endif

namespace sttm {

constexpr int kSpanOwners = 64;     // rows that are summed for by one block
constexpr int kSpanStep = 128;      // a span is a multiple of it, but the last
constexpr int kMostSpanTiles = 16;  // of kSpanOwners rows, of all spans of an item: bounds the scratch

// Other rows whose weights stay in the shared memory of a block: 32 KiB.
STTM_ANYWHERE constexpr int span_panel(DType dtype) { return dtype == DType::bfloat16 ? 256 : 128; }

// `count` spans of `rows` other rows each.
struct Spans {
    int rows, count;
};

// For `own` rows by `other` rows. One span where the weights of all other rows stay in shared memory.
STTM_ANYWHERE inline Spans spans_of(DType dtype, int own, int other) {
    if (other <= span_panel(dtype)) return {span_panel(dtype), 1};
    const int steps = (other - 1) / kSpanStep + 1, tiles = own / kSpanOwners + (own % kSpanOwners != 0);
    const int most = tiles > kMostSpanTiles || tiles == 0 ? 1 : kMostSpanTiles / tiles;
    const int each = (steps - 1) / most + 1;
    return {each * kSpanStep, (steps - 1) / each + 1};
}

// Sums of `rows` rows, span after span: `columns` of features, rounded up to whole vectors, then some more.
struct Partial {
    float* data;
    int64_t rows;
    int spans;
    int64_t more_at, pitch;
};

inline Partial partial_of(float* data, int64_t rows, int spans, int columns, int more) {
    const int64_t more_at = (int64_t(columns) + 7) / 8 * 8;
    return {data, rows, spans, more_at, more_at + (more + 3) / 4 * 4};
}

// How many tiles of kSequenceTile tokens B sequences of N together have, or more.
inline int64_t most_tiles(int B, int N) { return int64_t(N) / kSequenceTile + B; }

// Where the sums go of B items of `own` rows by `other` rows; if `packed`, of sequences, the spans of which are where
// their tiles are: these are as many or more.
inline Partial partial_of(float* data, bool packed, DType dtype, int B, int own, int other, int columns, int more) {
    if (packed) return partial_of(data, own, static_cast<int>(most_tiles(B, other)), columns, more);
    return partial_of(data, int64_t(B) * own, spans_of(dtype, own, other).count, columns, more);
}

// Floats of scratch that this takes; 0 where there is one panel and no scratch.
inline int64_t partial_floats(bool packed, DType dtype, int B, int own, int other, int columns, int more) {
#if defined(STTM_CPU)
    return 0;
#else
    if (other <= span_panel(dtype)) return 0;
    const Partial p = partial_of(nullptr, packed, dtype, B, own, other, columns, more);
    return p.rows * p.spans * p.pitch;
#endif
}

}  // namespace sttm
