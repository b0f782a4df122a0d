// match: every src finds its most similar dst, the best r merge, and the index map and its CSR follow.
//
// One launch for up to kOneLaunch tokens: the block that is the last of its batch item to finish selects. More tokens
// take a second launch, in which larger blocks select, and more than kOneBlock several, of blocks for chunks of tokens.
// Where every src merges nothing is selected: the groups of dst follow from their places, and tokens are sorted by
// them. A mean over heads that many blocks would take again is taken by a launch before. Sequences that are packed take
// two launches, of blocks for the tiles of all of them.
#pragma once

#include "select.cuh"
#include "similarity.cuh"
#include "view.cuh"

namespace sttm {

constexpr int kOneLaunch = 2048;  // tokens whose scores and partners fit beside the table of the sort
constexpr int kSelectThreads = 512;
constexpr int kScoreDigits = Select<kChunkThreads>::kSteps * Select<kChunkThreads>::kDigits;

// 64 src by 128 dst; warps share the src, so that blocks are many and reuse what they load.
template <typename T, bool EXACT>
using MatchTiles = DotTiles<T, EXACT, 2, 4, 2, 4>;
constexpr int kMatchOwn = 64;
constexpr int kMatchThreads = 256;

static_assert(kSequenceTile == 2 * kMatchOwn, "every second token of a tile is src");

// A sequence, inside of the tokens and the groups whatever the table holds.
__device__ __forceinline__ PackedSequence sequence_of(const MatchArguments& a, int at) {
    PackedSequence s = a.sequences[at];
    s.start = max(0, min(s.start, a.N));
    s.length = max(0, min(s.length, a.N - s.start));
    s.first_group = max(0, min(s.first_group, a.num_groups));
    s.groups = max(0, min(s.groups, a.num_groups - s.first_group));
    return s;
}

// The arguments of a sequence as if it were alone.
template <typename T>
__device__ __forceinline__ MatchArguments alone(MatchArguments a, const PackedSequence& s) {
    a.N = s.length;
    a.num_prefix = min(a.num_prefix, s.length);
    a.num_dst = (s.length - a.num_prefix + a.num_prefix % 2) / 2;
    a.num_src = s.length - a.num_prefix - a.num_dst;
    a.metric.data = static_cast<const T*>(a.metric.data) + s.start * a.metric.stride_n;
    a.score += s.start;
    a.partner += s.start;
    return a;
}

// Which sequence a tile of all of them belongs to.
__device__ __forceinline__ int sequence_of_tile(const MatchArguments& a, int tile) {
    int low = 0;
    for (int high = a.num_sequences; high - low > 1;) {
        const int middle = (low + high) / 2;
        (a.sequences[middle].first_tile <= tile ? low : high) = middle;
    }
    return low;
}

// Tokens of one side of a window: those of a list, or every second one.
template <bool DST>
struct TokenList {
    const MatchArguments& a;
    const int* list;
    const uint8_t* mask;

    __device__ __forceinline__ TokenList(const MatchArguments& a, int64_t item, int window)
        : a(a), list(nullptr), mask(a.mask.data == nullptr ? nullptr : a.mask.data + item * a.mask.stride_b) {
        if (!a.listed) return;
        list = DST ? a.dst + item * a.stride_dst + int64_t(window) * a.num_dst
                   : a.src + item * a.stride_src + int64_t(window) * a.num_src;
    }
    // The token at a place of the list, -1 beyond its end.
    __device__ __forceinline__ int at(int place) const {
        if (place >= (DST ? a.num_dst : a.num_src)) return -1;
        const int odd = a.num_prefix % 2;
        const int token = a.listed ? list[place] : a.num_prefix + (DST ? 1 - odd : odd) + 2 * place;
        return token >= 0 && token < a.N ? token : -1;
    }
    __device__ __forceinline__ bool real(int token) const {
        return mask == nullptr || mask[token * a.mask.stride_n] != 0;
    }
    // The same if it is real, else -1.
    __device__ __forceinline__ int operator[](int place) const {
        const int token = at(place);
        return token >= 0 && real(token) ? token : -1;
    }
};

template <typename T, bool DST>
struct TokenRows {
    const TokenList<DST>& tokens;
    const T* data;

