// The best dst of every src for 16-bit features of up to 128: the tile of src stays in registers as the operands of its
// products, dst go by in a ring of tiles in shared memory.
//
// Rows are read as they are, or from the mean over heads; their inverse norms were taken before. That of a src changes
// no choice and is multiplied at the end. A column that is no dst has NaN for its norm, and no comparison with NaN is
// true.
#pragma once

#include "match_rows.cuh"

namespace sttm {

constexpr int kNearestWarps = 4, kNearestThreads = kNearestWarps * kWarpSize;
constexpr int kNearestDepth = 128;
constexpr int kNearestOwn = 32 * kNearestWarps, kNearestOther = 128;
static_assert(kNearestOwn % (kSequenceTile / 2) == 0, "src of a sequence are shared out by its tiles");

// The tokens of a side of a window by their places in it, with what takes few registers: the places of lists and tokens
// fit 32 bits.
struct NearestTokens {
    const MatchLaunch& a;
    const int base;  // in the lists of all windows, or the first token

    __device__ __forceinline__ NearestTokens(const MatchLaunch& a, int item, int window)
        : a(a),
          base(a.listed ? item * static_cast<int>(a.stride_dst) + window * a.num_dst
                        : a.num_prefix + 1 - a.num_prefix % 2) {}
    // -1 beyond the end.
    __device__ __forceinline__ int operator()(int place) const {
        if (place >= a.num_dst) return -1;
        const int token = a.listed ? a.dst[base + place] : base + 2 * place;
        return static_cast<unsigned>(token) < static_cast<unsigned>(a.N) ? token : -1;
    }
};

template <typename T, int DEPTH>
struct Nearest {
    static_assert(sizeof(T) == 2 && DEPTH % 16 == 0 && DEPTH <= kNearestDepth && kNearestOwn == kNearestOther);
    static constexpr int kStages = DEPTH <= 64 ? 3 : 2;
    static constexpr int kRow = DEPTH <= 64 ? 64 : 128, kPieces = kRow / 8, kTile = kNearestOther * kRow;
    static constexpr int kSteps = DEPTH / 16;
    static constexpr int kBytes = kStages * kNearestOther * (kRow * int(sizeof(T)) + int(sizeof(float)));
    static constexpr int kMT = 2,
                         kPairs = 2;  // of 16 rows; of 16 columns that are multiplied before they are looked at

    T* const ring;
    float* const norms;
    const int D;
    const char* mine;  // the 16 bytes of a row of the item that this lane copies
    const unsigned pitch;

    __device__ __forceinline__ Nearest(unsigned char* shared, const T* rows, int64_t stride, int D)
        : ring(reinterpret_cast<T*>(shared)),
          norms(reinterpret_cast<float*>(shared + kStages * kTile * sizeof(T))),
          D(D),
          mine(reinterpret_cast<const char*>(rows + min(lane_index() % kPieces * 8, D - 8))),
          pitch(static_cast<unsigned>(anew(static_cast<int>(stride * sizeof(T))))) {
#ifndef STTM_HOST
        const int thread = static_cast<int>(threadIdx.x);
        asm volatile("" : "+l"(mine));
        terms = shared_address(norms + thread % 4 * 4);
        into = shared_address(ring + place_of(thread / kPieces * kPieces, thread % kPieces));
#endif
    }

    // Where 16 bytes of a row of a tile are: the rows that ldmatrix reads at once differ in what their places are
    // xored with, so that they lie in different banks.
    static __device__ __forceinline__ constexpr int key_of(int row) { return (row & 1) | (row >> 2 & 3) << 1; }
    static __device__ __forceinline__ int place_of(int row, int piece) {
        return row * kRow + (piece ^ key_of(row)) * 8;
    }

    // The 32 rows of a warp of a tile, given a token by each lane; features from D on are 0.
    __device__ __forceinline__ void load_rows(int stage, int token) const {
        const int piece = lane_index() % kPieces, bytes = piece * 8 < D ? 16 : 0;
        STTM_UNROLL
        for (int i = 0; i < kPieces; ++i) {
            const char* const from = mine + uint64_t(static_cast<unsigned>(shuffle<kPieces>(token, i))) * pitch;
#ifdef STTM_HOST
            const int row = static_cast<int>(threadIdx.x) / kPieces * kPieces + i;
            copy_async(ring + stage * kTile + place_of(row, piece), from, bytes);
#else
            // From row to row places differ by the distance, and in three bits that are xored.
            copy_async(((into + stage * (kTile * int(sizeof(T)))) ^ key_of(i) << 4) + i * kRow * int(sizeof(T)), from,
                       bytes);
#endif
        }
    }

