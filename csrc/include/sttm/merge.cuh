// merge: features, positions, counts and masses of each group in one pass over x.
//
// A group is added up by its owner, in an order that depends on the group alone: one token after another, or of a long
// one every fourth after another, and then the four sums. Where groups are short on average, a warp owns a few of them
// and each lane reads what belongs to one: its first two tokens and their weights. The warp then makes one group after
// another, a copy of one row or the sum of two; of a longer one its lanes read all tokens. Where groups are long on
// average, a block owns one.
#pragma once

#include "csr.cuh"
#include "slices.cuh"

namespace sttm {

constexpr int kParts = 4;                    // of a long group
constexpr int kMostShort = kWarpSize;        // tokens of a group that is not long
constexpr int kLongGroups = 32;              // tokens per group on average from which on blocks own groups
constexpr int kMostGroups = 8;               // of a warp
constexpr int kManyWarps = 132 * 48;         // what an H100 holds: with more groups than that, warps own several

__device__ __forceinline__ float larger(float a, float b) { return a != a || a > b ? a : b; }  // NaN if either is

// Adds `count` tokens to `total`, of which lane l knows number l and its coefficient.
template <bool Max, class S>
__device__ __forceinline__ void add_tokens(const S& slice, int n, float coefficient, int count,
                                           float (&total)[S::kPieces][S::kWide]) {
    constexpr int kTogether = S::kPieces == 1 ? 4 : S::kPieces == 2 ? 2 : 1;  // that are read at a time
    const auto add = [&](int first, auto together) {
        constexpr int kTokens = decltype(together)::value;
        typename S::Piece row[kTokens][S::kPieces];
        float share[kTokens];
        STTM_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            share[t] = shuffle(coefficient, first + t);
            slice.read(shuffle(n, first + t), row[t]);
        }
        STTM_UNROLL
        for (int piece = 0; piece < S::kPieces; ++piece) {
            STTM_UNROLL
            for (int t = 0; t < kTokens; ++t) {
                float value[S::kWide];
                row[t][piece].to_floats(value);
                STTM_UNROLL
                for (int e = 0; e < S::kWide; ++e) {
                    float& sum = total[piece][e];
                    sum = Max ? larger(sum, value[e]) : fmaf(share[t], value[e], sum);
                }
            }
        }
    };
    int first = 0;
    STTM_NO_UNROLL
    for (; first + kTogether <= count; first += kTogether) add(first, std::integral_constant<int, kTogether>());
    if constexpr (kTogether > 1) {
        STTM_NO_UNROLL
        for (; first < count; ++first) add(first, std::integral_constant<int, 1>());
    }
}

template <bool Max, int Pieces, int Wide>
__device__ __forceinline__ void start(float (&total)[Pieces][Wide]) {
    STTM_UNROLL
    for (auto& piece : total) {
        STTM_UNROLL
        for (float& value : piece) value = Max ? -INFINITY : 0.0f;
    }
}

template <class S>
__device__ __forceinline__ void write_total(const S& slice, int k, const float (&total)[S::kPieces][S::kWide]) {
    typename S::Piece out[S::kPieces];
    STTM_UNROLL
    for (int piece = 0; piece < S::kPieces; ++piece) out[piece] = S::Piece::from_floats(total[piece]);
    slice.write(k, out);
}

