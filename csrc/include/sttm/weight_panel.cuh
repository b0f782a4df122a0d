// Sums of rows by weights that are functions of similarities: the two products of backward passes. The weights of a
// panel of other rows are worked out once and stay in shared memory while one slice of features after another is
// multiplied by them.
#pragma once

#include "partial.cuh"
#include "similarity.cuh"

namespace sttm {

// COLUMNS features of ROWS rows, copied into a tile by all threads. A thread copies the same 16 bytes of rows that are
// STEP apart, so that a chunk after another costs it little more than the copies.
template <typename T, int THREADS, int ROWS, int COLUMNS>
struct RowPieces {
    static constexpr int PER_ROW = COLUMNS / Vec<T>::size, STEP = THREADS / PER_ROW, COUNT = ROWS / STEP;
    static_assert(COUNT * STEP == ROWS && STEP * PER_ROW == THREADS, "threads share the pieces evenly");

    int64_t at = 0;      // of the first row, from rows.data on
    unsigned there = 0;  // a bit for every row
    bool vectors;

    template <typename Rows>
    __device__ __forceinline__ RowPieces(const Rows& rows, const Features& f, int first)
        : vectors(f.vectors && f.heads == 1 && f.D % Vec<T>::size == 0) {
        if (!vectors) return;
        const int row = first + static_cast<int>(threadIdx.x) / PER_ROW;
        at = row * rows.stride;
        STTM_UNROLL
        for (int s = 0; s < COUNT; ++s) there |= unsigned(rows(row + s * STEP) != nullptr) << s;
    }

    // Features from `start` on; what is not there is 0.
    template <typename Rows>
    __device__ __forceinline__ void copy(T* tile, int pitch, const Rows& rows, const Features& f, int first,
                                         int start) const {
        if (!vectors) {
            load_tile<THREADS, ROWS, COLUMNS, 1>(tile, pitch, rows, first, f, start);
            return;
        }
        const int thread = anew(threadIdx.x), d = start + thread % PER_ROW * Vec<T>::size;
        const unsigned copied = d < f.D ? there : 0;
        T* const to = tile + thread / PER_ROW * pitch + thread % PER_ROW * Vec<T>::size;
        STTM_UNROLL
        for (int s = 0; s < COUNT; ++s) {
            if (copied >> s & 1) copy_async(to + s * STEP * pitch, rows.data + (at + s * STEP * rows.stride + d), 16);
        }
        if (copied == (1u << COUNT) - 1) return;
        STTM_UNROLL
        for (int s = 0; s < COUNT; ++s) {
            if (!(copied >> s & 1)) Vec<float>::filled(0).store(reinterpret_cast<float*>(to + s * STEP * pitch));
        }
    }
};

// The same without a branch for each copy, where registers allow it: these go from row to row by a step.
template <typename T, int THREADS, int ROWS, int COLUMNS>
struct SteppedPieces {
    static constexpr int PER_ROW = COLUMNS / Vec<T>::size, STEP = THREADS / PER_ROW, COUNT = ROWS / STEP;
    static_assert(COUNT * STEP == ROWS && STEP * PER_ROW == THREADS, "threads share the pieces evenly");

    const T* from;       // of the first row
    int step;            // from row to row of a thread, in bytes
    unsigned there = 0;  // a bit for every row

    template <typename Rows>
    __device__ __forceinline__ SteppedPieces(const Rows& rows, const Features&, int first) {
        const int row = first + static_cast<int>(threadIdx.x) / PER_ROW;
        from = rows.data + row * rows.stride + threadIdx.x % PER_ROW * Vec<T>::size;
        step = static_cast<int>(rows.stride) * (STEP * static_cast<int>(sizeof(T)));
        STTM_UNROLL
        for (int s = 0; s < COUNT; ++s) there |= unsigned(rows.there(row + s * STEP)) << s;
    }

