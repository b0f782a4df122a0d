// assign: every token finds its most similar meta token.
#pragma once

#include "similarity.cuh"

namespace sttm {

constexpr int kAssignThreads = 256;
template <typename T, bool EXACT>
using AssignTiles = DotTiles<T, EXACT, 8, 1, 1, 8>;

// One block per tile of the tokens of an item; with SWAPPED of its meta tokens, which the tokens are compared with. A
// lane keeps the best of the similarities that it sees of its two rows, and the sum of their exponentials relative to
// it. With EARLIER the last tiles of all items, which see most, come first.
template <typename T, bool EXACT, bool SWAPPED, bool EARLIER = false>
__global__ void __launch_bounds__(kAssignThreads, 2)
    assign_kernel(const AssignArguments a, const Features q_features, const Features m_features) {
    using Tiles = AssignTiles<T, EXACT>;
    const auto tile_of = [&]() -> TokenTile {
        const int block = static_cast<int>(blockIdx.x), tiles = ceil_div(a.N, Tiles::OWN);
        if (EARLIER) return {batch_item(block % a.B, a.N), (tiles - 1 - block / a.B) * Tiles::OWN};
        if (!SWAPPED) return token_tile<Tiles::OWN>(a, block);
        return {sequence_item(a.sequences, block / tiles, a.B, a.K, a.N), block % tiles * Tiles::OWN};
    };
    const TokenTile tile = tile_of();
    const Item& item = tile.item;
    const int first = tile.first, num_own = SWAPPED ? a.N : item.N, num_other = SWAPPED ? item.N : a.K;
    if (first >= num_own) return;
    if (!SWAPPED && item.N <= a.left_out) {
        for (int n = first + static_cast<int>(threadIdx.x); n < min(num_own, first + Tiles::OWN); n += kAssignThreads)
            a.index[item.first_row() + n] = -1;
        return;
    }
    const StridedRows<T> tokens =
        SWAPPED ? rows_of<T>(a.q, Mask{}, item.set, a.N) : token_rows<T>(a.q, a.mask, item);
    const StridedRows<T> metas =
        SWAPPED ? token_rows<T>(a.meta, a.meta_mask, item) : rows_of<T>(a.meta, a.meta_mask, item.set, a.K);
    const bool soft = !EARLIER && a.lse != nullptr;
    const int end = EARLIER ? min(num_other, first + Tiles::OWN) : num_other;

    Tiles tiles(shared_memory<unsigned char>());
    RowBest<1> best;
    best.clear();
    float total[2] = {0, 0};
    for (int start = 0; start < end; start += Tiles::OTHER) {
        float S[1][8][4];
        clear(S);
        tiles.multiply(S, tokens, q_features, first, metas, m_features, start, a.similarity,
                       start + Tiles::OTHER < end);
        const float before[2] = {best.value[0][0], best.value[0][1]};
        STTM_UNROLL
        for (int j = 0; j < 8; ++j) {
            STTM_UNROLL
            for (int e = 0; e < 4; ++e) {
                const int column = tiles.column(j, e), k = start + column;
                S[0][j][e] = similarity_of(S[0][j][e], tiles.own_term[tiles.row(0, e)], tiles.other_term[column],
                                           a.inverse_temperature, a.similarity);
                const int count = EARLIER ? first + tiles.row(0, e) : num_other;
                const bool real = k < count && (metas.mask == nullptr || metas.mask[k * metas.stride_mask] != 0);
                if (!real) S[0][j][e] = -INFINITY;
                best.offer(0, e, S[0][j][e], k);
            }
        }
        if (!soft) continue;
        STTM_UNROLL
        for (int r = 0; r < 2; ++r) {
            const float level = best.value[0][r] == -INFINITY ? 0.0f : best.value[0][r];
            total[r] *= expf(before[r] - level);
            STTM_UNROLL
            for (int j = 0; j < 8; ++j) total[r] += expf(S[0][j][2 * r] - level) + expf(S[0][j][2 * r + 1] - level);
        }
    }

    const float seen[2] = {best.value[0][0], best.value[0][1]};
    best.reduce();
    STTM_UNROLL
    for (int r = 0; r < 2; ++r) {
        const float level = best.value[0][r] == -INFINITY ? 0.0f : best.value[0][r];
        total[r] *= expf(seen[r] - level);
        total[r] += shuffle_xor(total[r], 1);
        total[r] += shuffle_xor(total[r], 2);
        const int n = first + tiles.row(0, 2 * r);
        if (n >= num_own || lane_index() % 4 != 0) continue;
        const bool real = tokens(n) != nullptr;
        const int64_t out = (SWAPPED ? int64_t(item.set) * a.N : item.first_row()) + n;
        if (a.index != nullptr) a.index[out] = real ? item.first_group + best.at[0][r] : -1;
        if (a.score != nullptr) a.score[out] = real ? best.value[0][r] : 0.0f;
        if (soft) a.lse[out] = real && total[r] != 0 ? level + logf(total[r]) : 0.0f;
        if (a.weight != nullptr) a.weight[out] = real ? 1.0f / total[r] : 0.0f;
    }
}

template <typename T, bool EXACT>
cudaError_t launch_assign(const AssignArguments& a, cudaStream_t stream) {
    using Tiles = AssignTiles<T, EXACT>;
    const auto run = [&](auto swapped, auto... earlier) {
        constexpr bool kSwapped = decltype(swapped)::value;
        const Grid grid{kSwapped ? times(a.B, ceil_div(a.N, Tiles::OWN)) : token_tiles(a, Tiles::OWN)};
        return launch(assign_kernel<T, EXACT, kSwapped, decltype(earlier)::value...>, grid, kAssignThreads, Tiles::BYTES, stream, a,
                      features_of<T>(a.q, a.D), features_of<T>(a.meta, a.D));
    };
    if (a.earlier) return run(std::false_type(), std::true_type());
    return with_flags(run, a.swapped);
}

}  // namespace sttm
