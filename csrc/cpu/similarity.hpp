// Similarities of tokens to meta tokens, a panel of tokens by a block of meta tokens at a time, and products with them.
#pragma once

#include "metric.hpp"

namespace sttm::cpu::STTM_ISA {
namespace {

constexpr int kMostChunks = 8;
constexpr int64_t kScratch = 16 << 20;  // bytes
constexpr int kTokens = 128;            // that a sum over tokens takes at a time: it is fetched and put back as often
constexpr int kTogether = kTokens / kPanel;

// Where an item is: item b of a batch, or a sequence, from row `start` on of those of the only item. Its groups are
// those of the `group`-th set of meta tokens, numbered from first_group on.
struct Item {
    int64_t b, start;
    int N;
    int64_t group;
    int32_t first_group;
};
template <class Arguments>
Item item_of(const Arguments& a, int64_t i) {
    if (a.sequences == nullptr) return {i, 0, a.N, i, 0};
    const PackedSequence& s = a.sequences[i];
    return {0, s.start, s.length, s.first_group / max(1, a.K), s.first_group};
}

// Tokens of all items.
template <class Arguments>
int64_t tokens_of(const Arguments& a) {
    return a.sequences == nullptr ? int64_t(a.B) * a.N : a.N;
}

// The panels of an item in consecutive chunks, each of which sums over its tokens; then the chunks are summed in order.
// The number of chunks depends on N alone.
struct Chunks {
    int panels, step, count;
};
inline Chunks chunks_of(int N) {
    const int panels = static_cast<int>(ceil_div(N, kPanel));
    const int step = max(kTogether, static_cast<int>(ceil_div(panels, kMostChunks)));
    return {panels, step, static_cast<int>(ceil_div(panels, step))};
}

// Tasks of the items from the `begin`-th on, `of(N)` for each: those of an item follow those of the one before.
struct Tasks {
    int64_t begin, items;
    const int64_t* first;  // of each item, and how many there are

    int64_t count() const { return first[items]; }
    int64_t first_of(int64_t i) const { return first[i - begin]; }
    int count_of(int64_t i) const { return static_cast<int>(first[i - begin + 1] - first[i - begin]); }
    // Whose a task is.
    int64_t whose(int64_t task) const {
        int64_t low = 0, high = items;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (first[middle] <= task ? low : high) = middle;
        }
        return begin + low;
    }
};
template <class Arguments, class F>
Tasks tasks_of(const Arguments& a, int64_t begin, int64_t end, const F& of) {
    int64_t* const first = take<int64_t>(end - begin + 1);
    first[0] = 0;
    for (int64_t i = begin; i < end; ++i) first[i - begin + 1] = first[i - begin] + of(item_of(a, i).N);
    return {begin, end - begin, first};
}

inline bool is_real(const Mask& mask, int64_t n) { return mask.data == nullptr || mask.data[n * mask.stride_n] != 0; }

// Takes a pointer that is not null `elements` on, of features by their dtype.
template <class T>
inline void advance(T*& data, int64_t elements) {
    if (data != nullptr) data += elements;
}
inline void advance(const void*& data, DType dtype, int64_t elements) {
    if (data != nullptr) data = static_cast<const char*>(data) + elements * size_of(dtype);
}
inline void advance(void*& data, DType dtype, int64_t elements) {
    if (data != nullptr) data = static_cast<char*>(data) + elements * size_of(dtype);
}

// Runs `verb(begin, end)` for a few items at a time, whose scratch, `floats(N)` for each, stays in a cache.
template <class Arguments, class Size, class F>
void by_items(const Arguments& a, Stream stream, const Size& floats, const F& verb) {
    for (int64_t begin = 0, end = 0; begin < a.B; begin = end) {
        if (begin > 0) release();
        int64_t used = 0, chunks = 0;
        for (; end < a.B; ++end) {
            const int N = item_of(a, end).N;
            used += 4 * floats(N);
            if (chunks >= stream.threads && used > kScratch) break;
            chunks += max(1, chunks_of(N).count);
        }
        verb(begin, end);
    }
}

// The meta tokens of every item as blocks, for cosine of unit length.
struct Meta {
    const float *blocks, *rows;     // block_size(D) floats of each block; all rows of each item, if asked for
    const float *inverse, *square;  // 1 / |m| and |m|^2 of each meta token
    int num_blocks;
    int64_t size, columns, begin, items;  // of a block; of a row; the first item; 1 if all items have the same ones