    // Features from `start` on; what is not there is 0.
    template <typename Rows>
    __device__ __forceinline__ void copy(T* tile, int pitch, const Rows& rows, const Features& f, int first,
                                         int start) const {
        if (!f.pieces) {
            load_tile<THREADS, ROWS, COLUMNS, 1>(tile, pitch, rows, first, f, start);
            return;
        }
        const int thread = anew(threadIdx.x), column = thread % PER_ROW * Vec<T>::size;
        const unsigned copied = start + column < f.D ? there : 0;
        T* const to = tile + thread / PER_ROW * pitch + column;
        const char* at = reinterpret_cast<const char*>(from + start);
        STTM_UNROLL
        for (int s = 0; s < COUNT; ++s, at += step) {
            copy_async(to + s * STEP * pitch, at, (copied >> s & 1) * 16);  // of 0 bytes nothing is read
        }
    }
};

// Of two neighbouring columns.
struct alignas(8) Pair {
    float value[2];
};

struct NoSquares {
    template <int UNROLL, typename T>
    __device__ __forceinline__ void add(const T*, int, int, int, int) {}
    __device__ __forceinline__ void store(float*, int, int, Similarity) const {}
};

// A block's tile and span of other rows, whose sums go there. `parts` blocks share its slices, and this one is number
// `mine`.
struct Span {
    const Partial& partial;
    const SpanTile& tile;
    int mine, parts;
};

// out[own row] = sum over other rows of weight[own row, other row] * values[other row], for ROWS own rows and SLICE
// features at a time, by eight warps of 32 own rows each.
//
// Weights keep the exponents of float32, as a softmax over many rows falls below the range of float16: they are
// bfloat16 beside bfloat16 values and float32, multiplied in TF32, beside float16 ones.
template <typename T, bool EXACT, int ROWS, bool STEPPED = false>
struct WeightPanel {
    using Weight = std::conditional_t<std::is_same<T, __nv_bfloat16>::value, __nv_bfloat16, float>;
    static constexpr int THREADS = 256, OWN = ROWS, OTHER = 128, SLICE = 128;
    template <int COUNT, int COLUMNS>
    using Pieces = std::conditional_t<STEPPED, SteppedPieces<T, THREADS, COUNT, COLUMNS>,
                                      RowPieces<T, THREADS, COUNT, COLUMNS>>;
    // Of rows that the weights of a panel multiply: exact products leave no registers for the other way.
    using Values = std::conditional_t<STEPPED || !EXACT, SteppedPieces<T, THREADS, 128 / sizeof(T), SLICE>,
                                      RowPieces<T, THREADS, 128 / sizeof(T), SLICE>>;
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

    // Goes through the elements of a product that a thread holds, of `count` columns rounded up to a multiple of 16,
    // pair by pair of neighbours in a row: use(i, j, r, row, column, what of_columns(column) says) for elements e = 2 r
    // and 2 r + 1.
    template <typename OfColumns, typename Use>
    static __device__ __forceinline__ void each(int count, const OfColumns& of_columns, const Use& use) {
        const int thread = anew(threadIdx.x);
        STTM_UNROLL
        for (int j = 0; j < NT; ++j) {
            if (column_warp() * 16 + j / 2 * PAIR >= count) continue;
            const int column = WeightPanel::column(j, 0, thread);
            const auto columns = of_columns(column);
            STTM_UNROLL
            for (int i = 0; i < 2; ++i) {
                STTM_UNROLL
                for (int r = 0; r < 2; ++r) use(i, j, r, row(i, 2 * r, thread), column, columns);
            }
        }
    }

    // <own row, other row> become similarities.
    __device__ __forceinline__ void to_similarities(float (&dot)[2][NT][4], int count, Similarity kind,
                                                    float inverse_temperature) const {
        const auto to = [&](auto kind_of) {
            constexpr Similarity kKind = decltype(kind_of)::value;
            float own[2][2];
            of_own_rows([&](int i, int r, int row) { own[i][r] = kKind == Similarity::dot ? 1 : own_term[row]; });
            const auto others = [&](int column) {
                return kKind == Similarity::dot ? Pair{1, 1} : Pair{other_term[column], other_term[column + 1]};
            };
            each(count, others, [&](int i, int j, int r, int, int, const Pair& other) {
                STTM_UNROLL
                for (int e = 0; e < 2; ++e) {
                    float& S = dot[i][j][2 * r + e];
                    S = similarity_of(S, own[i][r], other.value[e], inverse_temperature, kKind);
                }
            });
        };
        if (kind == Similarity::cosine) return to(std::integral_constant<Similarity, Similarity::cosine>());
        if (kind == Similarity::dot) return to(std::integral_constant<Similarity, Similarity::dot>());
        to(std::integral_constant<Similarity, Similarity::l2>());
    }

