// Sums of rows by weights that are functions of similarities: the two products of backward passes. The weights of a
// panel of other rows are worked out once and stay in shared memory while one slice of features after another is
// multiplied by them.
#pragma once

#include "similarity.cuh"

namespace sttm {

// COLUMNS features of ROWS rows, copied into a tile by all threads. A thread copies the same 16 bytes of rows that are
// STEP apart, so that a chunk after another costs it little more than the copies.
template <typename T, int THREADS, int ROWS, int COLUMNS>
struct RowPieces {
    static constexpr int PER_ROW = COLUMNS / Vec<T>::size, STEP = THREADS / PER_ROW, COUNT = ROWS / STEP;
    static_assert(COUNT * STEP == ROWS && STEP * PER_ROW == THREADS, "threads share the pieces evenly");

    const T* from[COUNT];
    unsigned there = 0;  // a bit for every row
    bool vectors;

    template <typename Rows>
    __device__ __forceinline__ RowPieces(const Rows& rows, const Features& f, int first)
        : vectors(f.vectors && f.heads == 1 && f.D % Vec<T>::size == 0) {
        if (!vectors) return;
        STTM_UNROLL
        for (int s = 0; s < COUNT; ++s) {
            from[s] = rows(first + static_cast<int>(threadIdx.x) / PER_ROW + s * STEP);
            there |= unsigned(from[s] != nullptr) << s;
        }
    }

    // Features from `start` on; what is not there is 0.
    template <typename Rows>
    __device__ __forceinline__ void copy(T* tile, int pitch, const Rows& rows, const Features& f, int first,
                                         int start) const {
        if (!vectors) {
            load_tile<THREADS, ROWS, COLUMNS>(tile, pitch, rows, first, f, start);
            return;
        }
        const int thread = anew(threadIdx.x), d = start + thread % PER_ROW * Vec<T>::size;
        const unsigned copied = d < f.D ? there : 0;
        T* const to = tile + thread / PER_ROW * pitch + thread % PER_ROW * Vec<T>::size;
        STTM_UNROLL
        for (int s = 0; s < COUNT; ++s) {
            if (copied >> s & 1) copy_async(to + s * STEP * pitch, from[s] + d, 16);
        }
        if (copied == (1u << COUNT) - 1) return;
        STTM_UNROLL
        for (int s = 0; s < COUNT; ++s) {
            if (!(copied >> s & 1)) Vec<float>::filled(0).store(reinterpret_cast<float*>(to + s * STEP * pitch));
        }
    }
};

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

// out[own row] = sum over other rows of weight[own row, other row] * values[other row], for OWN own rows and SLICE
// features at a time, by eight warps of 32 own rows each.
//
// Weights keep the exponents of float32, as a softmax over many rows falls below the range of float16: they are
// bfloat16 beside bfloat16 values and float32, multiplied in TF32, beside float16 ones.
template <typename T, bool EXACT, int OWN>
struct WeightPanel {
    using Weight = std::conditional_t<std::is_same<T, __nv_bfloat16>::value, __nv_bfloat16, float>;
    static constexpr int THREADS = 256, OTHER = 128, SLICE = 128;
    static constexpr int COLUMN_WARPS = 256 / OWN, NT = 16 / COLUMN_WARPS;
    static constexpr int PAIR = 16 * COLUMN_WARPS;  // warps take turns, so that all have work where columns are few
    static constexpr int CHUNK = 128 / sizeof(T);   // features of rows, or rows of values, at a time
    static constexpr int PITCH = CHUNK + 16 / sizeof(T), VALUE_PITCH = SLICE + 8, OUT_PITCH = SLICE + 8;
    static constexpr int TERMS_AT = COLUMN_WARPS * OWN * sizeof(float);
    static constexpr int TILES_AT = TERMS_AT + (OWN + OTHER) * sizeof(float);
    static constexpr int WEIGHTS_AT = TILES_AT + 2 * (OWN + OTHER) * PITCH * sizeof(T);
    static_assert(2 * CHUNK * VALUE_PITCH * sizeof(T) <= WEIGHTS_AT - TILES_AT, "values take the place of tiles");
    static_assert(OWN * OUT_PITCH * sizeof(float) <= WEIGHTS_AT - TILES_AT, "`out` takes the place of tiles");

