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

// Every second token of a sequence.
int tokens_of(const MatchArguments& a, const PackedSequence& s) { return max(0, s.length - a.num_prefix); }
Places src_of(const MatchArguments& a, const PackedSequence& s) {
    const int odd = a.num_prefix % 2;
    return {nullptr, s.start + a.num_prefix + odd, (tokens_of(a, s) + 1 - odd) / 2};
}
Places dst_of(const MatchArguments& a, const PackedSequence& s) {
    const int odd = a.num_prefix % 2;
    return {nullptr, s.start + a.num_prefix + 1 - odd, (tokens_of(a, s) + odd) / 2};
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

// What is searched for itself: an item, a sequence of one, or the lists of one. Blocks of its dst and panels of its src
// follow those of what came before.
struct Whole {
    int64_t b;
    Places src, dst;
    int64_t first_block, first_panel;
};

// Which of `count` a task belongs to, given the first task of each.
template <int64_t Whole::* kFirst>
const Whole& whose(const Whole* wholes, int64_t count, int64_t task) {
    int64_t low = 0, high = count;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (wholes[middle].*kFirst <= task ? low : high) = middle;
    }
    return wholes[low];
}

// All tokens, or those of the lists: every panel of src is a task.
template <class T>
void search_whole(const MatchArguments& a, Stream stream) {
    const int64_t size = block_size(a.D), row_size = kRows * columns_of(a.D);
    const bool halved = a.sequences != nullptr && !a.listed;
    const int64_t count = halved ? a.num_sequences : int64_t(a.B) * a.windows;
    const bool some = a.listed || a.mask.data != nullptr;
    int32_t* const listed = some ? take<int32_t>(count * (a.num_src + a.num_dst)) : nullptr;
    Whole* const wholes = take<Whole>(count);
    int64_t blocks = 0, panels = 0, work = 0;
    for (int64_t i = 0; i < count; ++i) {
        Whole& w = wholes[i];
        w.b = halved ? 0 : i / a.windows;
        w.src = halved ? src_of(a, a.sequences[i]) : src_of(a, w.b, i % a.windows);
        w.dst = halved ? dst_of(a, a.sequences[i]) : dst_of(a, w.b, i % a.windows);
        if (some) {
            int32_t* const at = listed + i * (a.num_src + a.num_dst);
            w.src = compact(a, w.b, w.src, at);
            w.dst = compact(a, w.b, w.dst, at + a.num_src);
        }
        w.first_block = blocks;
        w.first_panel = panels;
        if (w.dst.count == 0) continue;
        blocks += ceil_div(w.dst.count, kRows);
        panels += ceil_div(w.src.count, kPanel);
        work += int64_t(w.src.count) * w.dst.count;
    }
    const int threads = threads_for(stream, work * a.D / 8);
    float* const packed = take<float>(blocks * size);
    float* const rows = take<float>(threads * row_size);
    float* const panel = take<float>(threads * int64_t(kPanel) * a.D);
    parallel_for(blocks, threads, [&](int64_t task, int slot) {
        const Whole& w = whose<&Whole::first_block>(wholes, count, task);
        pack_dst<T>(a, w.b, w.dst, static_cast<int>(task - w.first_block), packed + task * size,
                    rows + slot * row_size);
    });
    parallel_for(panels, threads, [&](int64_t task, int slot) {
        const Whole& w = whose<&Whole::first_panel>(wholes, count, task);
        search<T>(a, w.b, w.src, static_cast<int>(task - w.first_panel) * kPanel, w.dst, packed + w.first_block * size,
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

enum Role : uint8_t { kStays, kSrc, kDst, kMasked };

// Memory to number the groups of an item in: of N tokens each.
struct Scratch {
    Role* role;
    uint32_t* keys;
    int32_t *next, *offsets;  // N + 1
};

// Of the N tokens from `first` on of all items, given score and partner of every src and the role of every token: the
// group of each, of which the first is `first_group`; at most r merge. Partners are counted from `origin` on. Tokens
// that stay come first: the prefix, and then protected ones.
void number_groups(const MatchArguments& a, int64_t first, int N, int r, int K, int64_t origin, int32_t first_group,
                   const Scratch& scratch) {
    const Role* const role = scratch.role;
    uint32_t* const keys = scratch.keys;
    int32_t* const index = a.index + first;
    const int32_t* const partner = a.partner + first;
    int num_src = 0;
    for (int n = 0; n < N; ++n)
        if (role[n] == kSrc) keys[num_src++] = key_of(a.score[first + n], partner[n]);
    r = min(r, num_src);
    Threshold least = r > 0 ? select(keys, num_src, r) : Threshold{0xffffffff, 0};
    // Who has no partner, or is not similar enough, stays even if fewer than r merge.
    const uint32_t none = a.threshold == -kInfinity ? 0 : key_of(a.threshold, 0);
    if (least.key <= none) least = {none, 0};

    int ties = least.ties, group = a.num_prefix, at = 0;
    for (int n = 0; n < N; ++n) index[n] = role[n] != kStays ? -1 : n < a.num_prefix ? n : group++;
    for (int n = 0; n < N; ++n) {
        if (role[n] != kSrc) continue;
        const uint32_t key = keys[at++];
        if (key > least.key || (key == least.key && ties > 0))
            ties -= key == least.key;
        else
            index[n] = group++;
    }
    for (int n = 0; n < N; ++n)
        if (role[n] == kDst) index[n] = group++;
    for (int n = 0; n < N; ++n)
        if (const int64_t at = partner[n] - origin; role[n] == kSrc && index[n] < 0 && at >= 0 && at < N)
            index[n] = index[at];
    for (int n = 0; n < N; ++n) index[n] = index[n] < 0 ? -1 : first_group + min(index[n], K - 1);
}

void number_item(const MatchArguments& a, int64_t b, const Scratch& scratch) {
    const int N = a.N, K = a.num_groups;
    for (int n = 0; n < N; ++n) scratch.role[n] = n < a.num_prefix ? kStays : kSrc;
    for (int64_t window = 0; window < a.windows; ++window) {
        const Places dst = dst_of(a, b, window);
        for (int i = 0; i < dst.count; ++i)
            if (dst[i] >= 0 && dst[i] < N) scratch.role[dst[i]] = kDst;
    }
    for (int n = 0; n < N; ++n)
        if (!is_real(a.mask, b, n)) scratch.role[n] = kMasked;
    number_groups(a, b * N, N, a.limit == nullptr ? a.r : min(a.r, a.limit[b]), K, 0, 0, scratch);
    if (a.order != nullptr)
        sort_item(N, K, a.index + b * N, a.order + b * N, a.offsets + b * (int64_t(K) + 1), scratch.next);
}

// What the lists say of every token of all sequences; of what they do not name, that it stays.
void read_roles(const MatchArguments& a, Role* role) {
    for (int n = 0; n < a.N; ++n) role[n] = kStays;
    for (int64_t i = 0; i < int64_t(a.windows) * a.num_src; ++i)
        if (a.src[i] >= 0 && a.src[i] < a.N) role[a.src[i]] = kSrc;
    for (int64_t i = 0; i < int64_t(a.windows) * a.num_dst; ++i)
        if (a.dst[i] >= 0 && a.dst[i] < a.N) role[a.dst[i]] = kDst;
}

void number_sequence(const MatchArguments& a, const PackedSequence& s, Role* roles, Scratch scratch) {
    if (roles != nullptr) {
        scratch.role = roles + s.start;
    } else {
        for (int n = 0; n < s.length; ++n) scratch.role[n] = n < a.num_prefix ? kStays : n % 2 == 0 ? kSrc : kDst;
    }
    number_groups(a, s.start, s.length, s.limit, s.groups, s.start, 0, scratch);
    int32_t* const index = a.index + s.start;
    sort_item(s.length, s.groups, index, a.order + s.start, scratch.offsets, scratch.next);
    for (int n = 0; n < s.length; ++n) {
        if (index[n] >= 0) index[n] += s.first_group;
        a.order[s.start + n] += s.start;
    }
    for (int k = 0; k < s.groups; ++k) a.offsets[s.first_group + k] = s.start + scratch.offsets[k];
}

}  // namespace

void match(const MatchArguments& a, Stream stream) {
    for (int64_t i = 0; i < int64_t(a.B) * a.N; ++i) {
        a.score[i] = -kInfinity;
        a.partner[i] = -1;
    }
    with_type(a.dtype, [&](auto type) {
        using T = decltype(type);
        const bool small = a.windows > max(1, a.num_sequences);
        small ? search_windows<T>(a, stream) : search_whole<T>(a, stream);
    });
    const int threads = threads_for(stream, int64_t(a.B) * a.N * 32);
    Role* const role = take<Role>(int64_t(threads) * a.N);
    uint32_t* const keys = take<uint32_t>(int64_t(threads) * a.N);
    int32_t* const next = take<int32_t>(int64_t(threads) * 2 * (a.N + 1));
    const auto scratch = [&](int64_t slot) {
        int32_t* const mine = next + slot * 2 * (a.N + 1);
        return Scratch{role + slot * a.N, keys + slot * a.N, mine, mine + a.N + 1};
    };
    if (a.sequences == nullptr) {
        parallel_for(a.B, threads, [&](int64_t b, int slot) { number_item(a, b, scratch(slot)); });
        return;
    }
    Role* const roles = a.listed ? take<Role>(a.N) : nullptr;
    if (roles != nullptr) read_roles(a, roles);
    parallel_for(a.num_sequences, threads,
                 [&](int64_t s, int slot) { number_sequence(a, a.sequences[s], roles, scratch(slot)); });
    a.offsets[a.num_groups] = a.N;
}

}  // namespace sttm::cpu::STTM_ISA