    int64_t num_rows() const { return int64_t(num_blocks) * kRows; }
    // Those of the i-th item alone.
    Meta of(int64_t i) const {
        const int64_t at = items == 1 ? 0 : (i - begin) * num_blocks;
        Meta own = *this;
        own.blocks += at * size;
        if (rows != nullptr) own.rows += at * kRows * columns;
        own.inverse += at * kRows;
        own.square += at * kRows;
        return own;
    }
};

template <class T, class Arguments>
Meta pack_meta(const Arguments& a, Stream stream, int64_t begin, int64_t end, bool with_rows = false) {
    Meta meta{};
    meta.num_blocks = static_cast<int>(ceil_div(a.K, kRows));
    meta.size = block_size(a.D);
    meta.columns = columns_of(a.D);
    meta.begin = begin;
    meta.items = a.meta.stride_b == 0 ? 1 : end - begin;
    const int64_t blocks = meta.items * meta.num_blocks, rows_size = kRows * meta.columns;
    const int64_t count = with_rows ? meta.num_rows() : kRows;
    const int threads = threads_for(stream, blocks * meta.size * 4);
    float* const packed = take<float>(blocks * meta.size);
    float* const rows = take<float>((with_rows ? blocks : threads) * rows_size);
    float *const inverse = take<float>(blocks * kRows), *const square = take<float>(blocks * kRows);
    parallel_for(blocks, threads, [&](int64_t task, int slot) {
        const int64_t b = task / meta.num_blocks;
        const int first = static_cast<int>(task % meta.num_blocks) * kRows;
        float* const to =
            with_rows ? rows + b * count * meta.columns + in_strip(count, first, 0) : rows + slot * rows_size;
        pack_block<T>(
            a.meta, item_of(a, begin + b).group, a.D, a.similarity == Similarity::cosine, packed + task * meta.size, to,
            count, [&](int r) { return first + r < a.K ? first + r : -1; }, inverse + task * kRows,
            square + task * kRows);
    });
    meta.blocks = packed;
    meta.rows = with_rows ? rows : nullptr;
    meta.inverse = inverse;
    meta.square = square;
    return meta;
}

// kPanel tokens from `start` on, and unless that is null as rows of kTokens. What is not there, or not real, is 0.
struct Panel {
    float *q, *rows = nullptr;
    Floats square[kVectors], inverse[kVectors], scale[kVectors];
};

template <class T, class Arguments, class F>
void load_panel(const Arguments& a, int start, const F& real, Panel& panel) {
    pack_panel<T>(
        a.q, 0, a.D, panel.q, [&](int i) { return start + i < a.N && real(start + i) ? start + i : -1; }, panel.rows,
        kTokens);
    for (int v = 0; v < kVectors; ++v) panel.inverse[v] = splat(1.0f);
    if (a.similarity != Similarity::dot) squares(panel.q, a.D, panel.square);
    if (a.similarity == Similarity::cosine)
        for (int v = 0; v < kVectors; ++v) panel.inverse[v] = inverse_norm(panel.square[v]);
    for (int v = 0; v < kVectors; ++v) panel.scale[v] = panel.inverse[v] * a.inverse_temperature;
}

// S of a panel and a block; -infinity behind the last meta token.
template <class Arguments>
STTM_INLINE void similarities(const Arguments& a, const Meta& meta, int block, const Panel& panel,
                              Floats (&S)[kRows][kVectors]) {
    STTM_UNROLL
    for (int r = 0; r < kRows; ++r) STTM_UNROLL
    for (int v = 0; v < kVectors; ++v) S[r][v] = Floats{};
    product_of<kRows, 1>(a.K - block * kRows, S, a.D, meta.blocks + block * meta.size, panel.q, kPanel);
    const float* const square = meta.square + block * kRows;
    STTM_UNROLL
    for (int r = 0; r < kRows; ++r) STTM_UNROLL
    for (int v = 0; v < kVectors; ++v) {
        if (a.similarity == Similarity::l2)
            S[r][v] = (2.0f * S[r][v] - panel.square[v] - square[r]) * a.inverse_temperature;
        else
            S[r][v] *= panel.scale[v];
        if (block * kRows + r >= a.K) S[r][v] = splat(-kInfinity);
    }
}

// out (K, columns) = or += tiles (panels, K, kPanel) times rows (kTokens, columns): a sum over tokens. `out` has
// `tile_rows` rows, as has a tile.
inline void sum_over_tokens(const float* tiles, int panels, int64_t K, int64_t tile_rows, const float* rows,
                            int64_t columns, bool add, float* out) {
    for (int64_t c = 0; c < columns; c += kPanel)
        for (int64_t k = 0; k < K; k += kRows) {
            Floats sum[kRows][kVectors] = {};
            for (int i = 0; i < panels; ++i)
                product_of<1, kPanel>(K - k, sum, kPanel, tiles + (i * tile_rows + k) * kPanel,
                                      rows + in_strip(kTokens, i * kPanel, c), kPanel);
            float* const to = out + in_strip(tile_rows, k, c);
            STTM_UNROLL
            for (int r = 0; r < kRows; ++r) STTM_UNROLL
            for (int v = 0; v < kVectors; ++v) {
                float* const here = to + r * kPanel + v * kWidth;
                store(here, add ? load(here) + sum[r][v] : sum[r][v]);
            }
        }
}

// out (kPanel, columns) = tile (K, kPanel) transposed times rows (K of `count`, columns): a sum over meta tokens.
inline void sum_over_meta(const float* tile, const float* rows, int64_t K, int64_t count, int64_t columns, float* out) {
    for (int64_t c = 0; c < columns; c += kPanel)
        for (int n = 0; n < kPanel; n += kRows) {
            Floats sum[kRows][kVectors] = {};
            product_of<kPanel, 1>(kPanel - n, sum, K, tile + n, rows + in_strip(count, 0, c), kPanel);
            STTM_UNROLL
            for (int r = 0; r < kRows; ++r) STTM_UNROLL
            for (int v = 0; v < kVectors; ++v)
                if (n + r < kPanel) store(out + in_strip(kPanel, n + r, c) + v * kWidth, sum[r][v]);
        }
}

// A share of a row, to be added to the gradient of a token; no row where there is nothing to add.
template <class T>
struct Added {
    const T* row = nullptr;
    float share = 0;
};
template <class T>
Added<T> added_to(const SoftMergeBackwardArguments&, const Item&, int64_t) {
    return {};
}
// Of a token, numbered among all tokens, that was merged along its index, too.
template <class T>
Added<T> added_to(const AssignBackwardArguments& a, const Item& item, int64_t token) {
    const int64_t k = int64_t(a.index[token]) - item.first_group, group = item.group * a.K + k;
    if (a.grad_merged == nullptr || k < 0 || k >= a.K || a.mass[group] == 0) return {};
    const float size = a.size == nullptr ? 1 : a.size[token], weight = a.weight == nullptr ? 1 : a.weight[token];
    return {static_cast<const T*>(a.grad_merged) + group * a.D, size * weight / a.mass[group]};
}

// Takes the gradient of similarities back to q and meta: dS, that of S, over the temperature and for cosine over |q|.
template <class T, class Arguments>
class PullBack {
public:
    // a: of all items, of which those of `chunks` are looked at.
    PullBack(const Arguments& a, const Meta& meta, const Tasks& chunks, int threads)
        : a_(a), meta_(meta), chunks_(chunks), columns_(meta.columns) {
        rows_ = take<float>(threads * kTokens * columns_);
        if (a.grad_q != nullptr) grad_ = take<float>(threads * columns_ * kPanel);
        if (a.grad_meta == nullptr) return;
        partial_ = take<float>(chunks.count() * meta.num_rows() * columns_);
        totals_ = take<float>(chunks.count() * meta.num_rows());
    }

