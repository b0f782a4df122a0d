// What the kernels of match share: which tokens are src and dst of a window or a sequence, and where their best
// partners, or groups, are left.
#pragma once

#include "select.cuh"
#include "similarity.cuh"
#include "view.cuh"

namespace sttm {

// Tokens whose groups the block finds that is the last of its batch item: more take a launch of larger blocks.
constexpr int kOneLaunch = 1024;

// The scratch of a launch, and what is decided before it.
struct MatchLaunch : MatchArguments {
    float* inverse;                 // (B, N) inverse norms of the tokens, NaN of masked ones, and behind them a NaN
    int nothing, first_token;       // where that is, and the first token of a sequence
    unsigned long long* best;       // (B, num_src) of what parts of the dst found: see packed_best
    int32_t *parts_done, *arrived;  // (B, tiles), (B): blocks that have finished
    int32_t* room;                  // (B, N) for selection by chunks; with partner behind it what csr takes
    int parts;                      // of the dst, a block for each
    bool select;                    // the last block of an item finds the groups
    bool whole;                     // every src merges, whatever its score
};

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
__device__ __forceinline__ MatchLaunch alone(MatchLaunch a, const PackedSequence& s) {
    a.N = s.length;
    a.num_prefix = min(a.num_prefix, s.length);
    a.num_dst = (s.length - a.num_prefix + a.num_prefix % 2) / 2;
    a.num_src = s.length - a.num_prefix - a.num_dst;
    a.metric.data = static_cast<const T*>(a.metric.data) + s.start * a.metric.stride_n;
    a.score += s.start;
    a.partner += s.start;
    a.first_token = s.start;
    return a;
}

// How many tiles of so many places of a list have tokens, which come first. Every lane of a warp must call.
__device__ __forceinline__ int tiles_with_tokens(const int* list, int count, int places) {
    int tiles = 0;
    for (int64_t first = 0; first < count; first += int64_t(kWarpSize) * places) {
        const int64_t at = first + int64_t(lane_index()) * places;
        const unsigned there = ballot(at < count && list[at] >= 0);
        tiles += __popc(there);
        if (there != kAllLanes) break;
    }
    return tiles;
}

// The arguments of a window of the lists of all sequences, in which tokens have their numbers of the row, without what
// pads its lists beyond the tiles of `own` src and `other` dst.
__device__ __forceinline__ MatchLaunch alone(MatchLaunch a, int window, int own, int other) {
    a.src += int64_t(window) * a.num_src;
    a.dst += int64_t(window) * a.num_dst;
    a.num_src = min(tiles_with_tokens(a.src, a.num_src, own) * own, a.num_src);
    a.num_dst = min(tiles_with_tokens(a.dst, a.num_dst, other) * other, a.num_dst);
    a.windows = 1;
    a.num_prefix = 0;
    a.first_token = 0;
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

// Scores in the order of unsigned integers, and among equals the lower place first: what a maximum finds. 0 is below
// all of them.
__device__ __forceinline__ unsigned long long packed_best(float value, int place) {
    const unsigned key = Select<kChunkThreads>::key_of(value), lower = ~static_cast<unsigned>(place);
#ifdef STTM_HOST
    return static_cast<unsigned long long>(key) << 32 | lower;
#else
    unsigned long long packed;
    asm("mov.b64 %0, {%1, %2};" : "=l"(packed) : "r"(lower), "r"(key));
    return packed;
#endif
}
__device__ __forceinline__ void unpack_best(unsigned long long packed, float& value, int& place) {
    const unsigned key = static_cast<unsigned>(packed >> 32);
    value = __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key);
    place = static_cast<int>(~static_cast<unsigned>(packed));
}

// Where the score of every token of an item goes, and its partner or group.
struct Found {
    const MatchLaunch& a;
    float* score;
    int* partner;

    __device__ __forceinline__ Found(const MatchLaunch& a, int64_t item)
        : a(a), score(a.score + item * a.N), partner((a.whole ? a.index : a.partner) + item * a.N) {}

    // Of a src, given the place of its best dst.
    __device__ __forceinline__ void of_src(const TokenList<false>& src, const TokenList<true>& dst, int at, float value,
                                           int place) const {
        const int token = src.at(at);
        if (token < 0) return;
        const bool real = src.real(token);
        score[token] = real ? value : -INFINITY;
        // A partner is -1 where there is no dst.
        partner[token] = a.whole ? group_of_dst(place) : real ? dst[place] : kMasked;
    }
    // Of dst and prefix, shared out among the blocks of an item: `tile` is one of `tiles` of the window.
    template <int THREADS>
    __device__ __forceinline__ void of_others(const TokenList<true>& dst, int window, int tile, int tiles) const {
        const int thread = static_cast<int>(threadIdx.x);
        for (int64_t i = int64_t(tile) * THREADS + thread; i < a.num_dst; i += int64_t(tiles) * THREADS) {
            const int token = dst.at(static_cast<int>(i));
            if (token < 0) continue;
            score[token] = -INFINITY;
            partner[token] = a.whole ? group_of_dst(static_cast<int>(i)) : dst.real(token) ? kIsDst : kMasked;
        }
        if (tile + window == 0)
            for (int n = thread; n < a.num_prefix; n += THREADS) {
                score[n] = -INFINITY;
                partner[n] = a.whole ? n : dst.real(n) ? kIsPrefix : kMasked;
            }
    }

private:
    __device__ __forceinline__ int group_of_dst(int place) const { return min(a.num_prefix + place, a.num_groups - 1); }
};

// Whether this block is the last of so many to come here; what the others wrote before is seen after it.
__device__ __forceinline__ bool is_last(int* arrived, int blocks) {
    __threadfence();
    __syncthreads();
    STTM_SHARED(int, last, [1]);
    if (threadIdx.x == 0) last[0] = atomicAdd(arrived, 1) == blocks - 1;
    __syncthreads();
    const bool found = last[0] != 0;
    __threadfence();
    return found;
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

// The same by the last of the `blocks` of an item, of what they have found.
template <int THREADS>
__device__ __forceinline__ void select_if_last(const MatchLaunch& a, int64_t item, int blocks, unsigned char* shared) {
    if (!is_last(a.arrived + item, blocks)) return;
    const Found found(a, item);
    int* const partners = reinterpret_cast<int*>(shared + Select<THREADS>::kShared);
    float* const scores = reinterpret_cast<float*>(partners + a.N);
    for (int n = threadIdx.x; n < a.N; n += THREADS) {
        partners[n] = static_cast<volatile const int*>(found.partner)[n];  // past the L1 cache, which may hold less
        if (!a.whole) scores[n] = static_cast<volatile const float*>(found.score)[n];
    }
    __syncthreads();
    if (!a.whole) {
        select_item<THREADS>(a, item, scores, partners, shared);
    } else if (a.order != nullptr) {
        Sort<THREADS>::run(partners, a.N, a.num_groups, a.order + item * a.N, a.offsets + item * (a.num_groups + 1),
                           a.partner + item * a.N, reinterpret_cast<int*>(shared));
    }
}

}  // namespace sttm
