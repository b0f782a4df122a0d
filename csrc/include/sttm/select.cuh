// From the best partner of every src token to the groups of all tokens: top-r, index map and CSR, by one block.
#pragma once

#include "csr.cuh"

namespace sttm {

// In place of a partner: a src token that has no dst token to go to, a dst token, a prefix token, no real token.
constexpr int kNoPartner = -1;
constexpr int kIsDst = -2;
constexpr int kIsPrefix = -3;
constexpr int kMasked = -4;

template <int THREADS>
struct Select {
    static constexpr int kWarps = THREADS / kWarpSize;
    static constexpr int kDigits = 256;
    static_assert(THREADS >= kDigits, "a thread for each digit");

    struct Shared {
        int histogram[kDigits];
        int above[kWarps], ties[kWarps], src[kWarps], dst[kWarps];  // of the tokens of each warp
        int digit, need;
    };
    static constexpr int kShared = Sort<THREADS>::kShared;
    static_assert(sizeof(Shared) <= kShared, "shares its memory with the sort");

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
        const unsigned threshold = find_threshold(score, partner, N, r, least, s);
        number_groups(score, partner, N, K, num_prefix, threshold, s.need, index, s);
        for (int start = threadIdx.x; start < N; start += THREADS * kAhead) {
            int to[kAhead];
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                const int n = start + THREADS * i;
                to[i] = n < N && index[n] < 0 ? partner[n] : -1;
            }
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i)
                if (to[i] >= 0 && to[i] < N) index[start + THREADS * i] = index[to[i]];
        }
        if (order == nullptr) return;
        __syncthreads();
        Sort<THREADS>::run(index, N, K, order, offsets, other, static_cast<int*>(shared), base, last);
    }

private:
    // The r-th highest key, digit by digit; leaves in s.need how many of the tokens that have exactly it merge. The key
    // of `least` if that is not below, and 0 if there are fewer than r.
    static __device__ unsigned find_threshold(const float* score, const int* partner, int N, int r, float least,
                                              Shared& s) {
        if (threadIdx.x == 0) s.need = r;
        __syncthreads();
        if (r <= 0) return ~0u;
        unsigned threshold = 0;
        for (int shift = 24; shift >= 0; shift -= 8) {
            const int digit = kDigits - 1 - int(threadIdx.x);  // thread 0 has the highest
            if (digit >= 0) s.histogram[digit] = 0;
            __syncthreads();
            if (threadIdx.x == 0) s.digit = 0;
            for (int start = threadIdx.x; start < N; start += THREADS * kAhead) {
                unsigned key[kAhead];
                bool counts[kAhead];
                STTM_UNROLL
                for (int i = 0; i < kAhead; ++i) {
                    const int n = start + THREADS * i;
                    counts[i] = n < N && partner[n] >= 0;
                    key[i] = n < N ? key_of(score[n]) : 0;
                }
                STTM_UNROLL
                for (int i = 0; i < kAhead; ++i)
                    if (counts[i] && (shift == 24 || key[i] >> (shift + 8) == threshold))
                        atomicAdd(&s.histogram[key[i] >> shift & (kDigits - 1)], 1);
            }
            __syncthreads();
            const int count = digit >= 0 ? s.histogram[digit] : 0;
            const int need = s.need;
            int total;
            const int higher = block_exclusive_sum<THREADS>(count, total);
            if (higher < need && need <= higher + count) {
                s.digit = digit;
                s.need = need - higher;
            }
            __syncthreads();
            threshold = threshold << 8 | unsigned(s.digit);
        }
        if (least == -INFINITY || threshold > key_of(least)) return threshold;
        if (threadIdx.x == 0) s.need = 0;
        __syncthreads();
        return key_of(least);
    }

    // Groups of all tokens but the merged ones, whose index is -1 until that of their partner is known. Each warp owns
    // a contiguous segment of the tokens: it counts, learns what the warps before it counted, and numbers.
    static __device__ void number_groups(const float* score, const int* partner, int N, int K, int num_prefix,
                                         unsigned threshold, int need, int* index, Shared& s) {
        const int lane = lane_index(), warp = warp_index();
        const unsigned lower = lower_lanes();
        const int segment = ceil_div(N, THREADS) * kWarpSize;
        const int first = min(N, warp * segment), end = min(N, first + segment);

        int above = 0, ties = 0, src = 0, dst = 0;
        for (int start = first; start < end; start += kWarpSize * kAhead) {
            const Tokens tokens(score, partner, start, end, threshold);
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                above += __popc(ballot(tokens.above(i)));
                ties += __popc(ballot(tokens.tie(i)));
                src += __popc(ballot(tokens.src(i)));
                dst += __popc(ballot(tokens.dst(i)));
            }
        }
        if (lane == 0) s.above[warp] = above, s.ties[warp] = ties, s.src[warp] = src, s.dst[warp] = dst;
        __syncthreads();

        int all_stay = 0, all_ties = 0;
        above = ties = src = dst = 0;
        for (int w = 0; w < kWarps; ++w) {
            all_stay += s.src[w] - s.above[w], all_ties += s.ties[w];
            if (w < warp) above += s.above[w], ties += s.ties[w], src += s.src[w], dst += s.dst[w];
        }
        int unmerged = src - above - min(ties, need);
        const int first_dst = num_prefix + all_stay - min(all_ties, need);
        for (int start = first; start < end; start += kWarpSize * kAhead) {
            const Tokens tokens(score, partner, start, end, threshold);
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                const int n = start + kWarpSize * i + lane;
                const unsigned tied = ballot(tokens.tie(i));
                const bool merges = tokens.above(i) || (tokens.tie(i) && ties + __popc(tied & lower) < need);
                const unsigned stay = ballot(tokens.src(i) && !merges), dsts = ballot(tokens.dst(i));
                int group = n;  // of the prefix
                if (tokens.src(i)) group = num_prefix + unmerged + __popc(stay & lower);
                if (tokens.dst(i)) group = first_dst + dst + __popc(dsts & lower);
                if (tokens.partner[i] == kMasked) group = -1;
                if (n < end) index[n] = merges ? -1 : min(group, K - 1);
                ties += __popc(tied);
                unmerged += __popc(stay);
                dst += __popc(dsts);
            }
        }
        __syncthreads();
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

}  // namespace sttm
