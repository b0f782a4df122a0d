// How kernels address features: any strides, or 16 bytes at a time where memory allows it.
#pragma once

#include "arguments.hpp"
#include "platform.cuh"

namespace sttm {

// The most blocks where each walks through its share in steps of the grid.
constexpr int64_t kMostWalkers = 1 << 30;

template <class T>
__device__ __forceinline__ const T* row_of(const Rows& rows, int64_t b, int64_t n) {
    return static_cast<const T*>(rows.data) + b * rows.stride_b + n * rows.stride_n;
}

// Whether every row begins at a multiple of 16 bytes, channels lie side by side, and C is a multiple of 16 bytes.
template <class T>
inline bool is_vectorizable(const Rows& rows, int64_t C) {
    constexpr int64_t kSize = Vec<T>::size;
    return rows.stride_c == 1 && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride_b % kSize == 0 &&
           rows.stride_n % kSize == 0 && C % kSize == 0;
}

__host__ __device__ inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Calls run(T()) with the type that `dtype` names.
template <class Run>
inline cudaError_t with_type(DType dtype, Run run) {
    switch (dtype) {
        case DType::float32: return run(float());
        case DType::float16: return run(__half());
        case DType::bfloat16: return run(__nv_bfloat16());
    }
    return cudaErrorInvalidValue;
}

// Calls run with std::true_type or std::false_type for each of `flags`.
template <class Run>
inline cudaError_t with_flags(const Run& run) {
    return run();
}
template <class Run, class... Flags>
inline cudaError_t with_flags(const Run& run, bool flag, Flags... flags) {
    if (flag) return with_flags([&](auto... others) { return run(std::true_type(), others...); }, flags...);
    return with_flags([&](auto... others) { return run(std::false_type(), others...); }, flags...);
}

}  // namespace sttm