    // use(i, r, row) for the four own rows of which a thread holds elements, e = 2 r and 2 r + 1.
    template <typename Use>
    static __device__ __forceinline__ void of_own_rows(const Use& use) {
        const int thread = anew(threadIdx.x);
        STTM_UNROLL
        for (int i = 0; i < 2; ++i) {
            STTM_UNROLL
            for (int r = 0; r < 2; ++r) use(i, r, row(i, 2 * r, thread));
        }
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

    // dot = <own row, other row> for `count` of OTHER other rows from `start` on, and the terms of both if TERMS;
    // `meanwhile` runs once after the first barrier. Begins when nobody uses the tiles any more, ends with a barrier.
    template <bool TERMS = true, typename OwnRows, typename OtherRows, typename Meanwhile>
    __device__ __forceinline__ void multiply(float (&dot)[2][NT][4], const OwnRows& own, const Features& own_f,
                                             int first, const OtherRows& other, const Features& other_f, int start,
                                             int count, Similarity kind, const Meanwhile& meanwhile) {
        const Pieces<OWN, CHUNK> own_pieces(own, own_f, anew(first));
        const Pieces<OTHER, CHUNK> other_pieces(other, other_f, start);
        std::conditional_t<TERMS, RowSquares<T, OWN + OTHER>, NoSquares> squares;
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
        if (TERMS) known = OWN;
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
        float along[2][2] = {};
        const bool cosine = kind == Similarity::cosine;
        const auto others = [&](int column) { return Pair{other_term[column], other_term[column + 1]}; };
        each(count, others, [&](int i, int j, int r, int row, int column, const Pair& other) {
            Pair weight;
            STTM_UNROLL
            for (int e = 0; e < 2; ++e) {
                weight.value[e] = dS(i, j, 2 * r + e, row, column + e);
                if (cosine) weight.value[e] *= other.value[e];
            }
            weight = weigh(row, at + column, weight);
            STTM_UNROLL
            for (int e = 0; e < 2; ++e) {
                const float taken = weight.value[e];
                if (taken != 0) along[i][r] += cosine ? taken * dot[i][j][2 * r + e] : taken;
            }
        });
        add_up(sums, along, before);
    }

    // Adds what every thread has of its four own rows, in elements e = 0 and e = 2, to `sums`, COLUMN_WARPS * OWN
    // floats, or sets them if there was nothing `before`; the sum of a row is that of its COLUMN_WARPS.
    static __device__ __forceinline__ void add_up(float* sums, const float (&values)[2][2], bool before) {
        const int thread = anew(threadIdx.x);
        STTM_UNROLL
        for (int i = 0; i < 2; ++i) {
            STTM_UNROLL
            for (int r = 0; r < 2; ++r) {
                float value = values[i][r];
                value += shuffle_xor(value, 1);
                value += shuffle_xor(value, 2);
                float& sum = sums[column_warp() * OWN + row(i, 2 * r, thread)];
                if (thread % 4 == 0) sum = before ? sum + value : value;
            }
        }
    }
    static __device__ __forceinline__ float sum_of(const float* sums, int row) {
        float sum = sums[row];
        for (int warp = 1; warp < COLUMN_WARPS; ++warp) sum += sums[warp * OWN + row];
        return sum;
    }

    // Sets the weights of `column` and its neighbour; returns what a product will take them for.
    __device__ __forceinline__ Pair weigh(int row, int column, Pair weight) {
        Weight* const to = weights + row * pitch_of(width) + column;
#ifndef STTM_HOST
        if constexpr (std::is_same<Weight, __nv_bfloat16>::value) {
            const __nv_bfloat162 rounded = __floats2bfloat162_rn(weight.value[0], weight.value[1]);
            *reinterpret_cast<__nv_bfloat162*>(to) = rounded;
            return Pair{__low2float(rounded), __high2float(rounded)};
        } else
#endif
        {
            STTM_UNROLL
            for (int e = 0; e < 2; ++e) {
                float value = weight.value[e];
                if (std::is_same<T, float>::value ? !EXACT : !std::is_same<Weight, T>::value)
                    value = round_to_tf32(value);
                const Weight rounded = from_float<Weight>(value);
                to[e] = rounded;
                weight.value[e] = to_float(rounded);
            }
            return weight;
        }
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
                const Values pieces(rows, f, first + next);
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
        each(
            SLICE, [](int) { return 0; },
            [&](int i, int j, int r, int row, int column, int) {
                float* const to = out + row * OUT_PITCH + column;
                Pair sum{acc[i][j][2 * r], acc[i][j][2 * r + 1]};
                if (before) sum.value[0] += to[0], sum.value[1] += to[1];
                *reinterpret_cast<Pair*>(to) = sum;
            });
    }

    // Makes the gradients of all own rows zero, after the next barrier.
    __device__ __forceinline__ void forget() {
        __syncthreads();
        STTM_NO_UNROLL
        for (int i = threadIdx.x; i < OWN * OUT_PITCH; i += THREADS) out[i] = 0;
        STTM_NO_UNROLL
        for (int i = threadIdx.x; i < COLUMN_WARPS * OWN; i += THREADS) sums[i] = 0;
    }

    // sums[row] becomes the sum of a row, after the next barrier.
    static __device__ __forceinline__ void reduce(float* sums) {
        __syncthreads();
        const int own_row = static_cast<int>(threadIdx.x);
        if (own_row < OWN) sums[own_row] = sum_of(sums, own_row);
    }

    // Takes the place of the sums: what makes gradients of those of own rows, after the next barrier.
    __device__ __forceinline__ OwnShare* shares() const { return reinterpret_cast<OwnShare*>(sums); }
    template <typename Rows>
    __device__ __forceinline__ void find_shares(const Rows& own, int first, Similarity kind) const {
        const int row = static_cast<int>(threadIdx.x);
        OwnShare share{};
        __syncthreads();
        if (row < OWN) share = own_share(own.there(first + row), own_term[row], sum_of(sums, row), kind);
        __syncthreads();
        if (row < OWN) shares()[row] = share;
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
            for (int e = 0; e < kSize; e += 4) {
                const Vec<float> v = Vec<float>::load(out + own_row * OUT_PITCH + first + e);
                STTM_UNROLL
                for (int i = 0; i < 4; ++i) value[e + i] = v.value[i];
            }
            store(own_row, first, value);
        }
        __syncthreads();
    }

