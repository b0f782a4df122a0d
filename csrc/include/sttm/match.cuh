// match: every src finds its most similar dst, the best r merge, and the index map and its CSR follow.
//
// Two launches for up to kOneLaunch tokens: one reads the metric for means over heads and norms, and of the next the
// block that is the last of its batch item to finish selects. More tokens take a third launch, in which larger blocks
// select, and more than kOneBlock several, of blocks for chunks of tokens. Where every src merges nothing is selected:
// the groups of dst follow from their places, and tokens are sorted by them. Sequences that are packed take three
// launches, of blocks for the tiles of all of them, or of the windows that lists name.
#pragma once

#include "nearest.cuh"

namespace sttm {

constexpr int kSelectThreads = 512;

// 64 src by 128 dst; warps share the src, so that blocks are many and reuse what they load.
template <typename T, bool EXACT>
using MatchTiles = DotTiles<T, EXACT, 2, 4, 2, 4>;
constexpr int kMatchOwn = 64;
constexpr int kMatchThreads = 256;

static_assert(kSequenceTile == 2 * kMatchOwn, "every second token of a tile is src");

constexpr int64_t kEnoughBlocks = 264;  // two for each multiprocessor of a large GPU: dst are not shared out further

// Features of any dtype, depth and strides. One block per tile of the src of a window, or of a sequence. A similarity
// that is not a number is passed over.
template <typename T, bool EXACT, bool PACKED>
__global__ void __launch_bounds__(kMatchThreads, 2)
    nearest_any_kernel(const MatchLaunch given, const Features f, int tiles) {
    using Tiles = MatchTiles<T, EXACT>;
    MatchLaunch own_part;
    int block = static_cast<int>(blockIdx.x);
    if constexpr (PACKED) {
        if (given.listed) {
            own_part = alone(given, block / tiles, Tiles::OWN, Tiles::OTHER);
            block %= tiles;
            tiles = max(1, ceil_div(own_part.num_src, Tiles::OWN));
        } else {
            const PackedSequence s = sequence_of(given, sequence_of_tile(given, block));
            own_part = alone<T>(given, s);
            block -= s.first_tile;
            tiles = ceil_div(s.length, kSequenceTile);
        }
        if (block < 0 || block >= tiles) return;
    }
    const MatchLaunch& a = PACKED ? own_part : given;
    static_assert(Tiles::OWN == kMatchOwn && Tiles::THREADS == kMatchThreads);
    constexpr int kMT = 2, kNT = 4, kColumnWarps = 4;
    const int blocks = tiles * a.windows;
    const int64_t item = PACKED ? 0 : block / blocks;
    const int window = PACKED ? 0 : block % blocks / tiles, tile = block % tiles;
    const int thread = static_cast<int>(threadIdx.x);
    const TokenList<false> src(a, item, window);
    const TokenList<true> dst(a, item, window);
    const T* metric = static_cast<const T*>(a.metric.data) + item * a.metric.stride_b;
    const TokenRows<T, false> own{src, metric};
    const TokenRows<T, true> other{dst, metric};

    unsigned char* const shared = shared_memory<unsigned char>();
    int* const tokens = reinterpret_cast<int*>(shared + Tiles::BYTES);  // of the dst of a tile
    Tiles dots(shared);
    RowBest<kMT> best;
    best.clear();
    for (int start = 0; start < a.num_dst; start += Tiles::OTHER) {
        float acc[kMT][kNT][4];
        clear(acc);
        dots.multiply(acc, own, f, tile * Tiles::OWN, other, f, start, Similarity::cosine,
                      start + Tiles::OTHER < a.num_dst, [&] {
                          if (thread < Tiles::OTHER) tokens[thread] = dst[start + thread];
                      });
        STTM_UNROLL
        for (int j = 0; j < kNT; ++j) {
            STTM_UNROLL
            for (int e = 0; e < 4; ++e) {
                const int column = dots.column(j, e);
                if (tokens[column] < 0) continue;
                STTM_UNROLL
                for (int i = 0; i < kMT; ++i)
                    best.offer(i, e,
                               similarity_of(acc[i][j][e], dots.own_term[dots.row(i, e)], dots.other_term[column], 1.0f,
                                             Similarity::cosine),
                               start + column);
            }
        }
    }
    best.reduce();

    // Over the warps that share the rows, the lowest position on a tie.
    __syncthreads();
    float* const values = reinterpret_cast<float*>(shared);
    int* const places = reinterpret_cast<int*>(values + kColumnWarps * Tiles::OWN);
    if (lane_index() % 4 == 0) {
        STTM_UNROLL
        for (int i = 0; i < kMT; ++i) {
            STTM_UNROLL
            for (int e = 0; e < 4; e += 2) {
                const int at = warp_index() % kColumnWarps * Tiles::OWN + dots.row(i, e);
                values[at] = best.value[i][e / 2];
                places[at] = best.at[i][e / 2];
            }
        }
    }
    __syncthreads();
    const Found found(a, item);
    if (thread < Tiles::OWN) {
        float value = values[thread];
        int place = places[thread];
        for (int at = thread + Tiles::OWN; at < kColumnWarps * Tiles::OWN; at += Tiles::OWN)
            if (values[at] > value || (values[at] == value && places[at] < place)) {
                value = values[at];
                place = places[at];
            }
        found.of_src(src, dst, tile * Tiles::OWN + thread, value, place);
    }
    found.template of_others<kMatchThreads>(dst, window, tile, tiles);
    if (!PACKED && a.select) select_if_last<kMatchThreads>(a, item, blocks, shared);
}

// One block per batch item.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) select_kernel(const MatchLaunch a) {
    const int64_t item = blockIdx.x, first = item * a.N;
    select_item<THREADS>(a, item, a.score + first, a.partner + first, shared_memory<void>());
}