// A group that is not long, by one of so many warps that share the slices: lane l knows token number l.
template <bool Max, int Warps, class S>
__device__ __forceinline__ void merge_short(const MergeArguments& a, int b, int k, S slice, int part, int begin,
                                            int length) {
    const Tokens tokens(a, b);
    const int lane = lane_index();
    const bool mine = lane < length;
    const int n = mine ? tokens[begin + lane] : 0;
    const Weights own = mine ? tokens.weights(n) : Weights();
    const float mass = warp_sum(own.w), count = a.weight == nullptr ? mass : warp_sum(own.count);
    const float share = own.w / mass, coefficient = a.reduce == Reduce::mean ? share : own.w;
    STTM_NO_UNROLL
    for (int first = first_channel<S, Warps>(part); first < a.C; first = slice.next(first, Warps)) {
        if (mass == 0.0f) {
            slice.write_fill(a, b, k);
        } else {
            float total[S::kPieces][S::kWide];
            start<Max>(total);
            if (a.reduce == Reduce::first)
                add_tokens<Max>(slice, n, 1.0f, 1, total);
            else
                add_tokens<Max>(slice, n, coefficient, length, total);
            write_total(slice, k, total);
        }
    }
    if (first_channel<S, Warps>(part) > 0) return;
    const int64_t group = wide_product(b, a.K) + k;
    if (lane == 0) {
        a.size_out[group] = count;
        a.mass_out[group] = mass;
    }
    STTM_NO_UNROLL
    for (int p = 0; p < a.P; ++p) {
        const bool adds = mine && mass != 0.0f;
        const float sum = warp_sum(adds ? share * a.positions[b * a.stride_pb + int64_t(n) * a.P + p] : 0.0f);
        if (lane == 0) a.positions_out[group * a.P + p] = sum;
    }
}

// The sum of what lanes have of the parts of a group: number i of lane l is what lane l / 4 + 8 i has of part l % 4
// where each part has a warp, and the same pairs are added as there.
__device__ __forceinline__ float sum_of_parts(const float (&value)[kParts]) {
    float sum = (value[0] + value[2]) + (value[1] + value[3]);
    STTM_UNROLL
    for (int mask = kWarpSize / 2; mask >= kParts; mask /= 2) sum += shuffle_xor(sum, mask);
    float total = shuffle(sum, 0);
    STTM_UNROLL
    for (int part = 1; part < kParts; ++part) total += shuffle(sum, part);
    return total;
}

