// assign and merge of short sequences, such as the tokens of a frame, in one launch: one batch item per block, or one
// sequence of those that are packed.
//
// All meta tokens of an item make one tile, so its features are read once for the similarities. They end in an index
// and a weight per token on chip, the tokens are sorted by group, and the features are added up group by group: threads
// own channels and go through the sorted tokens, so it does not matter how long a group is, and a token that is not a
// number spoils only its own. Features that are their own metric and fit in shared memory stay there in between; others
// are read again, from the L2 cache as long as that holds the sequences in flight.
#pragma once

#include "csr.cuh"
#include "similarity.cuh"
#include "view.cuh"

namespace sttm {

constexpr int kAssignMergeThreads = 256;
constexpr int kRowsAhead = 4;           // rows that a thread reads at a time
constexpr int kMostShared = 216 << 10;  // of a block: the most of any GPU, less what the kernel has besides

// 128 tokens by 64 or 128 meta tokens.
template <typename T, bool EXACT, int NT>
using AssignMergeTiles = DotTiles<T, EXACT, 4, 2, 2, NT>;

// The same, each time from the start, of all meta tokens.
template <typename T, bool EXACT, int NT>
struct StreamedTiles {
    using Tiles = AssignMergeTiles<T, EXACT, NT>;
    static constexpr int OWN = Tiles::OWN;
    unsigned char* shared;
    float* own_term = nullptr;
    float* other_term = nullptr;

    static __device__ __forceinline__ int row(int i, int e) { return Tiles::row(i, e); }
    static __device__ __forceinline__ int column(int j, int e) { return Tiles::column(j, e); }
    template <typename OwnRows, typename OtherRows>
    __device__ __forceinline__ void multiply(float (&acc)[2][NT][4], const OwnRows& own_rows, const Features& own_f,
                                             int first, const OtherRows& other_rows, const Features& other_f,
                                             Similarity kind) {
        Tiles tiles(shared);
        tiles.multiply(acc, own_rows, own_f, first, other_rows, other_f, 0, kind, false);
        own_term = tiles.own_term;
        other_term = tiles.other_term;
    }
};

// As AssignMergeTiles, of own rows that come to stay: what is read for the similarities is there for the merge too.
template <typename T, bool EXACT, int NT>
struct ResidentTiles {
    using Tiles = AssignMergeTiles<T, EXACT, NT>;
    static constexpr int OWN = Tiles::OWN, OTHER = Tiles::OTHER, CHUNK = Tiles::CHUNK, PITCH = Tiles::PITCH;
    static constexpr int kBuffers = 2 * OTHER * PITCH * int(sizeof(T));
    static constexpr int kTable = Sort<kAssignMergeThreads>::kShared;
    static constexpr int kBefore = Tiles::TERMS + (kBuffers < kTable ? kTable : kBuffers);  // bytes before the rows

    float *own_term, *other_term;
    T *other, *own;
    int rows, pitch;

    static __host__ __device__ int rows_of(int N) { return ceil_div(N, 32) * 32; }
    static __host__ __device__ int pitch_of(int D) { return ceil_div(D, 16) * 16 + Tiles::PAD; }
    static int64_t bytes(int N, int D) { return kBefore + int64_t(rows_of(N)) * pitch_of(D) * int64_t(sizeof(T)); }

    __device__ __forceinline__ ResidentTiles(unsigned char* shared, int N, int D)
        : own_term(reinterpret_cast<float*>(shared)),
          other_term(own_term + OWN),
          other(reinterpret_cast<T*>(other_term + OTHER)),
          own(reinterpret_cast<T*>(shared + kBefore)),
          rows(rows_of(N)),
          pitch(pitch_of(D)) {}

    static __device__ __forceinline__ int row(int i, int e) { return Tiles::row(i, e); }
    static __device__ __forceinline__ int column(int j, int e) { return Tiles::column(j, e); }

