// merge: features, positions, counts and masses of each group in one pass over x; and the way back.
//
// A group is added up by its owner, a warp for short groups or a block for long ones, in an order that depends on the
// group alone. The way back is a gather by a warp per token; the gradient of a weight is <g_k, x_n>, centred over the
// group by a second kernel, because y has been rounded.
#pragma once

#include "csr.cuh"
#include "view.cuh"

namespace sttm {

constexpr int kMergeWarps = 8, kMergeThreads = kMergeWarps * kWarpSize;
constexpr int kLongGroups = 8;  // tokens per group on average from which on a block owns a group

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

template <class T, bool Vectorized, bool Max, int Warps>
cudaError_t launch_merge_kernel(const MergeArguments& a, cudaStream_t stream) {
    const Grid grid{times(a.B, ceil_div(a.K, kMergeWarps / Warps)),
                    max(1, ceil_div(a.C, Lanes<T, Vectorized>::kSlice))};
    return launch(merge_kernel<T, Vectorized, Max, Warps>, grid, kMergeThreads, 0, stream, a);
}

template <class T>
cudaError_t launch_merge(const MergeArguments& a, cudaStream_t stream) {
    if (a.other != nullptr) {
        const cudaError_t error = csr(a.index, a.B, a.N, a.K, a.order, a.offsets, a.other, stream);
        if (error != cudaSuccess) return error;
    }
    const bool vectorized = is_vectorizable<T>(a.x, a.C) && is_aligned(a.y), largest = a.reduce == Reduce::max;
    const auto pick = [&](auto wide, auto most, auto warps) {
        return launch_merge_kernel<T, wide.value, most.value, warps.value>(a, stream);
    };
    const auto by_length = [&](auto wide, auto most) {
        if (a.N >= int64_t(kLongGroups) * a.K) return pick(wide, most, std::integral_constant<int, kMergeWarps>());
        return pick(wide, most, std::integral_constant<int, 1>());
    };
    const auto by_reduce = [&](auto wide) {
        return largest ? by_length(wide, std::true_type()) : by_length(wide, std::false_type());
    };
    return vectorized ? by_reduce(std::true_type()) : by_reduce(std::false_type());
}

// dL/dweight_n = size_n dL/dw_n and dL/dsize_n = weight_n dL/dw_n + dL/dsize'_k.
__device__ __forceinline__ void store_weight_grads(const MergeBackwardArguments& a, float grad_w, int64_t token,
                                                   int64_t group, bool has_group) {
    if (a.grad_weight != nullptr) {
        const float size = has_group && a.size != nullptr ? a.size[token] : 1.0f;
        a.grad_weight[token] = has_group ? grad_w * size : 0.0f;
    }
    if (a.grad_size_in != nullptr) {
        float grad = has_group && a.weight != nullptr ? grad_w * a.weight[token] : grad_w;
        if (has_group && a.grad_size != nullptr) grad += a.grad_size[group];
        a.grad_size_in[token] = has_group ? grad : 0.0f;
    }
}

// One warp per token: grad_x_n = (w_n / mass_k) g_k for mean, w_n g_k for sum, g_k of the first token for first. The
// gradient of w_n is written unless `dot` is given: then the products that it is made of go there, to plane 0 those
// from which `centre_kernel` takes the mean over the group, to plane 1 those of a sum.
template <class T, bool Vectorized>
__global__ void __launch_bounds__(kMergeThreads) merge_backward_kernel(MergeBackwardArguments a) {
    using L = Lanes<T, Vectorized>;
    const int64_t token = int64_t(blockIdx.x) * kMergeWarps + warp_index();
    if (token >= int64_t(a.B) * a.N) return;
    const int64_t b = token / a.N;
    const int n = static_cast<int>(token - b * a.N), lane = lane_index();
    const int k = a.index[token];
    const bool has_group = k >= 0 && k < a.K;
    const int64_t group = b * a.K + (has_group ? k : 0);
    const float mass = has_group ? a.mass[group] : 0.0f;
    const bool full = mass != 0.0f;
    const float w = has_group ? Weights(a.weight, a.size, token).w : 0.0f, share = full ? w / mass : 0.0f;

    const bool linear = a.reduce == Reduce::mean || a.reduce == Reduce::sum;
    const bool wants_w = a.grad_weight != nullptr || a.grad_size_in != nullptr;
    const bool wants_dot = wants_w && linear && a.grad_y.data != nullptr;
    const bool wants_x = a.grad_x != nullptr && !a.to_winners;
    float coefficient = a.reduce == Reduce::mean ? share : w;
    bool reads = full && a.grad_y.data != nullptr;
    if (a.reduce == Reduce::first && reads && wants_x) {
        const Members members(a.offsets + b * (a.K + 1), k, a.N);
        reads = members.length() > 0 && a.order[b * a.N + members.begin] == n;
        coefficient = 1.0f;
    }
    float plain = 0.0f;
    if (wants_x || wants_dot) {
        T* grad_x = static_cast<T*>(a.grad_x) + token * a.C;
        for (int first = 0; first < a.C; first += L::kSlice) {
            T g[L::kCount];
            read_row<T, Vectorized>(row_of<T>(a.grad_y, b, has_group ? k : 0), a.grad_y.stride_c, first,
                                    reads ? a.C : 0, g);
            if (wants_dot) {
                T x[L::kCount];
                read_row<T, Vectorized>(row_of<T>(a.x, b, n), a.x.stride_c, first, reads ? a.C : 0, x);
                STTM_UNROLL
                for (int e = 0; e < L::kCount; ++e) plain = fmaf(to_float(g[e]), to_float(x[e]), plain);
            }
            if (wants_x) {
                STTM_UNROLL
                for (T& value : g) value = reads ? from_float<T>(coefficient * to_float(value)) : from_float<T>(0.0f);
                write_row<T, Vectorized>(grad_x, first, a.C, g);
            }
        }
    }
    float moved = 0.0f;
    for (int p = lane; p < a.P; p += kWarpSize) {
        const bool given = full && a.grad_positions != nullptr;
        const float g = given ? a.grad_positions[b * a.stride_qb + int64_t(k) * a.P + p] : 0.0f;
        if (a.grad_positions_in != nullptr) a.grad_positions_in[token * a.P + p] = given ? share * g : 0.0f;
        if (given && a.dot != nullptr) moved = fmaf(g, a.positions[b * a.stride_pb + int64_t(n) * a.P + p], moved);
    }
    if (!wants_w) return;
    plain = warp_sum(plain);
    moved = warp_sum(moved);
    if (lane != 0) return;
    if (a.dot != nullptr) {
        a.dot[token] = a.reduce == Reduce::mean ? moved + plain : moved;
        if (a.reduce == Reduce::sum) a.dot[int64_t(a.B) * a.N + token] = plain;
    }
    if (a.dot == nullptr || !has_group) store_weight_grads(a, plain, token, group, has_group);
}

// One warp per group: dL/dw_n = (dot_n - sum_m w_m dot_m / mass_k) / mass_k + plane 1.
template <int Threads>
__global__ void __launch_bounds__(Threads) centre_kernel(MergeBackwardArguments a) {
    const int64_t group = int64_t(blockIdx.x) * (Threads / kWarpSize) + warp_index();
    if (group >= int64_t(a.B) * a.K) return;
    const int64_t b = group / a.K, tokens = b * a.N;
    const int k = static_cast<int>(group - b * a.K), lane = lane_index();
    const int32_t* order = a.order + tokens;
    const Members members(a.offsets + b * (a.K + 1), k, a.N);
    const float mass = a.mass[group], inverse = mass == 0.0f ? 0.0f : 1.0f / mass;
    float total = 0.0f;
    STTM_NO_UNROLL
    for (int i = members.begin + lane; i < members.end; i += kWarpSize) {
        const int n = member(order, i, members.end, a.N);
        if (n >= 0) total = fmaf(Weights(a.weight, a.size, tokens + n).w, a.dot[tokens + n], total);
    }
    const float mean = warp_sum(total) * inverse;
    STTM_NO_UNROLL
    for (int i = members.begin + lane; i < members.end; i += kWarpSize) {
        const int n = member(order, i, members.end, a.N);
        if (n < 0) continue;
        // A token alone in its group is its mean: its weight moves nothing, rounding aside.
        float grad_w = members.length() > 1 ? (a.dot[tokens + n] - mean) * inverse : 0.0f;
        if (a.reduce == Reduce::sum && mass != 0.0f) grad_w += a.dot[int64_t(a.B) * a.N + tokens + n];
        store_weight_grads(a, grad_w, tokens + n, group, true);
    }
}

// One warp per group and slice of channels: g goes to the first token that has the maximum, 0 to the others.
template <class T, bool Vectorized>
__global__ void __launch_bounds__(kMergeThreads) merge_max_backward_kernel(MergeBackwardArguments a) {
    using L = Lanes<T, Vectorized>;
    const int64_t group = int64_t(blockIdx.x) * kMergeWarps + warp_index();
    if (group >= int64_t(a.B) * a.K) return;
    const int64_t b = group / a.K, tokens = b * a.N;
    const int k = static_cast<int>(group - b * a.K), first_channel = blockIdx.y * L::kSlice;
    const int32_t* order = a.order + tokens;
    const Members members(a.offsets + b * (a.K + 1), k, a.N);
    const bool full = a.mass[group] != 0.0f;
    T best[L::kCount], g[L::kCount], value[L::kCount];
    int winner[L::kCount];
    read_row<T, Vectorized>(static_cast<const T*>(a.y) + group * a.C, 1, first_channel, a.C, best);
    read_row<T, Vectorized>(row_of<T>(a.grad_y, b, k), a.grad_y.stride_c, first_channel, a.C, g);
    STTM_UNROLL
    for (int& at : winner) at = -1;
    for (int i = members.begin; full && i < members.end; ++i) {
        const int n = member(order, i, members.end, a.N);
        if (n < 0) continue;
        read_row<T, Vectorized>(row_of<T>(a.x, b, n), a.x.stride_c, first_channel, a.C, value);
        STTM_UNROLL
        for (int e = 0; e < L::kCount; ++e) {
            const float x = to_float(value[e]), top = to_float(best[e]);
            if (winner[e] < 0 && (x == top || (x != x && top != top))) winner[e] = n;
        }
    }
    for (int i = members.begin; i < members.end; ++i) {
        const int n = member(order, i, members.end, a.N);
        if (n < 0) continue;
        STTM_UNROLL
        for (int e = 0; e < L::kCount; ++e) value[e] = winner[e] == n ? g[e] : from_float<T>(0.0f);
        write_row<T, Vectorized>(static_cast<T*>(a.grad_x) + (tokens + n) * a.C, first_channel, a.C, value);
    }
}

// Zeros for the tokens without a group, one warp per token.
template <class T, bool Vectorized>
__global__ void __launch_bounds__(kMergeThreads) clear_groupless_kernel(MergeBackwardArguments a) {
    using L = Lanes<T, Vectorized>;
    const int64_t token = int64_t(blockIdx.x) * kMergeWarps + warp_index();
    if (token >= int64_t(a.B) * a.N) return;
    const int k = a.index[token];
    if (k >= 0 && k < a.K) return;
    T zeros[L::kCount];
    STTM_UNROLL
    for (T& value : zeros) value = from_float<T>(0.0f);
    for (int first = 0; first < a.C; first += L::kSlice)
        write_row<T, Vectorized>(static_cast<T*>(a.grad_x) + token * a.C, first, a.C, zeros);
}

template <class T, bool Vectorized>
cudaError_t launch_merge_backward_kernels(const MergeBackwardArguments& a, cudaStream_t stream) {
    const Grid by_token{ceil_div64(int64_t(a.B) * a.N, kMergeWarps)};
    const Grid by_group{ceil_div64(int64_t(a.B) * a.K, kMergeWarps)};
    const bool wants_w = a.grad_weight != nullptr || a.grad_size_in != nullptr;
    cudaError_t error = cudaSuccess;
    if (a.to_winners) {
        const Grid grid{by_group.x, ceil_div(a.C, Lanes<T, Vectorized>::kSlice)};
        error = launch(merge_max_backward_kernel<T, Vectorized>, grid, kMergeThreads, 0, stream, a);
        if (error == cudaSuccess)
            error = launch(clear_groupless_kernel<T, Vectorized>, by_token, kMergeThreads, 0, stream, a);
    }
    if (error == cudaSuccess && ((a.grad_x != nullptr && !a.to_winners) || wants_w || a.grad_positions_in != nullptr))
        error = launch(merge_backward_kernel<T, Vectorized>, by_token, kMergeThreads, 0, stream, a);
    if (error == cudaSuccess && a.dot != nullptr)
        error = launch(centre_kernel<kMergeThreads>, by_group, kMergeThreads, 0, stream, a);
    return error;
}

template <class T>
cudaError_t launch_merge_backward(const MergeBackwardArguments& given, cudaStream_t stream) {
    MergeBackwardArguments a = given;
    a.to_winners = a.reduce == Reduce::max && a.grad_x != nullptr && a.grad_y.data != nullptr;
    if (a.other != nullptr) {
        const cudaError_t error = csr(a.index, a.B, a.N, a.K, a.order, a.offsets, a.other, stream);
        if (error != cudaSuccess) return error;
    }
    const bool aligned = is_aligned(a.grad_x) && is_aligned(a.y) && is_vectorizable<T>(a.x, a.C) &&
                         (a.grad_y.data == nullptr || is_vectorizable<T>(a.grad_y, a.C));
    return aligned ? launch_merge_backward_kernels<T, true>(a, stream)
                   : launch_merge_backward_kernels<T, false>(a, stream);
}

}  // namespace sttm
