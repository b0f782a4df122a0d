// Tiles of similarities, worked out as they are needed and never stored.
//
// A block owns rows of one side, tokens or meta tokens, and goes through the rows of the other. Features are read in
// place, in chunks of 128 bytes a row, the next chunk while one is multiplied; norms are added up from the chunks that
// feed the product.
#pragma once

#include <cmath>

#include "arguments.hpp"
#include "platform.cuh"
#include "product.cuh"
#include "sequences.cuh"
#include "view.cuh"

namespace sttm {

constexpr float kNormFloor = 1e-6f;

// How the features of a row are read, given where it starts: D of them, the mean over `heads`.
struct Features {
    int D;
    int heads;
    int64_t stride_h, stride_d;
    bool vectors;  // 16 bytes at a time: features adjacent, every row and head at a multiple of 16 bytes
    bool pieces;   // nothing but such vectors of one head, rows so near that some tens of them are 31 bits of bytes
};

template <typename T>
Features features_of(const Metric& metric, int D) {
    constexpr int64_t kSize = Vec<T>::size;
    const bool vectors = metric.stride_d == 1 && is_aligned(metric.data) && metric.stride_b % kSize == 0 &&
                         metric.stride_h % kSize == 0 && metric.stride_n % kSize == 0;
    const bool pieces = vectors && metric.heads == 1 && D % kSize == 0 && metric.stride_n <= INT32_MAX / 256;
    return Features{D, metric.heads, metric.stride_h, metric.stride_d, vectors, pieces};
}

// Rows [0, count) at a stride; nullptr beyond, and where `mask` is 0.
template <typename T>
struct StridedRows {
    const T* data;
    int64_t stride;
    int count;
    const uint8_t* mask;
    int64_t stride_mask;