    __device__ __forceinline__ const T* operator()(int at) const {
        const int token = tokens[at];
        return token < 0 ? nullptr : data + token * tokens.a.metric.stride_n;
    }
};

// Whether every src of every item merges, whatever its score.
inline bool all_merge(const MatchArguments& a) {
    return !a.listed && a.sequences == nullptr && a.mask.data == nullptr && a.limit == nullptr &&
           a.threshold == -INFINITY && a.r >= a.num_src && a.num_dst > 0;
}

// The groups of an item, given scores and partners.
template <int THREADS>
__device__ __forceinline__ void select_item(const MatchArguments& a, int64_t item, const float* score,
                                            const int* partner, void* shared) {
    const int r = a.limit == nullptr ? a.r : min(a.r, a.limit[item]);
    const int64_t first = item * a.N;
    int* const order = a.order == nullptr ? nullptr : a.order + first;
    Select<THREADS>::run(score, partner, a.N, r, a.threshold, a.num_groups, a.num_prefix, a.index + first, order,
                         a.offsets + item * (a.num_groups + 1), a.partner + first, shared);
}

// One block per tile of the src of a window, or of a sequence. A similarity that is not a number is passed over. Leaves
// scores and partners, if `whole` scores and groups, for all src merge; if `select` groups and CSR.
template <typename T, bool EXACT, bool PACKED>
__global__ void __launch_bounds__(kMatchThreads, 2)
    nearest_kernel(const MatchArguments given, const Features f, int tiles, bool select, bool whole) {
    MatchArguments own_part;
    int first_block = 0;
    if constexpr (PACKED) {
        const PackedSequence s = sequence_of(given, sequence_of_tile(given, static_cast<int>(blockIdx.x)));
        own_part = alone<T>(given, s);
        first_block = s.first_tile;
        tiles = ceil_div(s.length, kSequenceTile);
        if (static_cast<unsigned>(blockIdx.x - first_block) >= static_cast<unsigned>(tiles)) return;
    }
    const MatchArguments& a = PACKED ? own_part : given;
    using Tiles = MatchTiles<T, EXACT>;
    static_assert(Tiles::OWN == kMatchOwn && Tiles::THREADS == kMatchThreads);
    constexpr int kMT = 2, kNT = 4, kColumnWarps = 4;
    const int blocks = tiles * a.windows;
    const int block = static_cast<int>(blockIdx.x) - first_block;
    const int64_t item = PACKED ? 0 : block / blocks;
    const int window = PACKED ? 0 : block % blocks / tiles, tile = block % tiles;
    const int thread = static_cast<int>(threadIdx.x);
    float* score = a.score + item * a.N;
    int* partner = (whole ? a.index : a.partner) + item * a.N;  // or the group
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
    if (thread < Tiles::OWN) {
        const int token = src.at(tile * Tiles::OWN + thread);
        float value = values[thread];
        int place = places[thread];
        for (int at = thread + Tiles::OWN; at < kColumnWarps * Tiles::OWN; at += Tiles::OWN)
            if (values[at] > value || (values[at] == value && places[at] < place)) {
                value = values[at];
                place = places[at];
            }
        if (token >= 0) {
            const bool real = src.real(token);
            score[token] = real ? value : -INFINITY;
            // A partner is -1 where there is no dst.
            partner[token] = whole ? min(a.num_prefix + place, a.num_groups - 1) : real ? dst[place] : kMasked;
        }
    }
    for (int64_t i = int64_t(tile) * kMatchThreads + thread; i < a.num_dst; i += int64_t(tiles) * kMatchThreads) {
        const int token = dst.at(static_cast<int>(i));
        if (token < 0) continue;
        score[token] = -INFINITY;
        partner[token] = whole             ? min(a.num_prefix + static_cast<int>(i), a.num_groups - 1)
                         : dst.real(token) ? kIsDst
                                           : kMasked;
    }
    if (tile + window == 0)
        for (int n = thread; n < a.num_prefix; n += kMatchThreads) {
            score[n] = -INFINITY;
            partner[n] = whole ? n : src.real(n) ? kIsPrefix : kMasked;
        }
    if (!PACKED && !whole && a.N > kOneBlock) {
        int* const digits = a.partner + (a.B + item) * a.N;
        for (int i = block % blocks * kMatchThreads + thread; i < kScoreDigits; i += blocks * kMatchThreads)
            digits[i] = 0;
    }
    if (PACKED || !select) return;

    // Scores before the count, and the count before the scores of the other blocks.
    __threadfence();
    __syncthreads();
    STTM_SHARED(int, last, [1]);
    if (thread == 0) last[0] = atomicAdd(a.arrived + item, 1) == blocks - 1;
    __syncthreads();
    if (last[0] == 0) return;
    __threadfence();
    int* const partners = reinterpret_cast<int*>(shared + Select<kMatchThreads>::kShared);
    float* const scores = reinterpret_cast<float*>(partners + a.N);
    for (int n = thread; n < a.N; n += kMatchThreads) {
        partners[n] =
            static_cast<volatile const int*>(partner)[n];  // past the L1 cache, which may hold what was before
        if (!whole) scores[n] = static_cast<volatile const float*>(score)[n];
    }
    __syncthreads();
    if (!whole) {
        select_item<kMatchThreads>(a, item, scores, partners, shared);
    } else if (a.order != nullptr) {
        Sort<kMatchThreads>::run(partners, a.N, a.num_groups, a.order + item * a.N,
                                 a.offsets + item * (a.num_groups + 1), a.partner + item * a.N,
                                 reinterpret_cast<int*>(shared));
    }
}

// One block per batch item.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) select_kernel(const MatchArguments a) {
    const int64_t item = blockIdx.x, first = item * a.N;
    select_item<THREADS>(a, item, a.score + first, a.partner + first, shared_memory<void>());
}

