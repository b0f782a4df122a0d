// The softmax weights of soft_merge, worked out a tile at a time, and what tokens and meta tokens add to them.
#pragma once

#include "similarity.cuh"

namespace sttm {

constexpr int kSoftThreads = 256;
constexpr int kAxes = 8;  // of positions that a slice takes along

// What a token or a meta token adds to its weights A = exp(S - level of both) and to their gradients: with
// T = <g_k, x_n> + common_k, where <g_k, x_n> includes positions,
// dL/dS = A scale_n (T / mass_k + grad_size_k - centre_n) - A centre_k.
struct SoftTerm {
    int real;
    float scale;  // size_n; backward 1 / (kUp mass_k)
    float level;  // lse_n or lse_k, of the side that a softmax belongs to
    float centre, common, grad_size;
};

// Takes the least number above 0 to where its inverse is finite.
constexpr float kUp = 0x1p24f;

// weight / mass_k, in two steps: weights are not greater than mass_k where sizes are 1, but 1 / mass_k overflows for a
// group far from every token.
__device__ __forceinline__ float over_mass(float weight, const SoftTerm& meta) { return weight * kUp * meta.scale; }

__device__ __forceinline__ SoftTerm soft_token(const SoftMergeInputs& a, const float* lse, const float* mean,
                                               int64_t item, int n) {
    SoftTerm term{};
    if (n >= a.N) return term;
    if (a.mask.data != nullptr && a.mask.data[item * a.mask.stride_b + n * a.mask.stride_n] == 0) return term;
    term.real = 1;
    term.scale = a.size.data == nullptr ? 1.0f : a.size.data[item * a.size.stride_b + n * a.size.stride_n];
    if (a.over_meta) {
        term.level = lse[item * a.N + n];
        if (mean != nullptr && term.scale != 0) term.centre = mean[item * a.N + n];
    }
    return term;
}

__device__ __forceinline__ SoftTerm soft_meta(const SoftMergeInputs& a, const float* lse, int64_t item, int k) {
    SoftTerm term{k < a.K, 1};
    if (term.real && !a.over_meta) term.level = lse[item * a.K + k];
    return term;
}

// A; 0 where either is not there, whatever its features.
__device__ __forceinline__ float attention(float S, const SoftTerm& own, const SoftTerm& other) {
    return own.real && other.real ? expf(S - (own.level + other.level)) : 0.0f;
}

__device__ __forceinline__ float axis_of(const Rows& rows, int64_t item, int n, int axis) {
    return static_cast<const float*>(rows.data)[item * rows.stride_b + n * rows.stride_n + axis * rows.stride_c];
}

// Sums over other rows of weight * position for up to kAxes axes, in shared memory.
struct Moments {
    static constexpr int own = 64;
    float* sums;  // (2 column warps, own rows, kAxes)
    int first, count;

    __device__ __forceinline__ Moments(float* sums, const Rows& positions, int P, int slice)
        : sums(sums), first(slice * kAxes), count(positions.data == nullptr ? 0 : min(kAxes, P - first)) {
        for (int i = threadIdx.x; i < 2 * own * kAxes; i += kSoftThreads) sums[i] = 0;
    }

    template <typename Tiles>
    __device__ __forceinline__ void add(const Tiles& tiles, const float (&weight)[1][4][4], const Rows& positions,
                                        int64_t item, int start, const SoftTerm* terms) {
        STTM_NO_UNROLL
        for (int axis = 0; axis < count; ++axis) {
            float moment[2] = {0, 0};
            const int from = anew(start);
            STTM_UNROLL
            for (int j = 0; j < 4; ++j) {
                STTM_UNROLL
                for (int e = 0; e < 2; ++e) {
                    const int column = tiles.column(j, e);
                    if (!terms[column].real) continue;
                    const float value = axis_of(positions, item, from + column, first + axis);
                    moment[0] += weight[0][j][e] * value;
                    moment[1] += weight[0][j][2 + e] * value;
                }
            }
            STTM_UNROLL
            for (int r = 0; r < 2; ++r) {
                moment[r] += shuffle_xor(moment[r], 1);
                moment[r] += shuffle_xor(moment[r], 2);
                static_assert(Tiles::OWN == own, "one sum for every row");
                const int row = warp_index() % 2 * own + tiles.row(0, 2 * r);
                if (lane_index() % 4 == 0) sums[row * kAxes + axis] += moment[r];
            }
        }
    }

    // Calls store(row, axis, sum), after a barrier.
    template <typename Store>
    __device__ __forceinline__ void finish(int rows, const Store& store) {
        for (int i = threadIdx.x; i < rows * count; i += kSoftThreads) {
            const int row = i / count, axis = i % count;
            store(row, first + axis, sums[row * kAxes + axis] + sums[(own + row) * kAxes + axis]);
        }
    }
};

__host__ __device__ inline Metric metric_of(const Rows& rows) {
    return {rows.data, 1, rows.stride_b, 0, rows.stride_n, rows.stride_c};
}

// How the features of every side are read.
struct SoftFeatures {
    Features q, meta, x, grad_y;
};

template <typename T>
SoftFeatures soft_features(const SoftMergeInputs& a, const Rows& grad_y) {
    return {features_of<T>(a.q, a.D), features_of<T>(a.meta, a.D), features_of<T>(metric_of(a.x), a.C),
            features_of<T>(metric_of(grad_y), a.C)};
}

inline Grid soft_grid(const SoftMergeInputs& a, int rows, int tile, int slices) {
    return {times(int64_t(a.B) * ceil_div(rows, tile), slices)};
}

}  // namespace sttm