    // Own features are adjacent, and every row of them at a multiple of 16 bytes.
    template <typename OwnRows, typename OtherRows>
    __device__ __forceinline__ void multiply(float (&acc)[2][NT][4], const OwnRows& own_rows, const Features& own_f,
                                             int first, const OtherRows& other_rows, const Features& other_f,
                                             Similarity kind) {
        const int D = own_f.D, chunks = ceil_div(D, CHUNK), here = min(OWN, rows - first);
        const int warp_row = warp_index() / 2 * 32, warp_column = warp_index() % 2 * (OTHER / 2);
        T* const mine = own + first * pitch;
        RowSquares<T, OWN> own_squares;
        RowSquares<T, OTHER> other_squares;
        STTM_NO_UNROLL
        for (int chunk = -1; chunk < chunks; ++chunk) {
            if (chunk >= 0) {
                wait_for_copies();
                __syncthreads();
            }
            const int next = (chunk + 1) * CHUNK;
            if (next < D) {
                load_tile<kAssignMergeThreads, OWN, CHUNK>(mine + next, pitch, own_rows, first, own_f, next, here);
                load_tile<kAssignMergeThreads, OTHER, CHUNK>(other + (chunk + 1) % 2 * OTHER * PITCH, PITCH, other_rows,
                                                             0, other_f, next);
            }
            if (chunk < 0) continue;
            const int depth = min(CHUNK, (D - chunk * CHUNK + 15) / 16 * 16);
            const T* const own_tile = mine + chunk * CHUNK;
            const T* const other_tile = other + chunk % 2 * OTHER * PITCH;
            if (warp_row < here)
                warp_product<EXACT, false>(acc, own_tile + warp_row * pitch, pitch, other_tile + warp_column * PITCH,
                                           PITCH, depth);
            own_squares.template add<1>(own_tile, pitch, depth, 0, here);
            other_squares.template add<1>(other_tile, PITCH, depth, 0, OTHER);
        }
        own_squares.store(own_term, 0, here, kind);
        other_squares.store(other_term, 0, OTHER, kind);
        __syncthreads();
    }
};

// What the block knows about the tokens and groups of its sequence.
struct Sequence {
    int index[kAssignMergeTokens], order[kAssignMergeTokens], other[kAssignMergeTokens];
    float w[kAssignMergeTokens], size[kAssignMergeTokens];
    int offsets[kAssignMergeGroups + 1];
    float mass[kAssignMergeGroups];
    // Of every row of a tile, what the two warps that share it found.
    float best[2][128], total[2][128];
    int at[2][128];
};

// Index, score, lse and weight of the tokens first .. first + OWN, as assign has them; their weights into `sequence`.
template <typename T, int NT, typename Tiles>
__device__ __forceinline__ void assign_tokens(const AssignMergeArguments& args, const Features& q_features,
                                              const Features& m_features, const Item& item, int first,
                                              Sequence& sequence, Tiles& tiles) {
    const AssignArguments& a = args.assign;
    const StridedRows<T> tokens = token_rows<T>(a.q, a.mask, item);
    const StridedRows<T> metas = rows_of<T>(a.meta, Mask{}, item.set, a.K);
    const bool soft = a.lse != nullptr;
    float S[2][NT][4];
    clear(S);
    tiles.multiply(S, tokens, q_features, first, metas, m_features, a.similarity);
    RowBest<2> best;
    best.clear();
    STTM_UNROLL
    for (int j = 0; j < NT; ++j) {
        STTM_UNROLL
        for (int e = 0; e < 4; ++e) {
            const int k = tiles.column(j, e);
            STTM_UNROLL
            for (int i = 0; i < 2; ++i) {
                S[i][j][e] = k < a.K ? similarity_of(S[i][j][e], tiles.own_term[tiles.row(i, e)], tiles.other_term[k],
                                                     a.inverse_temperature, a.similarity)
                                     : -INFINITY;
                best.offer(i, e, S[i][j][e], k);
            }
        }
    }
    best.reduce();
    STTM_UNROLL
    for (int i = 0; i < 2; ++i) {
        STTM_UNROLL
        for (int r = 0; r < 2; ++r) {
            const float level = best.value[i][r] == -INFINITY ? 0.0f : best.value[i][r];
            float total = 0;
            if (soft) {
                STTM_UNROLL
                for (int j = 0; j < NT; ++j) total += expf(S[i][j][2 * r] - level) + expf(S[i][j][2 * r + 1] - level);
            }
            total += shuffle_xor(total, 1);
            total += shuffle_xor(total, 2);
            if (lane_index() % 4 != 0) continue;
            const int part = warp_index() % 2, row = tiles.row(i, 2 * r);
            sequence.best[part][row] = best.value[i][r];
            sequence.at[part][row] = best.at[i][r];
            sequence.total[part][row] = total;
        }
    }
    __syncthreads();

    const int row = static_cast<int>(threadIdx.x), n = first + row;
    if (row >= Tiles::OWN || n >= item.N) return;
    const bool real = tokens(n) != nullptr, second = sequence.best[1][row] > sequence.best[0][row];
    const float score = sequence.best[second][row], level = score == -INFINITY ? 0.0f : score;
    const int64_t out = item.first_row() + n;
    const int k = sequence.at[second][row];
    sequence.index[n] = real ? k : -1;
    a.index[out] = real ? item.first_group + k : -1;
    a.score[out] = real ? score : 0.0f;
    const float size = !real ? 0.0f : args.merge.size == nullptr ? 1.0f : args.merge.size[out];
    float weight = 1.0f;
    if (soft) {
        float total = 0;
        for (int part = 0; part < 2; ++part) {
            const float best = sequence.best[part][row];  // -inf without meta tokens: nothing to add, or NaN
            total += sequence.total[part][row] * (best == -INFINITY ? 1.0f : expf(best - level));
        }
        weight = real ? 1.0f / total : 0.0f;
        a.lse[out] = real && total != 0 ? level + logf(total) : 0.0f;
        a.weight[out] = weight;
    }
    sequence.size[n] = size;
    sequence.w[n] = size * weight;
}

// The tokens by group, for those who are given the plan.
__device__ __forceinline__ void store_order(const MergeArguments& a, const Item& item, int K,
                                            const Sequence& sequence) {
    if (a.order == nullptr) return;
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < item.N) a.order[item.first_row() + thread] = sequence.order[thread];
    if (thread <= K) a.offsets[int64_t(item.set) * (K + 1) + thread] = sequence.offsets[thread];
}

