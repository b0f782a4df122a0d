// Gradients of score and lse: similarities are worked out again, a panel of tokens at a time.
#include "similarity.hpp"

namespace sttm::cpu::STTM_ISA {

namespace {

inline float at(const Column& c, int64_t n) { return c.data == nullptr ? 0 : c.data[n * c.stride_n]; }

// The meta token of token n of an item, -1 if it has none.
inline int32_t chosen_by(const AssignBackwardArguments& a, const Item& item, int64_t n) {
    const int64_t k = int64_t(a.index[n]) - item.first_group;
    return k >= 0 && k < a.K ? static_cast<int32_t>(k) : -1;
}

// Of the tokens of a panel: whose meta token it is, -1 if none, and the gradients of score and lse times the scale of
// S.
struct Given {
    int32_t k[kPanel];
    float g[kPanel], h[kPanel], lse[kPanel];
};
Given given(const AssignBackwardArguments& a, const Item& item, int start, const Panel& panel) {
    Given found{};
    for (int i = 0; i < kPanel; ++i) {
        const int64_t n = start + i;
        found.k[i] = n < a.N ? chosen_by(a, item, n) : -1;
        if (found.k[i] < 0) continue;
        const float scale = panel.scale[i / kWidth][i % kWidth];
        const float through = at(a.grad_weight, n) * (a.weight == nullptr ? 1 : a.weight[n]);  // of exp(score - lse)
        found.g[i] = (at(a.grad_score, n) + through) * scale;
        if (!is_soft(a)) continue;
        found.h[i] = (at(a.grad_lse, n) - through) * scale;
        found.lse[i] = a.lse[n];
    }
    return found;
}

// dS[n, k] = g_n [k = index_n] + h_n exp(S[n, k] - lse_n). All S first: what exp keeps in registers would take those of
// the product.
void make_gradient(const AssignBackwardArguments& a, const Meta& meta, const Panel& panel, const Given& in, float* dS) {
    for (int block = 0; block < meta.num_blocks; ++block) {
        Floats S[kRows][kVectors];
        similarities(a, meta, block, panel, S);
        STTM_UNROLL
        for (int r = 0; r < kRows; ++r) STTM_UNROLL
        for (int v = 0; v < kVectors; ++v) store(dS + (int64_t(block) * kRows + r) * kPanel + v * kWidth, S[r][v]);
    }
    for (int64_t k = 0; k < meta.num_rows(); ++k)
        for (int v = 0; v < kVectors; ++v) {
            float* const at = dS + k * kPanel + v * kWidth;
            const Floats h = load(in.h + v * kWidth), share = exp(load(at) - load(in.lse + v * kWidth));
            store(at, h == 0.0f ? Floats{} : h * share);
        }
    for (int i = 0; i < kPanel; ++i)
        if (in.k[i] >= 0) dS[int64_t(in.k[i]) * kPanel + i] += in.g[i];
}

// What is read of an item alone.
AssignBackwardArguments alone(AssignBackwardArguments a, const Item& item) {
    const int64_t row = item.b * a.N + item.start;
    advance(a.q.data, a.dtype, item.b * a.q.stride_b + item.start * a.q.stride_n);
    advance(a.index, row);
    advance(a.lse, row);
    advance(a.weight, row);
    const auto advance_column = [&](Column& c) { advance(c.data, item.b * c.stride_b + item.start * c.stride_n); };
    advance_column(a.grad_score);
    advance_column(a.grad_lse);
    advance_column(a.grad_weight);
    a.N = item.N;
    return a;
}

template <class T>
void assign_backward_typed(const AssignBackwardArguments& all, int64_t begin, int64_t end, Stream stream) {
    const Meta metas = pack_meta<T>(all, stream, begin, end, true);
    const Tasks tasks = tasks_of(all, begin, end, [](int N) { return chunks_of(N).count; });
    const int threads = threads_for(stream, tokens_of(all) * (all.K + kRows) * all.D / 2);
    const int64_t panel_size = int64_t(all.D) * kPanel, tile_size = metas.num_rows() * kPanel;
    float* const packed = take<float>(threads * panel_size);
    float* const tiles = take<float>(threads * kTogether * tile_size);
    const PullBack<T, AssignBackwardArguments> back(all, metas, tasks, threads);
    parallel_for(tasks.count(), threads, [&](int64_t chunk, int slot) {
        const int64_t item_number = tasks.whose(chunk);
        const Item item = item_of(all, item_number);
        const AssignBackwardArguments a = alone(all, item);
        const Meta meta = metas.of(item_number);
        const Chunks chunks = chunks_of(a.N);
        const auto real = [&](int64_t n) { return chosen_by(a, item, n) >= 0; };
        const int first = static_cast<int>(chunk - tasks.first_of(item_number)) * chunks.step;
        const int last = min(chunks.panels, first + chunks.step);
        float* const dS = tiles + slot * kTogether * tile_size;
        Panel panel;
        panel.q = packed + slot * panel_size;
        back.begin(chunk, !is_soft(a));
        for (int i = first; i < last; ++i) {
            const int start = i * kPanel, at = (i - first) % kTogether;
            panel.rows = back.rows(slot, at);
            load_panel<T>(a, start, real, panel);
            const Given in = given(a, item, start, panel);
            if (!is_soft(a)) {
                back.chosen(panel, item, meta, chunk, start, in.k, in.g, slot);
                continue;
            }
            make_gradient(a, meta, panel, in, dS + at * tile_size);
            back.panel(panel, item, meta, chunk, start, dS + at * tile_size, slot);
            if (at + 1 == kTogether || i + 1 == last) back.add_up(chunk, dS, at + 1, i - first == at, slot);
        }
    });
    if (all.grad_meta != nullptr)
        parallel_for((end - begin) * all.K, threads,
                     [&](int64_t k, int) { back.finish(begin + k / all.K, k % all.K); });
}

}  // namespace

void assign_backward(const AssignBackwardArguments& a, Stream stream) {
    if (a.grad_q != nullptr) expect_large(a.grad_q, size_of(a.dtype) * tokens_of(a) * a.q.heads * a.D);
    const auto floats = [&](int N) { return (int64_t(chunks_of(N).count) + 1) * (a.K + kRows) * (a.D + kPanel); };
    by_items(a, stream, floats, [&](int64_t begin, int64_t end) {
        with_type(a.dtype, [&](auto type) { assign_backward_typed<decltype(type)>(a, begin, end, stream); });
    });
}

}  // namespace sttm::cpu::STTM_ISA
