// Bipartite matching: similarities live in registers, where each src keeps the maximum of its row.
#include "groups.hpp"
#include "metric.hpp"

namespace sttm::cpu::STTM_ISA {

namespace {

// Tokens of a window: every second one, or a list.
struct Places {
    const int32_t* list;
    int first, count;
    int64_t operator[](int i) const { return list == nullptr ? first + 2 * i : list[i]; }
};

bool is_real(const Mask& mask, int64_t b, int64_t n) {
    return mask.data == nullptr || mask.data[b * mask.stride_b + n * mask.stride_n] != 0;
}

// The places of an item without what is no token of it.
Places compact(const MatchArguments& a, int64_t b, const Places& places, int32_t* out) {
    int found = 0;
    for (int i = 0; i < places.count; ++i) {
        const int64_t n = places[i];
        if (n >= 0 && n < a.N && is_real(a.mask, b, n)) out[found++] = static_cast<int32_t>(n);
    }
    return {out, 0, found};
}

// The src or dst of a window of an item.
Places src_of(const MatchArguments& a, int64_t b, int64_t window) {
    if (!a.listed) return {nullptr, a.num_prefix + a.num_prefix % 2, a.num_src};
    return {a.src + b * a.stride_src + window * a.num_src, 0, a.num_src};
}
Places dst_of(const MatchArguments& a, int64_t b, int64_t window) {
    if (!a.listed) return {nullptr, a.num_prefix + 1 - a.num_prefix % 2, a.num_dst};
    return {a.dst + b * a.stride_dst + window * a.num_dst, 0, a.num_dst};
}

template <class T>
void pack_dst(const MatchArguments& a, int64_t b, const Places& dst, int block, float* to, float* rows) {
    pack_block<T>(a.metric, b, a.D, true, to, rows, kRows,
                  [&](int r) { return block * kRows + r < dst.count ? dst[block * kRows + r] : -1; });
}

// Of kPanel src from `start` on: the most similar dst, the first of equal ones, and the similarity.
template <class T>
void search(const MatchArguments& a, int64_t b, const Places& src, int start, const Places& dst, const float* blocks,
            float* panel) {
    pack_panel<T>(a.metric, b, a.D, panel, [&](int i) { return start + i < src.count ? src[start + i] : -1; });
    Floats square[kVectors], best[kVectors];
    Ints position[kVectors];
    squares(panel, a.D, square);
    for (int v = 0; v < kVectors; ++v) {
        best[v] = splat(-kInfinity);
        position[v] = Ints{};
    }
    for (int first = 0; first < dst.count; first += kRows) {
        Floats S[kRows][kVectors] = {};
        product_of<kRows, 1>(dst.count - first, S, a.D, blocks + first / kRows * block_size(a.D), panel, kPanel);
        STTM_UNROLL
        for (int r = 0; r < kRows; ++r) {
            if (first + r >= dst.count) break;
            STTM_UNROLL
            for (int v = 0; v < kVectors; ++v) {
                const Ints better = S[r][v] > best[v];
                best[v] = better ? S[r][v] : best[v];
                position[v] = better ? splat(first + r) : position[v];
            }
        }
    }
    for (int v = 0; v < kVectors; ++v) best[v] *= inverse_norm(square[v]);
    for (int i = 0; i < kPanel && start + i < src.count; ++i) {
        const int64_t n = b * a.N + src[start + i];
        const float score = best[i / kWidth][i % kWidth];
        a.score[n] = score == score ? score : -kInfinity;
        a.partner[n] = static_cast<int32_t>(dst[position[i / kWidth][i % kWidth]]);
    }
}

// All tokens, or those of the lists: every panel of src is a task.
template <class T>
void search_whole(const MatchArguments& a, Stream stream) {
    const int blocks = static_cast<int>(ceil_div(a.num_dst, kRows));
    const int panels = static_cast<int>(ceil_div(a.num_src, kPanel));
    const int threads = threads_for(stream, int64_t(a.B) * a.num_src * a.num_dst * a.D / 8);
    const int64_t size = block_size(a.D), row_size = kRows * columns_of(a.D);
    const bool some = a.listed || a.mask.data != nullptr;
    int32_t* const listed = some ? take<int32_t>(int64_t(a.B) * (a.num_src + a.num_dst)) : nullptr;
    Places* const places = take<Places>(2 * int64_t(a.B));
    for (int64_t b = 0; b < a.B; ++b) {
        places[2 * b] = src_of(a, b, 0);
        places[2 * b + 1] = dst_of(a, b, 0);
        if (some) {
            int32_t* const at = listed + b * (a.num_src + a.num_dst);
            places[2 * b] = compact(a, b, places[2 * b], at);
            places[2 * b + 1] = compact(a, b, places[2 * b + 1], at + a.num_src);
        }
    }
    float* const packed = take<float>(a.B * blocks * size);
    float* const rows = take<float>(threads * row_size);
    float* const panel = take<float>(threads * int64_t(kPanel) * a.D);
    parallel_for(int64_t(a.B) * blocks, threads, [&](int64_t task, int slot) {
        const int64_t b = task / blocks;
        pack_dst<T>(a, b, places[2 * b + 1], static_cast<int>(task % blocks), packed + task * size,
                    rows + slot * row_size);
    });
    parallel_for(int64_t(a.B) * panels, threads, [&](int64_t task, int slot) {
        const int64_t b = task / panels;
        const int start = static_cast<int>(task % panels) * kPanel;
        if (places[2 * b + 1].count > 0 && start < places[2 * b].count)
            search<T>(a, b, places[2 * b], start, places[2 * b + 1], packed + b * blocks * size,
                      panel + slot * int64_t(kPanel) * a.D);
    });
}

// Every window is a task.
template <class T>
void search_windows(const MatchArguments& a, Stream stream) {
    const int64_t work = int64_t(a.num_src + kPanel) * (a.num_dst + kRows) * a.D;
    const int threads = threads_for(stream, a.B * a.windows * work / 8);
    const int64_t blocks = ceil_div(a.num_dst, kRows), size = block_size(a.D), row_size = kRows * columns_of(a.D);
    int32_t* const listed = take<int32_t>(threads * int64_t(a.num_src + a.num_dst));
    float* const packed = take<float>(threads * blocks * size);
    float* const rows = take<float>(threads * row_size);
    float* const panel = take<float>(threads * int64_t(kPanel) * a.D);
    parallel_for(int64_t(a.B) * a.windows, threads, [&](int64_t task, int slot) {
        const int64_t b = task / a.windows, window = task % a.windows;
        int32_t* const at = listed + slot * int64_t(a.num_src + a.num_dst);
        const Places src = compact(a, b, src_of(a, b, window), at);
        const Places dst = compact(a, b, dst_of(a, b, window), at + a.num_src);
        if (dst.count == 0) return;
        float* const here = packed + slot * blocks * size;
        for (int block = 0; block * kRows < dst.count; ++block)
            pack_dst<T>(a, b, dst, block, here + block * size, rows + slot * row_size);
        for (int start = 0; start < src.count; start += kPanel)
            search<T>(a, b, src, start, dst, here, panel + slot * int64_t(kPanel) * a.D);
    });
}

// A number that orders scores as they are ordered, 0 for a token without a partner.
uint32_t key_of(float score, int32_t partner) {
    if (partner < 0) return 0;
    const uint32_t word = bits<uint32_t>(score + 0.0f);  // -0 is 0
    return word & 0x80000000 ? ~word : word | 0x80000000;
}

// The r-th greatest of `keys`, and how many equal ones are among the r greatest.
struct Threshold {
    uint32_t key;
    int ties;
};
Threshold select(const uint32_t* keys, int count, int r) {
    uint32_t prefix = 0, known = 0;
    int left = r;
    for (int shift = 24; shift >= 0; shift -= 8) {
        int histogram[256] = {};
        for (int i = 0; i < count; ++i)
            if ((keys[i] & known) == prefix) ++histogram[keys[i] >> shift & 255];
        int digit = 255;
        for (; digit > 0 && histogram[digit] < left; --digit) left -= histogram[digit];
        prefix |= static_cast<uint32_t>(digit) << shift;
        known |= 255u << shift;
    }
    return {prefix, left};
}

enum Role : uint8_t { kPrefix, kSrc, kDst, kMasked };

// Of one item, given score and partner of every src: index, order, offsets. Scratch: keys (N), next (K + 1).
void number_groups(const MatchArguments& a, int64_t b, Role* role, uint32_t* keys, int32_t* next) {
    const int N = a.N, K = a.num_groups;
    int32_t* const index = a.index + b * N;
    const int32_t* const partner = a.partner + b * N;
    for (int n = 0; n < N; ++n) role[n] = n < a.num_prefix ? kPrefix : kSrc;
    for (int64_t window = 0; window < a.windows; ++window) {
        const Places dst = dst_of(a, b, window);
        for (int i = 0; i < dst.count; ++i)
            if (dst[i] >= 0 && dst[i] < N) role[dst[i]] = kDst;
    }
    for (int n = 0; n < N; ++n)
        if (!is_real(a.mask, b, n)) role[n] = kMasked;
    int num_src = 0;
    for (int n = 0; n < N; ++n)
        if (role[n] == kSrc) keys[num_src++] = key_of(a.score[b * N + n], partner[n]);
    const int r = min(min(a.r, num_src), a.limit == nullptr ? N : a.limit[b]);
    Threshold least = r > 0 ? select(keys, num_src, r) : Threshold{0xffffffff, 0};
    // Who has no partner, or is not similar enough, stays even if fewer than r merge.
    const uint32_t none = a.threshold == -kInfinity ? 0 : key_of(a.threshold, 0);
    if (least.key <= none) least = {none, 0};

    int ties = least.ties, group = a.num_prefix, at = 0;
    for (int n = 0; n < N; ++n) {
        index[n] = role[n] == kPrefix ? n : -1;
        if (role[n] != kSrc) continue;
        const uint32_t key = keys[at++];
        if (key > least.key || (key == least.key && ties > 0))
            ties -= key == least.key;
        else
            index[n] = group++;
    }
    for (int n = 0; n < N; ++n)
        if (role[n] == kDst) index[n] = group++;
    for (int n = 0; n < N; ++n) {
        if (role[n] == kSrc && index[n] < 0 && partner[n] >= 0) index[n] = index[partner[n]];
        index[n] = min(index[n], K - 1);
    }
    if (a.order != nullptr) sort_item(N, K, index, a.order + b * N, a.offsets + b * (int64_t(K) + 1), next);
}

}  // namespace

void match(const MatchArguments& a, Stream stream) {
    for (int64_t i = 0; i < int64_t(a.B) * a.N; ++i) {
        a.score[i] = -kInfinity;
        a.partner[i] = -1;
    }
    with_type(a.dtype, [&](auto type) {
        using T = decltype(type);
        a.windows > 1 ? search_windows<T>(a, stream) : search_whole<T>(a, stream);
    });
    const int threads = threads_for(stream, int64_t(a.B) * a.N * 32);
    Role* const role = take<Role>(int64_t(threads) * a.N);
    uint32_t* const keys = take<uint32_t>(int64_t(threads) * a.N);
    int32_t* const next = take<int32_t>(int64_t(threads) * (a.N + 1));
    parallel_for(a.B, threads, [&](int64_t b, int slot) {
        number_groups(a, b, role + int64_t(slot) * a.N, keys + int64_t(slot) * a.N, next + int64_t(slot) * (a.N + 1));
    });
}

}  // namespace sttm::cpu::STTM_ISA