    // Of `width` other rows, a multiple of 16. Rows start 4 banks apart. `whole`: these are all other rows; else sums
    // wait in shared memory for those of the next panel.
    static __host__ __device__ constexpr int pitch_of(int width) { return width + 16 / sizeof(Weight); }
    static __host__ __device__ constexpr size_t out_at(int width) {
        return WEIGHTS_AT + size_t(OWN) * pitch_of(width) * sizeof(Weight);
    }
    static constexpr size_t bytes(int width, bool whole) {
        return out_at(width) + (whole ? 0 : OWN * OUT_PITCH * sizeof(float));
    }

    float *sums, *own_term, *other_term;  // sums of own rows: what `store_gradient` takes off
    T* tiles;
    Weight* weights;
    float* out;
    int width, known = 0;  // of the terms, those of own rows once they are there

    // `shared` holds bytes(width, whole), aligned to 16.
    __device__ __forceinline__ WeightPanel(unsigned char* shared, int width, bool whole)
        : sums(reinterpret_cast<float*>(shared)),
          own_term(reinterpret_cast<float*>(shared + TERMS_AT)),
          other_term(own_term + OWN),
          tiles(reinterpret_cast<T*>(shared + TILES_AT)),
          weights(reinterpret_cast<Weight*>(shared + WEIGHTS_AT)),
          out(reinterpret_cast<float*>(shared + (whole ? TILES_AT : out_at(width)))),
          width(width) {}

    // Where element (i, j, e) of a product lies that a thread holds.
    static __device__ __forceinline__ int row_warp() { return warp_index() / COLUMN_WARPS; }
    static __device__ __forceinline__ int column_warp() { return warp_index() % COLUMN_WARPS; }
    static __device__ __forceinline__ int row(int i, int e, int thread = threadIdx.x) {
        return thread / kWarpSize / COLUMN_WARPS * 32 + fragment_row(thread % kWarpSize, i, e);
    }
    static __device__ __forceinline__ int column(int j, int e, int thread = threadIdx.x) {
        return thread / kWarpSize % COLUMN_WARPS * 16 + fragment_column<PAIR>(thread % kWarpSize, j, e);
    }

    // Calls step(unroll, depth) for a product over `left` or CHUNK, whichever is less, rounded up to a multiple of 16;
    // a whole chunk is written out where registers allow it.
    template <typename Step>
    static __device__ __forceinline__ void with_depth(const Step& step, int left) {
        if (std::is_same<T, __nv_bfloat16>::value && left >= CHUNK) {
            step(std::integral_constant<int, CHUNK / 16>(), CHUNK);
        } else {
            step(std::integral_constant<int, 1>(), min(CHUNK, (left + 15) / 16 * 16));
        }
    }

    // dot = <own row, other row> for `count` of OTHER other rows from `start` on, and the terms of both; `meanwhile`
    // runs once after the first barrier. Begins when nobody uses the tiles any more, ends with a barrier.
    template <typename OwnRows, typename OtherRows, typename Meanwhile>
    __device__ __forceinline__ void multiply(float (&dot)[2][NT][4], const OwnRows& own, const Features& own_f,
                                             int first, const OtherRows& other, const Features& other_f, int start,
                                             int count, Similarity kind, const Meanwhile& meanwhile) {
        const RowPieces<T, THREADS, OWN, CHUNK> own_pieces(own, own_f, first);
        const RowPieces<T, THREADS, OTHER, CHUNK> other_pieces(other, other_f, start);
        RowSquares<T, OWN + OTHER> squares;
        const int D = own_f.D, end = OWN + (count + 15) / 16 * 16;
        clear(dot);
        STTM_NO_UNROLL
        for (int d = -CHUNK, buffer = 1; d < D; d += CHUNK, buffer ^= 1) {
            T* const tile = tiles + buffer * (OWN + OTHER) * PITCH;
            if (d >= 0) {
                wait_for_copies();
                __syncthreads();
            }
            if (d + CHUNK < D) {
                T* const next = tiles + (buffer ^ 1) * (OWN + OTHER) * PITCH;
                own_pieces.copy(next, PITCH, own, own_f, first, d + CHUNK);
                other_pieces.copy(next + OWN * PITCH, PITCH, other, other_f, start, d + CHUNK);
            }
            if (d < 0) continue;
            if (d == 0) meanwhile();
            const auto step = [&](auto unroll, int depth) {
                constexpr int kUnroll = decltype(unroll)::value;
                warp_product<EXACT, false, PAIR, kUnroll>(dot, tile + row_warp() * 32 * PITCH, PITCH,
                                                          tile + (OWN + column_warp() * 16) * PITCH, PITCH, depth,
                                                          count - column_warp() * 16);
                if (kind != Similarity::dot) squares.template add<kUnroll>(tile, PITCH, depth, known, end);
            };
            with_depth(step, D - d);
        }
        if (kind != Similarity::dot) squares.store(own_term, known, end, kind);
        known = OWN;
        __syncthreads();
    }

