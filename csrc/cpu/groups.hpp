// The tokens of each group: sorted by group, in token order within one.
#pragma once

#include "simd.hpp"

namespace sttm::cpu::STTM_ISA {

void csr(const CsrArguments&, Stream);

namespace {

// order (N) and offsets (K + 1) of one item; tokens without a group come last. `next` is scratch for K + 1 numbers.
inline void sort_item(int N, int K, const int32_t* index, int32_t* order, int32_t* offsets, int32_t* next) {
    for (int k = 0; k <= K; ++k) next[k] = 0;
    for (int n = 0; n < N; ++n) ++next[index[n] >= 0 && index[n] < K ? index[n] : K];
    int32_t start = 0;
    for (int k = 0; k <= K; ++k) {
        const int32_t count = next[k];
        next[k] = offsets[k] = start;
        start += count;
    }
    for (int n = 0; n < N; ++n) order[next[index[n] >= 0 && index[n] < K ? index[n] : K]++] = n;
}

// The tokens of group k of an item: order[begin] ... order[end - 1], as many as lie inside. A caller's plan may hold
// anything, so every token of it must pass `is_token`.
struct Members {
    const int32_t* order;
    int begin, end;
};
inline Members members(const int32_t* order, const int32_t* offsets, int N, int K, int64_t b, int k) {
    const int32_t* const at = offsets + b * (int64_t(K) + 1) + k;
    return {order + b * N, max(0, min(at[0], N)), max(0, min(at[1], N))};
}
inline bool is_token(int32_t n, int N) { return n >= 0 && n < N; }

}  // namespace
}  // namespace sttm::cpu::STTM_ISA
