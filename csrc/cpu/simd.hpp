// Vectors of the instruction set that a source is compiled for, and what every kernel reads and writes with.
//
// Each kernel is compiled several times, into one namespace per instruction set. All that is here has internal linkage
// and nothing comes from the standard library: the linker must not be able to take a function from the wrong object.
#pragma once

#include <cstdint>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "pool.hpp"
#include "sttm/arguments.hpp"

#if defined(__clang__)
#define STTM_UNROLL _Pragma("clang loop unroll(full)")
#else
#define STTM_UNROLL _Pragma("GCC unroll 64")
#endif
// For what takes vectors by reference, which stay in registers where it is compiled into its caller.
#define STTM_INLINE inline __attribute__((always_inline))

namespace sttm::cpu::STTM_ISA {
namespace {

// kWidth floats make a vector; a product keeps kRows by kVectors of them in registers, kPanel = kVectors * kWidth.
#if defined(__AVX512F__)
constexpr int kWidth = 16, kRows = 12;
#elif defined(__AVX__)
constexpr int kWidth = 8, kRows = 6;
#elif defined(__aarch64__)
constexpr int kWidth = 4, kRows = 12;
#else
constexpr int kWidth = 4, kRows = 6;
#endif
constexpr int kVectors = 2, kPanel = kVectors * kWidth;

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));

struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

constexpr float kInfinity = __builtin_inff();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class T>
inline T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
    return a < b ? b : a;
}

inline Floats splat(float value) { return value - Floats{}; }
inline Ints splat(int32_t value) { return value - Ints{}; }
inline Ints counted() {  // 0, 1, 2, ...
    Ints lanes{};
    for (int i = 0; i < kWidth; ++i) lanes[i] = i;
    return lanes;
}

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}
template <class Vector>
inline Vector load_bits(const void* from) {
    Vector to;
    __builtin_memcpy(&to, from, sizeof to);
    return to;
}

// Lane j of the result is element index[j] of a and b one after the other; the index is known when this is compiled.
STTM_INLINE Floats shuffle(Floats a, Floats b, Ints index) {
#if defined(__clang__)
    Floats to;
    STTM_UNROLL
    for (int j = 0; j < kWidth; ++j) to[j] = index[j] < kWidth ? a[index[j]] : b[index[j] - kWidth];
    return to;
#else
    return __builtin_shuffle(a, b, index);
#endif
}

inline Floats load(const float* from) { return load_bits<Floats>(from); }
inline void store(float* to, Floats value) { __builtin_memcpy(to, &value, sizeof value); }

inline Floats load(const BFloat* from) {
    return bits<Floats>(__builtin_convertvector(load_bits<Halves>(from), Words) << 16);
}
inline void store(BFloat* to, Floats value) {  // to nearest, ties to even
    const Words word = bits<Words>(value);
    const Words rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16, quiet = (word >> 16) | 0x40;
    const Halves half = __builtin_convertvector(value == value ? rounded : quiet, Halves);
    __builtin_memcpy(to, &half, sizeof half);
}

#if defined(__AVX512F__)
inline Floats load(const Half* from) {
    return bits<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
inline void store(Half* to, Floats value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(bits<__m512>(value), 0));
}
#elif defined(__F16C__)
inline Floats load(const Half* from) {
    return bits<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline void store(Half* to, Floats value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(bits<__m256>(value), 0));
}
#else
inline Floats load(const Half* from) {
    const Words half = __builtin_convertvector(load_bits<Halves>(from), Words);
    const Words magnitude = (half & 0x7fff) << 13;
    const Words scaled = bits<Words>(bits<Floats>(magnitude) * 0x1p112f);  // subnormals become normal
    const Words special = magnitude | 0x7f800000;
    return bits<Floats>(((half & 0x7c00) == 0x7c00 ? special : scaled) | ((half & 0x8000) << 16));
}
inline void store(Half* to, Floats value) {  // to nearest, ties to even
    const Words word = bits<Words>(value), sign = (word >> 16) & 0x8000, magnitude = word & 0x7fffffff;
    const Words normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const Words subnormal = bits<Words>(bits<Floats>(magnitude) + 0.5f) - bits<uint32_t>(0.5f);  // rounded by the sum
    const Words infinity = Words{} + 0x7c00, quiet = infinity | 0x200;
    Words half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477ff000 ? infinity : half;
    half = magnitude > 0x7f800000 ? quiet : half;
    const Halves found = __builtin_convertvector(half | sign, Halves);
    __builtin_memcpy(to, &found, sizeof found);
}
#endif

// The first `count` elements of a vector, which are `step` apart in memory; the others are 0 and are not touched.
template <class T>
inline Floats load_some(const T* from, int count, int64_t step = 1) {
    T some[kWidth] = {};
    for (int i = 0; i < count; ++i) some[i] = from[i * step];
    return load(some);
}
template <class T>
inline void store_some(T* to, Floats value, int count) {
    T some[kWidth];
    store(some, value);
    for (int i = 0; i < count; ++i) to[i] = some[i];
}
template <class T>
inline Floats load_up_to(const T* from, int64_t count, int64_t step) {
    return count >= kWidth && step == 1 ? load(from)
                                        : load_some(from, static_cast<int>(min<int64_t>(count, kWidth)), step);
}
template <class T>
inline void store_up_to(T* to, Floats value, int64_t count) {
    if (count >= kWidth)
        store(to, value);
    else
        store_some(to, value, static_cast<int>(count));
}
// Whether a result is better written past the caches, by `stream`: it is large, but not so large that its memory comes
// fresh from the system, zeroed through the caches; and its rows, which are dense, are made of whole aligned vectors.
template <class T>
inline bool is_streamed(const T* to, int64_t rows, int64_t columns) {
    constexpr int64_t kStreamed = 8 << 20;
    const int64_t bytes = rows * columns * static_cast<int64_t>(sizeof(T));
    return bytes >= kStreamed && bytes < kFresh && columns % kWidth == 0 &&
           reinterpret_cast<uintptr_t>(to) % (sizeof(T) * kWidth) == 0;
}

