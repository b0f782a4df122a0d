// Arithmetic that the compiler makes more of than it takes, and 16 bytes of features as floats.
#pragma once

#include <cstring>

#include "platform.cuh"

namespace sttm {

// a / b, rounded to nearest where b and the result are far from the ends of the range: without a branch for the rest.
__device__ __forceinline__ float quotient(float a, float b) {
#if defined(STTM_HOST)
    return a / b;
#else
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
    inverse = fmaf(inverse, fmaf(-b, inverse, 1.0f), inverse);
    const float near = a * inverse;
    return fmaf(inverse, fmaf(-b, near, a), near);
#endif
}

// a * b; of 32 bits by one instruction, where the compiler would widen both before and take six.
__device__ __forceinline__ int64_t wide_product(int a, int64_t b) { return a * b; }
__device__ __forceinline__ int64_t wide_product(int a, int b) {
#if defined(STTM_HOST)
    return int64_t(a) * b;
#else
    int64_t product;
    asm("mul.wide.s32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
    return product;
#endif
}

template <class T>
__device__ __forceinline__ T* further(T* at, int64_t bytes) {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(at) + bytes);
}
template <class T>
__device__ __forceinline__ T* element(T* at, int i) {
    return further(at, wide_product(i, int(sizeof(T))));
}

// 16 bytes of T, or one T, as they lie in memory: converted two values at a time where two are a word.
template <class T, bool Wide>
struct Piece {
    static constexpr int size = Wide ? Vec<T>::size : 1;
    using Word = std::conditional_t<Wide, uint32_t, T>;
    struct alignas(sizeof(T) * size) Words {
        Word word[Wide ? 4 : 1];
    } words;

    static __device__ __forceinline__ Piece load(const T* at) { return {*reinterpret_cast<const Words*>(at)}; }
    __device__ __forceinline__ void store(T* at) const { *reinterpret_cast<Words*>(at) = words; }
    static __device__ __forceinline__ Piece zero() {
        float zeros[size];
        STTM_UNROLL
        for (float& value : zeros) value = 0.0f;
        return from_floats(zeros);
    }

    __device__ __forceinline__ void to_floats(float (&out)[size]) const {
#if defined(STTM_HOST)
        T value[size];
        std::memcpy(value, &words, sizeof words);
        for (int i = 0; i < size; ++i) out[i] = to_float(value[i]);
#else
        if constexpr (!Wide) {
            out[0] = to_float(words.word[0]);
        } else {
            STTM_UNROLL
            for (int i = 0; i < 4; ++i) {
                const uint32_t word = words.word[i];
                if constexpr (std::is_same_v<T, float>) {
                    out[i] = __uint_as_float(word);
                } else if constexpr (std::is_same_v<T, __half>) {
                    const float2 both = __half22float2(reinterpret_cast<const __half2&>(word));
                    out[2 * i] = both.x, out[2 * i + 1] = both.y;
                } else {
                    out[2 * i] = __uint_as_float(word << 16), out[2 * i + 1] = __uint_as_float(word & 0xffff0000u);
                }
            }
        }
#endif
    }
    static __device__ __forceinline__ Piece from_floats(const float (&in)[size]) {
        Piece all;
#if defined(STTM_HOST)
        T value[size];
        for (int i = 0; i < size; ++i) value[i] = from_float<T>(in[i]);
        std::memcpy(&all.words, value, sizeof value);
#else
        if constexpr (!Wide) {
            all.words.word[0] = from_float<T>(in[0]);
        } else {
            STTM_UNROLL
            for (int i = 0; i < 4; ++i) {
                uint32_t& word = all.words.word[i];
                if constexpr (std::is_same_v<T, float>) {
                    word = __float_as_uint(in[i]);
                } else if constexpr (std::is_same_v<T, __half>) {
                    const __half2 both = __floats2half2_rn(in[2 * i], in[2 * i + 1]);
                    word = reinterpret_cast<const uint32_t&>(both);
                } else {
                    const __nv_bfloat162 both = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
                    word = reinterpret_cast<const uint32_t&>(both);
                }
            }
        }
#endif
        return all;
    }
};

}  // namespace sttm
