// Tokens reduced to groups: every group has one owner, who adds up its tokens in their order.
#include "groups.hpp"

namespace sttm::cpu::STTM_ISA {

namespace {

constexpr int kBlock = 8 * kWidth;       // channels that are summed in registers
constexpr int kAhead = 2;                // groups whose rows are fetched before their turn
constexpr int kPrefetched = 4;           // rows of such a group
constexpr int64_t kElements = 16 << 10;  // of y that a task makes
constexpr int kFewGroups = 16;           // with fewer of them, their channels are spread over tasks

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

// Of one group, channels [c, c + kBlock) or up to C.
template <class T, Reduce kReduce>
void reduce_block(const MergeArguments& a, int64_t b, const Members& m, const Totals& t, int c, T* y, bool streamed) {
    const T* const x = static_cast<const T*>(a.x.data) + b * a.x.stride_b + c * a.x.stride_c;
    const int left = a.C - c;
    const float up = kReduce == Reduce::mean ? t.up() : 1, scale = kReduce == Reduce::mean ? t.scale() : 1;
    Floats sum[8];
    STTM_UNROLL
    for (int v = 0; v < 8; ++v) sum[v] = kReduce == Reduce::max ? splat(-kInfinity) : Floats{};
    const auto add = [&](Floats& s, Floats value, float w) {
        if (kReduce == Reduce::max)
            s = s > value || s != s ? s : value;  // a NaN stays
        else
            s += w * value;
    };
    for (int i = m.begin; i < m.end; ++i) {
        const int32_t n = m.order[i];
        if (!is_token(n, a.N)) continue;
        const float w = weight_at(a, b * a.N + n) * up;
        const T* const row = x + n * a.x.stride_n;
        if (left >= kBlock && a.x.stride_c == 1) {
            STTM_UNROLL
            for (int v = 0; v < 8; ++v) add(sum[v], load(row + v * kWidth), w);
        } else {
            STTM_UNROLL
            for (int v = 0; v < 8; ++v)
                if (v * kWidth < left)
                    add(sum[v], load_up_to(row + v * kWidth * a.x.stride_c, left - v * kWidth, a.x.stride_c), w);
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

// Channels [c0, c1) of group k of item b.
template <class T, Reduce kReduce>
void merge_group(const MergeArguments& a, int64_t b, int k, int c0, int c1, bool streamed) {
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
    } else {
        for (int c = c0; c < c1; c += kBlock) reduce_block<T, kReduce>(a, b, m, t, c, y + c, streamed);
    }
    if (k + kAhead < a.K && a.x.stride_c == 1) {
        const Members next = members(a.order, a.offsets, a.N, a.K, b, k + kAhead);
        for (int i = next.begin; i < min(next.end, next.begin + kPrefetched); ++i)
            if (is_token(next.order[i], a.N)) prefetch(x + next.order[i] * a.x.stride_n + c0, c1 - c0);
    }
}

template <class T, Reduce kReduce>
void merge_groups(const MergeArguments& a, Stream stream) {
    const int64_t groups = int64_t(a.B) * a.K;
    const int threads = threads_for(stream, int64_t(a.B) * (a.N + a.K) * a.C * sizeof(T));
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
