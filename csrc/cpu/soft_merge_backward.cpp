// Gradients of the soft merge: A is worked out again, a panel of tokens at a time.
#include "soft_merge.hpp"

namespace sttm::cpu::STTM_ISA {

namespace {

// What a group hands to its tokens: g_k of y and of positions, as rows of `columns` and as blocks, and what is
// the same for every token, -<g_k, y_k> - <gradient of p_k, p_k>. What is divided by mass_k is size_n A, which is not
// greater: 1 / mass_k alone overflows for a group far from every token.
struct Groups {
    const float *rows, *blocks, *constant, *grad_size, *divisor;  // divisor: mass_k, infinity for an empty group
    int64_t columns, size;                                        // size: of a block
};

template <class T>
Groups pack_groups(const SoftMergeBackwardArguments& a, const Meta& meta, int threads) {
    const int64_t channels = int64_t(a.C) + a.P, columns = columns_of(channels), count = meta.num_rows();
    const int64_t size = block_size(channels);
    float *const rows = take<float>(a.B * count * columns), *const blocks = take<float>(a.B * meta.num_blocks * size);
    float *const constant = take<float>(a.B * count), *const grad_size = take<float>(a.B * count);
    float* const divisor = take<float>(a.B * count);
    const T *const grad_y = static_cast<const T*>(a.grad_y.data), *const y = static_cast<const T*>(a.y);
    const float* const grad_p = static_cast<const float*>(a.grad_positions.data);
    parallel_for(a.B * int64_t(meta.num_blocks), threads, [&](int64_t block, int) {
        for (int64_t at = block * kRows; at < (block + 1) * kRows; ++at) {
            const int64_t b = at / count, k = at % count, group = b * a.K + k;
            const float mass = k < a.K ? a.mass[group] : 0;
            divisor[at] = mass == 0 ? kInfinity : mass;
            grad_size[at] = k < a.K && a.grad_size.data != nullptr
                                ? a.grad_size.data[b * a.grad_size.stride_b + k * a.grad_size.stride_n]
                                : 0;
            const auto row = [&](int64_t c) { return rows + b * count * columns + in_strip(count, k, c); };
            Floats dot{};
            for (int c = 0; c < columns; c += kWidth) {
                Floats g{};
                if (c < a.C && mass != 0 && grad_y != nullptr) {
                    const T* const from =
                        grad_y + b * a.grad_y.stride_b + k * a.grad_y.stride_n + c * a.grad_y.stride_c;
                    g = load_up_to(from, a.C - c, a.grad_y.stride_c);
                    dot += g * load_up_to(y + group * a.C + c, a.C - c, 1);
                }
                store(row(c), g);
            }
            float total = sum_of(dot);
            for (int p = 0; p < a.P && mass != 0 && grad_p != nullptr; ++p) {
                const float g = grad_p[b * a.grad_positions.stride_b + k * a.grad_positions.stride_n +
                                       p * a.grad_positions.stride_c];
                *row(a.C + p) = g;
                total += g * a.positions_out[group * a.P + p];
            }
            constant[at] = -total;
        }
        const int64_t b = block / meta.num_blocks, k = block % meta.num_blocks * kRows;
        block_of_rows(rows + b * count * columns + in_strip(count, k, 0), count, channels, blocks + block * size);
    });
    return {rows, blocks, constant, grad_size, divisor, columns, size};
}

// Features and positions of the tokens of a panel, one to a lane; zeros for those that are not real.
template <class T>
void load_features(const SoftMergeBackwardArguments& a, int64_t b, int start, const float* real, float* panel) {
    const Metric x{a.x.data, 1, a.x.stride_b, 0, a.x.stride_n, a.x.stride_c};
    pack_panel<T>(x, b, a.C, panel, [&](int i) { return real[i] == 0 ? -1 : start + i; });
    const float* const p = static_cast<const float*>(a.positions.data);
    for (int j = 0; j < a.P; ++j)
        for (int i = 0; i < kPanel; ++i)
            panel[(int64_t(a.C) + j) * kPanel + i] =
                real[i] == 0
                    ? 0
                    : p[b * a.positions.stride_b + (start + i) * a.positions.stride_n + j * a.positions.stride_c];
}

// T[k, n] = constant_k + <g_k, x_n> + <gradient of p_k, p_n>, (K, kPanel). dL/dA[n, k] is
// size_n (T / mass_k + gradient of size'_k).
void worth(const SoftMergeBackwardArguments& a, const Groups& groups, const Meta& meta, int64_t b, const float* panel,
           float* tile) {
    const float* const blocks = groups.blocks + b * meta.num_blocks * groups.size;
    for (int block = 0; block < meta.num_blocks; ++block) {
        Floats sum[kRows][kVectors] = {};
        product_of<kRows, 1>(a.K - block * kRows, sum, int64_t(a.C) + a.P, blocks + block * groups.size, panel, kPanel);
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < kVectors; ++v)
                store(tile + (int64_t(block) * kRows + r) * kPanel + v * kWidth,
                      sum[r][v] + groups.constant[b * meta.num_rows() + block * kRows + r]);
    }
}

// Of A and T of item b: the gradient of sizes to `sum`; size_n A / mass_k over A; dS over T.
void through_softmax(const SoftMergeBackwardArguments& a, const Groups& groups, const Meta& meta, int64_t b,
                     const Panel& panel, const float* size, float* A, float* T, float* sum) {
    const float* const divisor = groups.divisor + b * meta.num_rows();
    const float* const grad_size = groups.grad_size + b * meta.num_rows();
    for (int v = 0; v < kVectors; ++v) {
        const auto of_weight = [&](int64_t k, Floats weight) {
            return weight / divisor[k] * load(T + k * kPanel + v * kWidth) + weight * grad_size[k];
        };
        const auto over_meta = [&](Floats n) {
            Floats total{};
            for (int64_t k = 0; k < a.K; ++k) total += of_weight(k, load(A + k * kPanel + v * kWidth) * n);
            return total;
        };
        if (a.grad_size_in != nullptr) store(sum + v * kWidth, over_meta(splat(1.0f)));
        const Floats n = load(size + v * kWidth);
        Floats total{};
        if (a.over_meta) total = a.size.data == nullptr ? load(sum + v * kWidth) : over_meta(n);
        for (int64_t k = 0; k < meta.num_rows(); ++k) {
            float *const share = A + k * kPanel + v * kWidth, *const t = T + k * kPanel + v * kWidth;
            const Floats w = load(share) * n;
            Floats off = load(share) * total;
            // Over tokens, what T stands for is centred but for the gradient of size'.
            if (!a.over_meta && k < a.K) off = load(share) * (grad_size[k] * a.mass[b * a.K + k]);
            store(t, (of_weight(k, w) - off) * panel.scale[v]);
            store(share, w / divisor[k]);
        }
    }
}

// `grad`: a row of kPanel for each token.
template <class T>
void write_tokens(const SoftMergeBackwardArguments& a, int64_t b, int start, const float* sum, const float* grad) {
    for (int i = 0; i < min(kPanel, a.N - start); ++i) {
        const int64_t n = b * a.N + start + i;
        const auto row = [&](int64_t c) { return grad + in_strip(kPanel, i, c); };
        if (a.grad_size_in != nullptr) a.grad_size_in[n] = sum[i];
        for (int c = 0; c < a.C && a.grad_x != nullptr; c += kWidth)
            store_up_to(static_cast<T*>(a.grad_x) + n * a.C + c, load(row(c)), a.C - c);
        for (int p = 0; p < a.P && a.grad_positions_in != nullptr; ++p)
            a.grad_positions_in[n * a.P + p] = *row(a.C + p);
    }
}

template <class T>
void soft_merge_backward_typed(const SoftMergeBackwardArguments& a, Stream stream) {
    const Meta meta = pack_meta<T>(a, stream, true);
    const Chunks chunks = chunks_of(a.N);
    const int threads = threads_for(stream, int64_t(a.B) * a.N * (a.K + kRows) * (a.D + a.C));
    const Groups groups = pack_groups<T>(a, meta, threads);
    const bool of_tokens = a.grad_x != nullptr || a.grad_positions_in != nullptr;
    const bool of_metric = a.grad_q != nullptr || a.grad_meta != nullptr;
    const int64_t panel_size = int64_t(a.D) * kPanel, tile_size = meta.num_rows() * kPanel;
    const int64_t wide_size = groups.columns * kPanel;
    float* const packed = take<float>(threads * panel_size);
    float* const tiles = take<float>(threads * (1 + kTogether) * tile_size);
    float *const wide = take<float>(threads * wide_size), *const grads = take<float>(threads * wide_size);
    const bool same = a.P == 0 && a.q.heads == 1 && a.q.data == a.x.data && a.C == a.D &&
                      a.q.stride_b == a.x.stride_b && a.q.stride_n == a.x.stride_n && a.q.stride_d == a.x.stride_c;
    const PullBack<T, SoftMergeBackwardArguments> back(a, meta, chunks, threads);
    parallel_for(int64_t(a.B) * chunks.count, threads, [&](int64_t chunk, int slot) {
        const int64_t b = chunk / chunks.count;
        const int first = static_cast<int>(chunk % chunks.count) * chunks.step;
        const int last = min(chunks.panels, first + chunks.step);
        Panel panel;
        panel.q = packed + slot * panel_size;
        float *const A = tiles + slot * (1 + kTogether) * tile_size, *const x = wide + slot * wide_size;
        float* const grad = grads + slot * wide_size;
        float* const together = A + tile_size;
        back.begin(chunk, false);
        for (int i = first; i < last; ++i) {
            const int start = i * kPanel, at = (i - first) % kTogether;
            float* const dS = together + at * tile_size;
            float real[kPanel], size[kPanel], lse[kPanel] = {}, sum[kPanel] = {};
            load_sizes(a, b, start, real, size);
            panel.rows = back.rows(slot, at);
            load_panel<T>(a, b, start, [&](int64_t n) { return is_real(a.mask, b, n); }, panel);
            load_similarities(a, meta, b, panel, A);
            for (int j = 0; j < kPanel && start + j < a.N && a.over_meta; ++j) lse[j] = a.lse[b * a.N + start + j];
            attend(a, a.over_meta ? lse : a.lse + b * a.K, real, meta.num_rows(), A);
            if (!same) load_features<T>(a, b, start, real, x);
            worth(a, groups, meta, b, same ? panel.q : x, dS);
            through_softmax(a, groups, meta, b, panel, size, A, dS, sum);
            if (of_tokens)
                sum_over_meta(A, groups.rows + b * meta.num_rows() * groups.columns, a.K, meta.num_rows(),
                              groups.columns, grad);
            write_tokens<T>(a, b, start, sum, grad);
            if (!of_metric) continue;
            back.panel(panel, b, chunk, start, dS, slot);
            if (at + 1 == kTogether || i + 1 == last) back.add_up(chunk, together, at + 1, i - first == at, slot);
        }
    });
    if (a.grad_meta != nullptr)
        parallel_for(int64_t(a.B) * a.K, threads, [&](int64_t k, int) { back.finish(k / a.K, k % a.K); });
}

void from_item(SoftMergeBackwardArguments& a, int64_t b) {
    inputs_from_item(a, b);
    advance(a.grad_y.data, a.dtype, b * a.grad_y.stride_b);
    advance(a.grad_size.data, b * a.grad_size.stride_b);
    advance(a.grad_positions.data, DType::float32, b * a.grad_positions.stride_b);
    advance(a.y, a.dtype, b * a.K * a.C);
    advance(a.mass, b * a.K);
    advance(a.positions_out, b * a.K * a.P);
    advance(a.lse, b * (a.over_meta ? a.N : a.K));
    advance(a.grad_x, a.dtype, b * a.N * a.C);
    advance(a.grad_q, a.dtype, b * a.q.heads * a.N * a.D);
    advance(a.grad_meta, a.dtype, b * a.K * a.D);
    advance(a.grad_size_in, b * a.N);
    advance(a.grad_positions_in, b * a.N * a.P);
}

}  // namespace

void soft_merge_backward(const SoftMergeBackwardArguments& a, Stream stream) {
    if (a.grad_x != nullptr) expect_large(a.grad_x, size_of(a.dtype) * a.B * a.N * a.C);
    if (a.grad_q != nullptr) expect_large(a.grad_q, size_of(a.dtype) * a.B * a.q.heads * a.N * a.D);
    const int64_t floats = (int64_t(a.K) + kRows) * ((int64_t(chunks_of(a.N).count) + 1) * (a.D + kPanel) + a.C + a.P);
    by_items(a, stream, floats, from_item, [&](const SoftMergeBackwardArguments& some) {
        with_type(a.dtype, [&](auto type) { soft_merge_backward_typed<decltype(type)>(some, stream); });
    });
}

}  // namespace sttm::cpu::STTM_ISA