    // Makes weights of dL/dS, dS(i, j, e, row, column) for dot[i][j][e], at the places from `at` of the panel on, so
    // that `out` becomes the gradient of the own rows once `store_gradient` has taken off what is along the row
    // (cosine) or what -|own row|^2 adds (l2). That share is added up, to what there was `before`, from the very
    // weights that multiply the features: rounding them leaves the gradient orthogonal to the row, or pointing between
    // the two rows.
    template <typename Gradient>
    __device__ __forceinline__ void pull_back(const float (&dot)[2][NT][4], int at, int count, Similarity kind,
                                              bool before, const Gradient& dS) {
        const int thread = anew(threadIdx.x);
        float along[2][2] = {};
        STTM_UNROLL
        for (int j = 0; j < NT; ++j) {
            if (column_warp() * 16 + j / 2 * PAIR >= count) continue;
            STTM_UNROLL
            for (int i = 0; i < 2; ++i) {
                STTM_UNROLL
                for (int e = 0; e < 4; ++e) {
                    const int row = WeightPanel::row(i, e, thread), column = WeightPanel::column(j, e, thread);
                    float weight = dS(i, j, e, row, column);
                    if (kind == Similarity::cosine) weight *= other_term[column];
                    weight = weigh(row, at + column, weight);
                    if (weight != 0) along[i][e / 2] += kind == Similarity::cosine ? weight * dot[i][j][e] : weight;
                }
            }
        }
        STTM_UNROLL
        for (int i = 0; i < 2; ++i) {
            STTM_UNROLL
            for (int r = 0; r < 2; ++r) {
                float value = along[i][r];
                value += shuffle_xor(value, 1);
                value += shuffle_xor(value, 2);
                float& sum = sums[column_warp() * OWN + row(i, 2 * r, thread)];
                if (thread % 4 == 0) sum = before ? sum + value : value;
            }
        }
    }

    // Sets a weight; returns what a product will take it for.
    __device__ __forceinline__ float weigh(int row, int column, float weight) {
        if (std::is_same<T, float>::value ? !EXACT : !std::is_same<Weight, T>::value) weight = round_to_tf32(weight);
        const Weight rounded = from_float<Weight>(weight);
        weights[row * pitch_of(width) + column] = rounded;
        return to_float(rounded);
    }