// Mass, count and mean position of the groups.
__device__ inline void merge_positions(const MergeArguments& a, const Item& item, int K, Sequence& sequence) {
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t first = int64_t(item.set) * K;
    const float* const positions = a.positions + item.tokens * a.stride_pb + int64_t(item.start) * a.P;
    if (thread < K) {
        float mass = 0, count = 0;
        for (int i = sequence.offsets[thread]; i < sequence.offsets[thread + 1]; ++i) {
            mass += sequence.w[sequence.order[i]];
            count += sequence.size[sequence.order[i]];
        }
        sequence.mass[thread] = mass;
        a.mass_out[first + thread] = mass;
        a.size_out[first + thread] = count;
    }
    __syncthreads();
    for (int64_t at = thread; at < int64_t(K) * a.P; at += kAssignMergeThreads) {
        const int k = static_cast<int>(at / a.P), p = static_cast<int>(at % a.P);
        float total = 0;
        for (int i = sequence.offsets[k]; i < sequence.offsets[k + 1]; ++i) {
            const int n = sequence.order[i];
            total = fmaf(sequence.w[n], positions[int64_t(n) * a.P + p], total);
        }
        a.positions_out[first * a.P + at] = sequence.mass[k] == 0 ? 0.0f : total / sequence.mass[k];
    }
}

