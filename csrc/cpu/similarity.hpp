// Similarities of tokens to meta tokens, a panel of tokens by a block of meta tokens at a time, and products with them.
#pragma once

#include "metric.hpp"

namespace sttm::cpu::STTM_ISA {
namespace {

constexpr int kFewestPanels = 4, kMostChunks = 8;
constexpr int64_t kScratch = 16 << 20;  // bytes
constexpr int kTogether = 4;  // panels that a sum over tokens takes at a time: it is fetched and put back as often

// The panels of an item in consecutive chunks, each of which sums over its tokens; then the chunks are summed in order.
// The number of chunks depends on N alone.
struct Chunks {
    int panels, step, count;
};
inline Chunks chunks_of(int N) {
    const int panels = static_cast<int>(ceil_div(N, kPanel));
    const int step = max(kFewestPanels, static_cast<int>(ceil_div(panels, kMostChunks)));
    return {panels, step, static_cast<int>(ceil_div(panels, step))};
}

inline bool is_real(const Mask& mask, int64_t b, int64_t n) {
    return mask.data == nullptr || mask.data[b * mask.stride_b + n * mask.stride_n] != 0;
}

// Takes a pointer that is not null `elements` on, of features by their dtype.
template <class T>
inline void advance(T*& data, int64_t elements) {
    if (data != nullptr) data += elements;
}
inline void advance(const void*& data, DType dtype, int64_t elements) {
    if (data != nullptr) data = static_cast<const char*>(data) + elements * (dtype == DType::float32 ? 4 : 2);
}
inline void advance(void*& data, DType dtype, int64_t elements) {
    if (data != nullptr) data = static_cast<char*>(data) + elements * (dtype == DType::float32 ? 4 : 2);
}

// Runs `verb` for a few items of the batch at a time, whose scratch, `floats` for each, stays in a cache.
// `from(some, b)` makes item b the first of `some`.
template <class Arguments, class From, class F>
void by_items(const Arguments& a, Stream stream, int64_t floats, const From& from, const F& verb) {
    const int64_t busy = ceil_div(stream.threads, max(1, chunks_of(a.N).count));
    const int64_t step = max<int64_t>(max<int64_t>(1, busy), kScratch / (4 * max<int64_t>(1, floats)));
    for (int64_t b = 0; b < a.B; b += step) {
        if (b > 0) release();
        Arguments some = a;
        from(some, b);
        some.B = static_cast<int>(min(step, a.B - b));
        verb(some);
    }
}

// The meta tokens of every item as blocks, for cosine of unit length.
struct Meta {
    const float *blocks, *inverse, *square;  // block_size(D) floats of each block; 1 / |m| and |m|^2 of each meta token
    int num_blocks;
    int64_t size, items;  // of a block; 1 if all items have the same ones

