// The tokens of each group, in token order, from an index: a stable counting sort without atomics.
//
// Tokens without a group count as group K: they follow all others in `order`. Groups are sorted by digits, the lowest
// first, with as many bits a digit as the table in shared memory holds: one pass for a few hundred groups, two for a
// hundred thousand. In a pass every warp owns a contiguous segment of the tokens. It counts them by digit, a scan over
// (digit, warp) says where each warp puts its tokens of each digit, and it puts them there 32 at a time: a token comes
// after those of its digit in lower lanes.
//
// Up to kOneBlock tokens one block sorts an item. More are shared out in chunks, a block for each: one launch counts
// the digits of every chunk, the next adds up those of the chunks before and places the tokens.
#pragma once

#include "platform.cuh"

namespace sttm {

constexpr int kAhead = 4;        // tokens that a thread reads at a time: what comes of them waits less
constexpr int kOneBlock = 8192;  // the most tokens of an item that one block goes through
constexpr int kChunkThreads = 512;

// The tokens of an item in chunks, a block for each; every chunk but the last has `size`.
struct Chunks {
    static constexpr int kLeast = kChunkThreads * kAhead, kMost = 64;
    int size, count;

    __host__ __device__ explicit Chunks(int N) : size(ceil_div(N, kLeast * kMost) * kLeast), count(ceil_div(N, size)) {}
};

__device__ __forceinline__ unsigned lower_lanes() { return (1u << lane_index()) - 1; }

template <int THREADS>
struct Sort {
    static constexpr int kWarps = THREADS / kWarpSize;
    static constexpr int kTable = THREADS <= 256 ? 8192 : 16384;  // counters of all warps together
    static constexpr int kShared = kTable * int(sizeof(int));

    static constexpr __host__ __device__ int log2_of(int power) { return power == 1 ? 0 : 1 + log2_of(power / 2); }
    static __host__ __device__ int width_of(int K) {
        int bits = 1;
        while (K >> bits) ++bits;
        return bits;
    }

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
        const int passes = passes_of(K), bits = bits_of(K);
        for (int pass = 0; pass < passes; ++pass) {
            const bool to_order = (passes - pass) % 2 == 1;  // the last pass writes `order`
            const int* from = pass == 0 ? nullptr : to_order ? other : order;
            const Digit digit{K, bits * pass, bits};
            count(index, from, 0, N, digit, table);
            find_places(digit, table);
            place(index, from, to_order ? order : other, 0, N, digit, table);
            __syncthreads();
        }
        find_offsets(index, order, offsets, 0, N, N, K, base, last ? K : K - 1);
        __syncthreads();
    }

    // How many digits groups have, 0 to K, and of how many bits.
    static __host__ __device__ int passes_of(int K) { return ceil_div(width_of(K), log2_of(kTable / kWarps)); }
    static __host__ __device__ int bits_of(int K) { return ceil_div(width_of(K), passes_of(K)); }

    // A digit of the groups of tokens.
    struct Digit {
        int K, shift, bits;

        __device__ __forceinline__ int values() const { return 1 << bits; }
    };

    // What a warp owns of the tokens [begin, end) of a block.
    struct Segment {
        int first, end;

        __device__ __forceinline__ Segment(int begin, int stop) {
            const int size = ceil_div(stop - begin, THREADS) * kWarpSize;
            first = min(stop, begin + warp_index() * size);
            end = min(stop, first + size);
        }
    };

