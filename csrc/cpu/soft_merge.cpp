// Every group is a mean of all tokens, weighted by a softmax. Sums run over chunks of tokens, then over chunks.
#include "soft_merge.hpp"

namespace sttm::cpu::STTM_ISA {

namespace {

// The arguments of an item alone.
SoftMergeArguments alone(SoftMergeArguments a, const Item& item) {
    advance(a.y, a.dtype, item.group * a.K * a.C);
    advance(a.size_out, item.group * a.K);
    advance(a.positions_out, item.group * a.K * a.P);
    advance(a.lse, a.over_meta ? item.b * a.N + item.start : item.group * a.K);
    inputs_of(a, item);
    return a;
}

// lse over the real tokens of each meta token, (B, K).
template <class T>
void lse_over_tokens(const SoftMergeArguments& all, const Meta& metas, const Tasks& tasks, int threads, float* packed,
                     float* tiles) {
    // Of each chunk, meta token and lane: the greatest S so far, and the sum of exp(S - greatest).
    const int64_t panel_size = int64_t(all.D) * kPanel, tile_size = metas.num_rows() * kPanel;
    float* const greatest = take<float>(tasks.count() * tile_size);
    float* const sums = take<float>(tasks.count() * tile_size);
    parallel_for(tasks.count(), threads, [&](int64_t chunk, int slot) {
        const int64_t i = tasks.whose(chunk);
        const SoftMergeArguments a = alone(all, item_of(all, i));
        const Meta meta = metas.of(i);
        const Chunks chunks = chunks_of(a.N);
        const int first = static_cast<int>(chunk - tasks.first_of(i)) * chunks.step;
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
            load_sizes(a, i * kPanel, real, size);
            load_panel<T>(a, i * kPanel, [&](int64_t n) { return is_real(a.mask, n); }, panel);
            load_similarities(a, meta, panel, tile);
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
    for (int64_t i = tasks.begin; i < tasks.begin + tasks.items; ++i)
        for (int64_t k = 0; k < all.K; ++k) {
            const auto each = [&](const auto& run) {
                for (int chunk = 0; chunk < tasks.count_of(i); ++chunk) {
                    const int64_t at = (tasks.first_of(i) + chunk) * tile_size + k * kPanel;
                    for (int v = 0; v < kVectors; ++v)
                        run(load(greatest + at + v * kWidth), load(sums + at + v * kWidth));
                }
            };
            Floats best = splat(-3e38f), total{};
            each([&](Floats one, Floats) { best = one > best ? one : best; });
            float top = best[0];
            for (int lane = 1; lane < kWidth; ++lane) top = max(top, best[lane]);
            each([&](Floats one, Floats sum) { total += sum * exp(one - top); });
            const float sum = sum_of(total);
            all.lse[item_of(all, i).group * all.K + k] = sum == 0 ? 0 : top + log(splat(sum))[0];
        }
}

// S becomes size_n A, 0 for tokens that are not real, with the softmax over meta tokens; and its lse.
void attend_over_meta(int K, int64_t rows, const float* real, const float* size, float* tile, float* lse) {
    for (int v = 0; v < kVectors; ++v) {
        float* const at = tile + v * kWidth;
        Floats best = splat(-kInfinity), sum{};
        for (int64_t k = 0; k < K; ++k) {
            const Floats S = load(at + k * kPanel);
            best = S > best ? S : best;
        }
        for (int64_t k = 0; k < K; ++k) {
            const Floats e = exp(load(at + k * kPanel) - best);
            sum += e;
            store(at + k * kPanel, e);
        }
        store(lse + v * kWidth, best + log(sum));
        const Ints is_real = load(real + v * kWidth) != 0.0f;
        const Floats scale = load(size + v * kWidth) / sum;
        for (int64_t k = 0; k < rows; ++k)
            store(at + k * kPanel, k < K ? (is_real ? load(at + k * kPanel) * scale : Floats{}) : Floats{});
    }
}

// The tokens of a panel as rows of what is summed: features, positions, 1. Zeros for those that are not real.
template <class T>
void load_rows(const SoftMergeArguments& a, int start, const float* real, int64_t columns, float* rows) {
    const Metric x{a.x.data, 1, a.x.stride_b, 0, a.x.stride_n, a.x.stride_c};
    for (int v = 0; v < kPanel; v += kWidth) {
        const Tokens<T> tokens(x, 0, [&](int i) { return real[v + i] == 0 ? -1 : start + v + i; });
        for (int64_t c = 0; c < columns; c += kWidth) {
            Floats part[kWidth];
            tokens.load_features(x, static_cast<int>(c), a.C, part);
            STTM_UNROLL
            for (int i = 0; i < kWidth; ++i) store(rows + in_strip(kTokens, v + i, c), part[i]);
        }
    }
    for (int i = 0; i < kPanel; ++i) {
        const int64_t n = start + i;
        const float* const p = static_cast<const float*>(a.positions.data);
        if (real[i] == 0) continue;
        for (int j = 0; j < a.P; ++j)
            rows[in_strip(kTokens, i, a.C + j)] = p[n * a.positions.stride_n + j * a.positions.stride_c];
        rows[in_strip(kTokens, i, a.C + a.P)] = 1;
    }
}

template <class T>
void soft_merge_typed(const SoftMergeArguments& all, int64_t begin, int64_t end, Stream stream) {
    const Meta metas = pack_meta<T>(all, stream, begin, end);
    const Tasks tasks = tasks_of(all, begin, end, [](int N) { return chunks_of(N).count; });
    const int threads = threads_for(stream, tokens_of(all) * (all.K + kRows) * (all.D + all.C) / 4);
    const int64_t panel_size = int64_t(all.D) * kPanel, tile_size = metas.num_rows() * kPanel;
    const int64_t columns = columns_of(int64_t(all.C) + all.P + 1), sum_size = metas.num_rows() * columns;
    float* const packed = take<float>(threads * panel_size);
    float* const tiles = take<float>(threads * kTogether * tile_size);
    float* const rows = take<float>(threads * kTokens * columns);
    float* const sums = take<float>(tasks.count() * sum_size);
    if (!all.over_meta) lse_over_tokens<T>(all, metas, tasks, threads, packed, tiles);

    parallel_for(tasks.count(), threads, [&](int64_t chunk, int slot) {
        const int64_t number = tasks.whose(chunk);
        const SoftMergeArguments a = alone(all, item_of(all, number));
        const Meta meta = metas.of(number);
        const Chunks chunks = chunks_of(a.N);
        const int first = static_cast<int>(chunk - tasks.first_of(number)) * chunks.step;
        const int last = min(chunks.panels, first + chunks.step);
        Panel panel;
        panel.q = packed + slot * panel_size;
        float *const W = tiles + slot * kTogether * tile_size, *const row = rows + slot * kTokens * columns;
        for (int i = first; i < last; ++i) {
            const int start = i * kPanel, at = (i - first) % kTogether;
            float* const tile = W + at * tile_size;
            float real[kPanel], size[kPanel], lse[kPanel];
            load_sizes(a, start, real, size);
            load_panel<T>(a, start, [&](int64_t n) { return is_real(a.mask, n); }, panel);
            load_similarities(a, meta, panel, tile);
            if (a.over_meta) {
                attend_over_meta(a.K, meta.num_rows(), real, size, tile, lse);
                for (int j = 0; j < kPanel && start + j < a.N; ++j) a.lse[start + j] = real[j] == 0 ? 0 : lse[j];
            } else {
                attend(a, a.lse, real, meta.num_rows(), tile);
                for (int64_t k = 0; a.size.data != nullptr && k < meta.num_rows(); ++k)
                    for (int v = 0; v < kVectors; ++v)
                        store(tile + k * kPanel + v * kWidth,
                              load(tile + k * kPanel + v * kWidth) * load(size + v * kWidth));
            }
            load_rows<T>(a, start, real, columns, row + in_strip(kTokens, at * kPanel, 0));
            if (at + 1 == kTogether || i + 1 == last)
                sum_over_tokens(W, at + 1, a.K, meta.num_rows(), row, columns, i - first != at,
                                sums + chunk * sum_size);
        }
    });

    parallel_for((end - begin) * all.K, threads, [&](int64_t group, int) {
        const int64_t number = begin + group / all.K, k = group % all.K;
        const SoftMergeArguments a = alone(all, item_of(all, number));
        const int count = tasks.count_of(number);
        const auto total = [&](int64_t c) {
            return sums + tasks.first_of(number) * sum_size + in_strip(metas.num_rows(), k, c);
        };
        for (int64_t c = 0; c < columns && count > 1; c += kWidth) {
            Floats sum = load(total(c));
            for (int chunk = 1; chunk < count; ++chunk) sum += load(total(c) + chunk * sum_size);
            store(total(c), sum);
        }
        const float mass = count == 0 ? 0 : *total(a.C + a.P);
        T* const y = static_cast<T*>(a.y) + k * a.C;
        for (int c = 0; c < a.C; c += kWidth) store_up_to(y + c, mass == 0 ? Floats{} : load(total(c)) / mass, a.C - c);
        a.size_out[k] = mass;
        for (int p = 0; p < a.P; ++p) a.positions_out[k * a.P + p] = mass == 0 ? 0 : *total(a.C + p) / mass;
    });
}

}  // namespace

void soft_merge(const SoftMergeArguments& a, Stream stream) {
    const auto floats = [&](int N) {
        return (int64_t(a.K) + kRows) * (int64_t(chunks_of(N).count) * (a.C + a.P + kPanel) + a.D);
    };
    by_items(a, stream, floats, [&](int64_t begin, int64_t end) {
        with_type(a.dtype, [&](auto type) { soft_merge_typed<decltype(type)>(a, begin, end, stream); });
    });
}

}  // namespace sttm::cpu::STTM_ISA