// 16 bytes of channels from c on, of rows of any layout.
template <typename T>
__device__ __forceinline__ Vec<T> channels(const T* row, const Features& f, int c) {
    return f.vectors && c + Vec<T>::size <= f.D ? Vec<T>::load(row + c) : features(row, f, c);
}
template <typename T>
__device__ __forceinline__ void store_channels(T* row, int c, int C, bool vectors, const Vec<T>& v) {
    if (vectors) {
        v.store(row + c);
        return;
    }
    STTM_UNROLL
    for (int e = 0; e < Vec<T>::size; ++e)
        if (c + e < C) row[c + e] = v.value[e];
}

// y, from the rows of x, which start `stride` apart. If a row is short, threads share the sorted tokens out among them,
// cut where a group starts.
template <typename T>
__device__ __forceinline__ void merge_features(const MergeArguments& a, const T* x, int64_t stride, const Features& f,
                                               const Item& item, int K, const Sequence& sequence) {
    constexpr int kSize = Vec<T>::size;
    const int pieces = ceil_div(a.C, kSize), lanes = min(pieces, kAssignMergeThreads);
    const int thread = static_cast<int>(threadIdx.x), parts = kAssignMergeThreads / lanes, part = thread / lanes;
    const int members = sequence.offsets[K];
    const bool vectors = a.C % kSize == 0 && reinterpret_cast<uintptr_t>(a.y) % 16 == 0;
    T* y = static_cast<T*>(a.y) + int64_t(item.set) * K * a.C;
    const auto start_of = [&](int part) {
        const int at = members * part / parts;
        if (at >= members) return members;
        const int k = sequence.index[sequence.order[at]];
        return sequence.offsets[k] == at ? at : sequence.offsets[k + 1];
    };
    if (part < parts) {
        const int begin = start_of(part), end = start_of(part + 1);
        for (int piece = thread % lanes; piece < pieces; piece += lanes) {
            const int c = piece * kSize;
            float total[kSize];
            int k = -1;
            const auto finish = [&] {
                if (k < 0 || sequence.mass[k] == 0) return;
                Vec<T> v;
                STTM_UNROLL
                for (int e = 0; e < kSize; ++e) v.value[e] = from_float<T>(total[e] / sequence.mass[k]);
                store_channels(y + int64_t(k) * a.C, c, a.C, vectors, v);
            };
#pragma unroll 1
            for (int start = begin; start < end; start += kRowsAhead) {
                Vec<T> v[kRowsAhead];
                STTM_UNROLL
                for (int i = 0; i < kRowsAhead; ++i)
                    v[i] = channels(x + sequence.order[min(start + i, end - 1)] * stride, f, c);
                STTM_UNROLL
                for (int i = 0; i < kRowsAhead; ++i) {
                    if (start + i >= end) continue;
                    const int n = sequence.order[start + i];
                    if (sequence.index[n] != k) {
                        finish();
                        k = sequence.index[n];
                        STTM_UNROLL
                        for (float& value : total) value = 0;
                    }
                    STTM_UNROLL
                    for (int e = 0; e < kSize; ++e) total[e] = fmaf(sequence.w[n], to_float(v[i].value[e]), total[e]);
                }
            }
            finish();
        }
    }
    const T* fill = static_cast<const T*>(a.fill);
    if (fill != nullptr) fill += item.tokens * a.stride_fb + int64_t(item.first_group) * a.C;
    for (int k = 0; k < K; ++k) {
        if (sequence.mass[k] != 0) continue;
        for (int c = thread; c < a.C; c += kAssignMergeThreads)
            y[int64_t(k) * a.C + c] = fill == nullptr ? from_float<T>(0) : fill[int64_t(k) * a.C + c];
    }
}

