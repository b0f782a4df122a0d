// From the best partner of every src token to the groups of all tokens: top-r, index map and CSR. One block for an item
// of up to kOneBlock tokens, else a block for every chunk of its tokens, in several launches.
#pragma once

#include "csr.cuh"

namespace sttm {

// In place of a partner: a src token that has no dst token to go to, a dst token, a prefix token, no real token.
constexpr int kNoPartner = -1;
constexpr int kIsDst = -2;
constexpr int kIsPrefix = -3;
constexpr int kMasked = -4;
constexpr int kFirstStay = -5;  // less k: a token that stays in group k

// Of some tokens: src above the threshold, src at it, all src, all dst.
struct Counts {
    int above, ties, src, dst;

    __device__ __forceinline__ void add(const Counts& other) {
        above += other.above, ties += other.ties, src += other.src, dst += other.dst;
    }
};

template <int THREADS>
struct Select {
    static constexpr int kWarps = THREADS / kWarpSize;
    static constexpr int kBits = 11, kDigits = 1 << kBits;  // a score has three digits, the last of ten bits
    static constexpr int kSteps = 3;
    static constexpr int kEach = ceil_div(kDigits, THREADS);

    struct Shared {
        int histogram[kDigits];
        Counts of_warp[kWarps];
        int digit, need;
    };
    static constexpr int kShared = Sort<THREADS>::kShared;
    static_assert(sizeof(Shared) <= kShared, "shares its memory with the sort");

    // Of the r-th highest key the first digits, and how many of the tokens that have exactly these merge.
    struct Threshold {
        unsigned key = 0;
        int need, bits = 0;
        bool all = false;  // no more than r have a partner: all merge

        __device__ __forceinline__ explicit Threshold(int r) : need(r) {}
        __device__ __forceinline__ int width() const { return min(kBits, 32 - bits); }
        __device__ __forceinline__ int shift() const { return 32 - bits - width(); }
    };

    // Unsigned integers in the order of the scores; -0 equals 0.
    static __device__ unsigned key_of(float score) {
        const unsigned bits = __float_as_uint(score == 0.0f ? 0.0f : score);
        return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
    }

    // Fills `index` (N) and, unless `order` is null, `order` (N) and `offsets` (K + 1) of one batch item, of which at
    // most r tokens merge, with a score above `least` unless that is -inf; all THREADS threads of a block call it.
    // `other` (N) is scratch, `partner` may be the same memory; `shared` has kShared bytes. `base` and `last` as in
    // Sort.
    static __device__ __attribute__((noinline)) void run(const float* score, const int* partner, int N, int r,
                                                         float least, int K, int num_prefix, int* index, int* order,
                                                         int* offsets, int* other, void* shared, int base = 0,
                                                         bool last = true) {
        Shared& s = *static_cast<Shared*>(shared);
        Threshold least_key(r);
        for (int step = 0; step < kSteps && r > 0 && !least_key.all; ++step) {
            for (int at = threadIdx.x; at < kDigits; at += THREADS) s.histogram[at] = 0;
            __syncthreads();
            add_digits(score, partner, 0, N, least_key, s.histogram);
            __syncthreads();
            next_digit(least_key, s.histogram, s);
        }
        finish(least_key, r, least);
        const Counts all = count(score, partner, 0, N, least_key.key, s);
        number_groups(score, partner, 0, N, K, num_prefix, least_key, all, Counts{}, index, s);
        __syncthreads();
        follow_partners(partner, 0, N, N, index);
        if (order == nullptr) return;
        __syncthreads();
        Sort<THREADS>::run(index, N, K, order, offsets, other, static_cast<int*>(shared), base, last);
    }

