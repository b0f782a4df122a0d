// What both ways of the soft merge share.
#pragma once

#include "similarity.hpp"

namespace sttm::cpu::STTM_ISA {
namespace {

// Makes the inputs those of an item alone.
inline void inputs_of(SoftMergeInputs& a, const Item& item) {
    const auto at = [&](const auto& rows) { return item.b * rows.stride_b + item.start * rows.stride_n; };
    advance(a.x.data, a.dtype, at(a.x));
    advance(a.q.data, a.dtype, at(a.q));
    advance(a.size.data, at(a.size));
    advance(a.mask.data, at(a.mask));
    advance(a.positions.data, DType::float32, at(a.positions));
    a.N = item.N;
}

// 1 or the size of the tokens of a panel, 0 for those that are not real.
inline void load_sizes(const SoftMergeInputs& a, int start, float* real, float* size) {
    for (int i = 0; i < kPanel; ++i) {
        const int64_t n = start + i;
        real[i] = n < a.N && is_real(a.mask, n);
        size[i] = real[i] == 0 ? 0 : a.size.data == nullptr ? 1 : a.size.data[n * a.size.stride_n];
    }
}

// S (K, kPanel) of a panel.
inline void load_similarities(const SoftMergeInputs& a, const Meta& meta, const Panel& panel, float* tile) {
    for (int block = 0; block < meta.num_blocks; ++block) {
        Floats S[kRows][kVectors];
        similarities(a, meta, block, panel, S);
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < kVectors; ++v)
                store(tile + (int64_t(block) * kRows + r) * kPanel + v * kWidth, S[r][v]);
    }
}

// S becomes A, 0 for tokens that are not real. lse is of the lanes if over_meta, else of the meta tokens.
inline void attend(const SoftMergeInputs& a, const float* lse, const float* real, int64_t rows, float* tile) {
    for (int64_t k = 0; k < rows; ++k)
        for (int v = 0; v < kVectors; ++v) {
            float* const at = tile + k * kPanel + v * kWidth;
            const Floats shift = a.over_meta ? load(lse + v * kWidth) : splat(k < a.K ? lse[k] : 0.0f);
            const Floats A = exp(load(at) - shift);
            store(at, load(real + v * kWidth) == 0.0f ? Floats{} : A);
        }
}

}  // namespace
}  // namespace sttm::cpu::STTM_ISA
