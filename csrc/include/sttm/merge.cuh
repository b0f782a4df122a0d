// merge: features, positions, counts and masses of each group in one pass over x.
//
// A group is added up by its owner, a warp for short groups or a block for long ones, in an order that depends on the
// group alone.
#pragma once

#include "csr.cuh"
#include "members.cuh"

namespace sttm {

constexpr int kLongGroups = 8;  // tokens per group on average from which on a block owns a group

__device__ __forceinline__ float larger(float a, float b) { return a != a || a > b ? a : b; }  // NaN if either is

// Owners are `Warps` warps each, which share a group's tokens; blockIdx.y is a slice of the channels. The owner of
// slice 0 writes what has no channels.
template <class T, bool Vectorized, bool Max, int Warps>
__global__ void __launch_bounds__(kMergeThreads, 3) merge_kernel(MergeArguments a) {
    using L = Lanes<T, Vectorized>;
    constexpr int kOwners = kMergeWarps / Warps;
    const int tiles = ceil_div(a.K, kOwners);
    const int64_t b = blockIdx.x / tiles;
    const int k = blockIdx.x % tiles * kOwners + warp_index() / Warps, part = warp_index() % Warps;
    if (Warps == 1 && k >= a.K) return;
    const int lane = lane_index(), first_channel = blockIdx.y * L::kSlice;
    const int64_t group = b * a.K + k, tokens = b * a.N;
    const int32_t* order = a.order + tokens;
    const Members members(a.offsets + b * (a.K + 1), k, a.N);
    const bool only_first = a.reduce == Reduce::first;

    float total[L::kCount];
    STTM_UNROLL
    for (float& value : total) value = Max ? -INFINITY : 0.0f;
    float mass = 0.0f, count = 0.0f;
    for (int base = members.begin; base < members.end; base += kWarpSize * Warps) {
        // Lane l knows token l of this part, then all read one after another, two at a time.
        const int mine = member(order, base + lane * Warps + part, members.end, a.N);
        const Weights own = mine < 0 ? Weights() : Weights(a.weight, a.size, tokens + mine);
        mass += own.w;
        count += own.count;
        int here = min(kWarpSize, ceil_div(max(members.end - base - part, 0), Warps));
        if (only_first) here = base == members.begin && part == 0 ? 1 : 0;
        for (int j = 0; j < here; j += 2) {
            const int n[2] = {shuffle(mine, j), j + 1 < here ? shuffle(mine, j + 1) : -1};
            const float weight[2] = {shuffle(own.w, j), shuffle(own.w, (j + 1) % kWarpSize)};
            T value[2][L::kCount];
            STTM_UNROLL
            for (int i = 0; i < 2; ++i)
                read_row<T, Vectorized>(row_of<T>(a.x, b, max(n[i], 0)), a.x.stride_c, first_channel,
                                        n[i] < 0 ? 0 : a.C, value[i]);
            STTM_UNROLL
            for (int i = 0; i < 2; ++i) {
                if (n[i] < 0) continue;
                const float w = only_first ? 1.0f : weight[i];
                STTM_UNROLL
                for (int e = 0; e < L::kCount; ++e)
                    total[e] = Max ? larger(total[e], to_float(value[i][e])) : fmaf(w, to_float(value[i][e]), total[e]);
            }
        }
    }
    mass = warp_sum(mass);
    count = warp_sum(count);

    T* y = static_cast<T*>(a.y) + group * a.C;
    const T* fill = static_cast<const T*>(a.fill) + b * a.stride_fb + int64_t(k) * a.C;
    const auto finish = [&](float sum, int c) {
        if (mass == 0.0f) return a.fill == nullptr ? from_float<T>(0.0f) : fill[c];
        return from_float<T>(a.reduce == Reduce::mean ? sum / mass : sum);
    };
    if constexpr (Warps == 1) {
        T out[L::kCount];
        STTM_UNROLL
        for (int step = 0; step < L::kSteps; ++step) {
            const int c = first_channel + L::channel(step);
            STTM_UNROLL
            for (int i = 0; i < L::kWide; ++i)
                out[step * L::kWide + i] = c < a.C ? finish(total[step * L::kWide + i], c + i) : from_float<T>(0.0f);
        }
        write_row<T, Vectorized>(y, first_channel, a.C, out);
    } else {
        STTM_SHARED(float, sums, [Warps][L::kSlice]);
        STTM_SHARED(float, masses, [Warps][2]);
        STTM_UNROLL
        for (int e = 0; e < L::kCount; ++e) sums[part][L::channel(e / L::kWide) + e % L::kWide] = total[e];
        if (lane == 0) masses[part][0] = mass, masses[part][1] = count;
        __syncthreads();
        mass = count = 0.0f;
        for (int w = 0; w < Warps; ++w) mass += masses[w][0], count += masses[w][1];
        for (int c = threadIdx.x; c < L::kSlice && first_channel + c < a.C; c += kMergeThreads) {
            float sum = sums[0][c];
            for (int w = 1; w < Warps; ++w) sum = Max ? larger(sum, sums[w][c]) : sum + sums[w][c];
            y[first_channel + c] = finish(sum, first_channel + c);
        }
    }

    if (blockIdx.y > 0) return;
    STTM_NO_UNROLL
    for (int p = part; p < a.P; p += Warps) {
        float sum = 0.0f;
        STTM_NO_UNROLL
        for (int i = members.begin + lane; i < members.end; i += kWarpSize) {
            const int n = member(order, i, members.end, a.N);
            if (n < 0) continue;
            const float w = Weights(a.weight, a.size, tokens + n).w;
            sum = fmaf(w, a.positions[b * a.stride_pb + int64_t(n) * a.P + p], sum);
        }
        sum = warp_sum(sum);
        if (lane == 0) a.positions_out[group * a.P + p] = mass == 0.0f ? 0.0f : sum / mass;
    }
    if (part == 0 && lane == 0) {
        a.size_out[group] = count;
        a.mass_out[group] = mass;
    }
}

template <class T>
cudaError_t launch_merge(const MergeArguments& a, cudaStream_t stream) {
    if (a.other != nullptr) {
        const cudaError_t error = csr(a.index, a.B, a.N, a.K, a.order, a.offsets, a.other, stream);
        if (error != cudaSuccess) return error;
    }
    const auto run = [&](auto vectorized, auto max, auto long_groups) {
        constexpr bool kVectorized = decltype(vectorized)::value, kMax = decltype(max)::value;
        constexpr int kWarps = decltype(long_groups)::value ? kMergeWarps : 1;
        const int slices = ceil_div(a.C, Lanes<T, kVectorized>::kSlice);
        const Grid grid{times(a.B, ceil_div(a.K, kMergeWarps / kWarps)), slices > 0 ? slices : 1};
        return launch(merge_kernel<T, kVectorized, kMax, kWarps>, grid, kMergeThreads, 0, stream, a);
    };
    return with_flags(run, is_vectorizable<T>(a.x, a.C) && is_aligned(a.y), a.reduce == Reduce::max,
                      a.N >= int64_t(kLongGroups) * a.K);
}

}  // namespace sttm
