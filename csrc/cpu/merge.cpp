// Tokens reduced to groups: every group has one owner, who adds up its tokens in their order.
#include "groups.hpp"

namespace sttm::cpu::STTM_ISA {

namespace {

constexpr int kBlock = 8 * kWidth;       // channels that are summed in registers
constexpr int kAhead = 2;                // groups whose rows are fetched before their turn
constexpr int kPrefetched = 4;           // rows of such a group
constexpr int64_t kElements = 16 << 10;  // of y that a task makes
constexpr int kFewGroups = 16;           // with fewer of them, their channels are spread over tasks
constexpr int kManyTokens = 16;          // to a group on average: a large x is then read from front to back
constexpr int64_t kFar = 2 << 20;        // bytes of a large x
constexpr int64_t kSums = 32 << 10;      // floats that stay in a cache meanwhile

struct Totals {
    float mass, size;
    int count;  // of tokens
    int32_t first;

    // What weights are multiplied by: 1 over a mass that is tiny is infinite.
    float up() const { return __builtin_fabsf(mass) < 0x1p-100f ? 0x1p64f : 1.0f; }
    float scale() const { return 1 / (mass * up()); }
};

inline float size_at(const MergeArguments& a, int64_t i) { return a.size == nullptr ? 1.0f : a.size[i]; }
inline float weight_at(const MergeArguments& a, int64_t i) {
    return a.weight == nullptr ? size_at(a, i) : size_at(a, i) * a.weight[i];
}

Totals totals(const MergeArguments& a, int64_t b, const Members& m) {
    Totals t{0, 0, 0, -1};
    for (int i = m.begin; i < m.end; ++i) {
        const int32_t n = m.order[i];
        if (!is_token(n, a.N)) continue;
        t.mass += weight_at(a, b * a.N + n);
        t.size += size_at(a, b * a.N + n);
        if (t.count++ == 0) t.first = n;
    }
    return t;
}

void write_positions(const MergeArguments& a, int64_t b, int k, const Members& m, const Totals& t) {
    float* const out = a.positions_out + (b * a.K + k) * a.P;
    for (int p = 0; p < a.P; ++p) {
        float total = 0;
        for (int i = m.begin; i < m.end; ++i) {
            const int32_t n = m.order[i];
            if (is_token(n, a.N))
                total += weight_at(a, b * a.N + n) * t.up() * a.positions[b * a.stride_pb + int64_t(n) * a.P + p];
        }
        out[p] = t.mass == 0 ? 0 : total * t.scale();
    }
}

template <class T>
void prefetch(const T* row, int64_t count) {
    for (const char* at = reinterpret_cast<const char*>(row); at < reinterpret_cast<const char*>(row + count); at += 64)
        __builtin_prefetch(at);
}

template <Reduce kReduce>
STTM_INLINE void add(Floats& sum, Floats value, float w) {
    if (kReduce == Reduce::max)
        sum = sum > value || sum != sum ? sum : value;  // a NaN stays
    else
        sum += w * value;
}

// Of one group, channels [c, c + kBlock) or up to C.
template <class T, Reduce kReduce>
void reduce_block(const MergeArguments& a, int64_t b, const Members& m, const Totals& t, int c, T* y, bool streamed) {
    const T* const x = static_cast<const T*>(a.x.data) + b * a.x.stride_b + c * a.x.stride_c;
    const int left = a.C - c;
    const float up = kReduce == Reduce::mean ? t.up() : 1, scale = kReduce == Reduce::mean ? t.scale() : 1;
    Floats sum[8];
    STTM_UNROLL
    for (int v = 0; v < 8; ++v) sum[v] = kReduce == Reduce::max ? splat(-kInfinity) : Floats{};
    for (int i = m.begin; i < m.end; ++i) {
        const int32_t n = m.order[i];
        if (!is_token(n, a.N)) continue;
        const float w = weight_at(a, b * a.N + n) * up;
        const T* const row = x + n * a.x.stride_n;
        if (left >= kBlock && a.x.stride_c == 1) {
            STTM_UNROLL
            for (int v = 0; v < 8; ++v) add<kReduce>(sum[v], load(row + v * kWidth), w);
        } else {
            STTM_UNROLL
            for (int v = 0; v < 8; ++v)
                if (v * kWidth < left)
                    add<kReduce>(sum[v], load_up_to(row + v * kWidth * a.x.stride_c, left - v * kWidth, a.x.stride_c),
                                 w);
        }
    }
    STTM_UNROLL
    for (int v = 0; v < 8; ++v) {
        if (v * kWidth >= left) break;
        const Floats value = sum[v] * scale;
        if (streamed)
            stream(y + v * kWidth, value);
        else
            store_up_to(y + v * kWidth, value, left - v * kWidth);
    }
}

// Channels [c0, c1) of group k of item b, unless `sums` is null of their sums.
template <class T, Reduce kReduce>
void merge_group(const MergeArguments& a, int64_t b, int k, int c0, int c1, bool streamed,
                 const float* sums = nullptr) {
    const Members m = members(a.order, a.offsets, a.N, a.K, b, k);
    const Totals t = totals(a, b, m);
    const int64_t g = b * a.K + k;
    if (c0 == 0) {
        a.size_out[g] = t.size;
        a.mass_out[g] = t.mass;
        if (a.P > 0) write_positions(a, b, k, m, t);
    }
    T* const y = static_cast<T*>(a.y) + g * a.C;
    const T* const x = static_cast<const T*>(a.x.data) + b * a.x.stride_b;
    const bool is_copy = kReduce == Reduce::first || (kReduce == Reduce::mean && t.count == 1 && t.mass - t.mass == 0);
    if (t.mass == 0) {
        if (a.fill == nullptr)
            __builtin_memset(y + c0, 0, sizeof(T) * (c1 - c0));
        else
            copy_row(static_cast<const T*>(a.fill) + b * a.stride_fb + int64_t(k) * a.C + c0, 1, y + c0, c1 - c0,
                     false);
    } else if (is_copy) {
        copy_row(x + t.first * a.x.stride_n + c0 * a.x.stride_c, a.x.stride_c, y + c0, c1 - c0, streamed);
    } else if (sums != nullptr) {
        for (int c = c0; c < c1; c += kWidth)
            store_up_to(y + c, load(sums + c - c0) * (kReduce == Reduce::mean ? t.scale() : 1), c1 - c);
    } else {
        for (int c = c0; c < c1; c += kBlock) reduce_block<T, kReduce>(a, b, m, t, c, y + c, streamed);
    }
    if (sums == nullptr && k + kAhead < a.K && a.x.stride_c == 1) {
        const Members next = members(a.order, a.offsets, a.N, a.K, b, k + kAhead);
        for (int i = next.begin; i < min(next.end, next.begin + kPrefetched); ++i)
            if (is_token(next.order[i], a.N)) prefetch(x + next.order[i] * a.x.stride_n + c0, c1 - c0);
    }
}

// Channels [c0, c1) of every group of item b, the tokens in their order. Scratch: the group of each token and what
// its weight is multiplied by, and the sums (K, width).
template <class T, Reduce kReduce>
void merge_in_order(const MergeArguments& a, int64_t b, int c0, int c1, int width, int32_t* group, float* factor,
                    float* sums) {
    for (int n = 0; n < a.N; ++n) group[n] = -1;
    for (int k = 0; k < a.K; ++k) {
        const Members m = members(a.order, a.offsets, a.N, a.K, b, k);
        const float up = kReduce == Reduce::mean ? totals(a, b, m).up() : 1;
        for (int i = m.begin; i < m.end; ++i) {
            const int32_t n = m.order[i];
            if (!is_token(n, a.N)) continue;
            group[n] = k;
            factor[n] = weight_at(a, b * a.N + n) * up;
        }
    }
    const Floats none = kReduce == Reduce::max ? splat(-kInfinity) : Floats{};
    for (int64_t i = 0; i < int64_t(a.K) * width; i += kWidth) store(sums + i, none);
    const T* row = static_cast<const T*>(a.x.data) + b * a.x.stride_b + c0 * a.x.stride_c;
    const int whole = a.x.stride_c == 1 ? (c1 - c0) / (4 * kWidth) * (4 * kWidth) : 0;
    for (int n = 0; n < a.N; ++n, row += a.x.stride_n) {
        if (group[n] < 0) continue;
        float* const to = sums + int64_t(group[n]) * width;
        const auto add_to = [&](int c, Floats value) {
            Floats sum = load(to + c);
            add<kReduce>(sum, value, factor[n]);
            store(to + c, sum);
        };
        int c = 0;
        for (; c < whole; c += 4 * kWidth) STTM_UNROLL
        for (int v = 0; v < 4; ++v) add_to(c + v * kWidth, load(row + c + v * kWidth));
        for (; c < c1 - c0; c += kWidth) add_to(c, load_up_to(row + c * a.x.stride_c, c1 - c0 - c, a.x.stride_c));
    }
    for (int k = 0; k < a.K; ++k) merge_group<T, kReduce>(a, b, k, c0, c1, false, sums + int64_t(k) * width);
}

template <class T, Reduce kReduce>
void merge_groups(const MergeArguments& a, Stream stream) {
    const int64_t groups = int64_t(a.B) * a.K;
    const int threads = threads_for(stream, int64_t(a.B) * (a.N + a.K) * a.C * sizeof(T));
    const bool large = int64_t(a.B) * a.N * a.C * static_cast<int64_t>(sizeof(T)) >= kFar;
    const bool many = int64_t(a.K) * kManyTokens <= a.N && int64_t(a.K) * kBlock <= kSums;
    if (kReduce != Reduce::first && large && many) {
        const int64_t busy = ceil_div(a.C, max<int64_t>(1, threads / max(a.B, 1)));
        const int64_t most = max<int64_t>(1, min(kSums / max(a.K, 1), busy) / kBlock) * kBlock;
        const int width = static_cast<int>(min(most, ceil_div(a.C, kWidth) * kWidth));
        const int64_t blocks = ceil_div(a.C, width);
        int32_t* const group = take<int32_t>(int64_t(threads) * a.N);
        float* const factor = take<float>(int64_t(threads) * a.N);
        float* const sums = take<float>(int64_t(threads) * a.K * width);
        parallel_for(a.B * blocks, threads, [&](int64_t task, int slot) {
            const int c = static_cast<int>(task % blocks) * width;
            merge_in_order<T, kReduce>(a, task / blocks, c, min(a.C, c + width), width, group + int64_t(slot) * a.N,
                                       factor + int64_t(slot) * a.N, sums + int64_t(slot) * a.K * width);
        });
        return;
    }
    if (groups < kFewGroups && a.C > kBlock) {
        const int64_t blocks = ceil_div(a.C, kBlock);
        parallel_for(groups * blocks, threads, [&](int64_t task, int) {
            const int c = static_cast<int>(task % blocks) * kBlock;
            merge_group<T, kReduce>(a, task / blocks / a.K, task / blocks % a.K, c, min(a.C, c + kBlock), false);
        });
        return;
    }
    const int64_t step = max<int64_t>(1, kElements / max(a.C, 1));
    const bool streamed = is_streamed(static_cast<const T*>(a.y), groups, a.C);
    parallel_for(ceil_div(groups, step), threads, [&](int64_t task, int) {
        for (int64_t g = task * step; g < min(groups, (task + 1) * step); ++g)
            merge_group<T, kReduce>(a, g / a.K, static_cast<int>(g % a.K), 0, a.C, streamed);
        fence();
    });
}

}  // namespace

void csr(const CsrArguments& a, Stream stream) {
    const int threads = threads_for(stream, int64_t(a.B) * (a.N + a.K) * 16);
    int32_t* const next = take<int32_t>((int64_t(a.K) + 1) * threads);
    parallel_for(a.B, threads, [&](int64_t b, int slot) {
        sort_item(a.N, a.K, a.index + b * a.N, a.order + b * a.N, a.offsets + b * (int64_t(a.K) + 1),
                  next + slot * (int64_t(a.K) + 1));
    });
}

void merge(const MergeArguments& a, Stream stream) {
    if (a.other != nullptr) STTM_ISA::csr({a.B, a.N, a.K, a.index, a.order, a.offsets, a.other}, stream);
    with_type(a.dtype, [&](auto type) {
        using T = decltype(type);
        expect_large(a.y, sizeof(T) * a.B * a.K * a.C);
        switch (a.reduce) {
            case Reduce::mean: return merge_groups<T, Reduce::mean>(a, stream);
            case Reduce::sum: return merge_groups<T, Reduce::sum>(a, stream);
            case Reduce::max: return merge_groups<T, Reduce::max>(a, stream);
            case Reduce::first: return merge_groups<T, Reduce::first>(a, stream);
        }
    });
}

}  // namespace sttm::cpu::STTM_ISA
