// Every token finds its most similar meta token; similarities stay in registers.
#include "groups.hpp"
#include "similarity.hpp"

namespace sttm::cpu::STTM_ISA {

void merge(const MergeArguments&, Stream);

namespace {

// Of the tokens in the lanes of a panel: the greatest similarity, whose it is, and the sum of exp(S - greatest).
struct Found {
    Floats best[kVectors], sum[kVectors];
    Ints index[kVectors];
};

enum class Wants { choice, softmax, earlier };

// With Wants::earlier, tokens from `token` on look at meta tokens before them alone.
template <Wants kWants>
inline void look(const Floats (&S)[kRows][kVectors], int first, int K, int token, Found& found) {
    STTM_UNROLL
    for (int v = 0; v < kVectors; ++v) {
        const Floats before = found.best[v];
        STTM_UNROLL
        for (int r = 0; r < kRows; ++r) {
            if (first + r >= K) break;
            Ints better = S[r][v] > found.best[v];
            if (kWants == Wants::earlier) better &= splat(first + r - token - v * kWidth) < counted();
            found.best[v] = better ? S[r][v] : found.best[v];
            found.index[v] = better ? splat(first + r) : found.index[v];
        }
        if (kWants != Wants::softmax) continue;
        found.sum[v] *= exp(before - found.best[v]);
        STTM_UNROLL
        for (int r = 0; r < kRows; ++r) {
            if (first + r >= K) break;
            found.sum[v] += exp(S[r][v] - found.best[v]);
        }
    }
}

// The arguments of an item alone.
AssignArguments alone(AssignArguments a, const Item& item) {
    const int64_t row = item.b * a.N + item.start;
    advance(a.q.data, a.dtype, item.b * a.q.stride_b + item.start * a.q.stride_n);
    advance(a.mask.data, item.b * a.mask.stride_b + item.start * a.mask.stride_n);
    advance(a.index, row);
    advance(a.score, row);
    advance(a.lse, row);
    advance(a.weight, row);
    a.N = item.N;
    return a;
}

template <class T, Wants kWants>
void assign_panel(const AssignArguments& a, const Meta& meta, int32_t first_group, int start, Panel& panel) {
    constexpr bool kSoft = kWants == Wants::softmax;
    const int K = kWants == Wants::earlier ? min(a.K, start + kPanel) : a.K;
    load_panel<T>(a, start, [&](int64_t n) { return is_real(a.mask, n); }, panel);
    Found found;
    for (int v = 0; v < kVectors; ++v) {
        found.best[v] = splat(-kInfinity);
        found.sum[v] = Floats{};
        found.index[v] = Ints{};
    }
    for (int block = 0; block * kRows < K; ++block) {
        Floats S[kRows][kVectors];
        similarities(a, meta, block, panel, S);
        look<kWants>(S, block * kRows, K, start, found);
    }
    for (int v = 0; v < kVectors; ++v) {
        const Floats lse = kSoft ? found.best[v] + log(found.sum[v]) : Floats{};
        const Floats weight = kSoft ? exp(found.best[v] - lse) : Floats{};
        for (int i = 0; i < kWidth && start + v * kWidth + i < a.N; ++i) {
            const int64_t n = start + v * kWidth + i;
            const bool real = is_real(a.mask, n);
            if (a.index != nullptr) a.index[n] = real ? first_group + found.index[v][i] : -1;
            if (a.score != nullptr) a.score[n] = real ? found.best[v][i] : 0;
            if (kSoft) a.lse[n] = real ? lse[i] : 0;
            if (kSoft && a.weight != nullptr) a.weight[n] = real ? weight[i] : 0;
        }
    }
}

}  // namespace

void assign(const AssignArguments& a, Stream stream) {
    if (a.B == 0) return;  // one set of meta tokens may be given to no item
    with_type(a.dtype, [&](auto type) {
        using T = decltype(type);
        const Meta meta = pack_meta<T>(a, stream, 0, a.B);
        const Tasks panels = tasks_of(a, 0, a.B, [](int N) { return ceil_div(N, kPanel); });
        const int64_t panel_size = int64_t(a.D) * kPanel;
        const int threads = threads_for(stream, tokens_of(a) * (a.K + kRows) * a.D / 8);
        float* const packed = take<float>(threads * panel_size);
        parallel_for(panels.count(), threads, [&](int64_t task, int slot) {
            const int64_t i = panels.whose(task);
            const Item item = item_of(a, i);
            const AssignArguments own = alone(a, item);
            Panel panel;
            panel.q = packed + slot * panel_size;
            const int start = static_cast<int>(task - panels.first_of(i)) * kPanel;
            if (a.earlier)
                assign_panel<T, Wants::earlier>(own, meta.of(i), item.first_group, start, panel);
            else if (a.lse != nullptr)
                assign_panel<T, Wants::softmax>(own, meta.of(i), item.first_group, start, panel);
            else
                assign_panel<T, Wants::choice>(own, meta.of(i), item.first_group, start, panel);
        });
    });
}

void assign_merge(const AssignMergeArguments& both, Stream stream) {
    STTM_ISA::assign(both.assign, stream);
    MergeArguments m = both.merge;
    if (m.order == nullptr) {
        m.order = take<int32_t>(int64_t(m.B) * m.N);
        m.offsets = take<int32_t>(int64_t(m.B) * (int64_t(m.K) + 1));
    }
    STTM_ISA::csr({m.B, m.N, m.K, m.index, m.order, m.offsets, nullptr}, stream);
    STTM_ISA::merge(m, stream);
}

}  // namespace sttm::cpu::STTM_ISA
