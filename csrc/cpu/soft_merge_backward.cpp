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

    // Those of the i-th item alone.
    Groups of(int64_t i, const Meta& meta) const {
        const int64_t at = i * meta.num_rows();
        return {rows + at * columns,
                blocks + i * meta.num_blocks * size,
                constant + at,
                grad_size + at,
                divisor + at,
                columns,
                size};
    }
};

// The arguments of an item alone, but for the gradients of q and meta.
SoftMergeBackwardArguments alone(SoftMergeBackwardArguments a, const Item& item) {
    const int64_t row = item.b * a.N + item.start, group = item.group;
    advance(a.grad_y.data, a.dtype, group * a.grad_y.stride_b);
    advance(a.grad_size.data, group * a.grad_size.stride_b);
    advance(a.grad_positions.data, DType::float32, group * a.grad_positions.stride_b);
    advance(a.y, a.dtype, group * a.K * a.C);
    advance(a.mass, group * a.K);
    advance(a.positions_out, group * a.K * a.P);
    advance(a.lse, a.over_meta ? row : group * a.K);
    advance(a.grad_x, a.dtype, row * a.C);
    advance(a.grad_size_in, row);
    advance(a.grad_positions_in, row * a.P);
    inputs_of(a, item);
    return a;
}

template <class T>
Groups pack_groups(const SoftMergeBackwardArguments& all, int64_t begin, int64_t end, const Meta& meta, int threads) {
    const int64_t channels = int64_t(all.C) + all.P, columns = columns_of(channels), count = meta.num_rows();
    const int64_t items = end - begin, size = block_size(channels);
    float *const rows = take<float>(items * count * columns), *const blocks =
                                                                  take<float>(items * meta.num_blocks * size);
    float *const constant = take<float>(items * count), *const grad_size = take<float>(items * count);
    float* const divisor = take<float>(items * count);
    parallel_for(items * int64_t(meta.num_blocks), threads, [&](int64_t block, int) {
        const int64_t b = block / meta.num_blocks;
        const SoftMergeBackwardArguments a = alone(all, item_of(all, begin + b));
        const T *const grad_y = static_cast<const T*>(a.grad_y.data), *const y = static_cast<const T*>(a.y);
        const float* const grad_p = static_cast<const float*>(a.grad_positions.data);
        for (int64_t at = block * kRows; at < (block + 1) * kRows; ++at) {
            const int64_t k = at % count;
            const float mass = k < a.K ? a.mass[k] : 0;
            divisor[at] = mass == 0 ? kInfinity : mass;
            grad_size[at] = k < a.K && a.grad_size.data != nullptr ? a.grad_size.data[k * a.grad_size.stride_n] : 0;
            const auto row = [&](int64_t c) { return rows + b * count * columns + in_strip(count, k, c); };
            Floats dot{};
            for (int c = 0; c < columns; c += kWidth) {
                Floats g{};
                if (c < a.C && mass != 0 && grad_y != nullptr) {
                    const T* const from = grad_y + k * a.grad_y.stride_n + c * a.grad_y.stride_c;
                    g = load_up_to(from, a.C - c, a.grad_y.stride_c);
                    dot += g * load_up_to(y + k * a.C + c, a.C - c, 1);
                }
                store(row(c), g);
            }
            float total = sum_of(dot);
            for (int p = 0; p < a.P && mass != 0 && grad_p != nullptr; ++p) {
                const float g = grad_p[k * a.grad_positions.stride_n + p * a.grad_positions.stride_c];
                *row(a.C + p) = g;
                total += g * a.positions_out[k * a.P + p];
            }
            constant[at] = -total;
        }
        const int64_t k = block % meta.num_blocks * kRows;
        block_of_rows(rows + b * count * columns + in_strip(count, k, 0), count, channels, blocks + block * size);
    });
    return {rows, blocks, constant, grad_size, divisor, columns, size};
}

// Features and positions of the tokens of a panel, one to a lane; zeros for those that are not real.
template <class T>
void load_features(const SoftMergeBackwardArguments& a, int start, const float* real, float* panel) {
    const Metric x{a.x.data, 1, a.x.stride_b, 0, a.x.stride_n, a.x.stride_c};
    pack_panel<T>(x, 0, a.C, panel, [&](int i) { return real[i] == 0 ? -1 : start + i; });
    const float* const p = static_cast<const float*>(a.positions.data);
    for (int j = 0; j < a.P; ++j)
        for (int i = 0; i < kPanel; ++i)
            panel[(int64_t(a.C) + j) * kPanel + i] =
                real[i] == 0 ? 0 : p[(start + i) * a.positions.stride_n + j * a.positions.stride_c];
}

// T[k, n] = constant_k + <g_k, x_n> + <gradient of p_k, p_n>, (K, kPanel). dL/dA[n, k] is
// size_n (T / mass_k + gradient of size'_k).
void worth(const SoftMergeBackwardArguments& a, const Groups& groups, const Meta& meta, const float* panel,
           float* tile) {
    for (int block = 0; block < meta.num_blocks; ++block) {
        Floats sum[kRows][kVectors] = {};
        product_of<kRows, 1>(a.K - block * kRows, sum, int64_t(a.C) + a.P, groups.blocks + block * groups.size, panel,
                             kPanel);
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < kVectors; ++v)
                store(tile + (int64_t(block) * kRows + r) * kPanel + v * kWidth,
                      sum[r][v] + groups.constant[block * kRows + r]);
    }
}

