// The product of two tiles in shared memory by one warp, and asynchronous copies into such tiles.
//
// Lane l holds rows g = l / 4 and g + 8 and columns 2 (l % 4) and + 1 of every 16 x 8 tile, the layout of mma.sync.
// Operands of one 16-bit type are multiplied as they are; other pairs, a float32 weight times a float16 feature say,
// in TF32, which holds both 16-bit formats' digits; EXACT products of float32 operands by FMA in the same layout.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "platform.cuh"

namespace sttm {

__device__ __forceinline__ int fragment_row(int lane, int i, int e) { return 16 * i + lane / 4 + e / 2 * 8; }

// Tiles of columns come in pairs; pair p starts at column p * PAIR, so that warps can take turns in pairs.
template <int PAIR = 16>
__device__ __forceinline__ int fragment_column(int lane, int j, int e) {
    return j / 2 * PAIR + j % 2 * 8 + lane % 4 * 2 + e % 2;
}

// The same value, of which the compiler knows nothing: what is worked out of it is worked out where it is used, and
// does not fill registers around a long loop.
__device__ __forceinline__ int anew(int value) {
#ifndef STTM_HOST
    asm volatile("" : "+r"(value));
#endif
    return value;
}

// 16 bytes from global to shared memory, the first `bytes` of them read and the rest zero.
#ifdef STTM_HOST
inline void copy_async(void* shared, const void* global, int bytes) {
    std::memset(shared, 0, 16);
    std::memcpy(shared, global, bytes);
}
#else
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
    copy_async(static_cast<uint32_t>(__cvta_generic_to_shared(shared)), global, bytes);
}
#endif

// The same of 4 bytes.
__device__ __forceinline__ void copy_4_async(void* shared, const void* global) {
#ifdef STTM_HOST
    std::memcpy(shared, global, 4);
#else
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(at), "l"(global) : "memory");
#endif
}

// Own copies so far become a group; all groups have arrived but the last COUNT.
__device__ __forceinline__ void commit_copies() {
#ifndef STTM_HOST
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int COUNT>
__device__ __forceinline__ void wait_for_copies_but() {
#ifndef STTM_HOST
    asm volatile("cp.async.wait_group %0;" ::"n"(COUNT) : "memory");
#endif
}

// Own copies have arrived; a barrier makes those of the other threads visible.
__device__ __forceinline__ void wait_for_copies() {
#ifndef STTM_HOST
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// A float as a TF32 product sees it.
__device__ __forceinline__ float round_to_tf32(float value) {
#ifndef STTM_HOST
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return __uint_as_float(bits);
#else
    return value;
#endif
}

template <typename T>
__device__ __forceinline__ void four(const T* at, float (&values)[4]) {
#ifndef STTM_HOST
    static_assert(std::is_same<T, float>::value, "other operands are for tensor cores");
    const float4 v = *reinterpret_cast<const float4*>(at);
    values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
#else
    for (int e = 0; e < 4; ++e) values[e] = to_float(at[e]);
#endif
}

// Every lane multiplies what belongs to its own elements.
template <bool DEPTH_MAJOR, int PAIR, int MT, int NT, typename A, typename B>
__device__ __forceinline__ void product_by_fma(float (&acc)[MT][NT][4], const A* a, int pitch_a, const B* b,
                                               int pitch_b, int depth, int columns) {
    const int lane = anew(lane_index());
    STTM_NO_UNROLL
    for (int k = 0; k < depth; k += 4) {
        float left[MT][2][4];
        STTM_UNROLL
        for (int i = 0; i < MT; ++i) {
            STTM_UNROLL
            for (int r = 0; r < 2; ++r) four(a + fragment_row(lane, i, 2 * r) * pitch_a + k, left[i][r]);
        }
        STTM_UNROLL
        for (int j = 0; j < NT; ++j) {
            const int column = fragment_column<PAIR>(lane, j, 0);
            if (j / 2 * PAIR >= columns) continue;
            float right[2][4];
            if constexpr (DEPTH_MAJOR) {
                STTM_UNROLL
                for (int s = 0; s < 4; ++s) {
                    right[0][s] = to_float(b[(k + s) * pitch_b + column]);
                    right[1][s] = to_float(b[(k + s) * pitch_b + column + 1]);
                }
            } else {
                four(b + column * pitch_b + k, right[0]);
                four(b + (column + 1) * pitch_b + k, right[1]);
            }
            STTM_UNROLL
            for (int s = 0; s < 4; ++s) {
                STTM_UNROLL
                for (int i = 0; i < MT; ++i) {
                    STTM_UNROLL
                    for (int e = 0; e < 4; ++e) acc[i][j][e] += left[i][e / 2][s] * right[e % 2][s];
                }
            }
        }
    }
}

#ifndef STTM_HOST

// Where a row lies in shared memory, as a number that is worked out once and not for every instruction.
__device__ __forceinline__ uint32_t shared_address(const void* row) {
    return static_cast<uint32_t>(anew(static_cast<int>(__cvta_generic_to_shared(row))));
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
template <bool TRANSPOSE>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t at) {
    if constexpr (TRANSPOSE) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(at)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(at)
                     : "memory");
    }
}