    int64_t rows() const { return int64_t(num_blocks) * kRows; }
    int64_t at(int64_t b) const { return (items == 1 ? 0 : b) * num_blocks; }
    const float* block(int64_t b, int block) const { return blocks + (at(b) + block) * size; }
};

template <class T, class Arguments>
Meta pack_meta(const Arguments& a, Stream stream) {
    Meta meta{};
    meta.num_blocks = static_cast<int>(ceil_div(a.K, kRows));
    meta.size = block_size(a.D);
    meta.items = a.meta.stride_b == 0 && a.B != 0 ? 1 : a.B;
    const int64_t blocks = meta.items * meta.num_blocks, row_size = a.D + kWidth;
    const int threads = threads_for(stream, blocks * meta.size * 4);
    float *const packed = take<float>(blocks * meta.size), *const rows = take<float>(threads * row_size);
    float *const inverse = take<float>(blocks * kRows), *const square = take<float>(blocks * kRows);
    parallel_for(blocks, threads, [&](int64_t task, int slot) {
        const int first = static_cast<int>(task % meta.num_blocks) * kRows;
        pack_block<T>(
            a.meta, task / meta.num_blocks, a.D, a.similarity == Similarity::cosine, packed + task * meta.size,
            rows + slot * row_size, [&](int r) { return first + r < a.K ? first + r : -1; }, inverse + task * kRows,
            square + task * kRows);
    });
    meta.blocks = packed;
    meta.inverse = inverse;
    meta.square = square;
    return meta;
}

// kPanel tokens from `start` on. What is not there, or not real, is 0.
struct Panel {
    float* q;
    Floats square[kVectors], inverse[kVectors], scale[kVectors];
};

template <class T, class Arguments, class F>
void load_panel(const Arguments& a, int64_t b, int start, const F& real, Panel& panel) {
    pack_panel<T>(a.q, b, a.D, panel.q, [&](int i) { return start + i < a.N && real(start + i) ? start + i : -1; });
    for (int v = 0; v < kVectors; ++v) panel.inverse[v] = splat(1.0f);
    if (a.similarity != Similarity::dot) squares(panel.q, a.D, panel.square);
    if (a.similarity == Similarity::cosine)
        for (int v = 0; v < kVectors; ++v) panel.inverse[v] = inverse_norm(panel.square[v]);
    for (int v = 0; v < kVectors; ++v) panel.scale[v] = panel.inverse[v] * a.inverse_temperature;
}

// S of a panel and a block; -infinity behind the last meta token.
template <class Arguments>
inline void similarities(const Arguments& a, const Meta& meta, int64_t b, int block, const Panel& panel,
                         Floats (&S)[kRows][kVectors]) {
    STTM_UNROLL
    for (int r = 0; r < kRows; ++r)
        STTM_UNROLL
        for (int v = 0; v < kVectors; ++v) S[r][v] = Floats{};
    product_of<kRows, 1>(a.K - block * kRows, S, a.D, meta.block(b, block), panel.q, kPanel);
    const float* const square = meta.square + (meta.at(b) + block) * kRows;
    STTM_UNROLL
    for (int r = 0; r < kRows; ++r)
        STTM_UNROLL
        for (int v = 0; v < kVectors; ++v) {
            if (a.similarity == Similarity::l2)
                S[r][v] = (2.0f * S[r][v] - panel.square[v] - square[r]) * a.inverse_temperature;
            else
                S[r][v] *= panel.scale[v];
            if (block * kRows + r >= a.K) S[r][v] = splat(-kInfinity);
        }
}

// out (K, columns) = or += tiles (panels, K, kPanel) times rows (panels, kPanel, columns): a sum over tokens. columns is a
// multiple of kPanel.
inline void sum_over_tokens(const float* tiles, int panels, int64_t K, const float* rows, int64_t columns, bool add,
                            float* out) {
    const int64_t tile_size = block_rows(K) * kPanel;
    for (int64_t c = 0; c < columns; c += kPanel)
        for (int64_t k = 0; k < K; k += kRows) {
            Floats sum[kRows][kVectors] = {};
            for (int i = 0; i < panels; ++i)
                product_of<1, kPanel>(K - k, sum, kPanel, tiles + i * tile_size + k * kPanel,
                                      rows + i * kPanel * columns + c, columns);
            STTM_UNROLL
            for (int r = 0; r < kRows; ++r)
                STTM_UNROLL
                for (int v = 0; v < kVectors; ++v) {
                    float* const to = out + (k + r) * columns + c + v * kWidth;
                    store(to, add ? load(to) + sum[r][v] : sum[r][v]);
                }
        }
}

// out (D, kPanel) = blocks (K, D) transposed times tile (K, kPanel): a sum over meta tokens. D is a multiple of kRows.
inline void sum_over_meta(const float* tile, const float* blocks, int64_t K, int64_t D, float* out) {
    for (int64_t d = 0; d < D; d += kRows) {
        Floats sum[kRows][kVectors] = {};
        for (int64_t k = 0; k < K; k += kRows)
            product<kRows, 1, kRows>(sum, min<int64_t>(kRows, K - k), blocks + k * D + d * kRows, tile + k * kPanel,
                                     kPanel);
        STTM_UNROLL
        for (int r = 0; r < kRows; ++r)
            STTM_UNROLL
            for (int v = 0; v < kVectors; ++v) store(out + (d + r) * kPanel + v * kWidth, sum[r][v]);
    }
}

// Takes dS, the gradient of similarities that are not divided by the temperature, back to q and meta.
template <class T, class Arguments>
class PullBack {
public:
    PullBack(const Arguments& a, const Meta& meta, const Chunks& chunks, int threads)
        : a_(a), meta_(meta), chunks_(chunks), columns_(ceil_div(a.D, kPanel) * kPanel) {
        if (a.grad_q != nullptr) grad_ = take<float>(threads * block_rows(a.D) * kPanel);
        if (a.grad_meta == nullptr) return;
        rows_ = take<float>(threads * kTogether * columns_ * kPanel);
        partial_ = take<float>(int64_t(a.B) * chunks.count * meta.rows() * columns_);
        totals_ = take<float>(int64_t(a.B) * chunks.count * meta.rows());
    }