// A long group, whose part p has every kParts-th token from number p on: by one warp, or by a warp for each part.
template <bool Max, int Warps, class S>
__device__ __forceinline__ void merge_long(const MergeArguments& a, int b, int k, S slice, int part, int begin,
                                           int end) {
    static_assert(Warps == 1 || Warps == kParts, "a warp has one part or all");
    const Tokens tokens(a, b);
    constexpr int kRound = kWarpSize * kParts;  // tokens of which lanes know their part at a time
    const int lane = lane_index();
    float mass = 0.0f, count = 0.0f;
    if constexpr (Warps == 1) {
        float masses[kParts] = {}, counts[kParts] = {};
        STTM_NO_UNROLL
        for (int base = begin + lane; base < end; base += kRound) {
            STTM_UNROLL
            for (int i = 0; i < kParts; ++i) {
                if (base + i * kWarpSize >= end) continue;
                const Weights own = tokens.weights(tokens[base + i * kWarpSize]);
                masses[i] += own.w;
                counts[i] += own.count;
            }
        }
        mass = sum_of_parts(masses);
        count = a.weight == nullptr ? mass : sum_of_parts(counts);
    } else {
        STTM_NO_UNROLL
        for (int i = begin + lane * kParts + part; i < end; i += kRound) {
            const Weights own = tokens.weights(tokens[i]);
            mass += own.w;
            count += own.count;
        }
        mass = warp_sum(mass);
        count = a.weight == nullptr ? mass : warp_sum(count);
        STTM_SHARED(float, masses, [Warps][2]);
        if (lane == 0) masses[part][0] = mass, masses[part][1] = count;
        __syncthreads();
        mass = masses[0][0], count = masses[0][1];
        STTM_UNROLL
        for (int w = 1; w < Warps; ++w) mass += masses[w][0], count += masses[w][1];
    }
    const int64_t group = wide_product(b, a.K) + k;
    if (blockIdx.y == 0 && part == 0 && lane == 0) {
        a.size_out[group] = count;
        a.mass_out[group] = mass;
    }
    STTM_NO_UNROLL
    for (int first = blockIdx.y * S::kChannels; first < a.C; first = slice.next(first)) {
        float total[S::kPieces][S::kWide];
        start<Max>(total);
        const auto add = [&](int e, float other) {
            float& sum = total[e / S::kWide][e % S::kWide];
            sum = Max ? larger(sum, other) : sum + other;
        };
        STTM_NO_UNROLL
        for (int p = part; p < part + kParts / Warps; ++p) {
            float own[S::kPieces][S::kWide];
            start<Max>(own);
            STTM_NO_UNROLL
            for (int base = begin + p; base < end && mass != 0.0f; base += kRound) {
                const int i = base + lane * kParts;
                const int n = i < end ? tokens[i] : 0;
                const float w = i < end ? tokens.weights(n).w : 0.0f;
                if (a.reduce == Reduce::first) {
                    if (base == begin) add_tokens<Max>(slice, n, 1.0f, 1, own);
                    continue;
                }
                const int here = min(kWarpSize, ceil_div(end - base, kParts));
                add_tokens<Max>(slice, n, a.reduce == Reduce::mean ? w / mass : w, here, own);
            }
            STTM_UNROLL
            for (int e = 0; e < S::kPieces * S::kWide; ++e) add(e, own[e / S::kWide][e % S::kWide]);
        }
        if constexpr (Warps > 1) {
            STTM_SHARED(float, sums, [Warps][S::kPieces * S::kWide][kWarpSize]);
            STTM_UNROLL
            for (int e = 0; e < S::kPieces * S::kWide; ++e) sums[part][e][lane] = total[e / S::kWide][e % S::kWide];
            __syncthreads();
            if (part == 0) {
                STTM_UNROLL
                for (int e = 0; e < S::kPieces * S::kWide; ++e) {
                    STTM_UNROLL
                    for (int w = 1; w < Warps; ++w) add(e, sums[w][e][lane]);
                }
            }
            __syncthreads();
        }
        if (part == 0) {
            if (mass == 0.0f)
                slice.write_fill(a, b, k);
            else
                write_total(slice, k, total);
        }
    }

    if (blockIdx.y > 0) return;
    STTM_NO_UNROLL
    for (int p = part; p < a.P; p += Warps) {
        float sum = 0.0f;
        STTM_NO_UNROLL
        for (int i = begin + lane; i < end && mass != 0.0f; i += kWarpSize) {
            const int n = tokens[i];
            sum = fmaf(tokens.weights(n).w / mass, a.positions[b * a.stride_pb + int64_t(n) * a.P + p], sum);
        }
        sum = warp_sum(sum);
        if (lane == 0) a.positions_out[group * a.P + p] = sum;
    }
}