// One block per sequence. Groups and tokens are numbered through afterwards.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) select_packed_kernel(const MatchArguments a) {
    const PackedSequence s = sequence_of(a, static_cast<int>(blockIdx.x));
    int* const index = a.index + s.start;
    int* const order = a.order + s.start;
    Select<THREADS>::run(a.score + s.start, a.partner + s.start, s.length, s.limit, a.threshold, s.groups,
                         min(a.num_prefix, s.length), index, order, a.offsets + s.first_group, a.partner + s.start,
                         shared_memory<void>(), s.start, false);
    for (int n = threadIdx.x; n < s.length; n += THREADS) {
        index[n] += s.first_group;
        order[n] += s.start;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) a.offsets[a.num_groups] = a.N;
}

// mean (B, N, D) over the heads; a thread for 16 bytes of it.
template <typename T>
__global__ void __launch_bounds__(kMatchThreads) mean_kernel(const MatchArguments a, const Features f) {
    const int pieces = ceil_div(a.D, Vec<T>::size);
    const int64_t all = int64_t(a.B) * a.N * pieces, step = int64_t(gridDim.x) * kMatchThreads;
    for (int64_t at = int64_t(blockIdx.x) * kMatchThreads + threadIdx.x; at < all; at += step) {
        const int64_t row = at / pieces;
        const int d = static_cast<int>(at % pieces) * Vec<T>::size;
        const T* from =
            static_cast<const T*>(a.metric.data) + row / a.N * a.metric.stride_b + row % a.N * a.metric.stride_n;
        const Vec<T> v = features(from, f, d);
        T* to = static_cast<T*>(a.mean) + row * a.D + d;
        if (a.D % Vec<T>::size == 0) {
            v.store(to);
        } else {
            for (int e = 0; e < Vec<T>::size && d + e < a.D; ++e) to[e] = v.value[e];
        }
    }
}

template <typename T, bool EXACT>
cudaError_t launch_match(MatchArguments a, cudaStream_t stream) {
    if (a.B == 0) return cudaSuccess;
    if (a.mean != nullptr) {
        const int64_t pieces = times(int64_t(a.B) * a.N, ceil_div(a.D, Vec<T>::size));
        const Grid grid{min(ceil_div64(pieces, kMatchThreads), kMostWalkers)};
        const cudaError_t error =
            launch(mean_kernel<T>, grid, kMatchThreads, 0, stream, a, features_of<T>(a.metric, a.D));
        if (error != cudaSuccess) return error;
        a.metric = Metric{a.mean, 1, int64_t(a.N) * a.D, 0, a.D, 1};
    }
    if (a.sequences != nullptr) {
        constexpr int kShared = MatchTiles<T, EXACT>::BYTES + MatchTiles<T, EXACT>::OTHER * int(sizeof(int));
        const cudaError_t error = launch(nearest_kernel<T, EXACT, true>, Grid{a.tiles}, kMatchThreads, kShared, stream,
                                         a, features_of<T>(a.metric, a.D), 0, false, false);
        if (error != cudaSuccess) return error;
        return launch(select_packed_kernel<kSelectThreads>, Grid{a.num_sequences}, kSelectThreads,
                      Select<kSelectThreads>::kShared, stream, a);
    }
    const bool whole = all_merge(a), select = a.N <= kOneLaunch;
    const int tiles = max(1, ceil_div(a.num_src, kMatchOwn));
    const Grid grid{times(int64_t(a.B) * a.windows, tiles)};
    const int for_tiles = MatchTiles<T, EXACT>::BYTES + MatchTiles<T, EXACT>::OTHER * int(sizeof(int));
    const int for_select = Select<kMatchThreads>::kShared + min(a.N, kOneLaunch) * int(sizeof(float) + sizeof(int));
    if (select) {
        const cudaError_t error = cudaMemsetAsync(a.arrived, 0, a.B * sizeof(int), stream);
        if (error != cudaSuccess) return error;
    }
    const int shared = select ? max(for_tiles, for_select) : for_tiles;
    cudaError_t error = launch(nearest_kernel<T, EXACT, false>, grid, kMatchThreads, shared, stream, a,
                               features_of<T>(a.metric, a.D), tiles, select, whole);
    if (error != cudaSuccess || select) return error;
    if (!whole && a.N <= kOneBlock)
        return launch(select_kernel<kSelectThreads>, Grid{a.B}, kSelectThreads, Select<kSelectThreads>::kShared, stream,
                      a);
    if (!whole) {
        error = select_by_chunks({a.score, a.partner, a.limit, a.N, a.num_groups, a.num_prefix, a.r, 0, a.threshold,
                                  a.index, a.partner + int64_t(a.B) * a.N},
                                 a.B, stream);
        if (error != cudaSuccess) return error;
    }
    if (a.order == nullptr) return cudaSuccess;
    return csr(a.index, a.B, a.N, a.num_groups, a.order, a.offsets, a.partner, stream);
}

}  // namespace sttm