    __device__ __forceinline__ bool there(int row) const {
        return row < count && (mask == nullptr || mask[row * stride_mask] != 0);
    }
    __device__ __forceinline__ const T* operator()(int row) const {
        const bool real = row < count && (mask == nullptr || mask[row * stride_mask] != 0);
        return real ? data + row * stride : nullptr;
    }
};

template <typename T>
__device__ __forceinline__ StridedRows<T> rows_of(const Metric& metric, const Mask& mask, int64_t item, int count) {
    const bool masked = mask.data != nullptr;
    return {static_cast<const T*>(metric.data) + item * metric.stride_b, metric.stride_n, count,
            masked ? mask.data + item * mask.stride_b : nullptr, mask.stride_n};
}

// The tokens of an item.
template <typename T>
__device__ __forceinline__ StridedRows<T> token_rows(const Metric& metric, const Mask& mask, const Item& item) {
    StridedRows<T> rows = rows_of<T>(metric, mask, item.tokens, item.N);
    rows.data += item.start * rows.stride;
    if (rows.mask != nullptr) rows.mask += item.start * rows.stride_mask;
    return rows;
}

// Feature d of a row, rounded to T as a mean over heads taken beforehand would be.
template <typename T>
__device__ __forceinline__ T feature(const T* row, const Features& f, int d) {
    row += d * f.stride_d;
    if (f.heads == 1) return *row;
    float total = 0;
    STTM_NO_UNROLL
    for (int h = 0; h < f.heads; ++h, row += f.stride_h) total += to_float(*row);
    return from_float<T>(total * (1.0f / f.heads));
}

// The same for the 16 bytes from d on; features from D on are 0.
template <typename T>
__device__ __forceinline__ Vec<T> features(const T* row, const Features& f, int d) {
    constexpr int kSize = Vec<T>::size;
    const bool whole = f.vectors && d + kSize <= f.D;
    float total[kSize] = {};
    row += d * f.stride_d;
    if (whole && f.heads == 1) return Vec<T>::load(row);
    Vec<T> v;
    STTM_NO_UNROLL
    for (int h = 0; h < f.heads; ++h, row += f.stride_h) {
        if (whole) {
            v = Vec<T>::load(row);
            STTM_UNROLL
            for (int e = 0; e < kSize; ++e) total[e] += to_float(v.value[e]);
        } else {
            STTM_UNROLL
            for (int e = 0; e < kSize; ++e) total[e] += d + e < f.D ? to_float(row[e * f.stride_d]) : 0.0f;
        }
    }
    const float share = 1.0f / f.heads;
    STTM_UNROLL
    for (int e = 0; e < kSize; ++e) v.value[e] = from_float<T>(total[e] * share);
    return v;
}

// The first `left` of `values` * `share`; at most as many as fit 16 bytes.
template <typename T>
__device__ __forceinline__ void store_features(T* at, const float (&values)[Vec<T>::size], int left, float share) {
    Vec<T> v;
    STTM_UNROLL
    for (int e = 0; e < Vec<T>::size; ++e) v.value[e] = from_float<T>(values[e] * share);
    if (left >= Vec<T>::size && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
        v.store(at);
    } else {
        STTM_UNROLL
        for (int e = 0; e < Vec<T>::size; ++e) {
            if (e < left) at[e] = v.value[e];
        }
    }
}

// Features [start, start + COLUMNS) of `count` rows from `first` on, ROWS at most, into a tile; 0 for rows that are not
// there and for features from D to the next multiple of 16, beyond which nothing is written. UNROLL copies are written
// out, where registers allow it.
template <int THREADS, int ROWS, int COLUMNS, int UNROLL = 8, typename T, typename Rows>
__device__ __forceinline__ void load_tile(T* tile, int pitch, const Rows& rows, int first, const Features& f,
                                          int start, int count = ROWS) {
    constexpr int kSize = Vec<T>::size, kPieces = COLUMNS / kSize, kStep = THREADS / kPieces;
    static_assert(THREADS % kPieces == 0, "a thread has the same features of every row that it copies");
    const int thread = anew(threadIdx.x), column = thread % kPieces * kSize, d = start + column;
    if (d >= (f.D + 15) / 16 * 16) return;
    int row = thread / kPieces;
    T* to = tile + row * pitch + column;
    if (f.vectors && f.heads == 1) {
        const int bytes = min(max(f.D - d, 0), kSize) * static_cast<int>(sizeof(T));
#pragma unroll UNROLL
        for (int i = 0; i < ceil_div(ROWS, kStep); ++i) {
            if (row + i * kStep >= count) break;
            const T* from = rows(first + row + i * kStep);
            copy_async(to + i * kStep * pitch, from == nullptr ? rows.data : from + d, from == nullptr ? 0 : bytes);
        }
        return;
    }
    STTM_NO_UNROLL
    for (; row < count; row += kStep, to += kStep * pitch) {
        const T* from = rows(first + row);
        if (from == nullptr || d >= f.D) {
            Vec<T>::filled(from_float<T>(0)).store(to);
        } else if (f.vectors && d + kSize <= f.D) {
            features(from, f, d).store(to);
        } else {
            STTM_NO_UNROLL
            for (int e = 0; e < kSize; ++e) to[e] = d + e < f.D ? feature(from, f, d + e) : from_float<T>(0);
        }
    }
}

// Sum of the squares of `depth` elements of a row of a tile, a multiple of 16.
template <typename T>
__device__ __forceinline__ float squares(const T* row, int depth) {
    float total[4] = {};
    STTM_NO_UNROLL
    for (int d = 0; d < depth; d += Vec<T>::size) {
        const Vec<T> v = Vec<T>::load(row + d);
        STTM_UNROLL
        for (int e = 0; e < Vec<T>::size; ++e) total[e % 4] += to_float(v.value[e]) * to_float(v.value[e]);
    }
    return (total[0] + total[1]) + (total[2] + total[3]);
}

// The same of a row where it is, by a warp.
template <typename T>
__device__ __forceinline__ float sum_of_squares(const T* row, const Features& f) {
    float total = 0;
    for (int d = lane_index() * Vec<T>::size; d < f.D; d += kWarpSize * Vec<T>::size) {
        const Vec<T> v = features(row, f, d);
        STTM_UNROLL
        for (int e = 0; e < Vec<T>::size; ++e) total += to_float(v.value[e]) * to_float(v.value[e]);
    }
    return warp_sum(total);
}

__device__ __forceinline__ float inverse_norm(float square) { return 1.0f / fmaxf(sqrtf(square), kNormFloor); }

// Whether a row of that inverse norm is scaled to length 1; one below the floor is only multiplied.
__device__ __forceinline__ bool is_normalised(float inverse) { return inverse < 1.0f / kNormFloor; }

// What a row adds to its similarities: its inverse norm (cosine) or its square (l2).
__device__ __forceinline__ float norm_term(float square, Similarity kind) {
    return kind == Similarity::cosine ? inverse_norm(square) : square;
}

// Sums of the squares of the rows of a tile, chunk by chunk, by eight warps: of 16-bit features on tensor cores, the
// diagonal of the product of 16 rows with themselves.
template <typename T, int ROWS>
struct RowSquares {
#ifdef STTM_HOST
    static constexpr bool DIAGONAL = false;
#else
    static constexpr bool DIAGONAL = sizeof(T) == 2;
#endif
    static constexpr int GROUPS = ROWS / 16, COUNT = DIAGONAL ? ceil_div(GROUPS, 8) : 1;
    float acc[COUNT][2][4] = {};