    // Counts the next digit of all tokens [begin, end) that have the digits found so far.
    static __device__ void add_digits(const float* score, const int* partner, int begin, int end,
                                      const Threshold& found, int* histogram) {
        const int width = found.width(), shift = found.shift();
        for (int start = begin + threadIdx.x; start < end; start += THREADS * kAhead) {
            unsigned key[kAhead];
            bool counts[kAhead];
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                const int n = start + THREADS * i;
                counts[i] = n < end && partner[n] >= 0;
                key[i] = n < end ? key_of(score[n]) : 0;
            }
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i)
                if (counts[i] && (found.bits == 0 || key[i] >> (shift + width) == found.key))
                    atomicAdd(histogram + (key[i] >> shift & ((1u << width) - 1)), 1);
        }
    }

    // The digit behind which are fewer than need tokens, and with it at least need. Ends with a barrier.
    static __device__ void next_digit(Threshold& found, const int* histogram, Shared& s) {
        const int highest = kDigits - 1 - kEach * int(threadIdx.x);  // thread 0 has the highest digits
        int counts[kEach], sum = 0;
        STTM_UNROLL
        for (int i = 0; i < kEach; ++i) {
            counts[i] = highest - i >= 0 ? histogram[highest - i] : 0;
            sum += counts[i];
        }
        if (threadIdx.x == 0) s.digit = 0;
        int total;
        int higher = block_exclusive_sum<THREADS>(sum, total);
        STTM_UNROLL
        for (int i = 0; i < kEach; ++i) {
            if (higher < found.need && found.need <= higher + counts[i]) {
                s.digit = highest - i;
                s.need = found.need - higher;
            }
            higher += counts[i];
        }
        __syncthreads();
        if (found.bits == 0 && total <= found.need) {
            found.all = true;
        } else {
            found.key = found.key << found.width() | unsigned(s.digit);
            found.need = s.need;
            found.bits += found.width();
        }
        __syncthreads();
    }

    // When all digits are found: the key of `least` if that is not below.
    static __device__ void finish(Threshold& found, int r, float least) {
        if (r <= 0) found.key = ~0u;
        if (least == -INFINITY || found.key > key_of(least)) return;
        found.key = key_of(least);
        found.need = 0;
    }

    // What warps count of the tokens [begin, end), each of its own: left in s.of_warp, and the sum returned. Ends with
    // a barrier.
    static __device__ Counts count(const float* score, const int* partner, int begin, int end, unsigned threshold,
                                   Shared& s) {
        const typename Sort<THREADS>::Segment mine(begin, end);
        Counts counts{};
        for (int start = mine.first; start < mine.end; start += kWarpSize * kAhead) {
            const Tokens tokens(score, partner, start, mine.end, threshold);
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                counts.above += __popc(ballot(tokens.above(i)));
                counts.ties += __popc(ballot(tokens.tie(i)));
                counts.src += __popc(ballot(tokens.src(i)));
                counts.dst += __popc(ballot(tokens.dst(i)));
            }
        }
        if (lane_index() == 0) s.of_warp[warp_index()] = counts;
        __syncthreads();
        Counts all{};
        for (int w = 0; w < kWarps; ++w) all.add(s.of_warp[w]);
        return all;
    }

    // Groups of the tokens [begin, end) but the merged ones, whose index is -1 until that of their partner is known,
    // given what was counted of all and of those before `begin`, and by the warps of these.
    static __device__ void number_groups(const float* score, const int* partner, int begin, int end, int K,
                                         int num_prefix, const Threshold& found, const Counts& all, Counts before,
                                         int* index, const Shared& s) {
        const typename Sort<THREADS>::Segment mine(begin, end);
        const int lane = lane_index(), need = found.need;
        const unsigned lower = lower_lanes();
        for (int w = 0; w < warp_index(); ++w) before.add(s.of_warp[w]);

        int ties = before.ties, dst = before.dst, unmerged = before.src - before.above - min(ties, need);
        const int first_dst = num_prefix + all.src - all.above - min(all.ties, need);
        for (int start = mine.first; start < mine.end; start += kWarpSize * kAhead) {
            const Tokens tokens(score, partner, start, mine.end, found.key);
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                const int n = start + kWarpSize * i + lane;
                const unsigned tied = ballot(tokens.tie(i));
                const bool merges = tokens.above(i) || (tokens.tie(i) && ties + __popc(tied & lower) < need);
                const unsigned stay = ballot(tokens.src(i) && !merges), dsts = ballot(tokens.dst(i));
                int group = tokens.partner[i] <= kFirstStay ? kFirstStay - tokens.partner[i] : n;  // of the prefix
                if (tokens.src(i)) group = num_prefix + unmerged + __popc(stay & lower);
                if (tokens.dst(i)) group = first_dst + dst + __popc(dsts & lower);
                if (tokens.partner[i] == kMasked) group = -1;
                if (n < mine.end) index[n] = merges ? -1 : min(group, K - 1);
                ties += __popc(tied);
                unmerged += __popc(stay);
                dst += __popc(dsts);
            }
        }
    }

    // The groups of merged tokens of [begin, end), those of their partners, which are known.
    static __device__ void follow_partners(const int* partner, int begin, int end, int N, int* index) {
        for (int start = begin + threadIdx.x; start < end; start += THREADS * kAhead) {
            int to[kAhead];
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                const int n = start + THREADS * i;
                to[i] = n < end && index[n] < 0 ? partner[n] : -1;
            }
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i)
                if (to[i] >= 0 && to[i] < N) index[start + THREADS * i] = index[to[i]];
        }
    }

    // The next kAhead tokens of a lane, read at once; past the end as if of the prefix.
    struct Tokens {
        unsigned key[kAhead], threshold;
        int partner[kAhead];

        __device__ __forceinline__ Tokens(const float* score, const int* partners, int start, int end,
                                          unsigned threshold)
            : threshold(threshold) {
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                const int n = start + kWarpSize * i + lane_index();
                partner[i] = n < end ? partners[n] : kIsPrefix;
                key[i] = n < end ? key_of(score[n]) : 0;
            }
        }
        __device__ bool above(int i) const { return partner[i] >= 0 && key[i] > threshold; }
        __device__ bool tie(int i) const { return partner[i] >= 0 && key[i] == threshold; }
        __device__ bool src(int i) const { return partner[i] >= kNoPartner; }
        __device__ bool dst(int i) const { return partner[i] == kIsDst; }
    };
};

