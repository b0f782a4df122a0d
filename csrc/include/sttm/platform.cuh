// What the kernels need of the platform. The only header that knows who compiles them: nvcc for a GPU, or with
// -DSTTM_HOST a C++ compiler for csrc/host/cuda_on_host.hpp, which runs them on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#if defined(STTM_HOST)
#include "../../host/cuda_on_host.hpp"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cub/block/block_scan.cuh>
#endif

namespace sttm {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t ceil_div64(int64_t a, int64_t b) { return (a + b - 1) / b; }

// STTM_SHARED(float, tile, [16][17]) declares `__shared__ float tile[16][17]`.
#if defined(STTM_HOST)
#define STTM_SHARED(type, name, ...)                         \
    typedef type name##_type __VA_ARGS__;                    \
    static ::sttm::host::Shared<name##_type> name##_storage; \
    name##_type& name = name##_storage.get()
#define STTM_UNROLL
#define STTM_NO_UNROLL
#else
#define STTM_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define STTM_UNROLL _Pragma("unroll")
#define STTM_NO_UNROLL _Pragma("unroll 1")
#endif

// The dynamic shared memory of the block, aligned to 128 bytes.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#if defined(STTM_HOST)
    return reinterpret_cast<T*>(host::machine.dynamic_shared);
#else
    extern __shared__ __align__(128) unsigned char sttm_dynamic_shared[];
    return reinterpret_cast<T*>(sttm_dynamic_shared);
#endif
}

// a * b of counts, as far as it fits.
constexpr int64_t times(int64_t a, int64_t b) { return a > 0 && b > INT64_MAX / a ? INT64_MAX : a * b; }

// Blocks of a launch, counted in 64 bits so that too many are seen.
struct Grid {
    static constexpr int64_t kMostX = INT32_MAX, kMostY = 65535, kMostZ = 65535;
    int64_t x, y = 1, z = 1;

    // Throws std::length_error if CUDA has no grids of that size.
    dim3 checked() const {
        if (x > kMostX || y > kMostY)
            throw std::length_error("a grid of " + std::to_string(x) + " x " + std::to_string(y) +
                                    " blocks is needed, and " + std::to_string(kMostX) + " x " +
                                    std::to_string(kMostY) + " is the largest");
        return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
    }
};

// Held from a request for shared memory to the launch that needs it: requests replace each other.
inline std::mutex& shared_memory_mutex() {
    static std::mutex mutex;
    return mutex;
}

// Whoever calls holds the mutex.
template <class... Parameters>
cudaError_t request_shared_memory(void (*kernel)(Parameters...), size_t bytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) cudaGetLastError();  // leaves no error behind for whoever asks next
    return error;
}

// cudaErrorInvalidValue if the GPU has less than `bytes` of dynamic shared memory for a block of `kernel`.
template <class... Parameters>
cudaError_t can_have_shared_memory(void (*kernel)(Parameters...), size_t bytes) {
    const std::lock_guard<std::mutex> lock(shared_memory_mutex());
    return request_shared_memory(kernel, bytes);
}

// Runs `kernel` on the stream. An empty grid runs nothing. Dynamic shared memory is always asked for: what a kernel
// may have unasked depends on its static shared memory.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), Grid blocks, int threads, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
    if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return cudaSuccess;
    const dim3 grid = blocks.checked(), block(static_cast<unsigned>(threads));
    std::unique_lock<std::mutex> lock(shared_memory_mutex(), std::defer_lock);
    if (shared_bytes > 0) {
        lock.lock();
        const cudaError_t error = request_shared_memory(kernel, shared_bytes);
        if (error != cudaSuccess) return error;
    }
#if defined(STTM_HOST)
    (void)stream;
    return host::run(kernel, grid, block, shared_bytes, [&] { kernel(Parameters(arguments)...); });
#else
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
    if (error != cudaSuccess) cudaGetLastError();
    return error;
#endif
}

// float, half and bfloat16

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float value) {
    if constexpr (std::is_same_v<T, __half>) {
        return __float2half_rn(value);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __float2bfloat16_rn(value);
    } else {
        return value;
    }
}

// 16 bytes of T, read and written at once. Addresses must be multiples of 16.
template <class T>
struct alignas(16) Vec {
    static constexpr int size = 16 / sizeof(T);
    T value[size];

    static __device__ __forceinline__ Vec load(const T* at) { return *reinterpret_cast<const Vec*>(at); }
    static __device__ __forceinline__ Vec filled(T value) {
        Vec all;
        STTM_UNROLL
        for (int i = 0; i < size; ++i) all.value[i] = value;
        return all;
    }
    __device__ __forceinline__ void store(T* at) const { *reinterpret_cast<Vec*>(at) = *this; }
};

// 16 bytes to global memory, which the compiler may not take apart.
__device__ __forceinline__ void store_whole(const Vec<uint32_t>& words, void* at) {
#if defined(STTM_HOST)
    words.store(static_cast<uint32_t*>(at));
#else
    __stwb(static_cast<uint4*>(at), make_uint4(words.value[0], words.value[1], words.value[2], words.value[3]));
#endif
}