    // A tile of dst from place `start` on, and its norms. Rows that are not there are copies of the first one.
    __device__ __forceinline__ void load_other(const NearestTokens& dst, int first_token, int start, int stage) const {
        const int row = static_cast<int>(threadIdx.x), token = dst(start + row);
        copy_4_async(norms + stage * kNearestOther + row,
                     dst.a.inverse + (token < 0 ? dst.a.nothing : first_token + token));
        load_rows(stage, max(token, 0));
    }

    // Which column of 16 * kPairs adjacent ones of a tile an element of a product belongs to: a lane has four in a row.
    static __device__ __forceinline__ int column(int j, int e) {
        return j / 2 * 16 + lane_index() % 4 * 4 + j % 2 * 2 + e % 2;
    }

#ifdef STTM_HOST
    float own[kMT][2][DEPTH];
    const T* other;
    const float* term_at;

    void keep_own(const T* tile) {
        for (int i = 0; i < kMT; ++i)
            for (int half = 0; half < 2; ++half)
                for (int d = 0; d < DEPTH; ++d) {
                    const int row = warp_index() * kWarpSize + fragment_row(lane_index(), i, 2 * half);
                    own[i][half][d] = d < D ? to_float(tile[place_of(row, d / 8) + d % 8]) : 0.0f;
                }
    }
    void start_tile(int stage) {
        other = ring + stage * kTile;
        term_at = norms + stage * kNearestOther + lane_index() % 4 * 4;
    }
    void next_half() {
        other += kTile / 2;
        term_at += kNearestOther / 2;
    }
    void load_terms(float (&term)[4], int first) const { four(term_at + first, term); }
    void multiply(float (&acc)[kMT][2 * kPairs][4], int first) const {
        for (int i = 0; i < kMT; ++i)
            for (int j = 0; j < 2 * kPairs; ++j)
                for (int e = 0; e < 4; ++e) {
                    acc[i][j][e] = 0;
                    for (int d = 0; d < D; ++d)
                        acc[i][j][e] +=
                            own[i][e / 2][d] * to_float(other[place_of(first + column(j, e), d / 8) + d % 8]);
                }
    }
#else
    uint32_t own[kMT][kSteps][4];
    uint32_t into, at, here[4], terms, term_at;

    __device__ __forceinline__ void keep_own(const T* tile) {
        const int lane = lane_index();
        STTM_UNROLL
        for (int i = 0; i < kMT; ++i) {
            STTM_UNROLL
            for (int k = 0; k < kSteps; ++k) {
                const int row = warp_index() * kWarpSize + 16 * i + lane % 16;
                load_matrices<false>(own[i][k], shared_address(tile + place_of(row, 2 * k + lane / 16)));
            }
        }
        const int row = lane % 8 / 2 * 4 + lane / 16 * 2 + lane % 2;
        at = shared_address(ring + place_of(row, lane / 8 % 2));
    }
    __device__ __forceinline__ void start_tile(int stage) {
        STTM_UNROLL
        for (int k = 0; k < 4; ++k) here[k] = (at + stage * (kTile * int(sizeof(T)))) ^ k << 5;
        term_at = terms + stage * (kNearestOther * int(sizeof(float)));
    }
    __device__ __forceinline__ void next_half() {
        STTM_UNROLL
        for (int k = 0; k < 4; ++k) here[k] += kTile / 2 * int(sizeof(T));
        term_at += kNearestOther / 2 * int(sizeof(float));
    }
    // The norms of the lane's columns of those from `first` on.
    __device__ __forceinline__ void load_terms(float (&term)[4], int first) const {
        asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                     : "=f"(term[0]), "=f"(term[1]), "=f"(term[2]), "=f"(term[3])
                     : "r"(term_at + first * int(sizeof(float)))
                     : "memory");
    }
    // acc = the own rows of the warp times the columns from `first` on.
    __device__ __forceinline__ void multiply(float (&acc)[kMT][2 * kPairs][4], int first) const {
        STTM_UNROLL
        for (int k = 0; k < kSteps; ++k) {
            STTM_UNROLL
            for (int p = 0; p < kPairs; ++p) {
                uint32_t right[4];
                load_matrices<false>(right, here[k % 4] + ((first + 16 * p) * kRow + k / 4 * 64) * int(sizeof(T)));
                STTM_UNROLL
                for (int i = 0; i < kMT; ++i) {
                    STTM_UNROLL
                    for (int h = 0; h < 2; ++h) {
                        float (&sum)[4] = acc[i][2 * p + h];
                        if (k == 0) sum[0] = sum[1] = sum[2] = sum[3] = 0;
                        sttm::multiply<T>(sum, own[i][k], right[2 * h], right[2 * h + 1]);
                    }
                }
            }
        }
    }
#endif

