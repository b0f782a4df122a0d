// Before the search for partners, in one pass over the metric: means over heads, inverse norms, scratch set to 0, and
// of packed sequences that have lists what holds for the tokens of none.
#pragma once

#include "match_tokens.cuh"

namespace sttm {

constexpr int kRowThreads = 256;
constexpr int kHeadsAhead = 8;  // heads that a thread reads at a time

// Rows of a mean begin at multiples of 16 bytes; features from D on are 0.
inline int mean_pitch(int D) { return ceil_div(D, 8) * 8; }

// `features`, with the loads of several heads under way.
template <typename T>
__device__ __forceinline__ Vec<T> features_ahead(const T* row, const Features& f, int d) {
    constexpr int kSize = Vec<T>::size;
    if (!f.vectors || d + kSize > f.D || f.heads == 1) return features(row, f, d);
    float total[kSize] = {};
    row += d;
    int h = 0;
    STTM_NO_UNROLL
    for (; h + kHeadsAhead <= f.heads; h += kHeadsAhead) {
        Vec<T> v[kHeadsAhead];
        STTM_UNROLL
        for (int i = 0; i < kHeadsAhead; ++i, row += f.stride_h) v[i] = Vec<T>::load(row);
        STTM_UNROLL
        for (int i = 0; i < kHeadsAhead; ++i) {
            STTM_UNROLL
            for (int e = 0; e < kSize; ++e) total[e] += to_float(v[i].value[e]);
        }
    }
    STTM_NO_UNROLL
    for (; h < f.heads; ++h, row += f.stride_h) {
        const Vec<T> v = Vec<T>::load(row);
        STTM_UNROLL
        for (int e = 0; e < kSize; ++e) total[e] += to_float(v.value[e]);
    }
    Vec<T> mean;
    STTM_UNROLL
    for (int e = 0; e < kSize; ++e) mean.value[e] = from_float<T>(total[e] * (1.0f / f.heads));
    return mean;
}

// `mean` (B, N, pitch) and `inverse` (B, N), NaN where `mask` is 0, each unless it is null; `zeros` integers from
// `zero` on become 0, and `others` tokens stay. A thread has 16 bytes of a row at a time, a block whole rows.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    rows_kernel(const Metric metric, const Features f, const Mask mask, int64_t rows, int N, T* mean, float* inverse,
                int* zero, int64_t zeros, int* partner, float* score, int64_t others) {
    const int thread = static_cast<int>(threadIdx.x);
    for (int64_t i = int64_t(blockIdx.x) * kRowThreads + thread; i < zeros; i += int64_t(gridDim.x) * kRowThreads)
        zero[i] = 0;
    for (int64_t i = int64_t(blockIdx.x) * kRowThreads + thread; i < others; i += int64_t(gridDim.x) * kRowThreads) {
        partner[i] = kIsPrefix;
        score[i] = -INFINITY;
    }
    if (mean == nullptr && inverse == nullptr) return;
    STTM_SHARED(float, squares, [kRowThreads]);
    const int pitch = ceil_div(f.D, 8) * 8, pieces = pitch / Vec<T>::size, each = max(1, min(pieces, kRowThreads));
    const int at_once = kRowThreads / each, mine = thread / each;
    const int64_t first = int64_t(blockIdx.x) * at_once, row = first + mine;
    float square = 0;
    if (mine < at_once && row < rows) {
        const T* const from =
            static_cast<const T*>(metric.data) + row / N * metric.stride_b + row % N * metric.stride_n;
        for (int piece = thread % each; piece < pieces; piece += each) {
            const Vec<T> v = features_ahead(from, f, piece * Vec<T>::size);
            if (mean != nullptr) v.store(mean + row * pitch + piece * Vec<T>::size);
            STTM_UNROLL
            for (int e = 0; e < Vec<T>::size; ++e) square += to_float(v.value[e]) * to_float(v.value[e]);
        }
    }
    if (inverse == nullptr) return;
    squares[thread] = square;
    __syncthreads();
    if (thread < at_once && first + thread < rows) {
        float total = 0;
        for (int i = 0; i < each; ++i) total += squares[thread * each + i];
        const int64_t at = first + thread;
        const bool real = mask.data == nullptr || mask.data[at / N * mask.stride_b + at % N * mask.stride_n] != 0;
        inverse[at] = real ? inverse_norm(total) : NAN;
    }
    if (blockIdx.x == 0 && thread == 0) inverse[rows] = NAN;
}

template <typename T>
cudaError_t launch_rows(const MatchLaunch& a, int* zero, int64_t zeros, bool norms, cudaStream_t stream) {
    const int each = max(1, min(mean_pitch(a.D) / Vec<T>::size, kRowThreads));
    const int64_t rows = int64_t(a.B) * a.N;
    const int64_t others = a.listed && a.sequences != nullptr ? rows : 0, writes = zeros + others;
    const bool reads = norms || a.mean != nullptr;
    if (!reads && writes == 0) return cudaSuccess;
    const Grid grid{reads ? ceil_div64(rows, kRowThreads / each) : min(ceil_div64(writes, kRowThreads), int64_t(264))};
    return launch(rows_kernel<T>, grid, kRowThreads, 0, stream, a.metric, features_of<T>(a.metric, a.D), a.mask, rows,
                  a.N, static_cast<T*>(a.mean), norms ? a.inverse : nullptr, zero, zeros, a.partner, a.score, others);
}

}  // namespace sttm
