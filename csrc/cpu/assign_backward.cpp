// Gradients of score and lse: similarities are worked out again, a panel of tokens at a time.
#include "similarity.hpp"

namespace sttm::cpu::STTM_ISA {

namespace {

inline float at(const Column& c, int64_t b, int64_t n) { return c.data[b * c.stride_b + n * c.stride_n]; }

// Of the tokens of a panel: whose group it is, -1 if none, and the gradients of score and lse times the scale of S.
struct Given {
    int32_t k[kPanel];
    float g[kPanel], h[kPanel], lse[kPanel];
};
Given given(const AssignBackwardArguments& a, int64_t b, int start, const Panel& panel) {
    Given found{};
    for (int i = 0; i < kPanel; ++i) {
        const int64_t n = start + i;
        const int32_t k = n < a.N ? a.index[b * a.N + n] : -1;
        found.k[i] = k < a.K ? max(k, -1) : -1;
        if (found.k[i] < 0) continue;
        const float scale = panel.scale[i / kWidth][i % kWidth];
        found.g[i] = at(a.grad_score, b, n) * scale;
        if (a.grad_lse.data == nullptr) continue;
        found.h[i] = at(a.grad_lse, b, n) * scale;
        found.lse[i] = a.lse[b * a.N + n];
    }
    return found;
}

// dS[n, k] = g_n [k = index_n] + h_n exp(S[n, k] - lse_n). All S first: what exp keeps in registers would take those of
// the product.
void make_gradient(const AssignBackwardArguments& a, const Meta& meta, int64_t b, const Panel& panel, const Given& in,
                   float* dS) {
    for (int block = 0; block < meta.num_blocks; ++block) {
        Floats S[kRows][kVectors];
        similarities(a, meta, b, block, panel, S);
        STTM_UNROLL
        for (int r = 0; r < kRows; ++r) STTM_UNROLL
        for (int v = 0; v < kVectors; ++v)
            store(dS + (int64_t(block) * kRows + r) * kPanel + v * kWidth, S[r][v]);
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

void from_item(AssignBackwardArguments& a, int64_t b) {
    advance(a.q.data, a.dtype, b * a.q.stride_b);
    advance(a.meta.data, a.dtype, b * a.meta.stride_b);
    advance(a.index, b * a.N);
    advance(a.lse, b * a.N);
    advance(a.grad_score.data, b * a.grad_score.stride_b);
    advance(a.grad_lse.data, b * a.grad_lse.stride_b);
    advance(a.grad_q, a.dtype, b * a.q.heads * a.N * a.D);
    advance(a.grad_meta, a.dtype, b * a.K * a.D);
}

template <class T>
void assign_backward_typed(const AssignBackwardArguments& a, Stream stream) {
    const Meta meta = pack_meta<T>(a, stream, true);
    const Chunks chunks = chunks_of(a.N);
    const int threads = threads_for(stream, int64_t(a.B) * a.N * (a.K + kRows) * a.D / 2);
    const int64_t panel_size = int64_t(a.D) * kPanel, tile_size = meta.num_rows() * kPanel;
    float* const packed = take<float>(threads * panel_size);
    float* const tiles = take<float>(threads * kTogether * tile_size);
    const PullBack<T, AssignBackwardArguments> back(a, meta, chunks, threads);
    parallel_for(int64_t(a.B) * chunks.count, threads, [&](int64_t chunk, int slot) {
        const int64_t b = chunk / chunks.count;
        const auto real = [&](int64_t n) { return a.index[b * a.N + n] >= 0 && a.index[b * a.N + n] < a.K; };
        const int first = static_cast<int>(chunk % chunks.count) * chunks.step;
        const int last = min(chunks.panels, first + chunks.step);
        float* const dS = tiles + slot * kTogether * tile_size;
        Panel panel;
        panel.q = packed + slot * panel_size;
        back.begin(chunk, a.grad_lse.data == nullptr);
        for (int i = first; i < last; ++i) {
            const int start = i * kPanel, at = (i - first) % kTogether;
            panel.rows = back.rows(slot, at);
            load_panel<T>(a, b, start, real, panel);
            const Given in = given(a, b, start, panel);
            if (a.grad_lse.data == nullptr) {
                back.chosen(panel, b, chunk, start, in.k, in.g, slot);
                continue;
            }
            make_gradient(a, meta, b, panel, in, dS + at * tile_size);
            back.panel(panel, b, chunk, start, dS + at * tile_size, slot);
            if (at + 1 == kTogether || i + 1 == last) back.add_up(chunk, dS, at + 1, i - first == at, slot);
        }
    });
    if (a.grad_meta != nullptr)
        parallel_for(int64_t(a.B) * a.K, threads, [&](int64_t k, int) { back.finish(k / a.K, k % a.K); });
}

}  // namespace

void assign_backward(const AssignBackwardArguments& a, Stream stream) {
    if (a.grad_q != nullptr) expect_large(a.grad_q, size_of(a.dtype) * a.B * a.q.heads * a.N * a.D);
    const int64_t floats = (int64_t(chunks_of(a.N).count) + 1) * (a.K + kRows) * (a.D + kPanel);
    by_items(a, stream, floats, from_item, [&](const AssignBackwardArguments& some) {
        with_type(a.dtype, [&](auto type) { assign_backward_typed<decltype(type)>(some, stream); });
    });
}

}  // namespace sttm::cpu::STTM_ISA