template <typename T>
__device__ __forceinline__ void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define STTM_MMA(shape_and_types)                                                                    \
    asm("mma.sync.aligned." shape_and_types " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                                     \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
    if constexpr (std::is_same<T, float>::value) {
        STTM_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
    } else if constexpr (std::is_same<T, __half>::value) {
        STTM_MMA("m16n8k16.row.col.f32.f16.f16.f32");
    } else {
        STTM_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
    }
#undef STTM_MMA
}

// The same of half the depth, of 16-bit elements.
template <typename T>
__device__ __forceinline__ void multiply_half(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t b) {
#define STTM_MMA(shape_and_types)                                                           \
    asm("mma.sync.aligned." shape_and_types " {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};" \
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                            \
        : "r"(a0), "r"(a1), "r"(b))
    if constexpr (std::is_same<T, __half>::value) {
        STTM_MMA("m16n8k8.row.col.f32.f16.f16.f32");
    } else {
        STTM_MMA("m16n8k8.row.col.f32.bf16.bf16.f32");
    }
#undef STTM_MMA
}

// acc[h] += 16 rows times rows 8 h to 8 h + 7 of them, whose sums of squares lie on its diagonal.
template <int UNROLL, typename T>
__device__ __forceinline__ void add_squares(float (&acc)[2][4], const T* rows, int pitch, int depth) {
    const int lane = anew(lane_index());
    const uint32_t at = shared_address(rows + lane % 16 * pitch + lane / 16 * 8);
#pragma unroll UNROLL
    for (int k = 0; k < depth; k += 16) {
        uint32_t r[4];
        load_matrices<false>(r, at + k * sizeof(T));
        STTM_UNROLL
        for (int half = 0; half < 2; ++half) {
            multiply_half<T>(acc[0], r[2 * half], r[2 * half + 1], r[2 * half]);
            multiply_half<T>(acc[1], r[2 * half], r[2 * half + 1], r[2 * half + 1]);
        }
    }
}

template <bool DEPTH_MAJOR, int PAIR, int UNROLL, int MT, int NT, typename T>
__device__ __forceinline__ void product_of_halves(float (&acc)[MT][NT][4], const T* a, int pitch_a, const T* b,
                                                  int pitch_b, int depth, int columns) {
    const int lane = anew(lane_index());
    constexpr int kBytes = sizeof(T);
    a += lane % 16 * pitch_a + lane / 16 * 8;
    b += DEPTH_MAJOR ? lane % 16 * pitch_b + lane / 16 * 8 : (lane % 8 + lane / 16 * 8) * pitch_b + lane / 8 % 2 * 8;
    const uint32_t left_at = shared_address(a), right_at = shared_address(b);
#pragma unroll UNROLL
    for (int k = 0; k < depth; k += 16) {
        uint32_t left[MT][4];
        STTM_UNROLL
        for (int i = 0; i < MT; ++i) load_matrices<false>(left[i], left_at + (16 * i * pitch_a + k) * kBytes);
        STTM_UNROLL
        for (int j = 0; j < NT; j += 2) {
            const int column = j / 2 * PAIR;
            if (column >= columns) continue;
            uint32_t right[4];
            load_matrices<DEPTH_MAJOR>(right,
                                       right_at + (DEPTH_MAJOR ? k * pitch_b + column : column * pitch_b + k) * kBytes);
            STTM_UNROLL
            for (int i = 0; i < MT; ++i) {
                multiply<T>(acc[i][j], left[i], right[0], right[1]);
                multiply<T>(acc[i][j + 1], left[i], right[2], right[3]);
            }
        }
    }
}