    // Of rows [first, end), multiples of 16.
    template <int UNROLL>
    __device__ __forceinline__ void add(const T* tile, int pitch, int depth, int first, int end) {
        if constexpr (DIAGONAL) {
#ifndef STTM_HOST
            STTM_UNROLL
            for (int c = 0; c < COUNT; ++c) {
                const int row = (warp_index() + 8 * c) * 16;
                if (row >= first && row < end) add_squares<UNROLL>(acc[c], tile + row * pitch, pitch, depth);
            }
#endif
        } else {
            const int row = static_cast<int>(threadIdx.x);
            if (row >= first && row < end) acc[0][0][0] += squares(tile + row * pitch, depth);
        }
    }

    // terms[row] of the rows that were added.
    __device__ __forceinline__ void store(float* terms, int first, int end, Similarity kind) const {
        if constexpr (DIAGONAL) {
            const int group = lane_index() / 4, odd = group % 2;
            STTM_UNROLL
            for (int c = 0; c < COUNT; ++c) {
                const int row = (warp_index() + 8 * c) * 16;
                if (row < first || row >= end || lane_index() % 4 != group / 2) continue;
                terms[row + group] = norm_term(odd ? acc[c][0][1] : acc[c][0][0], kind);
                terms[row + group + 8] = norm_term(odd ? acc[c][1][3] : acc[c][1][2], kind);
            }
        } else {
            const int row = static_cast<int>(threadIdx.x);
            if (row >= first && row < end) terms[row] = norm_term(acc[0][0][0], kind);
        }
    }
};

// S from <q, m> and the terms of both rows; the same bits whichever side owns the tile.
__device__ __forceinline__ float similarity_of(float dot, float own_term, float other_term, float inverse_temperature,
                                               Similarity kind) {
    if (kind == Similarity::cosine) return dot * inverse_temperature * (own_term * other_term);
    if (kind == Similarity::l2) return ((dot - own_term) + (dot - other_term)) * inverse_temperature;
    return dot * inverse_temperature;
}

// <own row, other row> for OWN rows of one side and OTHER rows of the other, by ROW_WARPS x COLUMN_WARPS warps of
// MT x NT tiles of 16 x 8.
//
//     Tiles tiles(shared_memory<unsigned char>());
//     for (int start = 0; start < count; start += Tiles::OTHER) {
//         float acc[MT][NT][4];
//         clear(acc);
//         tiles.multiply(acc, own_rows, own_features, first, other_rows, other_features, start, kind, more);
//         ... acc[i][j][e] is that of own row first + tiles.row(i, e) and other row start + tiles.column(j, e)
//         ... own_term[tiles.row(i, e)], other_term[tiles.column(j, e)]
//     }
//
// multiply begins and ends with a barrier: a block that only reads terms and registers between two calls needs none.
template <typename T, bool EXACT, int ROW_WARPS, int COLUMN_WARPS, int MT, int NT>
struct DotTiles {
    static constexpr int OWN = ROW_WARPS * MT * 16;
    static constexpr int OTHER = COLUMN_WARPS * NT * 8;
    static constexpr int THREADS = 32 * ROW_WARPS * COLUMN_WARPS;
    static constexpr int CHUNK = 128 / sizeof(T);
    static constexpr int PAD = 16 / sizeof(T);  // rows start 4 banks apart
    static constexpr int PITCH = CHUNK + PAD;
    static constexpr int TERMS = (OWN + OTHER) * sizeof(float);
    static constexpr int BYTES = TERMS + 2 * (OWN + OTHER) * PITCH * sizeof(T);
    static_assert(THREADS == 256 && OWN <= THREADS && OTHER <= THREADS, "as squares of rows are added up");

    float* own_term;
    float* other_term;
    T* own;
    T* other;
    int buffer = 0;
    bool first_tile = true, in_flight = false;

    // `shared` holds BYTES, aligned to 16.
    __device__ __forceinline__ explicit DotTiles(unsigned char* shared)
        : own_term(reinterpret_cast<float*>(shared)),
          other_term(own_term + OWN),
          own(reinterpret_cast<T*>(other_term + OTHER)),
          other(own + 2 * OWN * PITCH) {}

    // Where an element of a product lies that a thread holds.
    static __device__ __forceinline__ int row(int i, int e, int thread = threadIdx.x) {
        return thread / kWarpSize / COLUMN_WARPS * (MT * 16) + fragment_row(thread % kWarpSize, i, e);
    }
    static __device__ __forceinline__ int column(int j, int e, int thread = threadIdx.x) {
        return thread / kWarpSize % COLUMN_WARPS * (NT * 8) + fragment_column(thread % kWarpSize, j, e);
    }

