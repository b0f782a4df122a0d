// Where the blocks of a launch find their tokens: in items of a batch, or in packed sequences, each of which is an item
// as if it were alone.
#pragma once

#include "arguments.hpp"
#include "platform.cuh"
#include "spans.hpp"

namespace sttm {

// Tokens, N of them, and a set of meta tokens or groups.
struct Item {
    int set, tokens;     // numbers of the set, and of the item of arrays of tokens
    int start, N;        // where its tokens are in that item, and how many
    int first_group;     // what its index counts from

    // Where its tokens begin if those of all items are numbered through.
    __device__ __forceinline__ int64_t first_row() const { return int64_t(tokens) * N + start; }
};

__device__ __forceinline__ Item batch_item(int item, int N) { return {item, item, 0, N, 0}; }

// An entry of the table of B sequences of N tokens and sets of K, inside of these whatever the table holds.
__device__ __forceinline__ Item sequence_item(const PackedSequence* table, int entry, int B, int N, int K) {
    const PackedSequence& s = table[entry];
    const int set = min(max(s.first_group, 0) / max(K, 1), B - 1), start = min(max(s.start, 0), N);
    return {set, 0, start, min(max(s.length, 0), N - start), set * K};
}

// The entry of the table that a tile of all sequences belongs to.
__device__ __forceinline__ int sequence_of_tile(const PackedSequence* table, int count, int tile) {
    int low = 0;
    for (int high = count; high - low > 1;) {
        const int middle = (low + high) / 2;
        (table[middle].first_tile <= tile ? low : high) = middle;
    }
    return low;
}

// How many tokens all items have.
template <class Arguments>
__host__ __device__ __forceinline__ int64_t tokens_of(const Arguments& a) {
    return a.sequences == nullptr ? int64_t(a.B) * a.N : a.N;
}

// Tiles of `rows` tokens, and where one of them is.
template <class Arguments>
int64_t token_tiles(const Arguments& a, int rows) {
    if (a.sequences == nullptr) return times(a.B, ceil_div(a.N, rows));
    return times(most_tiles(a.B, a.N), kSequenceTile / rows);
}
struct TokenTile {
    static constexpr int begin = 0;  // of the other rows
    Item item;
    int first;  // of its tokens

    __device__ __forceinline__ bool there() const { return first < item.N; }
};
template <int ROWS, class Arguments>
__device__ __forceinline__ TokenTile token_tile(const Arguments& a, int tile) {
    static_assert(kSequenceTile % ROWS == 0, "a tile of a sequence is cut evenly");
    if (a.sequences == nullptr) {
        const int tiles = ceil_div(a.N, ROWS);
        return {batch_item(tile / tiles, a.N), tile % tiles * ROWS};
    }
    constexpr int kEach = kSequenceTile / ROWS;
    const int whole = tile / kEach, entry = sequence_of_tile(a.sequences, a.B, whole);
    const int before = min(max(a.sequences[entry].first_tile, 0), whole);
    return {sequence_item(a.sequences, entry, a.B, a.N, a.K), (whole - before) * kSequenceTile + tile % kEach * ROWS};
}

}  // namespace sttm