template <typename T, bool EXACT, int NT, bool RESIDENT>
__global__ void __launch_bounds__(kAssignMergeThreads, NT == 4 ? 2 : 1)
    assign_merge_kernel(const AssignMergeArguments a, const Features q_features, const Features m_features,
                        const Features x_features) {
    using Resident = ResidentTiles<T, EXACT, NT>;
    using Streamed = StreamedTiles<T, EXACT, NT>;
    STTM_SHARED(Sequence, sequences, [1]);
    Sequence& sequence = sequences[0];
    unsigned char* const shared = shared_memory<unsigned char>();
    const int block = static_cast<int>(blockIdx.x), K = a.assign.K;
    const Item item = a.assign.sequences == nullptr
                          ? batch_item(block, a.assign.N)
                          : sequence_item(a.assign.sequences, block, a.assign.B, a.assign.N, K);
    if (item.N > kAssignMergeTokens) return;
    const auto tiles_of = [&] {
        if constexpr (RESIDENT) {
            return Resident(shared, item.N, a.assign.D);
        } else {
            return Streamed{shared};
        }
    };
    auto tiles = tiles_of();
    for (int first = 0; first < item.N; first += Resident::OWN)
        assign_tokens<T, NT>(a, q_features, m_features, item, first, sequence, tiles);
    __syncthreads();
    Sort<kAssignMergeThreads>::run(sequence.index, item.N, K, sequence.order, sequence.offsets, sequence.other,
                                   reinterpret_cast<int*>(shared));
    store_order(a.merge, item, K, sequence);
    merge_positions(a.merge, item, K, sequence);
    if constexpr (RESIDENT) {
        merge_features(a.merge, static_cast<const T*>(tiles.own), tiles.pitch, x_features, item, K, sequence);
    } else {
        const T* const x = row_of<T>(a.merge.x, item.tokens, item.start);
        merge_features(a.merge, x, a.merge.x.stride_n, x_features, item, K, sequence);
    }
}

inline bool is_same(const Metric& a, const Metric& b) {
    return a.data == b.data && a.heads == b.heads && a.stride_b == b.stride_b && a.stride_n == b.stride_n &&
           a.stride_d == b.stride_d;
}

template <typename T, bool EXACT>
cudaError_t launch_assign_merge(const AssignMergeArguments& a, cudaStream_t stream) {
    const AssignArguments& given = a.assign;
    const bool packed = given.sequences != nullptr;
    if ((given.N > kAssignMergeTokens && !packed) || given.K > kAssignMergeGroups) return cudaErrorInvalidValue;
    const Metric x{a.merge.x.data, 1, a.merge.x.stride_b, 0, a.merge.x.stride_n, a.merge.x.stride_c};
    const Features q_features = features_of<T>(given.q, given.D), m_features = features_of<T>(given.meta, given.D);
    const Features x_features = features_of<T>(x, a.merge.C);
    const auto run = [&](auto few_groups) {
        constexpr int NT = decltype(few_groups)::value ? 4 : 8;
        using Resident = ResidentTiles<T, EXACT, NT>;
        using Tiles = AssignMergeTiles<T, EXACT, NT>;
        static_assert(Tiles::THREADS == kAssignMergeThreads && Tiles::BYTES >= Resident::kTable);
        const auto run_kernel = [&](auto kernel, int64_t bytes) {
            return launch(kernel, Grid{given.B}, kAssignMergeThreads, static_cast<size_t>(bytes), stream, a, q_features,
                          m_features, x_features);
        };
        if constexpr (sizeof(T) == 2) {  // float32 features seldom fit, and kernels take their time to compile
            const int64_t bytes = Resident::bytes(min(given.N, kAssignMergeTokens), given.D);
            const int64_t most = packed ? kMostShared / 2 : kMostShared;  // many of the sequences are shorter than that
            if (is_same(given.q, x) && given.D == a.merge.C && x_features.vectors && bytes <= most) {
                const auto kernel = assign_merge_kernel<T, EXACT, NT, true>;
                const cudaError_t fits = can_have_shared_memory(kernel, static_cast<size_t>(bytes));
                if (fits == cudaSuccess) return run_kernel(kernel, bytes);
                if (fits != cudaErrorInvalidValue) return fits;
            }
        }
        return run_kernel(assign_merge_kernel<T, EXACT, NT, false>, Tiles::BYTES);
    };
    return with_flags(run, given.K <= 64);
}

}  // namespace sttm