    // Room for the rows of the i-th panel of some that `add_up` takes together.
    float* rows(int slot, int i) const { return rows_ + slot * kTokens * columns_ + in_strip(kTokens, i * kPanel, 0); }

    // Of a chunk: `chosen` if its tokens have a gradient at one meta token each.
    void begin(int64_t chunk, bool chosen) const {
        if (partial_ == nullptr) return;
        if (chosen)
            __builtin_memset(partial_ + chunk * meta_.num_rows() * columns_, 0,
                             sizeof(float) * meta_.num_rows() * columns_);
        __builtin_memset(totals_ + chunk * meta_.num_rows(), 0, sizeof(float) * meta_.num_rows());
    }

    // dS (K, kPanel) of the tokens from `start` on of an item, zeros for those that are not real.
    void panel(const Panel& p, const Item& item, const Meta& meta, int64_t chunk, int start, const float* dS,
               int slot) const {
        const bool is_l2 = a_.similarity == Similarity::l2;
        if (grad_ != nullptr) {
            float* const grad = grad_ + slot * columns_ * kPanel;
            Floats total[kVectors] = {};
            sum_over_meta(dS, meta.rows, a_.K, meta_.num_rows(), columns_, grad);
            for (int64_t k = 0; k < a_.K && is_l2; ++k)
                for (int v = 0; v < kVectors; ++v) total[v] += load(dS + k * kPanel + v * kWidth);
            finish_q(p, item, start, total, grad);
        }
        for (int64_t k = 0; k < a_.K && is_l2 && partial_ != nullptr; ++k) {
            Floats sum{};
            for (int v = 0; v < kVectors; ++v) sum += load(dS + k * kPanel + v * kWidth);
            totals_[chunk * meta_.num_rows() + k] += sum_of(sum);
        }
    }

