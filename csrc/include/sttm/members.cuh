// How a warp walks through the channels of a row and the tokens of a group.
#pragma once

#include "platform.cuh"
#include "view.cuh"

namespace sttm {

constexpr int kMergeWarps = 8, kMergeThreads = kMergeWarps * kWarpSize;

// How a warp walks through channels: each lane has kWide adjacent ones, kSteps times.
template <class T, bool Vectorized>
struct Lanes {
    static constexpr int kWide = Vectorized ? Vec<T>::size : 1;
    static constexpr int kSteps = Vectorized ? 16 / kWide : 2;
    static constexpr int kCount = kWide * kSteps;
    static constexpr int kSlice = kCount * kWarpSize;

    static __device__ __forceinline__ int channel(int step) { return (step * kWarpSize + lane_index()) * kWide; }
};

// The channels `first` + channel(step) of a row, 0 past C.
template <class T, bool Vectorized>
__device__ __forceinline__ void read_row(const T* row, int64_t stride_c, int first, int C,
                                         T (&out)[Lanes<T, Vectorized>::kCount]) {
    using L = Lanes<T, Vectorized>;
    STTM_UNROLL
    for (int step = 0; step < L::kSteps; ++step) {
        const int c = first + L::channel(step);
        if constexpr (Vectorized) {
            const Vec<T> v = c < C ? Vec<T>::load(row + c) : Vec<T>::filled(from_float<T>(0.0f));
            STTM_UNROLL
            for (int i = 0; i < L::kWide; ++i) out[step * L::kWide + i] = v.value[i];
        } else {
            out[step] = c < C ? row[c * stride_c] : from_float<T>(0.0f);
        }
    }
}

template <class T, bool Vectorized>
__device__ __forceinline__ void write_row(T* row, int first, int C, const T (&in)[Lanes<T, Vectorized>::kCount]) {
    using L = Lanes<T, Vectorized>;
    STTM_UNROLL
    for (int step = 0; step < L::kSteps; ++step) {
        const int c = first + L::channel(step);
        if (c >= C) continue;
        if constexpr (Vectorized) {
            Vec<T> v;
            STTM_UNROLL
            for (int i = 0; i < L::kWide; ++i) v.value[i] = in[step * L::kWide + i];
            v.store(row + c);
        } else {
            row[c] = in[step];
        }
    }
}

// size_n and w_n = size_n weight_n, which are 1 unless given.
struct Weights {
    float count = 0.0f, w = 0.0f;

    Weights() = default;
    __device__ __forceinline__ Weights(const float* weight, const float* size, int64_t token)
        : count(size == nullptr ? 1.0f : size[token]), w(weight == nullptr ? count : count * weight[token]) {}
};

// The tokens order[begin, end) of a group. Offsets that a caller made up stay inside of the item.
struct Members {
    int begin, end;

    __device__ __forceinline__ Members(const int32_t* offsets, int k, int N)
        : begin(min(max(offsets[k], 0), N)), end(min(max(offsets[k + 1], begin), N)) {}
    __device__ __forceinline__ int length() const { return end - begin; }
};

// Token number i of an order, -1 past `end`.
__device__ __forceinline__ int member(const int32_t* order, int i, int end, int N) {
    const int n = i < end ? order[i] : -1;
    return n < N ? n : -1;
}

}  // namespace sttm
