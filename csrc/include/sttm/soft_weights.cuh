// The softmax weights of soft_merge, worked out a tile at a time, and what tokens and meta tokens add to them.
#pragma once

#include "spans.hpp"
#include "weight_panel.cuh"

namespace sttm {

constexpr int kSoftThreads = 256;
constexpr int kAxes = 4;  // of positions that a block takes along

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
                                               const Item& item, int n) {
    SoftTerm term{};
    if (n >= item.N) return term;
    const int64_t b = item.tokens, at = item.start + n;
    if (a.mask.data != nullptr && a.mask.data[b * a.mask.stride_b + at * a.mask.stride_n] == 0) return term;
    term.real = 1;
    term.scale = a.size.data == nullptr ? 1.0f : a.size.data[b * a.size.stride_b + at * a.size.stride_n];
    if (a.over_meta) {
        term.level = lse[item.first_row() + n];
        if (mean != nullptr && term.scale != 0) term.centre = mean[item.first_row() + n];
    }
    return term;
}

__device__ __forceinline__ SoftTerm soft_meta(const SoftMergeInputs& a, const float* lse, int64_t set, int k) {
    SoftTerm term{k < a.K, 1};
    if (term.real && !a.over_meta) term.level = lse[set * a.K + k];
    return term;
}

// A of a row of that level; 0 where the other is not there, whatever the features of the row.
__device__ __forceinline__ float attention(float S, float level, const SoftTerm& other) {
    const float A = expf(S - (level + other.level));
    return other.real != 0 ? A : 0.0f;
}

__device__ __forceinline__ float axis_of(const Rows& rows, int64_t item, int n, int axis) {
    return static_cast<const float*>(rows.data)[item * rows.stride_b + n * rows.stride_n + axis * rows.stride_c];
}

// How positions of two neighbouring columns along an axis are read, other rows from `start` on; 0 of those not there.
__device__ __forceinline__ auto neighbours(const SoftTerm* terms, const Rows& positions, int64_t item, int start,
                                           int axis) {
    return [=, &positions](int column) {
        Pair value{};
        STTM_UNROLL
        for (int e = 0; e < 2; ++e) {
            if (terms[column + e].real) value.value[e] = axis_of(positions, item, start + column + e, axis);
        }
        return value;
    };
}

// The terms of two neighbouring columns.
struct SoftTerms {
    SoftTerm of[2];
};

// Sums over other rows of weight * position for up to kAxes axes, those of slice `part`, in shared memory.
template <typename Panel>
struct Moments {
    static constexpr int FLOATS = kAxes * Panel::COLUMN_WARPS * Panel::OWN;
    float* sums;
    int first, count;

    __device__ __forceinline__ Moments(float* sums, const Rows& positions, int P, int part)
        : sums(sums), first(part * kAxes), count(positions.data == nullptr ? 0 : min(kAxes, P - first)) {}

    __device__ __forceinline__ float* of(int axis) const { return sums + axis * Panel::COLUMN_WARPS * Panel::OWN; }

    // By the weights of columns [0, columns) of a tile, other rows from `start` on, to what there was `before`.
    __device__ __forceinline__ void add(const float (&weight)[2][Panel::NT][4], const Rows& positions, int64_t item,
                                        int start, int columns, const SoftTerm* terms, bool before) const {
        STTM_NO_UNROLL
        for (int axis = 0; axis < count; ++axis) {
            float moment[2][2] = {};
            const int from = anew(start);
            Panel::each(columns, neighbours(terms, positions, item, from, first + axis),
                        [&](int i, int j, int r, int, int, const Pair& value) {
                            STTM_UNROLL
                            for (int e = 0; e < 2; ++e) moment[i][r] += weight[i][j][2 * r + e] * value.value[e];
                        });
            Panel::add_up(of(axis), moment, before);
        }
    }

    // Calls store(row, axis, sum), after a barrier.
    template <typename Store>
    __device__ __forceinline__ void finish(int rows, const Store& store) const {
        for (int i = threadIdx.x; i < rows * count; i += kSoftThreads) {
            const int row = i / count, axis = i % count;
            store(row, first + axis, Panel::sum_of(of(axis), row));
        }
    }
};

// Sums become means.
template <int COUNT>
__device__ __forceinline__ void mean_of(float (&sums)[COUNT], float mass) {
    STTM_UNROLL
    for (int e = 0; e < COUNT; ++e) sums[e] = mass == 0 ? 0.0f : sums[e] / mass;
}

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

// Where there are fewer blocks than kSoftFewBlocks, up to kSoftMostShares share the slices of a tile.
constexpr int kSoftFewBlocks = 64, kSoftMostShares = 4;

// How many blocks share the slices of a tile and the axes of positions.
inline int soft_shares(int64_t blocks, int slices, int P) {
    return max(shares(blocks, slices, kSoftFewBlocks, kSoftMostShares), ceil_div(P, kAxes));
}

}  // namespace sttm