    // Goes through the slices of the features of `count` other rows: make(from, end, part) sets the weights of rows
    // [from, end), done(part, fresh) uses `out`. Weights are made once, or for every slice if the panel has no room for
    // all of them; `fresh` says so. `parts` blocks share the slices, and this one is number `mine`; one that has none
    // is called once, with `part` beyond the features.
    template <typename Rows, typename Make, typename Done>
    __device__ __forceinline__ void for_each_slice(const Rows& rows, const Features& f, int count, int mine, int parts,
                                                   const Make& make, const Done& done) {
        int part = mine * SLICE;
        do {
            const bool fresh = part < parts * SLICE || width < count;
            int from = 0;
            do {
                const int end = min(count - from, width) + from;
                if (fresh) make(from, end, part);
                add(rows, f, from, end - from, part, from > 0);
                from = end;
            } while (from < count);
            done(part, fresh);
            part += parts * SLICE;
        } while (part < f.D);
    }

    // The same of a span [begin, end) of other rows, which may be of several panels: done(part) has `out` of every
    // panel.
    template <typename Rows, typename Make, typename Done>
    __device__ __forceinline__ void for_each_panel(const Rows& rows, const Features& f, int begin, int end, int mine,
                                                   int parts, const Make& make, const Done& done) {
        int from = begin;
        do {
            const int until = min(end - from, width) + from;
            make(from, until, 0);
            STTM_NO_UNROLL
            for (int part = mine * SLICE; part < f.D; part += parts * SLICE) {
                add(rows, f, from, until - from, part, false);
                done(part, from > begin);
            }
            from = until;
        } while (from < end);
    }

