// The tokens of each group, in token order, from an index: a stable counting sort without atomics.
//
// Tokens without a group count as group K: they follow all others in `order`. Groups are sorted by digits, the lowest
// first, with as many bits a digit as the table in shared memory holds: one pass for a few hundred groups, two for a
// hundred thousand. In a pass every warp owns a contiguous segment of the tokens. It counts them by digit, a scan over
// (digit, warp) says where each warp puts its tokens of each digit, and it puts them there 32 at a time: a token comes
// after those of its digit in lower lanes.
#pragma once

#include "platform.cuh"

namespace sttm {

constexpr int kAhead = 4;  // tokens that a thread reads at a time: what comes of them waits less

__device__ __forceinline__ unsigned lower_lanes() { return (1u << lane_index()) - 1; }

template <int THREADS>
struct Sort {
    static constexpr int kWarps = THREADS / kWarpSize;
    static constexpr int kTable = THREADS <= 256 ? 8192 : 16384;  // counters of all warps together
    static constexpr int kShared = kTable * int(sizeof(int));

    // The group of a token; K if it has none.
    static __device__ int group_of(const int* index, int n, int K) {
        const int group = index[n];
        return group >= 0 && group < K ? group : K;
    }

    // Fills `order` (N) and `offsets` (K + 1) of one batch item; all THREADS threads of a block call it. `index` may
    // have been written by this block before its last barrier. `other` (N) is scratch, `table` kShared bytes of shared
    // memory. Ends with a barrier. Offsets are counted from `base` on; without `last`, that of K is not written.
    static __device__ void run(const int* index, int N, int K, int* order, int* offsets, int* other, int* table,
                               int base = 0, bool last = true) {
        int bits = 1;
        while (K >> bits) ++bits;
        const int most = log2_of(kTable / kWarps);
        const int passes = (bits + most - 1) / most;
        bits = (bits + passes - 1) / passes;
        for (int pass = 0; pass < passes; ++pass) {
            const bool to_order = (passes - pass) % 2 == 1;  // the last pass writes `order`
            const int* from = pass == 0 ? nullptr : to_order ? other : order;
            sort_digit(index, from, to_order ? order : other, N, K, bits * pass, bits, table);
        }
        find_offsets(index, order, offsets, N, K, base, last ? K : K - 1);
        __syncthreads();
    }

private:
    static constexpr __host__ __device__ int log2_of(int power) { return power == 1 ? 0 : 1 + log2_of(power / 2); }

    // Sorts tokens `from` (null: 0, 1, 2 ...) stably by one digit of their group.
    static __device__ void sort_digit(const int* index, const int* from, int* to, int N, int K, int shift, int bits,
                                      int* table) {
        const int warp = warp_index(), digits = 1 << bits;
        const int segment = ceil_div(N, THREADS) * kWarpSize;
        const int first = min(N, warp * segment), end = min(N, first + segment);
        int* mine = table + warp * digits;

        for (int at = threadIdx.x; at < kWarps * digits; at += THREADS) table[at] = 0;
        __syncthreads();
        for (int start = first; start < end; start += kWarpSize * kAhead) {
            const Tokens tokens(index, from, start, end, K, shift, digits);
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                if (start + kWarpSize * i >= end) continue;
                const unsigned peers = match_any(tokens.digit[i]);
                if (tokens.token[i] >= 0 && (peers & lower_lanes()) == 0) mine[tokens.digit[i]] += __popc(peers);
                __syncwarp();
            }
        }
        __syncthreads();

        int placed = 0;
        for (int start = 0; start < digits; start += THREADS) {
            const int digit = start + int(threadIdx.x);
            int count = 0;
            if (digit < digits)
                for (int w = 0; w < kWarps; ++w) count += table[w * digits + digit];
            int total;
            int at = placed + block_exclusive_sum<THREADS>(count, total);
            placed += total;
            if (digit < digits)
                for (int w = 0; w < kWarps; ++w) {
                    const int here = table[w * digits + digit];
                    table[w * digits + digit] = at;
                    at += here;
                }
        }
        __syncthreads();