// Of A and T: the gradient of sizes to `sum`; size_n A / mass_k over A; dS over T.
void through_softmax(const SoftMergeBackwardArguments& a, const Groups& groups, const Meta& meta, const Panel& panel,
                     const float* size, float* A, float* T, float* sum) {
    const float *const divisor = groups.divisor, *const grad_size = groups.grad_size;
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
            if (!a.over_meta && k < a.K) off = load(share) * (grad_size[k] * a.mass[k]);
            store(t, (of_weight(k, w) - off) * panel.scale[v]);
            store(share, w / divisor[k]);
        }
    }
}

// `grad`: a row of kPanel for each token.
template <class T>
void write_tokens(const SoftMergeBackwardArguments& a, int start, const float* sum, const float* grad) {
    for (int i = 0; i < min(kPanel, a.N - start); ++i) {
        const int64_t n = start + i;
        const auto row = [&](int64_t c) { return grad + in_strip(kPanel, i, c); };
        if (a.grad_size_in != nullptr) a.grad_size_in[n] = sum[i];
        for (int c = 0; c < a.C && a.grad_x != nullptr; c += kWidth)
            store_up_to(static_cast<T*>(a.grad_x) + n * a.C + c, load(row(c)), a.C - c);
        for (int p = 0; p < a.P && a.grad_positions_in != nullptr; ++p)
            a.grad_positions_in[n * a.P + p] = *row(a.C + p);
    }
}

template <class T>
void soft_merge_backward_typed(const SoftMergeBackwardArguments& all, int64_t begin, int64_t end, Stream stream) {
    const Meta metas = pack_meta<T>(all, stream, begin, end, true);
    const Tasks tasks = tasks_of(all, begin, end, [](int N) { return chunks_of(N).count; });
    const int threads = threads_for(stream, tokens_of(all) * (all.K + kRows) * (all.D + all.C));
    const Groups of_all = pack_groups<T>(all, begin, end, metas, threads);
    const bool of_tokens = all.grad_x != nullptr || all.grad_positions_in != nullptr;
    const bool of_metric = all.grad_q != nullptr || all.grad_meta != nullptr;
    const int64_t panel_size = int64_t(all.D) * kPanel, tile_size = metas.num_rows() * kPanel;
    const int64_t wide_size = of_all.columns * kPanel;
    float* const packed = take<float>(threads * panel_size);
    float* const tiles = take<float>(threads * (1 + kTogether) * tile_size);
    float *const wide = take<float>(threads * wide_size), *const grads = take<float>(threads * wide_size);
    const bool same = all.P == 0 && all.q.heads == 1 && all.q.data == all.x.data && all.C == all.D &&
                      all.q.stride_b == all.x.stride_b && all.q.stride_n == all.x.stride_n &&
                      all.q.stride_d == all.x.stride_c;
    const PullBack<T, SoftMergeBackwardArguments> back(all, metas, tasks, threads);
    parallel_for(tasks.count(), threads, [&](int64_t chunk, int slot) {
        const int64_t number = tasks.whose(chunk);
        const Item item = item_of(all, number);
        const SoftMergeBackwardArguments a = alone(all, item);
        const Meta meta = metas.of(number);
        const Groups groups = of_all.of(number - begin, meta);
        const Chunks chunks = chunks_of(a.N);
        const int first = static_cast<int>(chunk - tasks.first_of(number)) * chunks.step;
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
            load_sizes(a, start, real, size);
            panel.rows = back.rows(slot, at);
            load_panel<T>(a, start, [&](int64_t n) { return is_real(a.mask, n); }, panel);
            load_similarities(a, meta, panel, A);
            for (int j = 0; j < kPanel && start + j < a.N && a.over_meta; ++j) lse[j] = a.lse[start + j];
            attend(a, a.over_meta ? lse : a.lse, real, meta.num_rows(), A);
            if (!same) load_features<T>(a, start, real, x);
            worth(a, groups, meta, same ? panel.q : x, dS);
            through_softmax(a, groups, meta, panel, size, A, dS, sum);
            if (!a.over_meta && a.N == 1)  // a softmax over one thing is 1
                __builtin_memset(dS, 0, sizeof(float) * tile_size);
            if (of_tokens) sum_over_meta(A, groups.rows, a.K, meta.num_rows(), groups.columns, grad);
            write_tokens<T>(a, start, sum, grad);
            if (!of_metric) continue;
            back.panel(panel, item, meta, chunk, start, dS, slot);
            if (at + 1 == kTogether || i + 1 == last) back.add_up(chunk, together, at + 1, i - first == at, slot);
        }
    });
    if (all.grad_meta != nullptr)
        parallel_for((end - begin) * all.K, threads,
                     [&](int64_t k, int) { back.finish(begin + k / all.K, k % all.K); });
}

}  // namespace

void soft_merge_backward(const SoftMergeBackwardArguments& a, Stream stream) {
    if (a.grad_x != nullptr) expect_large(a.grad_x, size_of(a.dtype) * tokens_of(a) * a.C);
    if (a.grad_q != nullptr) expect_large(a.grad_q, size_of(a.dtype) * tokens_of(a) * a.q.heads * a.D);
    const auto floats = [&](int N) {
        return (int64_t(a.K) + kRows) * ((int64_t(chunks_of(N).count) + 1) * (a.D + kPanel) + a.C + a.P);
    };
    by_items(a, stream, floats, [&](int64_t begin, int64_t end) {
        with_type(a.dtype, [&](auto type) { soft_merge_backward_typed<decltype(type)>(a, begin, end, stream); });
    });
}

}  // namespace sttm::cpu::STTM_ISA