    // Of a chunk: `chosen` if its tokens have a gradient at one meta token each.
    void begin(int64_t chunk, bool chosen) const {
        if (partial_ == nullptr) return;
        if (chosen)
            __builtin_memset(partial_ + chunk * meta_.rows() * columns_, 0, sizeof(float) * meta_.rows() * columns_);
        __builtin_memset(totals_ + chunk * meta_.rows(), 0, sizeof(float) * meta_.rows());
    }

    // dS (K, kPanel) of the tokens from `start` on, zeros for those that are not real: the i-th panel of some that
    // `add_up` takes together.
    void panel(const Panel& p, int64_t b, int64_t chunk, int start, const float* dS, int slot, int i) const {
        if (grad_ != nullptr) {
            float* const grad = grad_ + slot * block_rows(a_.D) * kPanel;
            Floats total[kVectors];
            sum_over_meta(dS, meta_.block(b, 0), a_.K, block_rows(a_.D), grad);
            for (int v = 0; v < kVectors; ++v) {
                total[v] = Floats{};
                for (int64_t k = 0; k < a_.K; ++k) total[v] += load(dS + k * kPanel + v * kWidth);
            }
            finish_q(p, b, start, total, grad);
        }
        if (partial_ == nullptr) return;
        load_rows(p, rows(slot) + i * columns_ * kPanel);
        if (a_.similarity != Similarity::l2) return;
        for (int64_t k = 0; k < a_.K; ++k) {
            Floats sum{};
            for (int v = 0; v < kVectors; ++v) sum += load(dS + k * kPanel + v * kWidth);
            totals_[chunk * meta_.rows() + k] += sum_of(sum);
        }
    }

    // dS (panels, K, kPanel) of these panels, which are the first of their chunk or not.
    void add_up(int64_t chunk, const float* dS, int panels, bool first, int slot) const {
        if (partial_ != nullptr)
            sum_over_tokens(dS, panels, a_.K, rows(slot), columns_, !first,
                            partial_ + chunk * meta_.rows() * columns_);
    }

    // A panel whose tokens have a gradient g at one meta token each, k; -1 for tokens that are not real.
    void chosen(const Panel& p, int64_t b, int64_t chunk, int start, const int32_t* k, const float* g, int slot) const {
        if (grad_ != nullptr) {
            float* const grad = grad_ + slot * block_rows(a_.D) * kPanel;
            Floats total[kVectors];
            for (int i = 0; i < kPanel; ++i) {
                total[i / kWidth][i % kWidth] = k[i] < 0 ? 0 : g[i];
                const float* const m = k[i] < 0 ? nullptr : meta_.block(b, k[i] / kRows) + k[i] % kRows;
                for (int64_t d = 0; d < a_.D; ++d) grad[d * kPanel + i] = k[i] < 0 ? 0 : g[i] * m[d * kRows];
            }
            finish_q(p, b, start, total, grad);
        }
        if (partial_ == nullptr) return;
        load_rows(p, rows(slot));
        for (int i = 0; i < kPanel; ++i) {
            if (k[i] < 0) continue;
            float* const to = partial_ + (chunk * meta_.rows() + k[i]) * columns_;
            for (int64_t d = 0; d < columns_; d += kWidth) store(to + d, load(to + d) + g[i] * load(rows(slot) + i * columns_ + d));
            totals_[chunk * meta_.rows() + k[i]] += g[i];
        }
    }