        for (int start = first; start < end; start += kWarpSize * kAhead) {
            const Tokens tokens(index, from, start, end, K, shift, digits);
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                if (start + kWarpSize * i >= end) continue;
                const int token = tokens.token[i], digit = tokens.digit[i];
                const unsigned peers = match_any(digit);
                const int at = token < 0 ? 0 : mine[digit], before = __popc(peers & lower_lanes());
                __syncwarp();
                if (token >= 0) {
                    to[at + before] = token;
                    if (before == 0) mine[digit] = at + __popc(peers);
                }
                __syncwarp();
            }
        }
        __syncthreads();
    }

    // The next kAhead tokens of a lane, read at once, and a digit of their groups; -1 past the end.
    struct Tokens {
        int token[kAhead], digit[kAhead];

        __device__ __forceinline__ Tokens(const int* index, const int* from, int start, int end, int K, int shift,
                                          int digits) {
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                const int n = start + kWarpSize * i + lane_index();
                token[i] = n >= end ? -1 : from == nullptr ? n : from[n];
            }
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i)
                digit[i] = token[i] < 0 ? -1 : group_of(index, token[i], K) >> shift & (digits - 1);
        }
    };

    // offsets_k = how many of the sorted tokens are in a group below k: where the group changes between two tokens in
    // a row, that place goes to all groups from the one behind the first to the second.
    static __device__ void find_offsets(const int* index, const int* order, int* offsets, int N, int K, int base,
                                        int highest) {
        const int lane = lane_index();
        for (int start = kWarpSize * warp_index(); start <= N; start += THREADS * kAhead) {
            int below[kAhead], group[kAhead];
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                const int n = start + THREADS * i + lane;
                below[i] = n == 0 || n > N ? -1 : order[n - 1];
                group[i] = n < N ? order[n] : -1;
            }
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                below[i] = below[i] < 0 ? -1 : group_of(index, below[i], K);
                group[i] = group[i] < 0 ? K : group_of(index, group[i], K);
            }
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                const int n = start + THREADS * i + lane, count = n <= N ? group[i] - below[i] : 0;
                if (count > 0 && group[i] <= highest) offsets[group[i]] = base + n;
                // Groups without tokens are rare or many: the warp fills them together.
                for (unsigned left = ballot(count > 1); left != 0; left &= left - 1) {
                    const int from = __ffs(left) - 1;
                    const int last = shuffle(group[i], from), least = shuffle(below[i], from) + 1;
                    for (int k = least + lane; k < last; k += kWarpSize) offsets[k] = base + start + THREADS * i + from;
                }
            }
        }
    }
};

// One block per batch item.
template <int THREADS>
__global__ void __launch_bounds__(THREADS)
    csr_kernel(const int* index, int N, int K, int* order, int* offsets, int* other) {
    const int64_t item = blockIdx.x;
    Sort<THREADS>::run(index + item * N, N, K, order + item * N, offsets + item * (K + 1), other + item * N,
                       shared_memory<int>());
}

// `order` (B, N) and `offsets` (B, K + 1) of `index` (B, N), all contiguous; `other` (B, N) is scratch. Blocks have FEW
// threads for short sequences and MANY for others.
template <int FEW = 256, int MANY = 1024>
cudaError_t csr(const int* index, int64_t B, int N, int K, int* order, int* offsets, int* other, cudaStream_t stream) {
    const Grid grid{B};
    if (N <= 2048)
        return launch(csr_kernel<FEW>, grid, FEW, Sort<FEW>::kShared, stream, index, N, K, order, offsets, other);
    return launch(csr_kernel<MANY>, grid, MANY, Sort<MANY>::kShared, stream, index, N, K, order, offsets, other);
}

}  // namespace sttm
