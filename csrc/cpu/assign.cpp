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

template <bool kSoft>
inline void look(const Floats (&S)[kRows][kVectors], int first, int K, Found& found) {
    STTM_UNROLL
    for (int v = 0; v < kVectors; ++v) {
        const Floats before = found.best[v];
        STTM_UNROLL
        for (int r = 0; r < kRows; ++r) {
            if (first + r >= K) break;
            const Ints better = S[r][v] > found.best[v];
            found.best[v] = better ? S[r][v] : found.best[v];
            found.index[v] = better ? splat(first + r) : found.index[v];
        }
        if (!kSoft) continue;
        found.sum[v] *= exp(before - found.best[v]);
        STTM_UNROLL
        for (int r = 0; r < kRows; ++r) {
            if (first + r >= K) break;
            found.sum[v] += exp(S[r][v] - found.best[v]);
        }
    }
}

template <class T, bool kSoft>
void assign_panel(const AssignArguments& a, const Meta& meta, int64_t b, int start, Panel& panel) {
    load_panel<T>(a, b, start, [&](int64_t n) { return is_real(a.mask, b, n); }, panel);
    Found found;
    for (int v = 0; v < kVectors; ++v) {
        found.best[v] = splat(-kInfinity);
        found.sum[v] = Floats{};
        found.index[v] = Ints{};
    }
    for (int block = 0; block < meta.num_blocks; ++block) {
        Floats S[kRows][kVectors];
        similarities(a, meta, b, block, panel, S);
        look<kSoft>(S, block * kRows, a.K, found);
    }
    for (int v = 0; v < kVectors; ++v) {
        const Floats lse = kSoft ? found.best[v] + log(found.sum[v]) : Floats{};
        const Floats weight = kSoft ? exp(found.best[v] - lse) : Floats{};
        for (int i = 0; i < kWidth && start + v * kWidth + i < a.N; ++i) {
            const int64_t n = start + v * kWidth + i, at = b * a.N + n;
            const bool real = is_real(a.mask, b, n);
            if (a.index != nullptr) a.index[at] = real ? found.index[v][i] : -1;
            if (a.score != nullptr) a.score[at] = real ? found.best[v][i] : 0;
            if (kSoft) a.lse[at] = real ? lse[i] : 0;
            if (kSoft && a.weight != nullptr) a.weight[at] = real ? weight[i] : 0;
        }
    }
}

}  // namespace

void assign(const AssignArguments& a, Stream stream) {
    if (a.B == 0) return;  // one set of meta tokens may be given to no item
    with_type(a.dtype, [&](auto type) {
        using T = decltype(type);
        const Meta meta = pack_meta<T>(a, stream);
        const int64_t panels = ceil_div(a.N, kPanel), panel_size = int64_t(a.D) * kPanel;
        const int threads = threads_for(stream, int64_t(a.B) * a.N * (a.K + kRows) * a.D / 8);
        float* const packed = take<float>(threads * panel_size);
        parallel_for(a.B * panels, threads, [&](int64_t task, int slot) {
            Panel panel;
            panel.q = packed + slot * panel_size;
            const int start = static_cast<int>(task % panels) * kPanel;
            if (a.lse != nullptr)
                assign_panel<T, true>(a, meta, task / panels, start, panel);
            else
                assign_panel<T, false>(a, meta, task / panels, start, panel);
        });
    });
}

void assign_merge(const AssignMergeArguments& both, Stream stream) {
    STTM_ISA::assign(both.assign, stream);
    MergeArguments m = both.merge;
    m.order = take<int32_t>(int64_t(m.B) * m.N);
    m.offsets = take<int32_t>(int64_t(m.B) * (int64_t(m.K) + 1));
    STTM_ISA::csr({m.B, m.N, m.K, m.index, m.order, m.offsets, nullptr}, stream);
    STTM_ISA::merge(m, stream);
}

}  // namespace sttm::cpu::STTM_ISA