    // Columns of the half of a tile from `first` on, against the best so far.
    __device__ __forceinline__ void look_at(int first, float (&best)[kMT][2], int (&best_at)[kMT][2]) const {
        float acc[kMT][2 * kPairs][4];
        multiply(acc, first);
        STTM_UNROLL
        for (int p = 0; p < kPairs; ++p) {
            float term[4];
            load_terms(term, first + 16 * p);
            STTM_UNROLL
            for (int c = 0; c < 4; ++c) {
                STTM_UNROLL
                for (int i = 0; i < kMT; ++i) {
                    STTM_UNROLL
                    for (int half = 0; half < 2; ++half) {
                        const float candidate = acc[i][2 * p + c / 2][2 * half + c % 2] * term[c];
                        if (candidate > best[i][half]) {
                            best[i][half] = candidate;
                            best_at[i][half] = first + 16 * p + c;
                        }
                    }
                }
            }
        }
        __syncwarp();
    }

    // The best of the columns [begin, end) for every row of the warp, and its place; place 0 and -inf where no
    // similarity is a number. What a lane gets is that of row `lane`.
    __device__ __forceinline__ void run(const NearestTokens& dst, int first_token, int own_token, int begin, int end,
                                        float& value, int& place) {
        const int lane = lane_index(), tiles = ceil_div(end - begin, kNearestOther);
        load_rows(kStages - 1, max(own_token, 0));
        commit_copies();
        STTM_UNROLL
        for (int stage = 0; stage + 1 < kStages; ++stage) {
            if (stage < tiles) load_other(dst, first_token, begin + stage * kNearestOther, stage);
            commit_copies();
        }
        wait_for_copies_but<kStages - 1>();
        __syncwarp();
        keep_own(ring + (kStages - 1) * kTile);

        float best[kMT][2];
        int best_at[kMT][2];  // from the lane's first column of this half of a tile on
        STTM_UNROLL
        for (int i = 0; i < kMT; ++i) {
            best[i][0] = best[i][1] = -INFINITY;
            best_at[i][0] = best_at[i][1] = 0;
        }
        int stage = 0;
        STTM_NO_UNROLL
        for (int tile = 0; tile < tiles; ++tile) {
            wait_for_copies_but<kStages - 2>();
            __syncthreads();
            const int ahead = tile + kStages - 1;
            if (ahead < tiles)
                load_other(dst, first_token, begin + ahead * kNearestOther, stage == 0 ? kStages - 1 : stage - 1);
            commit_copies();
            start_tile(stage);
            STTM_NO_UNROLL
            for (int half_tile = 0; half_tile < 2; ++half_tile) {
                STTM_UNROLL
                for (int first = 0; first < kNearestOther / 2; first += 16 * kPairs) look_at(first, best, best_at);
                next_half();
                STTM_UNROLL
                for (int i = 0; i < kMT; ++i) {
                    best_at[i][0] -= kNearestOther / 2;
                    best_at[i][1] -= kNearestOther / 2;
                }
            }
            if (++stage == kStages) stage = 0;
        }

        // Absolute places, over the lanes that share rows, and every lane to its row.
        RowBest<kMT> all;
        STTM_UNROLL
        for (int i = 0; i < kMT; ++i) {
            STTM_UNROLL
            for (int half = 0; half < 2; ++half) {
                const bool none = !(best[i][half] > -INFINITY);
                all.value[i][half] = best[i][half] == 0.0f ? 0.0f : best[i][half];  // -0 equals 0
                all.at[i][half] = none ? 0 : best_at[i][half] + begin + tiles * kNearestOther + lane % 4 * 4;
            }
        }
        all.reduce();
        value = 0, place = 0;
        STTM_UNROLL
        for (int i = 0; i < kMT; ++i) {
            STTM_UNROLL
            for (int half = 0; half < 2; ++half) {
                const float v = shuffle(all.value[i][half], lane % 8 * 4);
                const int at = shuffle(all.at[i][half], lane % 8 * 4);
                if (lane / 8 == 2 * i + half) value = v, place = at;
            }
        }
    }
};

// Which part of the dst and tile of the src of a window of an item a block has.
struct NearestBlock {
    int tile, part, window;
    int64_t item;

