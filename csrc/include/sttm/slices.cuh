// What a warp sees of the rows of an item, a slice of the channels at a time, and of the tokens of its groups.
#pragma once

#include "members.cuh"
#include "pieces.cuh"

namespace sttm {

// What a lane has of the rows of an item: kWide adjacent channels, Pieces times, in a slice of the channels. All pieces
// but the last are there for every lane unless Ragged.
template <class T, bool Vectorized, int Pieces, bool Ragged>
struct Slice {
    using Piece = sttm::Piece<T, Vectorized>;
    using One = Slice<T, Vectorized, 1, true>;
    static constexpr int kPieces = Pieces, kWide = Piece::size;
    static constexpr int kStep = kWide * kWarpSize, kChannels = kStep * Pieces;
    using Pitch = std::conditional_t<Vectorized, int, int64_t>;  // 32 bits are multiplied at once, 64 are not

    const T* x;
    T* y;
    Pitch pitch_x, pitch_y;  // from row to row, in bytes
    int64_t stride_c;
    int left;  // channels from the first one of this lane on

    // The slice from channel `first` on.
    __device__ __forceinline__ Slice(const MergeArguments& a, int b, int first) {
        const int channel = first + lane_index() * kWide;
        stride_c = Vectorized ? 1 : a.x.stride_c;
        x = row_of<T>(a.x, b, 0) + channel * stride_c;
        y = static_cast<T*>(a.y) + wide_product(b, a.K) * a.C + channel;
        pitch_x = static_cast<Pitch>(a.x.stride_n * int64_t(sizeof(T)));
        pitch_y = static_cast<Pitch>(a.C * int64_t(sizeof(T)));
        left = a.C - channel;
    }
    // To the next slice that this warp has after the one at channel `first`, if so many of a block share them; returns
    // its channel.
    __device__ __forceinline__ int next(int first, int warps = 1) {
        const int channels = gridDim.y * warps * kChannels;
        if (channels < left + lane_index() * kWide) {
            x += channels * stride_c;
            y += channels;
            left -= channels;
        }
        return first + channels;
    }

    __device__ __forceinline__ bool has(int piece) const {
        return (piece < Pieces - 1 && !Ragged) || piece * kStep < left;
    }
    __device__ __forceinline__ void read(int n, Piece (&out)[Pieces]) const { read_row(x, n, pitch_x, stride_c, out); }
    __device__ __forceinline__ void write(int k, const Piece (&in)[Pieces]) const {
        T* to = row(y, k, pitch_y);
        STTM_UNROLL
        for (int piece = 0; piece < Pieces; ++piece)
            if (has(piece)) in[piece].store(to + piece * kStep);
    }
    __device__ __forceinline__ void copy(int n, int k) const {
        Piece pieces[Pieces];
        read(n, pieces);
        write(k, pieces);
    }
    // What a group without mass has.
    __device__ __forceinline__ void write_fill(const MergeArguments& a, int b, int k) const {
        Piece pieces[Pieces];
        STTM_UNROLL
        for (Piece& piece : pieces) piece = Piece::zero();
        if (a.fill != nullptr) {
            const T* fill = static_cast<const T*>(a.fill) + b * a.stride_fb + (a.C - left);
            read_row(fill, k, pitch_y, 1, pieces);
        }
        write(k, pieces);
    }

private:
    template <class Pointer>
    static __device__ __forceinline__ Pointer row(Pointer base, int n, Pitch pitch) {
        return further(base, wide_product(n, pitch));
    }
    __device__ __forceinline__ void read_row(const T* base, int n, Pitch pitch, int64_t stride,
                                             Piece (&out)[Pieces]) const {
        const T* from = row(base, n, pitch);
        STTM_UNROLL
        for (int piece = 0; piece < Pieces; ++piece)
            out[piece] = has(piece) ? Piece::load(from + piece * kStep * stride) : Piece::zero();
    }
};

// Where the first slice begins of warp `part` of so many of a block that share slices.
template <class S, int Warps>
__device__ __forceinline__ int first_channel(int part) {
    return (blockIdx.y * Warps + part) * S::kChannels;
}

// What lanes are told about the tokens of an item.
struct Tokens {
    const MergeArguments& a;
    const int64_t first;
    const int32_t* order;

    __device__ __forceinline__ Tokens(const MergeArguments& a, int b)
        : a(a), first(wide_product(b, a.N)), order(a.order + first) {}

    // Token number i of the order. One that a caller made up stays inside of the item.
    __device__ __forceinline__ int operator[](int i) const {
        return static_cast<int>(min(static_cast<unsigned>(*element(order, i)), static_cast<unsigned>(a.N - 1)));
    }
    __device__ __forceinline__ Weights weights(int n) const {
        Weights own;
        own.count = a.size == nullptr ? 1.0f : *element(a.size + first, n);
        own.w = a.weight == nullptr ? own.count : own.count * *element(a.weight + first, n);
        return own;
    }
};

__device__ __forceinline__ Members members_of(const MergeArguments& a, int b, int k) {
    return Members(element(a.offsets + wide_product(b, a.K + 1), k), 0, a.N);
}

}  // namespace sttm