// Element i of as many T as 32 bits hold, and those 32 bits.
template <class T>
__device__ __forceinline__ float element_of(uint32_t word, int i) {
    if constexpr (std::is_same_v<T, __half>) {
        const uint16_t bits = static_cast<uint16_t>(word >> 16 * i);
        __half value;
        std::memcpy(&value, &bits, sizeof value);
        return to_float(value);
    } else {
        return __uint_as_float(sizeof(T) == 4 ? word : i == 0 ? word << 16 : word & 0xffff0000u);
    }
}

#if defined(STTM_HOST)

template <class T>
inline uint32_t word_of(const float (&values)[4 / sizeof(T)]) {
    T all[4 / sizeof(T)];
    for (size_t i = 0; i < 4 / sizeof(T); ++i) all[i] = from_float<T>(values[i]);
    uint32_t word;
    std::memcpy(&word, all, sizeof word);
    return word;
}

#else

template <class T>
__device__ __forceinline__ uint32_t word_of(const float (&values)[4 / sizeof(T)]) {
    uint32_t word;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const __nv_bfloat162 both = __floats2bfloat162_rn(values[0], values[1]);
        std::memcpy(&word, &both, sizeof word);
    } else if constexpr (std::is_same_v<T, __half>) {
        const __half2 both = __floats2half2_rn(values[0], values[1]);
        std::memcpy(&word, &both, sizeof word);
    } else {
        word = __float_as_uint(values[0]);
    }
    return word;
}

#endif

// Warps. Every lane must call; lane and warp are those of a block in one dimension.

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % kWarpSize); }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x / kWarpSize); }

#if defined(STTM_HOST)

template <class T>
inline T shuffle(T value, int source, STTM_HOST_SITE) {
    return host::from_bits<T>(host::exchange(host::to_bits(value), {"shuffle", file, line})[source & 31]);
}
// From lane `source` of every WIDTH lanes.
template <int WIDTH, class T>
inline T shuffle(T value, int source, STTM_HOST_SITE) {
    const int first = lane_index() / WIDTH * WIDTH;
    return host::from_bits<T>(host::exchange(host::to_bits(value), {"shuffle", file, line})[first + source]);
}
template <class T>
inline T shuffle_xor(T value, int mask, STTM_HOST_SITE) {
    const uint64_t* all = host::exchange(host::to_bits(value), {"shuffle_xor", file, line});
    return host::from_bits<T>(all[(threadIdx.x % kWarpSize) ^ mask]);
}
template <class T>
inline T shuffle_up(T value, int delta, STTM_HOST_SITE) {
    const uint64_t* all = host::exchange(host::to_bits(value), {"shuffle_up", file, line});
    const int lane = lane_index();
    return host::from_bits<T>(all[lane < delta ? lane : lane - delta]);
}
inline unsigned ballot(bool predicate, STTM_HOST_SITE) {
    const uint64_t* all = host::exchange(predicate, {"ballot", file, line});
    unsigned votes = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) votes |= unsigned(all[lane]) << lane;
    return votes;
}
inline unsigned match_any(int value, STTM_HOST_SITE) {
    const uint64_t mine = host::to_bits(value), *all = host::exchange(mine, {"match_any", file, line});
    unsigned same = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) same |= unsigned(all[lane] == mine) << lane;
    return same;
}

#else

template <class T>
__device__ __forceinline__ T shuffle(T value, int source) {
    return __shfl_sync(kAllLanes, value, source);
}
template <int WIDTH, class T>
__device__ __forceinline__ T shuffle(T value, int source) {
    return __shfl_sync(kAllLanes, value, source, WIDTH);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(kAllLanes, value, mask);
}
template <class T>
__device__ __forceinline__ T shuffle_up(T value, int delta) {
    return __shfl_up_sync(kAllLanes, value, delta);
}
__device__ __forceinline__ unsigned ballot(bool predicate) { return __ballot_sync(kAllLanes, predicate); }
__device__ __forceinline__ unsigned match_any(int value) { return __match_any_sync(kAllLanes, value); }

#endif

// Every lane gets the sum, the same bits: a butterfly adds the same pairs whatever the lane.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
    STTM_UNROLL
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value = value + shuffle_xor(value, mask);
    return value;
}

// Blocks of `Threads` threads in one dimension. Every thread must call and gets the result; the shared memory that
// this uses is free again when it returns.

// The sum of the values of all threads before this one; `total` becomes that of all.
template <int Threads>
__device__ __forceinline__ int block_exclusive_sum(int value, int& total) {
#if defined(STTM_HOST)
    STTM_SHARED(int, sums, [Threads + 1]);
    sums[threadIdx.x] = value;
    __syncthreads();
    if (threadIdx.x == 0) {
        int before = 0;
        for (int t = 0; t < Threads; ++t) before += std::exchange(sums[t], before);
        sums[Threads] = before;
    }
    __syncthreads();
    const int before = sums[threadIdx.x];
    total = sums[Threads];
#else
    using Scan = cub::BlockScan<int, Threads>;
    __shared__ typename Scan::TempStorage storage;
    int before;
    Scan(storage).ExclusiveSum(value, before, total);
#endif
    __syncthreads();
    return before;
}

}  // namespace sttm