    // The own rows stay if all of their features fit the two buffers.
    static __device__ __forceinline__ bool stays(int D) { return D <= 2 * CHUNK; }
    __device__ __forceinline__ int own_pitch(int D) const { return stays(D) ? 2 * CHUNK + PAD : PITCH; }
    __device__ __forceinline__ T* own_chunk(int D, int chunk, int buffer) const {
        return own + (stays(D) ? chunk * CHUNK : buffer * OWN * PITCH);
    }

    // acc += <own row, other row>. `more`: the tile of OTHER rows after this one comes next, so its loads may begin.
    // `meanwhile` runs once after the first barrier, before the product: what it writes is there for all when multiply
    // returns, what it copies after wait_for_copies and a barrier.
    template <typename OwnRows, typename OtherRows, typename Meanwhile>
    __device__ __forceinline__ void multiply(float (&acc)[MT][NT][4], const OwnRows& own_rows, const Features& own_f,
                                             int first, const OtherRows& other_rows, const Features& other_f, int start,
                                             Similarity kind, bool more, const Meanwhile& meanwhile) {
        const int D = own_f.D, chunks = ceil_div(D, CHUNK);
        const bool resident = stays(D), norms = kind != Similarity::dot;
        RowSquares<T, OWN> own_squares;
        RowSquares<T, OTHER> other_squares;
        STTM_NO_UNROLL
        for (int chunk = in_flight ? 0 : -1; chunk < chunks; ++chunk) {
            const int used = buffer;
            if (chunk >= 0) {
                wait_for_copies();
                __syncthreads();
                if (chunk == 0) meanwhile();
                buffer ^= 1;
            }
            const bool last = chunk + 1 == chunks;
            if (!last || more) {
                const int next = last ? 0 : chunk + 1;
                if (!resident || (first_tile && !last)) {
                    load_tile<THREADS, OWN, CHUNK>(own_chunk(D, next, buffer), own_pitch(D), own_rows, first, own_f,
                                                   next * CHUNK);
                }
                load_tile<THREADS, OTHER, CHUNK>(other + buffer * OTHER * PITCH, PITCH, other_rows,
                                                 last ? start + OTHER : start, other_f, next * CHUNK);
            }
            if (chunk < 0) continue;
            const int depth = min(CHUNK, (D - chunk * CHUNK + 15) / 16 * 16), pitch = own_pitch(D);
            const T* own_tile = own_chunk(D, chunk, used);
            const T* other_tile = other + used * OTHER * PITCH;
            warp_product<EXACT, false>(acc, own_tile + warp_index() / COLUMN_WARPS * (MT * 16) * pitch, pitch,
                                       other_tile + warp_index() % COLUMN_WARPS * (NT * 8) * PITCH, PITCH, depth);
            if (norms && first_tile) own_squares.template add<1>(own_tile, pitch, depth, 0, OWN);
            if (norms) other_squares.template add<1>(other_tile, PITCH, depth, 0, OTHER);
        }
        if (norms && first_tile) own_squares.store(own_term, 0, OWN, kind);
        if (norms) other_squares.store(other_term, 0, OTHER, kind);
        __syncthreads();
        first_tile = false;
        in_flight = more;
    }

    template <typename OwnRows, typename OtherRows>
    __device__ __forceinline__ void multiply(float (&acc)[MT][NT][4], const OwnRows& own_rows, const Features& own_f,
                                             int first, const OtherRows& other_rows, const Features& other_f, int start,
                                             Similarity kind, bool more) {
        multiply(acc, own_rows, own_f, first, other_rows, other_f, start, kind, more, [] {});
    }
};

// The greatest of the elements that a lane sees of its rows, the lowest position on a tie; `reduce` is over all lanes
// that share the rows. What is not a number is passed over, which may leave position 0 and -inf.
template <int MT>
struct RowBest {
    float value[MT][2];
    int at[MT][2];

