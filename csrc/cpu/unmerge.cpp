// Rows copied along an index, and two indices made one.
#include "simd.hpp"

namespace sttm::cpu::STTM_ISA {

namespace {

constexpr int64_t kBytes = 64 << 10;  // that a task moves

template <class T>
void unmerge_typed(const UnmergeArguments& a, Stream stream) {
    const int64_t rows = int64_t(a.B) * a.N, row_bytes = int64_t(a.C) * sizeof(T);
    const int64_t step = max<int64_t>(1, kBytes / max<int64_t>(row_bytes, 1));
    const T* const x = static_cast<const T*>(a.x.data);
    T* const y = static_cast<T*>(a.y);
    const bool streamed = is_streamed(y, rows, a.C);
    expect_large(y, rows * row_bytes);
    parallel_for(ceil_div(rows, step), threads_for(stream, rows * row_bytes), [&](int64_t task, int) {
        for (int64_t i = task * step; i < min(rows, (task + 1) * step); ++i) {
            const int32_t k = a.index[i];
            if (k >= 0 && k < a.K)
                copy_row(x + i / a.N * a.x.stride_b + k * a.x.stride_n, a.x.stride_c, y + i * a.C, a.C, streamed);
            else
                __builtin_memset(y + i * a.C, 0, row_bytes);
        }
        fence();
    });
}

}  // namespace

void unmerge(const UnmergeArguments& a, Stream stream) {
    with_type(a.dtype, [&](auto type) { unmerge_typed<decltype(type)>(a, stream); });
}

void compose(const ComposeArguments& a, Stream) {
    for (int64_t i = 0; i < int64_t(a.B) * a.N; ++i) {
        const int32_t k = a.index1[i];
        const int32_t found = k >= 0 && k < a.K ? a.index2[i / a.N * a.K + k] : -1;
        a.out[i] = found >= 0 && found < a.num_groups ? found : -1;
    }
}

}  // namespace sttm::cpu::STTM_ISA