// `here` adjacent groups of an item from `begin` on, by one of so many warps that share the slices; no group is long if
// these are several. There are tokens.
template <bool Max, int Warps, class S>
__device__ __forceinline__ void merge_groups(const MergeArguments& a, int b, int begin, int here, int part) {
    using One = typename S::One;
    constexpr int kLonger = -2;
    const int lane = lane_index(), start = first_channel<S, Warps>(part);
    const Tokens tokens(a, b);

    // Of the group of this lane: its tokens, or -1; what they are multiplied by, and their shares of the mass.
    int n0 = -1, n1 = -1, partner = -1, at = 0, length = 0;
    float w0 = 0.0f, w1 = 0.0f, share0 = 0.0f, share1 = 0.0f;
    if (lane < here) {
        const Members members = members_of(a, b, begin + lane);
        at = members.begin, length = members.length();
        n0 = tokens[min(at, a.N - 1)], n1 = tokens[min(at + 1, a.N - 1)];
        const Weights own0 = tokens.weights(n0), own1 = tokens.weights(n1);
        w0 = length > 0 ? own0.w : 0.0f, w1 = length > 1 ? own1.w : 0.0f;
        const float mass = w0 + w1;
        const float count = (length > 0 ? own0.count : 0.0f) + (length > 1 ? own1.count : 0.0f);
        share0 = quotient(w0, mass), share1 = quotient(w1, mass);
        if (a.reduce == Reduce::mean) w0 = share0, w1 = share1;
        if (length < 2) n1 = -1;
        partner = a.reduce == Reduce::first ? -1 : n1;
        // One token is copied, unless it is multiplied: w / w is 1. Quotients are right of common masses.
        const bool common = fabsf(mass) > 1e-30f && fabsf(mass) < 1e30f;
        const bool copied = length == 2 || Max || a.reduce == Reduce::first || w0 == 1.0f;
        if (mass == 0.0f && length <= 2)
            n0 = n1 = -1;
        else if (length > 2 || !common || !copied)
            n0 = kLonger;
        if (n0 != kLonger && start == 0) {
            const int64_t group = wide_product(b, a.K) + (begin + lane);
            a.size_out[group] = count;
            a.mass_out[group] = mass;
        }
    }

    S slice(a, b, start);
    STTM_NO_UNROLL
    for (int first = start; first < a.C; first = slice.next(first, Warps)) {
        STTM_NO_UNROLL
        for (int i = 0; i < here; ++i) {
            const int one = shuffle(n0, i), other = shuffle(partner, i), k = begin + i;
            if (one < 0) {
                if (one != kLonger) slice.write_fill(a, b, k);
            } else if (other < 0) {
                slice.copy(one, k);
            } else {
                const float a0 = shuffle(w0, i), a1 = shuffle(w1, i);
                typename S::Piece row[2][S::kPieces];
                slice.read(one, row[0]);
                slice.read(other, row[1]);
                STTM_UNROLL
                for (int piece = 0; piece < S::kPieces; ++piece) {
                    float value[2][S::kWide];
                    row[0][piece].to_floats(value[0]);
                    row[1][piece].to_floats(value[1]);
                    STTM_UNROLL
                    for (int e = 0; e < S::kWide; ++e) {
                        float& sum = value[0][e];
                        sum = Max ? larger(sum, value[1][e]) : fmaf(a1, value[1][e], a0 * sum);
                    }
                    row[0][piece] = S::Piece::from_floats(value[0]);
                }
                slice.write(k, row[0]);
            }
        }
    }

    const unsigned longer = ballot(n0 == kLonger);
    if (start == 0 && a.P > 0) {
        const int entries = here * a.P;
        STTM_NO_UNROLL
        for (int base = 0; base < entries; base += kWarpSize) {
            const int entry = min(base + lane, entries - 1), i = unsigned(entry) / unsigned(a.P);
            const float* position = a.positions + b * a.stride_pb + (entry - i * a.P);
            const int one = shuffle(n0, i), other = shuffle(n1, i);
            const float a0 = shuffle(share0, i), a1 = shuffle(share1, i);
            float sum = one < 0 ? 0.0f : a0 * position[int64_t(one) * a.P];
            if (one >= 0 && other >= 0) sum = fmaf(a1, position[int64_t(other) * a.P], sum);
            if (base + lane < entries && one != kLonger)
                a.positions_out[(wide_product(b, a.K) + begin) * a.P + entry] = sum;
        }
    }
    STTM_NO_UNROLL
    for (unsigned left = longer; left != 0; left &= left - 1) {
        const int i = __ffs(left) - 1, from = shuffle(at, i), count = shuffle(length, i);
        if (count <= kMostShort)
            merge_short<Max, Warps>(a, b, begin + i, S(a, b, start), part, from, count);
        else if constexpr (Warps == 1)
            merge_long<Max, 1>(a, b, begin + i, One(a, b, blockIdx.y * One::kChannels), 0, from, from + count);
    }
}

// A warp, which is a block, owns `groups` adjacent groups of an item; blockIdx.y is a slice of the channels, blockIdx.z
// the item, counted from `first_item`. There are tokens. The owner of slice 0 writes what has no channels.
template <class T, bool Vectorized, bool Max, int Pieces>
__global__ void __launch_bounds__(kWarpSize, 24) merge_kernel(MergeArguments a, int first_item, int groups) {
    using S = Slice<T, Vectorized, Pieces, !Vectorized || Max>;
    const int b = first_item + blockIdx.z, begin = blockIdx.x * groups;
    merge_groups<Max, 1, S>(a, b, begin, min(groups, a.K - begin), 0);
}