    __device__ __forceinline__ void clear() {
        STTM_UNROLL
        for (int i = 0; i < MT; ++i) {
            value[i][0] = value[i][1] = -INFINITY;
            at[i][0] = at[i][1] = 0;
        }
    }
    // Positions of one row must ascend from call to call.
    __device__ __forceinline__ void offer(int i, int e, float candidate, int position) {
        if (candidate > value[i][e / 2]) {
            value[i][e / 2] = candidate;
            at[i][e / 2] = position;
        }
    }
    __device__ __forceinline__ void reduce() {
        STTM_UNROLL
        for (int i = 0; i < MT; ++i) {
            STTM_UNROLL
            for (int r = 0; r < 2; ++r) {
                STTM_UNROLL
                for (int mask = 1; mask <= 2; mask *= 2) {
                    const float candidate = shuffle_xor(value[i][r], mask);
                    const int position = shuffle_xor(at[i][r], mask);
                    if (candidate > value[i][r] || (candidate == value[i][r] && position < at[i][r])) {
                        value[i][r] = candidate;
                        at[i][r] = position;
                    }
                }
            }
        }
    }
};

// What makes the gradient of a row of the sum of other rows by the weights dL/dS: what lies along the row is taken off,
// and the rest scaled.
struct alignas(8) OwnShare {
    float off, scale;  // a scale below 0: there is no such row, and its gradient is 0

    __device__ __forceinline__ float of(float sum, float feature) const { return (sum - off * feature) * scale; }
};

// `term` is the inverse norm of the row and `along` the sum of the weights by cosines, for cosine; for l2, that of the
// weights, as -|row|^2 is a part of the similarity.
__device__ __forceinline__ OwnShare own_share(bool there, float term, float along, Similarity kind) {
    const float inverse = kind == Similarity::cosine ? term : 1.0f;
    const bool normalised = kind == Similarity::cosine && is_normalised(inverse);
    OwnShare share{0, kind == Similarity::l2 ? 2.0f : inverse};
    if (kind == Similarity::l2 || normalised) share.off = along * inverse * inverse;
    if (!there) share.scale = -1;
    return share;
}

// Adds `share` of the D features of a row to `value`, of those from d on, unless there is no row.
template <typename T>
__device__ __forceinline__ void add_share(float (&value)[Vec<T>::size], const T* row, int d, int D, float share) {
    if (row == nullptr) return;
    Vec<T> v;
    if (d + Vec<T>::size <= D && reinterpret_cast<uintptr_t>(row + d) % 16 == 0) {
        v = Vec<T>::load(row + d);
    } else {
        STTM_UNROLL
        for (int e = 0; e < Vec<T>::size; ++e) v.value[e] = d + e < D ? row[d + e] : from_float<T>(0);
    }
    STTM_UNROLL
    for (int e = 0; e < Vec<T>::size; ++e) value[e] = fmaf(share, to_float(v.value[e]), value[e]);
}

// Nothing is added to a gradient.
struct NoMore {
    static constexpr bool kAny = false;

    struct Term {
        float share = 0;
    };
    __device__ __forceinline__ bool aligned() const { return true; }
    __device__ __forceinline__ Term term(int) const { return {}; }
    __device__ __forceinline__ std::nullptr_t row(const Term&) const { return nullptr; }
};

// Features from d on of the gradient of a row of (items, heads, count, D), of `value`, the sum by weights, and of a
// share of the row `more`; 0 for a row without `features`. Every head has the same share of the gradient of their mean.
template <typename T>
__device__ __forceinline__ void store_gradient(T* grad, int64_t item, const T* features, int count, const Features& f,
                                               int row, int d, float (&value)[Vec<T>::size], const OwnShare& share,
                                               Similarity kind, const T* more = nullptr, float more_share = 0) {
    if (features != nullptr && kind != Similarity::dot) {
        const Vec<T> v = sttm::features(features, f, d);
        STTM_UNROLL
        for (int e = 0; e < Vec<T>::size; ++e) value[e] = share.of(value[e], to_float(v.value[e]));
    } else if (features == nullptr) {
        STTM_UNROLL
        for (int e = 0; e < Vec<T>::size; ++e) value[e] = 0;
    }
    add_share(value, more, d, f.D, more_share);
    T* const to = grad + (item * f.heads * count + row) * f.D + d;
    for (int h = 0; h < f.heads; ++h) {
        store_features(to + h * int64_t(count) * f.D, value, f.D - d, 1.0f / f.heads);
    }
}

template <bool FIRST, typename A, typename B>
__device__ __forceinline__ const auto& either(const A& a, const B& b) {
    if constexpr (FIRST) {
        return a;
    } else {
        return b;
    }
}

// Calls run(T(), std::bool_constant<EXACT>()) for features of `dtype` and what their products may round.
template <typename Run>
cudaError_t with_product(DType dtype, bool tf32, Run run) {
    return with_type(dtype, [&](auto type) {
        if constexpr (std::is_same<decltype(type), float>::value) {
            if (!tf32) return run(type, std::true_type());
        }
        return run(type, std::false_type());
    });
}

}  // namespace sttm