// What was found of the tokens of a sequence by lists, as if it were alone: partners counted from its start, and for
// tokens of no list the group that they stay in. Returns how many these are.
template <int THREADS>
__device__ __forceinline__ int settle(int* partner, const PackedSequence& s) {
    int before = 0;
    for (int first = 0; first < s.length; first += THREADS) {
        const int n = first + static_cast<int>(threadIdx.x);
        const int found = n < s.length ? partner[n] : kIsDst;
        const bool stays = found == kIsPrefix;
        int here;
        const int rank = block_exclusive_sum<THREADS>(stays, here);
        if (stays) partner[n] = kFirstStay - (before + rank);
        if (found >= 0) partner[n] = found >= s.start && found - s.start < s.length ? found - s.start : kNoPartner;
        before += here;
    }
    __syncthreads();
    return before;
}

// One block per sequence. Groups and tokens are numbered through afterwards.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) select_packed_kernel(const MatchLaunch a) {
    const PackedSequence s = sequence_of(a, static_cast<int>(blockIdx.x));
    int* const index = a.index + s.start;
    int* const order = a.order + s.start;
    const int stay = a.listed ? settle<THREADS>(a.partner + s.start, s) : min(a.num_prefix, s.length);
    Select<THREADS>::run(a.score + s.start, a.partner + s.start, s.length, s.limit, a.threshold, s.groups, stay, index,
                         order, a.offsets + s.first_group, a.partner + s.start, shared_memory<void>(), s.start, false);
    for (int n = threadIdx.x; n < s.length; n += THREADS) {
        index[n] += s.first_group;
        order[n] += s.start;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) a.offsets[a.num_groups] = a.N;
}

template <typename T, bool EXACT, bool PACKED>
cudaError_t launch_any(const MatchLaunch& a, Grid grid, int tiles, cudaStream_t stream) {
    constexpr int kTiles = MatchTiles<T, EXACT>::BYTES + MatchTiles<T, EXACT>::OTHER * int(sizeof(int));
    const int for_select = a.select ? Select<kMatchThreads>::kShared + a.N * int(sizeof(float) + sizeof(int)) : 0;
    return launch(nearest_any_kernel<T, EXACT, PACKED>, grid, kMatchThreads, max(kTiles, for_select), stream, a,
                  features_of<T>(a.metric, a.D), tiles);
}

// Whether every row can be read 16 bytes at a time, and rows and places of lists be found with 32 bits.
template <typename T>
bool is_plain(const MatchArguments& a, const Metric& metric, int D) {
    constexpr int64_t kMost = INT32_MAX / 8;
    return int64_t(a.B) * a.N < kMost && a.B * a.stride_dst < kMost && metric.heads == 1 &&
           features_of<T>(metric, D).vectors && D % Vec<T>::size == 0 && metric.stride_n >= 0 &&
           metric.stride_n < kMost;
}