    __device__ __forceinline__ NearestBlock(const MatchLaunch& a, int block, int tiles, int parts)
        : tile(block % tiles),
          part(block / tiles % parts),
          window(block / tiles / parts % a.windows),
          item(block / tiles / parts / a.windows) {}
};

// One block per part of the dst and tile of the src of a window, or per tile of a sequence, or of its windows.
template <typename T, int DEPTH, bool PACKED>
__global__ void __launch_bounds__(kNearestThreads, DEPTH <= 96 ? 3 : 2)
    nearest_kernel(const MatchLaunch given, int tiles) {
    STTM_SHARED(MatchLaunch, own_parts, [1]);  // registers are for the product
    int block = static_cast<int>(blockIdx.x);
    if constexpr (PACKED) {
        MatchLaunch own_part;
        if (given.listed) {
            own_part = alone(given, block / tiles, kNearestOwn, kNearestOther);
            block %= tiles;
            tiles = max(1, ceil_div(own_part.num_src, kNearestOwn));
            if (block >= tiles) return;
        } else {
            const PackedSequence s = sequence_of(given, sequence_of_tile(given, block));
            constexpr int kEach = kNearestOwn / (kSequenceTile / 2);
            block -= s.first_tile;
            tiles = ceil_div(ceil_div(s.length, kSequenceTile), kEach);
            if (block < 0 || block % kEach != 0 || block / kEach >= tiles) return;
            block /= kEach;
            own_part = alone<T>(given, s);
        }
        if (threadIdx.x == 0) own_parts[0] = own_part;
        __syncthreads();
    }
    const MatchLaunch& a = PACKED ? own_parts[0] : given;
    const int parts = PACKED ? 1 : a.parts, thread = static_cast<int>(threadIdx.x);
    unsigned char* const shared = shared_memory<unsigned char>();
    float value;
    int place;
    {
        const NearestBlock mine(a, block, tiles, parts);
        const T* const rows = static_cast<const T*>(a.metric.data) + mine.item * a.metric.stride_b;
        const int each = ceil_div(ceil_div(a.num_dst, kNearestOther), parts) * kNearestOther;
        const int token = TokenList<false>(a, mine.item, mine.window)[mine.tile * kNearestOwn + thread];
        const int item = static_cast<int>(mine.item);
        Nearest<T, DEPTH> nearest(shared, rows, a.metric.stride_n, a.D);
        nearest.run(NearestTokens(a, item, mine.window), PACKED ? a.first_token : item * a.N, token,
                    min(mine.part * each, a.num_dst), min((mine.part + 1) * each, a.num_dst), value, place);
    }

    // What is known of the block is worked out again, rather than kept in registers meanwhile.
    const NearestBlock mine(a, anew(block), tiles, parts);
    const int at = mine.tile * kNearestOwn + thread;
    if (parts > 1) {
        unsigned long long* const best = a.best + mine.item * a.num_src + at;
        if (at < a.num_src) atomicMax(best, packed_best(value, place));
        if (!is_last(a.parts_done + mine.item * tiles + mine.tile, parts)) return;
        if (at < a.num_src) unpack_best(*static_cast<volatile unsigned long long*>(best), value, place);
    }
    const TokenList<false> src(a, mine.item, mine.window);
    const TokenList<true> dst(a, mine.item, mine.window);
    const int token = src[at];
    value *= token < 0 ? 0.0f : a.inverse[(PACKED ? a.first_token : mine.item * a.N) + token];
    if (!(value > -INFINITY)) value = -INFINITY, place = 0;
    const Found found(a, mine.item);
    found.of_src(src, dst, at, value, place);
    found.template of_others<kNearestThreads>(dst, mine.window, mine.tile, tiles);
    if (!PACKED && a.select) select_if_last<kNearestThreads>(a, mine.item, tiles * a.windows, shared);
}

template <typename T, bool PACKED>
cudaError_t launch_nearest(const MatchLaunch& a, Grid grid, int tiles, cudaStream_t stream) {
    const int for_select = a.select ? Select<kNearestThreads>::kShared + a.N * int(sizeof(float) + sizeof(int)) : 0;
    const auto run = [&](auto depth) {
        constexpr int kDepth = decltype(depth)::value;
        return launch(nearest_kernel<T, kDepth, PACKED>, grid, kNearestThreads,
                      max(Nearest<T, kDepth>::kBytes, for_select), stream, a, tiles);
    };
    if (a.D <= 64) return run(std::integral_constant<int, 64>());
    if (a.D <= 80) return run(std::integral_constant<int, 80>());
    if (a.D <= 96) return run(std::integral_constant<int, 96>());
    return run(std::integral_constant<int, kNearestDepth>());
}

}  // namespace sttm
