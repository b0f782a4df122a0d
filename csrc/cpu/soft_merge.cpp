// Every group is a mean of all tokens, weighted by a softmax. Sums run over chunks of tokens, then over chunks.
#include "soft_merge.hpp"

namespace sttm::cpu::STTM_ISA {

namespace {

// lse over the real tokens of each meta token, (B, K).
template <class T>
void lse_over_tokens(const SoftMergeArguments& a, const Meta& meta, const Chunks& chunks, int threads, float* packed,
                     float* tiles) {
    // Of each chunk, meta token and lane: the greatest S so far, and the sum of exp(S - greatest).
    const int64_t panel_size = int64_t(a.D) * kPanel, tile_size = meta.num_rows() * kPanel;
    float* const greatest = take<float>(int64_t(a.B) * chunks.count * tile_size);
    float* const sums = take<float>(int64_t(a.B) * chunks.count * tile_size);
    parallel_for(int64_t(a.B) * chunks.count, threads, [&](int64_t chunk, int slot) {
        const int64_t b = chunk / chunks.count;
        const int first = static_cast<int>(chunk % chunks.count) * chunks.step;
        float *const best = greatest + chunk * tile_size, *const sum = sums + chunk * tile_size;
        for (int64_t i = 0; i < tile_size; ++i) {
            best[i] = -3e38f;  // finite: an S of -infinity adds nothing
            sum[i] = 0;
        }
        Panel panel;
        panel.q = packed + slot * panel_size;
        float* const tile = tiles + slot * tile_size;
        for (int i = first; i < min(chunks.panels, first + chunks.step); ++i) {
            float real[kPanel], size[kPanel];
            load_sizes(a, b, i * kPanel, real, size);
            load_panel<T>(a, b, i * kPanel, [&](int64_t n) { return is_real(a.mask, b, n); }, panel);
            load_similarities(a, meta, b, panel, tile);
            for (int64_t k = 0; k < a.K; ++k)
                for (int v = 0; v < kVectors; ++v) {
                    const int64_t at = k * kPanel + v * kWidth;
                    const Floats there = load(real + v * kWidth), S = load(tile + at), before = load(best + at);
                    const Ints more = S > before;
                    const Floats e = exp(more ? before - S : S - before), old = load(sum + at);
                    const Ints is_there = there != 0.0f;
                    store(sum + at, is_there ? (more ? old * e + 1.0f : old + e) : old);
                    store(best + at, is_there & more ? S : before);
                }
        }
    });
    for (int64_t b = 0; b < a.B; ++b)
        for (int64_t k = 0; k < a.K; ++k) {
            const auto each = [&](const auto& run) {
                for (int chunk = 0; chunk < chunks.count; ++chunk) {
                    const int64_t at = (b * chunks.count + chunk) * tile_size + k * kPanel;
                    for (int v = 0; v < kVectors; ++v)
                        run(load(greatest + at + v * kWidth), load(sums + at + v * kWidth));
                }
            };
            Floats best = splat(-3e38f), total{};
            each([&](Floats one, Floats) { best = one > best ? one : best; });
            float top = best[0];
            for (int i = 1; i < kWidth; ++i) top = max(top, best[i]);
            each([&](Floats one, Floats sum) { total += sum * exp(one - top); });
            const float sum = sum_of(total);
            a.lse[b * a.K + k] = sum == 0 ? 0 : top + log(splat(sum))[0];
        }
}

// The tokens of a panel as rows of what is summed: features, positions, 1. Zeros for those that are not real.
template <class T>
void load_rows(const SoftMergeArguments& a, int64_t b, int start, const float* real, int64_t columns, float* rows) {
    for (int i = 0; i < kPanel; ++i) {
        const int64_t n = start + i;
        const T* const x = static_cast<const T*>(a.x.data) + b * a.x.stride_b + n * a.x.stride_n;
        const float* const p = static_cast<const float*>(a.positions.data) + b * a.positions.stride_b;
        for (int64_t c = 0; c < columns; c += kWidth)
            store(rows + in_strip(kTokens, i, c),
                  real[i] == 0 || c >= a.C ? Floats{} : load_up_to(x + c * a.x.stride_c, a.C - c, a.x.stride_c));
        if (real[i] == 0) continue;
        for (int j = 0; j < a.P; ++j)
            rows[in_strip(kTokens, i, a.C + j)] = p[n * a.positions.stride_n + j * a.positions.stride_c];
        rows[in_strip(kTokens, i, a.C + a.P)] = 1;
    }
}

template <class T>
void soft_merge_typed(const SoftMergeArguments& a, Stream stream) {
    const Meta meta = pack_meta<T>(a, stream);
    const Chunks chunks = chunks_of(a.N);
    const int threads = threads_for(stream, int64_t(a.B) * a.N * (a.K + kRows) * (a.D + a.C) / 4);
    const int64_t panel_size = int64_t(a.D) * kPanel, tile_size = meta.num_rows() * kPanel;
    const int64_t columns = columns_of(int64_t(a.C) + a.P + 1), sum_size = meta.num_rows() * columns;
    float* const packed = take<float>(threads * panel_size);
    float* const tiles = take<float>(threads * kTogether * tile_size);
    float* const rows = take<float>(threads * kTokens * columns);
    float* const sums = take<float>(a.B * chunks.count * sum_size);
    if (!a.over_meta) lse_over_tokens<T>(a, meta, chunks, threads, packed, tiles);

    parallel_for(int64_t(a.B) * chunks.count, threads, [&](int64_t chunk, int slot) {
        const int64_t b = chunk / chunks.count;
        const int first = static_cast<int>(chunk % chunks.count) * chunks.step;
        const int last = min(chunks.panels, first + chunks.step);
        Panel panel;
        panel.q = packed + slot * panel_size;
        float *const W = tiles + slot * kTogether * tile_size, *const row = rows + slot * kTokens * columns;
        for (int i = first; i < last; ++i) {
            const int start = i * kPanel, at = (i - first) % kTogether;
            float* const tile = W + at * tile_size;
            float real[kPanel], size[kPanel], lse[kPanel];
            load_sizes(a, b, start, real, size);
            load_panel<T>(a, b, start, [&](int64_t n) { return is_real(a.mask, b, n); }, panel);
            load_similarities(a, meta, b, panel, tile);
            if (a.over_meta) {
                lse_over_meta(a, tile, lse);
                for (int j = 0; j < kPanel && start + j < a.N; ++j)
                    a.lse[b * a.N + start + j] = real[j] == 0 ? 0 : lse[j];
            }
            attend(a, a.over_meta ? lse : a.lse + b * a.K, real, meta.num_rows(), tile);
            for (int64_t k = 0; a.size.data != nullptr && k < meta.num_rows(); ++k)
                for (int v = 0; v < kVectors; ++v)
                    store(tile + k * kPanel + v * kWidth,
                          load(tile + k * kPanel + v * kWidth) * load(size + v * kWidth));
            load_rows<T>(a, b, start, real, columns, row + in_strip(kTokens, at * kPanel, 0));
            if (at + 1 == kTogether || i + 1 == last)
                sum_over_tokens(W, at + 1, a.K, meta.num_rows(), row, columns, i - first != at,
                                sums + chunk * sum_size);
        }
    });

    parallel_for(int64_t(a.B) * a.K, threads, [&](int64_t group, int) {
        const int64_t b = group / a.K, k = group % a.K;
        const auto total = [&](int64_t c) {
            return sums + b * chunks.count * sum_size + in_strip(meta.num_rows(), k, c);
        };
        for (int64_t c = 0; c < columns && chunks.count > 1; c += kWidth) {
            Floats sum = load(total(c));
            for (int chunk = 1; chunk < chunks.count; ++chunk) sum += load(total(c) + chunk * sum_size);
            store(total(c), sum);
        }
        const float mass = chunks.count == 0 ? 0 : *total(a.C + a.P);
        T* const y = static_cast<T*>(a.y) + group * a.C;
        for (int c = 0; c < a.C; c += kWidth) store_up_to(y + c, mass == 0 ? Floats{} : load(total(c)) / mass, a.C - c);
        a.size_out[group] = mass;
        for (int p = 0; p < a.P; ++p) a.positions_out[group * a.P + p] = mass == 0 ? 0 : *total(a.C + p) / mass;
    });
}

void from_item(SoftMergeArguments& a, int64_t b) {
    inputs_from_item(a, b);
    advance(a.y, a.dtype, b * a.K * a.C);
    advance(a.size_out, b * a.K);
    advance(a.positions_out, b * a.K * a.P);
    advance(a.lse, b * (a.over_meta ? a.N : a.K));
}

}  // namespace

void soft_merge(const SoftMergeArguments& a, Stream stream) {
    const int64_t floats = (int64_t(a.K) + kRows) * (int64_t(chunks_of(a.N).count) * (a.C + a.P + kPanel) + a.D);
    by_items(a, stream, floats, from_item, [&](const SoftMergeArguments& some) {
        with_type(a.dtype, [&](auto type) { soft_merge_typed<decltype(type)>(some, stream); });
    });
}

}  // namespace sttm::cpu::STTM_ISA