template <typename T>
__device__ __forceinline__ uint32_t tf32_bits(T value) {
    return __float_as_uint(std::is_same<T, float>::value ? round_to_tf32(to_float(value)) : to_float(value));
}

template <bool DEPTH_MAJOR, int PAIR, int MT, int NT, typename A, typename B>
__device__ __forceinline__ void product_in_tf32(float (&acc)[MT][NT][4], const A* a, int pitch_a, const B* b,
                                                int pitch_b, int depth, int columns) {
    const int lane = anew(lane_index()), g = lane / 4, t = lane % 4;
    a += g * pitch_a + t;
    b += DEPTH_MAJOR ? t * pitch_b + g : g * pitch_b + t;
    STTM_NO_UNROLL
    for (int k = 0; k < depth; k += 8) {
        uint32_t left[MT][4];
        STTM_UNROLL
        for (int i = 0; i < MT; ++i) {
            const A* row = a + 16 * i * pitch_a + k;
            left[i][0] = tf32_bits(row[0]), left[i][1] = tf32_bits(row[8 * pitch_a]);
            left[i][2] = tf32_bits(row[4]), left[i][3] = tf32_bits(row[8 * pitch_a + 4]);
        }
        STTM_UNROLL
        for (int j = 0; j < NT; ++j) {
            const int column = j / 2 * PAIR + j % 2 * 8;
            if (j / 2 * PAIR >= columns) continue;
            const B* at = b + (DEPTH_MAJOR ? k * pitch_b + column : column * pitch_b + k);
            const uint32_t b0 = tf32_bits(at[0]), b1 = tf32_bits(at[DEPTH_MAJOR ? 4 * pitch_b : 4]);
            STTM_UNROLL
            for (int i = 0; i < MT; ++i) multiply<float>(acc[i][j], left[i], b0, b1);
        }
    }
}

#endif

// acc += A B for a warp: A is MT * 16 rows by `depth`, adjacent along the depth; B is `depth` by NT * 8 columns,
// adjacent along the columns if DEPTH_MAJOR and along the depth if not. Depth is a multiple of 16, rows start at
// multiples of 16 bytes, NT is even; pairs of column tiles that start at or beyond `columns` are left out. UNROLL steps
// of 16-bit operands are written out, where registers allow it.
template <bool EXACT, bool DEPTH_MAJOR, int PAIR = 16, int UNROLL = 1, int MT, int NT, typename A, typename B>
__device__ __forceinline__ void warp_product(float (&acc)[MT][NT][4], const A* a, int pitch_a, const B* b, int pitch_b,
                                             int depth, int columns = NT / 2 * PAIR) {
    static_assert(NT % 2 == 0, "column tiles come in pairs");
#ifdef STTM_HOST
    product_by_fma<DEPTH_MAJOR, PAIR>(acc, a, pitch_a, b, pitch_b, depth, columns);
#else
    if constexpr (std::is_same<A, B>::value && !std::is_same<A, float>::value) {
        product_of_halves<DEPTH_MAJOR, PAIR, UNROLL>(acc, a, pitch_a, b, pitch_b, depth, columns);
    } else if constexpr (EXACT) {
        product_by_fma<DEPTH_MAJOR, PAIR>(acc, a, pitch_a, b, pitch_b, depth, columns);
    } else {
        product_in_tf32<DEPTH_MAJOR, PAIR>(acc, a, pitch_a, b, pitch_b, depth, columns);
    }
#endif
}

template <int MT, int NT>
__device__ __forceinline__ void clear(float (&acc)[MT][NT][4]) {
    STTM_UNROLL
    for (int i = 0; i < MT; ++i) {
        STTM_UNROLL
        for (int j = 0; j < NT; ++j) {
            STTM_UNROLL
            for (int e = 0; e < 4; ++e) acc[i][j][e] = 0;
        }
    }
}

}  // namespace sttm