    // Meta token k of item b, when all chunks are done.
    void finish(int64_t b, int64_t k) const {
        T* const to = static_cast<T*>(a_.grad_meta) + (b * a_.K + k) * a_.D;
        const int64_t stride = meta_.rows() * columns_;
        float* const sum = partial_ + b * chunks_.count * stride + k * columns_;
        float total = 0;
        for (int chunk = 0; chunk < chunks_.count; ++chunk)
            total += totals_[(b * chunks_.count + chunk) * meta_.rows() + k];
        const float* const block = meta_.block(b, static_cast<int>(k / kRows)) + k % kRows;
        const float inverse = meta_.inverse[(meta_.at(b)) * kRows + k];
        float radial = 0;
        for (int64_t d = 0; d < a_.D; ++d) {
            for (int chunk = 1; chunk < chunks_.count; ++chunk) sum[d] += sum[chunk * stride + d];
            if (a_.similarity == Similarity::l2) sum[d] = 2 * (sum[d] - total * block[d * kRows]);
            radial += sum[d] * block[d * kRows];
        }
        if (a_.similarity == Similarity::cosine) {
            if (inverse >= 1 / kNormFloor) radial = 0;
            for (int64_t d = 0; d < a_.D; ++d) sum[d] = (sum[d] - radial * block[d * kRows]) * inverse;
        }
        for (int64_t d = 0; d < a_.D; d += kWidth) store_up_to(to + d, load(sum + d), a_.D - d);
    }

private:
    float* rows(int slot) const { return rows_ + slot * kTogether * columns_ * kPanel; }

    // Of what each token gets from unit meta tokens, and the total of its dS: the gradient of q, written out.
    void finish_q(const Panel& p, int64_t b, int start, const Floats (&total)[kVectors], float* grad) const {
        for (int v = 0; v < kVectors; ++v) {
            const auto at = [&](float* from, int64_t d) { return from + d * kPanel + v * kWidth; };
            if (a_.similarity == Similarity::l2) {
                for (int64_t d = 0; d < a_.D; ++d)
                    store(at(grad, d), 2.0f * (load(at(grad, d)) - total[v] * load(at(p.q, d))));
            } else if (a_.similarity == Similarity::cosine) {
                Floats radial{};
                for (int64_t d = 0; d < a_.D; ++d) radial += load(at(grad, d)) * load(at(p.q, d));
                radial *= p.inverse[v] * p.inverse[v];
                radial = p.inverse[v] >= 1 / kNormFloor ? Floats{} : radial;
                for (int64_t d = 0; d < a_.D; ++d)
                    store(at(grad, d), (load(at(grad, d)) - radial * load(at(p.q, d))) * p.inverse[v]);
            }
        }
        const int heads = a_.q.heads, count = min(kPanel, a_.N - start);
        for (int h = 0; h < heads; ++h)
            unpack_panel(grad, a_.D, 1.0f / static_cast<float>(heads), count,
                         static_cast<T*>(a_.grad_q) + ((b * heads + h) * a_.N + start) * a_.D, a_.D);
    }

    // The tokens of a panel as rows (kPanel, columns), for cosine of unit length.
    void load_rows(const Panel& p, float* rows) const {
        for (int v = 0; v < kVectors; ++v)
            for (int64_t d = 0; d < columns_; d += kWidth) {
                Floats part[kWidth];
                STTM_UNROLL
                for (int i = 0; i < kWidth; ++i)
                    part[i] = d + i < a_.D ? load(p.q + (d + i) * kPanel + v * kWidth) * p.inverse[v] : Floats{};
                transpose<kWidth / 2>(part);
                STTM_UNROLL
                for (int i = 0; i < kWidth; ++i) store(rows + (v * kWidth + i) * columns_ + d, part[i]);
            }
    }

    const Arguments& a_;
    const Meta& meta_;
    Chunks chunks_;
    int64_t columns_;
    float *grad_ = nullptr, *rows_ = nullptr, *partial_ = nullptr, *totals_ = nullptr;
};

}  // namespace
}  // namespace sttm::cpu::STTM_ISA
