// Gradients of merge: a gather by a warp per token. The gradient of a weight is <g_k, x_n>, centred over the group by a
// second kernel, because y has been rounded.
#pragma once

#include "csr.cuh"
#include "members.cuh"

namespace sttm {

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

template <class T>
cudaError_t launch_merge_backward(const MergeBackwardArguments& given, cudaStream_t stream) {
    MergeBackwardArguments a = given;
    a.to_winners = a.reduce == Reduce::max && a.grad_x != nullptr && a.grad_y.data != nullptr;
    if (a.other != nullptr) {
        const cudaError_t error = csr(a.index, a.B, a.N, a.K, a.order, a.offsets, a.other, stream);
        if (error != cudaSuccess) return error;
    }
    const Grid by_token{ceil_div64(int64_t(a.B) * a.N, kMergeWarps)};
    const Grid by_group{ceil_div64(int64_t(a.B) * a.K, kMergeWarps)};
    const bool wants_w = a.grad_weight != nullptr || a.grad_size_in != nullptr;
    const auto run = [&](auto vectorized) {
        constexpr bool kVectorized = decltype(vectorized)::value;
        cudaError_t error = cudaSuccess;
        if (a.to_winners) {
            const Grid grid{by_group.x, ceil_div(a.C, Lanes<T, kVectorized>::kSlice)};
            error = launch(merge_max_backward_kernel<T, kVectorized>, grid, kMergeThreads, 0, stream, a);
            if (error == cudaSuccess)
                error = launch(clear_groupless_kernel<T, kVectorized>, by_token, kMergeThreads, 0, stream, a);
        }
        const bool wants_x = a.grad_x != nullptr && !a.to_winners;
        if (error == cudaSuccess && (wants_x || wants_w || a.grad_positions_in != nullptr))
            error = launch(merge_backward_kernel<T, kVectorized>, by_token, kMergeThreads, 0, stream, a);
        if (error == cudaSuccess && a.dot != nullptr)
            error = launch(centre_kernel<kMergeThreads>, by_group, kMergeThreads, 0, stream, a);
        return error;
    };
    return with_flags(run, is_aligned(a.grad_x) && is_aligned(a.y) && is_vectorizable<T>(a.x, a.C) &&
                               (a.grad_y.data == nullptr || is_vectorizable<T>(a.grad_y, a.C)));
}

}  // namespace sttm