// What selection by chunks works on. Of `room` (B, N) an item has kSteps histograms, 0 at the beginning, and
// behind them the Counts of its chunks.
struct SelectArguments {
    const float* score;
    const int *partner, *limit;
    int N, K, num_prefix, r, step;
    float least;
    int *index, *room;
};

template <int THREADS>
struct SelectChunk : Chunk {
    using S = Select<THREADS>;
    const SelectArguments& a;
    typename S::Shared& s;
    const float* score;
    const int* partner;
    int *index, *histograms;
    Counts* counts;
    int r;

    __device__ __forceinline__ explicit SelectChunk(const SelectArguments& a)
        : Chunk(a.N),
          a(a),
          s(*shared_memory<typename S::Shared>()),
          score(a.score + item * a.N),
          partner(a.partner + item * a.N),
          index(a.index + item * a.N),
          histograms(a.room + item * a.N),
          counts(reinterpret_cast<Counts*>(histograms + S::kSteps * S::kDigits)),
          r(a.limit == nullptr ? a.r : min(a.r, a.limit[item])) {}

    // What so many histograms say.
    __device__ __forceinline__ typename S::Threshold found(int steps) const {
        typename S::Threshold found(r);
        for (int step = 0; step < steps && r > 0 && !found.all; ++step)
            S::next_digit(found, histograms + step * S::kDigits, s);
        if (steps == S::kSteps) S::finish(found, r, a.least);
        return found;
    }
};

// One block per chunk, for every digit of the scores.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) score_digits_kernel(const SelectArguments a) {
    using S = Select<THREADS>;
    const SelectChunk<THREADS> mine(a);
    const typename S::Threshold found = mine.found(a.step);
    if (mine.r <= 0 || found.all) return;
    int* const here = mine.s.histogram;
    for (int at = threadIdx.x; at < S::kDigits; at += THREADS) here[at] = 0;
    __syncthreads();
    S::add_digits(mine.score, mine.partner, mine.begin, mine.end, found, here);
    __syncthreads();
    for (int at = threadIdx.x; at < S::kDigits; at += THREADS)
        if (here[at] != 0) atomicAdd(mine.histograms + a.step * S::kDigits + at, here[at]);
}

template <int THREADS>
__global__ void __launch_bounds__(THREADS) count_chunks_kernel(const SelectArguments a) {
    using S = Select<THREADS>;
    const SelectChunk<THREADS> mine(a);
    const unsigned threshold = mine.found(S::kSteps).key;
    const Counts counts = S::count(mine.score, mine.partner, mine.begin, mine.end, threshold, mine.s);
    if (threadIdx.x == 0) mine.counts[mine.at] = counts;
}

template <int THREADS>
__global__ void __launch_bounds__(THREADS) number_chunks_kernel(const SelectArguments a) {
    using S = Select<THREADS>;
    const SelectChunk<THREADS> mine(a);
    const typename S::Threshold found = mine.found(S::kSteps);
    S::count(mine.score, mine.partner, mine.begin, mine.end, found.key, mine.s);
    Counts all{}, before{};
    for (int c = 0; c < mine.count; ++c) {
        if (c < mine.at) before.add(mine.counts[c]);
        all.add(mine.counts[c]);
    }
    S::number_groups(mine.score, mine.partner, mine.begin, mine.end, a.K, a.num_prefix, found, all, before, mine.index,
                     mine.s);
}

template <int THREADS>
__global__ void __launch_bounds__(THREADS) follow_partners_kernel(const SelectArguments a) {
    const SelectChunk<THREADS> mine(a);
    Select<THREADS>::follow_partners(mine.partner, mine.begin, mine.end, a.N, mine.index);
}

// `index` of B items of more than kOneBlock tokens.
inline cudaError_t select_by_chunks(SelectArguments a, int64_t B, cudaStream_t stream) {
    using S = Select<kChunkThreads>;
    const Grid chunks{times(B, Chunks(a.N).count)};
    const auto run = [&](void (*kernel)(SelectArguments)) {
        return launch(kernel, chunks, kChunkThreads, sizeof(S::Shared), stream, a);
    };
    for (a.step = 0; a.step < S::kSteps; ++a.step) {
        const cudaError_t error = run(score_digits_kernel<kChunkThreads>);
        if (error != cudaSuccess) return error;
    }
    for (const auto kernel : {count_chunks_kernel<kChunkThreads>, number_chunks_kernel<kChunkThreads>,
                              follow_partners_kernel<kChunkThreads>}) {
        const cudaError_t error = run(kernel);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

}  // namespace sttm