    // dS (panels, K, kPanel) of these panels, which are the first of their chunk or not.
    void add_up(int64_t chunk, const float* dS, int panels, bool first, int slot) const {
        if (partial_ != nullptr)
            sum_over_tokens(dS, panels, a_.K, meta_.num_rows(), rows(slot, 0), columns_, !first,
                            partial_ + chunk * meta_.num_rows() * columns_);
    }

    // A panel whose tokens have a gradient g at one meta token each, k; -1 for tokens that are not real.
    void chosen(const Panel& p, const Item& item, const Meta& meta, int64_t chunk, int start, const int32_t* k,
                const float* g, int slot) const {
        float* const grad = grad_ + slot * columns_ * kPanel;
        float* const partial = partial_ + chunk * meta_.num_rows() * columns_;
        Floats total[kVectors] = {};
        for (int i = 0; i < kPanel; ++i) {
            const bool real = k[i] >= 0;
            total[i / kWidth][i % kWidth] = real ? g[i] : 0;
            for (int64_t d = 0; d < columns_ && grad_ != nullptr; d += kWidth)
                store(grad + in_strip(kPanel, i, d), real ? g[i] * load(meta_row(meta, k[i], d)) : Floats{});
            if (!real || partial_ == nullptr) continue;
            for (int64_t d = 0; d < columns_; d += kWidth) {
                float* const to = partial + in_strip(meta_.num_rows(), k[i], d);
                store(to, load(to) + g[i] * load(p.rows + in_strip(kTokens, i, d)));
            }
            totals_[chunk * meta_.num_rows() + k[i]] += g[i];
        }
        if (grad_ != nullptr) finish_q(p, item, start, total, grad);
    }