    // table (kWarps, values) = how many of the tokens from[begin, stop) of each warp have each digit; from null: 0, 1,
    // 2 ... Ends with a barrier.
    static __device__ void count(const int* index, const int* from, int begin, int stop, const Digit& digit,
                                 int* table) {
        const Segment mine(begin, stop);
        int* const counts = table + warp_index() * digit.values();

        for (int at = threadIdx.x; at < kWarps * digit.values(); at += THREADS) table[at] = 0;
        __syncthreads();
        for (int start = mine.first; start < mine.end; start += kWarpSize * kAhead) {
            const Tokens tokens(index, from, start, mine.end, digit);
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                if (start + kWarpSize * i >= mine.end) continue;
                const unsigned peers = match_any(tokens.digit[i]);
                if (tokens.token[i] >= 0 && (peers & lower_lanes()) == 0) counts[tokens.digit[i]] += __popc(peers);
                __syncwarp();
            }
        }
        __syncthreads();
    }

    // In place of its count, where each warp puts its first token of each digit. With `chunks`, what each of so many
    // chunks has of each digit, this block has the tokens of `chunk`. Ends with a barrier.
    static __device__ void find_places(const Digit& digit, int* table, const int* chunks = nullptr, int num_chunks = 0,
                                       int chunk = 0) {
        const int values = digit.values();
        int placed = 0;
        for (int start = 0; start < values; start += THREADS) {
            const int value = start + int(threadIdx.x);
            int all = 0, before = 0;
            if (value < values) {
                for (int c = 0; c < num_chunks; ++c) {
                    const int here = chunks[c * values + value];
                    all += here;
                    if (c < chunk) before += here;
                }
                if (chunks == nullptr)
                    for (int w = 0; w < kWarps; ++w) all += table[w * values + value];
            }
            int total;
            int at = placed + block_exclusive_sum<THREADS>(all, total) + before;
            placed += total;
            if (value < values)
                for (int w = 0; w < kWarps; ++w) {
                    const int here = table[w * values + value];
                    table[w * values + value] = at;
                    at += here;
                }
        }
        __syncthreads();
    }

    // Puts the tokens from[begin, stop) where the table says.
    static __device__ void place(const int* index, const int* from, int* to, int begin, int stop, const Digit& digit,
                                 int* table) {
        const Segment mine(begin, stop);
        int* const places = table + warp_index() * digit.values();
        for (int start = mine.first; start < mine.end; start += kWarpSize * kAhead) {
            const Tokens tokens(index, from, start, mine.end, digit);
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                if (start + kWarpSize * i >= mine.end) continue;
                const int token = tokens.token[i], value = tokens.digit[i];
                const unsigned peers = match_any(value);
                const int at = token < 0 ? 0 : places[value], before = __popc(peers & lower_lanes());
                __syncwarp();
                if (token >= 0) {
                    to[at + before] = token;
                    if (before == 0) places[value] = at + __popc(peers);
                }
                __syncwarp();
            }
        }
    }

    // The next kAhead tokens of a lane, read at once, and a digit of their groups; -1 past the end.
    struct Tokens {
        int token[kAhead], digit[kAhead];

        __device__ __forceinline__ Tokens(const int* index, const int* from, int start, int end, const Digit& of) {
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                const int n = start + kWarpSize * i + lane_index();
                token[i] = n >= end ? -1 : from == nullptr ? n : from[n];
            }
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i)
                digit[i] = token[i] < 0 ? -1 : group_of(index, token[i], of.K) >> of.shift & (of.values() - 1);
        }
    };

    // offsets_k = how many of the sorted tokens are in a group below k: where the group changes between two tokens in
    // a row, that place goes to all groups from the one behind the first to the second. Places [begin, stop], of which
    // the last is N.
    static __device__ void find_offsets(const int* index, const int* order, int* offsets, int begin, int stop, int N,
                                        int K, int base, int highest) {
        const int lane = lane_index();
        for (int start = begin + kWarpSize * warp_index(); start <= stop; start += THREADS * kAhead) {
            int below[kAhead], group[kAhead];
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                const int n = start + THREADS * i + lane;
                below[i] = n == 0 || n > stop ? -1 : order[n - 1];
                group[i] = n <= stop && n < N ? order[n] : -1;
            }
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                below[i] = below[i] < 0 ? -1 : group_of(index, below[i], K);
                group[i] = group[i] < 0 ? K : group_of(index, group[i], K);
            }
            STTM_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                const int n = start + THREADS * i + lane, count = n <= stop ? group[i] - below[i] : 0;
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

// What sorting by chunks works on; `counts` (B, chunks, values of a digit) fits (B, N).
struct SortArguments {
    const int* index;
    int N, K, shift, bits;
    const int* from;
    int *to, *counts, *offsets;
};

