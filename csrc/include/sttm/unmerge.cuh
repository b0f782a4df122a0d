// unmerge and compose: gathers along an index, 0 or -1 where it points outside.
#pragma once

#include "view.cuh"

namespace sttm {

constexpr int kUnmergeThreads = 256;

// Threads of a block take a power-of-two share of it for each row: wide rows have all of it, narrow ones share it.
inline int threads_per_row(int columns, int threads) {
    int share = 1;
    while (share < columns && share < threads) share *= 2;
    return share;
}

template <class T, bool Vectorized>
__global__ void __launch_bounds__(kUnmergeThreads) unmerge_kernel(UnmergeArguments a, int share) {
    const int rows = kUnmergeThreads / share, tiles = ceil_div(a.N, rows);
    const int64_t b = blockIdx.x / tiles;
    const int n = blockIdx.x % tiles * rows + threadIdx.x / share;
    if (n >= a.N) return;
    const int64_t token = b * a.N + n;
    const int k = a.index[token];
    const bool member = k >= 0 && k < a.K;
    const T* x = row_of<T>(a.x, b, member ? k : 0);
    T* y = static_cast<T*>(a.y) + token * a.C;
    if constexpr (Vectorized) {
        const Vec<T> zero = Vec<T>::filled(from_float<T>(0.0f));
        for (int c = threadIdx.x % share * Vec<T>::size; c < a.C; c += share * Vec<T>::size)
            (member ? Vec<T>::load(x + c) : zero).store(y + c);
    } else {
        for (int c = threadIdx.x % share; c < a.C; c += share)
            y[c] = member ? x[c * a.x.stride_c] : from_float<T>(0.0f);
    }
}

template <class T>
cudaError_t launch_unmerge(const UnmergeArguments& a, cudaStream_t stream) {
    const bool vectorized = is_vectorizable<T>(a.x, a.C) && is_aligned(a.y);
    const int share = threads_per_row(vectorized ? a.C / Vec<T>::size : a.C, kUnmergeThreads);
    const Grid grid{a.C == 0 ? 0 : times(a.B, ceil_div(a.N, kUnmergeThreads / share))};
    return launch(vectorized ? unmerge_kernel<T, true> : unmerge_kernel<T, false>, grid, kUnmergeThreads, 0, stream, a,
                  share);
}

template <int Threads>
__global__ void __launch_bounds__(Threads) compose_kernel(ComposeArguments a) {
    const int64_t tokens = int64_t(a.B) * a.N, step = int64_t(gridDim.x) * Threads;
    for (int64_t token = int64_t(blockIdx.x) * Threads + threadIdx.x; token < tokens; token += step) {
        const int k = a.index1[token];
        const int onward = k >= 0 && k < a.K ? a.index2[token / a.N * a.K + k] : -1;
        a.out[token] = onward >= 0 && onward < a.num_groups ? onward : -1;
    }
}

inline cudaError_t launch_compose(const ComposeArguments& a, cudaStream_t stream) {
    const int64_t blocks = min(ceil_div64(int64_t(a.B) * a.N, kUnmergeThreads), kMostWalkers);
    return launch(compose_kernel<kUnmergeThreads>, Grid{blocks}, kUnmergeThreads, 0, stream, a);
}

}  // namespace sttm