    // Meta token k of the i-th item, when all chunks are done.
    void finish(int64_t i, int64_t k) const {
        T* const to = static_cast<T*>(a_.grad_meta) + (item_of(a_, i).group * a_.K + k) * a_.D;
        const int64_t first = chunks_.first_of(i), size = meta_.num_rows() * columns_;
        const int count = chunks_.count_of(i);
        const Meta meta = meta_.of(i);
        for (int64_t d = 0; d < a_.D && count == 0; d += kWidth) store_up_to(to + d, Floats{}, a_.D - d);
        if (count == 0) return;
        const auto sum = [&](int64_t d) { return partial_ + first * size + in_strip(meta_.num_rows(), k, d); };
        float total = 0;
        for (int chunk = 0; chunk < count; ++chunk) total += totals_[(first + chunk) * meta_.num_rows() + k];
        Floats along{};
        for (int64_t c = 0; c < columns_; c += kPanel) {
            float* const to = sum(c);
            const float* const row = meta_row(meta, k, c);
            STTM_UNROLL
            for (int v = 0; v < kPanel; v += kWidth) {
                Floats here = load(to + v);
                for (int chunk = 1; chunk < count; ++chunk) here += load(to + v + chunk * size);
                if (a_.similarity == Similarity::l2) here = 2 * (here - total * load(row + v));
                along += here * load(row + v);
                store(to + v, here);
            }
        }
        const bool is_cosine = a_.similarity == Similarity::cosine;
        const float inverse = is_cosine ? meta.inverse[k] : 1;
        const float radial = inverse < 1 / kNormFloor ? sum_of(along) : 0;
        for (int64_t c = 0; c < a_.D; c += kPanel) {
            const float *const from = sum(c), *const row = meta_row(meta, k, c);
            STTM_UNROLL
            for (int v = 0; v < kPanel; v += kWidth) {
                Floats here = load(from + v);
                if (is_cosine) here = (here - radial * load(row + v)) * inverse;
                if (c + v < a_.D) store_up_to(to + c + v, here, a_.D - c - v);
            }
        }
    }

private:
    static const float* meta_row(const Meta& meta, int64_t k, int64_t d) {
        return meta.rows + in_strip(meta.num_rows(), k, d);
    }

    // Of what each token gets from meta tokens, and the total of its dS: the gradient of q, written out.
    void finish_q(const Panel& p, const Item& item, int start, const Floats (&total)[kVectors],
                  const float* grad) const {
        const int heads = a_.q.heads, count = min(kPanel, item.N - start);
        const int64_t first = item.b * heads * a_.N + item.start + start;
        const float factor = (a_.similarity == Similarity::l2 ? 2.0f : 1.0f) / static_cast<float>(heads);
        for (int v = 0; v * kWidth < count; ++v) {
            Floats along = total[v];  // how much of q is not in its gradient
            if (a_.similarity == Similarity::cosine) {
                Floats dot[kWidth] = {};
                for (int64_t c = 0; c < columns_; c += kPanel) {
                    const float* const g = grad + in_strip(kPanel, v * kWidth, c);
                    const float* const q = p.rows + in_strip(kTokens, v * kWidth, c);
                    STTM_UNROLL
                    for (int i = 0; i < kWidth; ++i) STTM_UNROLL
                    for (int u = 0; u < kVectors; ++u)
                        dot[i] += load(g + i * kPanel + u * kWidth) * load(q + i * kPanel + u * kWidth);
                }
                along = sums_of(dot) * p.inverse[v] * p.inverse[v];
                along = p.inverse[v] >= 1 / kNormFloor ? Floats{} : along;
            }
            for (int row = v * kWidth; row < min(count, (v + 1) * kWidth); ++row) {
                T* const to = static_cast<T*>(a_.grad_q) + (first + row) * a_.D;
                const float inward = a_.similarity == Similarity::dot ? 0 : along[row % kWidth];
                const Added<T> added = added_to<T>(a_, item, item.b * a_.N + item.start + start + row);
                for (int64_t c = 0; c < a_.D; c += kPanel) {
                    const float* const g = grad + in_strip(kPanel, row, c);
                    const float* const q = p.rows + in_strip(kTokens, row, c);
                    STTM_UNROLL
                    for (int u = 0; u < kPanel; u += kWidth) {
                        Floats here = load(g + u);
                        if (a_.similarity != Similarity::dot) here -= inward * load(q + u);
                        here *= factor;
                        if (added.row != nullptr && c + u < a_.D)
                            here += added.share / static_cast<float>(heads) *
                                    load_up_to(added.row + c + u, a_.D - c - u, 1);
                        for (int h = 0; h < heads && c + u < a_.D; ++h)
                            store_up_to(to + h * int64_t(a_.N) * a_.D + c + u, here, a_.D - c - u);
                    }
                }
            }
        }
    }

    const Arguments& a_;
    const Meta& meta_;
    const Tasks& chunks_;
    int64_t columns_;
    float *grad_ = nullptr, *rows_ = nullptr, *partial_ = nullptr, *totals_ = nullptr;
};

}  // namespace
}  // namespace sttm::cpu::STTM_ISA