// Stores that do not fetch what they overwrite. Others see them after `fence`.
template <int kBytes>
inline void stream_bytes(void* to, const void* from) {
    __builtin_memcpy(to, from, kBytes);
}
#if defined(__SSE2__)
template <>
inline void stream_bytes<16>(void* to, const void* from) {
    _mm_stream_si128(static_cast<__m128i*>(to), load_bits<__m128i>(from));
}
inline void fence() { _mm_sfence(); }
#else
inline void fence() {}
#endif
#if defined(__AVX__)
template <>
inline void stream_bytes<32>(void* to, const void* from) {
    _mm256_stream_si256(static_cast<__m256i*>(to), load_bits<__m256i>(from));
}
#endif
#if defined(__AVX512F__)
template <>
inline void stream_bytes<64>(void* to, const void* from) {
    _mm512_stream_si512(static_cast<__m512i*>(to), load_bits<__m512i>(from));
}
#endif
template <class T>
inline void stream(T* to, Floats value) {
    T some[kWidth];
    store(some, value);
    stream_bytes<sizeof some>(to, some);
}

// `count` elements that are `step` apart to a row.
template <class T>
inline void copy_row(const T* from, int64_t step, T* to, int count, bool streamed) {
    if (step == 1 && streamed)
        for (int c = 0; c < count; c += kWidth) stream_bytes<sizeof(T) * kWidth>(to + c, from + c);
    else if (step == 1)
        __builtin_memcpy(to, from, sizeof(T) * count);
    else
        for (int c = 0; c < count; ++c) to[c] = from[c * step];
}

template <class T>
inline float to_float(T value) {
    return load_some(&value, 1)[0];
}
inline float to_float(float value) { return value; }

// Its elements added up in one order.
inline float sum_of(Floats value) {
    float total = 0;
    STTM_UNROLL
    for (int i = 0; i < kWidth; ++i) total += value[i];
    return total;
}

// e^x to 2 ulp of what it is rounded to, 0 from 2^-150 down.
inline Floats exp(Floats x) {
    const Floats least = splat(-103.97f), most = splat(88.7f);
    const Floats inside = x < least ? least : (x > most ? most : x);
    const Floats magic = splat(0x1.8p23f);  // adding it rounds to an integer, which its last bits then hold
    const Floats shifted = inside * 1.44269504f + magic;
    const Floats n = shifted - magic;
    Floats f = inside - n * 0.693359375f;
    f = f - n * -2.12194440e-4f;
    Floats p = splat(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * (f * f) + f + 1.0f;
    // A power of 2 below the normal range is made of two.
    const Ints exponent = bits<Ints>(shifted) - bits<int32_t>(0x1.8p23f), low = exponent < -126;
    const Floats power = bits<Floats>((exponent + 127 + (low & 64)) << 23);
    Floats result = p * power * (low ? splat(0x1p-64f) : splat(1.0f));
    result = x < least ? Floats{} : result;
    return x > most ? splat(kInfinity) : result;
}

// The natural logarithm of a positive normal number to 2 ulp; NaN of NaN.
inline Floats log(Floats x) {
    const Ints word = bits<Ints>(x);
    Ints exponent = (word >> 23) - 126;
    Floats m = bits<Floats>((word & 0x007fffff) | 0x3f000000);  // [0.5, 1)
    const Ints low = m < 0.707106781f;
    exponent = exponent + low;  // a true comparison is -1
    m = (low ? m + m : m) - 1.0f;
    const Floats z = m * m, e = __builtin_convertvector(exponent, Floats);
    Floats p = splat(7.0376836292e-2f);
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    p = p * m * z + e * -2.12194440e-4f - 0.5f * z;
    const Floats result = m + p + e * 0.693359375f;
    return x == x ? result : x;
}

template <class F>
void parallel_for(int64_t tasks, int threads, const F& run) {
    parallel(
        tasks, threads,
        [](const void* context, int64_t task, int slot) { (*static_cast<const F*>(context))(task, slot); }, &run);
}

template <class T>
T* take(int64_t count) {
    return static_cast<T*>(cpu::take(static_cast<size_t>(count) * sizeof(T)));
}

inline int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// `run` with a value of the type of the features.
template <class F>
void with_type(DType dtype, const F& run) {
    switch (dtype) {
        case DType::float32: return run(float{});
        case DType::float16: return run(Half{});
        case DType::bfloat16: return run(BFloat{});
    }
}

// As many threads as `bytes` of memory traffic, or a flop for each, keep busy for longer than waking one takes.
inline int threads_for(Stream stream, int64_t bytes) {
    return static_cast<int>(min<int64_t>(stream.threads, 1 + bytes / (128 << 10)));
}

}  // namespace
}  // namespace sttm::cpu::STTM_ISA