    // Features from `part` on of `count` other rows, from `first` on, by the weights of the panel, added to `out` if
    // there was another panel `before`. Begins when nobody uses the tiles any more; a barrier must follow.
    template <typename Rows>
    __device__ __forceinline__ void add(const Rows& rows, const Features& f, int first, int count, int part,
                                        bool before) {
        float acc[2][NT][4];
        clear(acc);
        STTM_NO_UNROLL
        for (int at = -CHUNK, buffer = 1; at < count; at += CHUNK, buffer ^= 1) {
            if (at >= 0) {
                wait_for_copies();
                __syncthreads();
            }
            const int next = at + CHUNK;
            if (next < count) {
                const RowPieces<T, THREADS, CHUNK, SLICE> pieces(rows, f, first + next);
                pieces.copy(tiles + (buffer ^ 1) * CHUNK * VALUE_PITCH, VALUE_PITCH, rows, f, first + next, part);
            }
            if (at < 0) continue;
            const int pitch = pitch_of(width), column = column_warp() * 16;
            const auto step = [&](auto unroll, int depth) {
                warp_product<EXACT, true, PAIR, decltype(unroll)::value>(
                    acc, weights + row_warp() * 32 * pitch + at, pitch, tiles + buffer * CHUNK * VALUE_PITCH + column,
                    VALUE_PITCH, depth, f.D - part - column);
            };
            with_depth(step, count - at);
        }
        __syncthreads();
        const int thread = anew(threadIdx.x);
        STTM_UNROLL
        for (int i = 0; i < 2; ++i) {
            STTM_UNROLL
            for (int j = 0; j < NT; ++j) {
                STTM_UNROLL
                for (int e = 0; e < 4; ++e) {
                    float& sum = out[row(i, e, thread) * OUT_PITCH + column(j, e, thread)];
                    sum = before ? sum + acc[i][j][e] : acc[i][j][e];
                }
            }
        }
    }

    // Adds up what all warps have of `sums`, which are there after the next barrier.
    __device__ __forceinline__ void reduce_sums() {
        __syncthreads();
        const int own_row = static_cast<int>(threadIdx.x);
        if (own_row >= OWN) return;
        for (int warp = 1; warp < COLUMN_WARPS; ++warp) sums[own_row] += sums[warp * OWN + own_row];
    }

    // Calls store(row, column, values) for 16 bytes' worth of `out` at a time, neighbours side by side; rows below
    // `rows`, columns below `columns`. Begins and ends with a barrier.
    template <typename Store>
    __device__ __forceinline__ void finish(int rows, int columns, const Store& store) {
        constexpr int kSize = Vec<T>::size, kPieces = SLICE / kSize;
        __syncthreads();
        STTM_NO_UNROLL
        for (int i = threadIdx.x; i < OWN * kPieces; i += THREADS) {
            const int own_row = i / kPieces, first = i % kPieces * kSize;
            if (own_row >= rows || first >= columns) continue;
            float value[kSize];
            STTM_UNROLL
            for (int e = 0; e < kSize; ++e) value[e] = out[own_row * OUT_PITCH + first + e];
            store(own_row, first, value);
        }
        __syncthreads();
    }

    // grad (items, heads, num_own, D) of the own rows from `first` on and features from `part` on; 0 for rows that are
    // not there. Every head has the same share of the gradient of their mean.
    template <typename Rows>
    __device__ __forceinline__ void store_gradient(T* grad, int64_t item, const Rows& own, int num_own,
                                                   const Features& f, int first, int part, Similarity kind) {
        finish(num_own - first, f.D - part, [&](int row, int column, float (&value)[Vec<T>::size]) {
            const int d = part + column;
            const T* features = own(first + row);
            const float inverse = kind == Similarity::cosine ? own_term[row] : 1.0f;
            const bool normalised = kind == Similarity::cosine && is_normalised(inverse);
            const float scale = kind == Similarity::l2 ? 2.0f : inverse;
            const float off = kind == Similarity::l2 || normalised ? sums[row] * inverse * inverse : 0.0f;
            if (features != nullptr && kind != Similarity::dot) {
                const Vec<T> v = sttm::features(features, f, d);
                STTM_UNROLL
                for (int e = 0; e < Vec<T>::size; ++e) value[e] = (value[e] - off * to_float(v.value[e])) * scale;
            } else if (features == nullptr) {
                STTM_UNROLL
                for (int e = 0; e < Vec<T>::size; ++e) value[e] = 0;
            }
            T* to = grad + (item * f.heads * num_own + first + row) * f.D + d;
            for (int h = 0; h < f.heads; ++h) {
                store_features(to + h * int64_t(num_own) * f.D, value, f.D - d, 1.0f / f.heads);
            }
        });
    }
};

}  // namespace sttm