    // grad (items, heads, count, D) of the own rows, num_own of an item from `start` on: from `first` of these on, and
    // features from `part` on. `more` has rows of which a share is added.
    template <typename Rows, typename More = NoMore>
    __device__ __forceinline__ void store_gradient(T* grad, int64_t item, int count, int start, const Rows& own,
                                                   int num_own, const Features& f, int first, int part, Similarity kind,
                                                   const More& more = {}) {
        if (f.pieces && is_aligned(grad) && more.aligned()) {
            T* const to = grad + (item * count + start) * f.D;
            if (kind == Similarity::dot) return store_pieces<false>(to, own, num_own, f.D, first, part, more);
            return store_pieces<true>(to, own, num_own, f.D, first, part, more);
        }
        finish(num_own - first, f.D - part, [&](int row, int column, float (&value)[Vec<T>::size]) {
            const auto term = more.term(row);
            const T* const added = more.row(term);
            sttm::store_gradient(grad, item, own(first + row), count, f, start + first + row, part + column, value,
                                 shares()[row], kind, added, term.share);
        });
    }

    // The same of features in pieces; `grad` is that of the first own row. A thread has the same columns of rows that
    // are STEP apart, and reads kMost of them before it writes. READS: `out` is not all of the gradient.
    template <bool READS, typename Rows, typename More>
    __device__ __forceinline__ void store_pieces(T* grad, const Rows& own, int num_own, int D, int first, int part,
                                                 const More& more) const {
        using Pieces = SteppedPieces<T, THREADS, OWN, SLICE>;
        using Words = Vec<uint32_t>;
        constexpr int kSize = Vec<T>::size, kMost = Pieces::COUNT < 4 ? Pieces::COUNT : 4;
        const int thread = anew(threadIdx.x), column = thread % Pieces::PER_ROW * kSize, left = num_own - first;
        int row = thread / Pieces::PER_ROW;
        const T* from = own.data + (first + row) * own.stride + (part + column);
        T* to = grad + int64_t(first + row) * D + (part + column);
        const int step = static_cast<int>(own.stride) * Pieces::STEP;
        __syncthreads();
        STTM_NO_UNROLL
        for (int s = 0; s < Pieces::COUNT && part + column < D; s += kMost) {
            Words features[kMost], added[More::kAny ? kMost : 1];
            float added_shares[More::kAny ? kMost : 1];
            STTM_UNROLL
            for (int i = 0; i < kMost; ++i, from += step) {
                features[i] = Words::filled(0);
                if (READS && row + i * Pieces::STEP < left)
                    features[i] = Words::load(reinterpret_cast<const uint32_t*>(from));
                if constexpr (More::kAny) {
                    const auto term = more.term(row + i * Pieces::STEP);
                    added[i] = Words::filled(0);
                    if (const T* const from_there = more.row(term))
                        added[i] = Words::load(reinterpret_cast<const uint32_t*>(from_there + (part + column)));
                    added_shares[i] = term.share;
                }
            }
            STTM_UNROLL
            for (int i = 0; i < kMost; ++i, row += Pieces::STEP, to += D * Pieces::STEP) {
                const OwnShare share = shares()[row];
                const uint32_t kept = share.scale >= 0 ? ~0u : 0u;
                const float* const sums = out + row * OUT_PITCH + column;
                Words gradient;
                STTM_UNROLL
                for (int e = 0; e < 4; ++e) {
                    float value[kSize / 4];
                    STTM_UNROLL
                    for (int j = 0; j < kSize / 4; ++j) {
                        value[j] = sums[e * (kSize / 4) + j];
                        if (READS) value[j] = share.of(value[j], element_of<T>(features[i].value[e], j));
                        if constexpr (More::kAny)
                            value[j] = fmaf(added_shares[i], element_of<T>(added[i].value[e], j), value[j]);
                    }
                    gradient.value[e] = word_of<T>(value) & kept;
                }
                if (row < left) store_whole(gradient, to);
            }
        }
        __syncthreads();
    }