// A block owns a group and two pieces of the channels of each lane: of a group that is not long, a warp for each.
template <class T, bool Vectorized, bool Max>
__global__ void __launch_bounds__(kParts* kWarpSize, 6) merge_long_kernel(MergeArguments a, int first_item) {
    using S = Slice<T, Vectorized, 2, true>;
    const int b = first_item + blockIdx.z, k = blockIdx.x, part = warp_index();
    const Members members = members_of(a, b, k);
    if (a.N == 0 || members.length() > kMostShort)
        merge_long<Max, kParts>(a, b, k, S(a, b, blockIdx.y * S::kChannels), part, members.begin, members.end);
    else if (part < S::kPieces)
        merge_groups<Max, S::kPieces, typename S::One>(a, b, k, 1, part);
}

template <class T>
cudaError_t launch_merge(const MergeArguments& a, cudaStream_t stream) {
    if (a.other != nullptr) {
        const cudaError_t error = csr(a.index, a.B, a.N, a.K, a.order, a.offsets, a.other, stream);
        if (error != cudaSuccess) return error;
    }
    const int64_t owners = times(a.B, a.K);
    const int groups = static_cast<int>(min(max(owners / kManyWarps, int64_t(1)), int64_t(kMostGroups)));
    const bool long_groups = a.N == 0 || a.N >= int64_t(kLongGroups) * a.K;
    // Slices have warps of their own where that shortens the way of a warp that has little company.
    const bool spread = owners < kManyWarps / 8 && a.N > 4 * int64_t(a.K);
    const auto run = [&](auto vectorized, auto maximum) {
        constexpr bool kVectorized = decltype(vectorized)::value, kMax = decltype(maximum)::value;
        const auto with_pieces = [&](auto pieces) {
            using S = Slice<T, kVectorized, decltype(pieces)::value, true>;
            const int64_t slices = min(max(ceil_div64(a.C, S::kChannels), int64_t(1)), Grid::kMostY);
            cudaError_t error = cudaSuccess;
            for (int64_t first = 0; first < a.B && error == cudaSuccess; first += Grid::kMostZ) {
                const int64_t items = min(a.B - first, Grid::kMostZ);
                if constexpr (S::kPieces == 2) {
                    if (long_groups) {
                        error = launch(merge_long_kernel<T, kVectorized, kMax>, Grid{a.K, slices, items},
                                       kParts * kWarpSize, 0, stream, a, int(first));
                        continue;
                    }
                }
                const Grid grid{ceil_div(a.K, groups), spread ? slices : 1, items};
                error = launch(merge_kernel<T, kVectorized, kMax, S::kPieces>, grid, kWarpSize, 0, stream, a,
                               int(first), groups);
            }
            return error;
        };
        if constexpr (kVectorized && !kMax) {
            // The most pieces of which all but the last of a slice are whole.
            const int steps = ceil_div(a.C, Vec<T>::size * kWarpSize);
            if (!long_groups && !spread && steps % 4 == 0) return with_pieces(std::integral_constant<int, 4>());
            if (!long_groups && !spread && steps % 3 == 0) return with_pieces(std::integral_constant<int, 3>());
            if (!long_groups && (spread || steps % 2 == 1)) return with_pieces(std::integral_constant<int, 1>());
        }
        return with_pieces(std::integral_constant<int, 2>());
    };
    const bool vectorized = is_vectorizable<T>(a.x, a.C) && is_aligned(a.y) && is_aligned(a.fill) &&
                            a.stride_fb % Vec<T>::size == 0 && a.x.stride_n * sizeof(T) <= INT32_MAX &&
                            a.C * sizeof(T) <= INT32_MAX;
    return with_flags(run, vectorized, a.reduce == Reduce::max);
}

}  // namespace sttm