// Where a block of a launch for chunks is.
struct Chunk {
    int64_t item;
    int at, count, begin, end;

    __device__ __forceinline__ explicit Chunk(int N) {
        const Chunks chunks(N);
        count = chunks.count;
        item = blockIdx.x / count;
        at = static_cast<int>(blockIdx.x % count);
        begin = at * chunks.size;
        end = min(N, begin + chunks.size);
    }
};

__device__ __forceinline__ const int* of_item(const int* from, int64_t item, int N) {
    return from == nullptr ? nullptr : from + item * N;
}

// How many tokens of each chunk have each digit. One block per chunk.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) count_digits_kernel(const SortArguments a) {
    using S = Sort<THREADS>;
    const Chunk mine(a.N);
    const typename S::Digit digit{a.K, a.shift, a.bits};
    int* const table = shared_memory<int>();
    S::count(a.index + mine.item * a.N, of_item(a.from, mine.item, a.N), mine.begin, mine.end, digit, table);
    const int values = digit.values();
    int* const counts = a.counts + mine.item * a.N + mine.at * values;
    for (int value = threadIdx.x; value < values; value += THREADS) {
        int all = 0;
        for (int w = 0; w < S::kWarps; ++w) all += table[w * values + value];
        counts[value] = all;
    }
}

// Sorts by the digit that was counted. One block per chunk.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) place_digits_kernel(const SortArguments a) {
    using S = Sort<THREADS>;
    const Chunk mine(a.N);
    const typename S::Digit digit{a.K, a.shift, a.bits};
    const int *const index = a.index + mine.item * a.N, *const from = of_item(a.from, mine.item, a.N);
    int* const table = shared_memory<int>();
    S::count(index, from, mine.begin, mine.end, digit, table);
    S::find_places(digit, table, a.counts + mine.item * a.N, mine.count, mine.at);
    S::place(index, from, a.to + mine.item * a.N, mine.begin, mine.end, digit, table);
}

// Offsets of what was sorted. One block per chunk.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) find_offsets_kernel(const SortArguments a) {
    const Chunk mine(a.N);
    const int stop = mine.at + 1 == mine.count ? a.N : mine.end - 1;
    Sort<THREADS>::find_offsets(a.index + mine.item * a.N, a.from + mine.item * a.N, a.offsets + mine.item * (a.K + 1),
                                mine.begin, stop, a.N, a.K, 0, a.K);
}

// `order` (B, N) and `offsets` (B, K + 1) of `index` (B, N), all contiguous; `other` (2, B, N) is scratch. Blocks have
// FEW threads for short sequences and MANY for others.
template <int FEW = 256, int MANY = 1024>
cudaError_t csr(const int* index, int64_t B, int N, int K, int* order, int* offsets, int* other, cudaStream_t stream) {
    const Grid items{B};
    if (N <= 2048)
        return launch(csr_kernel<FEW>, items, FEW, Sort<FEW>::kShared, stream, index, N, K, order, offsets, other);
    if (N <= kOneBlock)
        return launch(csr_kernel<MANY>, items, MANY, Sort<MANY>::kShared, stream, index, N, K, order, offsets, other);
    using S = Sort<kChunkThreads>;
    const Grid chunks{times(B, Chunks(N).count)};
    const int passes = S::passes_of(K), bits = S::bits_of(K);
    SortArguments a{index, N, K, 0, bits, nullptr, nullptr, other + B * N, offsets};
    for (int pass = 0; pass < passes; ++pass, a.from = a.to) {
        a.shift = bits * pass;
        a.to = (passes - pass) % 2 == 1 ? order : other;
        cudaError_t error = launch(count_digits_kernel<kChunkThreads>, chunks, kChunkThreads, S::kShared, stream, a);
        if (error != cudaSuccess) return error;
        error = launch(place_digits_kernel<kChunkThreads>, chunks, kChunkThreads, S::kShared, stream, a);
        if (error != cudaSuccess) return error;
    }
    return launch(find_offsets_kernel<kChunkThreads>, chunks, kChunkThreads, 0, stream, a);
}

}  // namespace sttm