    // The same of meta tokens, num_own in each set, from a span of tokens, whose weights make(from, end, 0) sets:
    // `grad` itself where a panel has room for all tokens, else partial sums. Zero if is_zero() says so of one token.
    template <typename OwnRows, typename OtherRows, typename Make, typename IsZero>
    __device__ __forceinline__ void store_span(T* grad, const OwnRows& own, int num_own, const Features& own_f,
                                               Similarity kind, const OtherRows& other, const Features& other_f,
                                               const Span& span, const Make& make, const IsZero& is_zero) {
        const SpanTile& tile = span.tile;
        const bool whole = tile.item.N <= width;
        const int first = tile.first;
        for_each_panel(other, other_f, tile.begin, tile.end, span.mine, span.parts, make, [&](int part, bool before) {
            if (whole) {
                if (is_zero()) forget();
                if (part < span.parts * SLICE) find_shares(own, first, kind);
                store_gradient(grad, tile.item.set, num_own, 0, own, num_own, own_f, first, part, kind);
                return;
            }
            finish(num_own - first, own_f.D - part, [&](int row, int column, float (&value)[Vec<T>::size]) {
                float* const to = partial_row(span.partial, tile.span, tile.row(num_own) + row);
                accumulate(to + part + column, value, before);
            });
        });
        if (whole || span.mine != 0) return;
        __syncthreads();
        const int row = static_cast<int>(threadIdx.x);
        if (row < OWN && first + row < num_own) {
            partial_row(span.partial, tile.span, tile.row(num_own) + row)[span.partial.more_at] = sum_of(sums, row);
        }
    }
};

// A row of dL/dmeta, of the sums of all spans.
template <typename T, typename Arguments>
struct StoreMetaGradient {
    Arguments a;
    Features f;
    Partial p;

    __device__ __forceinline__ Summed summed(int64_t row) const { return sttm::summed(a, p, row); }
    __device__ __forceinline__ const T* features(const Summed& of) const {
        return rows_of<T>(a.meta, Mask{}, of.out / a.K, a.K)(static_cast<int>(of.out % a.K));
    }
    // Returns the inverse norm.
    __device__ __forceinline__ float begin(const Summed& of, int) const {
        return a.similarity == Similarity::cosine ? inverse_norm(sum_of_squares(features(of), f)) : 1.0f;
    }
    __device__ __forceinline__ void operator()(const Summed& of, int column, float (&value)[Vec<T>::size],
                                               float inverse) const {
        const T* const row = of.first == of.end ? nullptr : features(of);
        store_gradient(static_cast<T*>(a.grad_meta), of.out / a.K, row, a.K, f, static_cast<int>(of.out % a.K), column,
                       value, own_share(row != nullptr, inverse, sum_of_spans(p, of, p.more_at), a.similarity),
                       a.similarity);
    }
};

// Where there are fewer blocks than `few`, up to `most` of them share the slices of a tile, each with weights of its
// own.
inline int shares(int64_t blocks, int slices, int few, int most) {
    return blocks == 0 || blocks >= few ? 1 : min(min(slices, most), few / static_cast<int>(blocks));
}

// Calls run(rows, width) for tiles of `rows` own rows, 64, or 32 if the weights of all `num_other` rows fit shared
// memory only then; `width` are those of a panel. kernel_of(rows) is what will be launched.
template <typename T, bool EXACT, typename KernelOf, typename Run>
cudaError_t with_panel(int num_other, const KernelOf& kernel_of, const Run& run) {
    constexpr int kMostWidth = 1 << 15;  // beyond what any shared memory holds
    const int whole = ceil_div(min(num_other, kMostWidth), 16) * 16;
    const auto fits = [&](auto rows) {
        const size_t bytes = WeightPanel<T, EXACT, decltype(rows)::value>::bytes(whole, true);
        return num_other <= whole && can_have_shared_memory(kernel_of(rows), bytes) == cudaSuccess;
    };
    using Rows64 = std::integral_constant<int, 64>;
    using Rows32 = std::integral_constant<int, 32>;
    if (fits(Rows64())) return run(Rows64(), whole);
    if (fits(Rows32())) return run(Rows32(), whole);
    return run(Rows64(), WeightPanel<T, EXACT, 64>::OTHER);
}

}  // namespace sttm