// Lays out the scratch, at `memory`. What must be 0 begins with `best`; returns its end.
inline int* lay_out(MatchLaunch& a, int32_t* memory, int tiles) {
    const int64_t tokens = int64_t(a.B) * a.N;
    a.best = reinterpret_cast<unsigned long long*>(memory);
    memory += a.parts > 1 ? 2 * int64_t(a.B) * a.num_src : 0;
    a.parts_done = memory;
    memory += a.parts > 1 ? int64_t(a.B) * tiles : 0;
    a.arrived = memory;
    memory += a.select ? a.B : 0;
    a.room = memory;
    int* const end = a.room + (a.N > kOneBlock && a.sequences == nullptr && !a.whole ? tokens : 0);
    a.partner = a.room + tokens;
    a.inverse = reinterpret_cast<float*>(a.partner + tokens);
    a.nothing = static_cast<int>(tokens);
    return end;
}

template <typename T, bool EXACT>
cudaError_t launch_match(const MatchArguments& given, cudaStream_t stream) {
    if (given.B == 0 || given.N == 0) return cudaSuccess;
    MatchLaunch a{};
    static_cast<MatchArguments&>(a) = given;
    const bool packed = a.sequences != nullptr;
    const Metric plain{a.mean, 1, int64_t(a.N) * mean_pitch(a.D), 0, mean_pitch(a.D), 1};
    const Metric& read = a.mean == nullptr ? a.metric : plain;
    const bool halves = sizeof(T) == 2 && a.D <= kNearestDepth && is_plain<T>(a, read, a.mean == nullptr ? a.D : 8);
    const int tiles = max(1, ceil_div(a.num_src, halves ? kNearestOwn : kMatchOwn));
    const int64_t blocks = times(int64_t(a.B) * a.windows, tiles);
    a.whole = all_merge(a);
    a.select = !packed && a.N <= kOneLaunch;
    a.parts = 1;
    if (halves && !a.listed && !packed)
        a.parts = static_cast<int>(min(ceil_div64(kEnoughBlocks, blocks), int64_t(ceil_div(a.num_dst, kNearestOther))));
    a.parts = max(a.parts, 1);
    const Grid grid{packed && !a.listed ? a.tiles : times(blocks, a.parts)};
    grid.checked();  // before anything is written
    int* const end = lay_out(a, given.partner, tiles);
    int* const zero = reinterpret_cast<int*>(a.best);
    cudaError_t error = launch_rows<T>(a, zero, end - zero, halves, stream);
    if (error != cudaSuccess) return error;
    if (a.mean != nullptr) a.metric = plain, a.D = mean_pitch(a.D);

    const auto nearest = [&](auto is_packed) {
        constexpr bool kPacked = decltype(is_packed)::value;
        if constexpr (sizeof(T) == 2) {
            if (halves) return launch_nearest<T, kPacked>(a, grid, tiles, stream);
        }
        return launch_any<T, EXACT, kPacked>(a, grid, tiles, stream);
    };
    error = packed ? nearest(std::true_type()) : nearest(std::false_type());
    if (error != cudaSuccess || a.select) return error;
    if (packed)
        return launch(select_packed_kernel<kSelectThreads>, Grid{a.num_sequences}, kSelectThreads,
                      Select<kSelectThreads>::kShared, stream, a);
    if (!a.whole && a.N <= kOneBlock)
        return launch(select_kernel<kSelectThreads>, Grid{a.B}, kSelectThreads, Select<kSelectThreads>::kShared, stream,
                      a);
    if (!a.whole) {
        error = select_by_chunks(
            {a.score, a.partner, a.limit, a.N, a.num_groups, a.num_prefix, a.r, 0, a.threshold, a.index, a.room}, a.B,
            stream);
        if (error != cudaSuccess) return error;
    }
    if (a.order == nullptr) return cudaSuccess;
    return csr(a.index, a.B, a.N, a.num_groups, a.order, a.offsets, a.room, stream);
}

}  // namespace sttm
