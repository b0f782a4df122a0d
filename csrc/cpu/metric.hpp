// What similarity is measured on, in the two forms that a product takes its operands.
#pragma once

#include "simd.hpp"

namespace sttm::cpu::STTM_ISA {
namespace {

constexpr float kNormFloor = 1e-6f;

// Rows of features lie in strips of kPanel columns, all rows of a strip one after another, so that a product that runs
// down the rows reads what is consecutive. The last strip is padded.
inline int64_t columns_of(int64_t D) { return ceil_div(D, kPanel) * kPanel; }
// Where feature d of row i of `count` is.
inline int64_t in_strip(int64_t count, int64_t i, int64_t d) {
    const uint64_t column = static_cast<uint64_t>(d);  // whose quotient is a shift
    return (static_cast<int64_t>(column / kPanel) * count + i) * kPanel + static_cast<int64_t>(column % kPanel);
}

// A block: kRows tokens, feature d of token r at block[d kRows + r].
inline int64_t block_size(int64_t D) { return D * kRows; }

// acc[r][v] += sum over d of a[d kStepD + r kStepR] times vector v of row d of b. The sum runs in the order of d, so it
// depends on its own terms alone.
template <int kR, int kStepD, int kStepR>
STTM_INLINE void product(Floats (&acc)[kRows][kVectors], int64_t depth, const float* a, const float* b,
                         int64_t step_b) {
    for (int64_t d = 0; d < depth; ++d, a += kStepD, b += step_b) {
        Floats row[kVectors];
        STTM_UNROLL
        for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * kWidth);
        STTM_UNROLL
        for (int r = 0; r < kR; ++r) {
            const Floats factor = splat(a[r * kStepR]);
            STTM_UNROLL
            for (int v = 0; v < kVectors; ++v) acc[r][v] += factor * row[v];
        }
    }
}

// The same for at least the first `rows` of acc: the last block of a few costs less than a whole one.
template <int kStepD, int kStepR>
STTM_INLINE void product_of(int64_t rows, Floats (&acc)[kRows][kVectors], int64_t depth, const float* a, const float* b,
                            int64_t step_b) {
    if (rows <= kRows / 3)
        product<kRows / 3, kStepD, kStepR>(acc, depth, a, b, step_b);
    else if (rows <= kRows * 2 / 3)
        product<kRows * 2 / 3, kStepD, kStepR>(acc, depth, a, b, step_b);
    else
        product<kRows, kStepD, kStepR>(acc, depth, a, b, step_b);
}

// A token's features, null for zeros.
template <class T>
inline const T* features_of(const Metric& m, int64_t b, int64_t n) {
    return n < 0 ? nullptr : static_cast<const T*>(m.data) + b * m.stride_b + n * m.stride_n;
}
// Features [d, d + kWidth) or up to D of a token, averaged over heads.
template <class T>
Floats features(const Metric& m, const T* token, int d, int D) {
    if (token == nullptr || d >= D) return Floats{};
    const T* const at = token + d * m.stride_d;
    Floats sum = load_up_to(at, D - d, m.stride_d);
    if (m.heads == 1) return sum;
    for (int h = 1; h < m.heads; ++h) sum += load_up_to(at + h * m.stride_h, D - d, m.stride_d);
    return sum / static_cast<float>(m.heads);
}

// Lanes [0, h) and [2h, 3h), ... of rows i and i + h change places with each other's, for the h that halve kWidth.
template <int h>
STTM_INLINE void transpose(Floats (&rows)[kWidth]) {
    Ints low, high;
    STTM_UNROLL
    for (int j = 0; j < kWidth; ++j) {
        low[j] = (j & h) == 0 ? j : kWidth + j - h;
        high[j] = (j & h) == 0 ? j + h : kWidth + j;
    }
    STTM_UNROLL
    for (int i = 0; i < kWidth; ++i) {
        if (i & h) continue;
        const Floats a = rows[i], b = rows[i + h];
        rows[i] = shuffle(a, b, low);
        rows[i + h] = shuffle(a, b, high);
    }
    if constexpr (h > 1) transpose<h / 2>(rows);
}

// lane i of the result: the elements of values[i] added up, in the order of sum_of.
inline Floats sums_of(Floats (&values)[kWidth]) {
    transpose<kWidth / 2>(values);
    Floats total{};
    STTM_UNROLL
    for (int i = 0; i < kWidth; ++i) total += values[i];
    return total;
}

// kWidth tokens, null for zeros.
template <class T>
struct Tokens {
    const T* at[kWidth];
    bool dense, beside;  // features, or tokens, one after another in memory

    template <class F>
    Tokens(const Metric& m, int64_t b, const F& token) : dense(m.heads == 1 && m.stride_d == 1) {
        beside = m.heads == 1 && m.stride_n == 1 && token(0) >= 0;
        for (int i = 0; i < kWidth; ++i) {
            at[i] = features_of<T>(m, b, token(i));
            beside = beside && at[i] == at[0] + i;
        }
    }

    // Features [d, d + kWidth) or up to D of each.
    STTM_INLINE void load_features(const Metric& m, int d, int D, Floats (&part)[kWidth]) const {
        if (d + kWidth <= D && dense) {
            STTM_UNROLL
            for (int i = 0; i < kWidth; ++i) part[i] = at[i] == nullptr ? Floats{} : load(at[i] + d);
        } else if (d + kWidth <= D && beside) {
            STTM_UNROLL
            for (int i = 0; i < kWidth; ++i) part[i] = load(at[0] + (d + i) * m.stride_d);
            transpose<kWidth / 2>(part);
        } else {
            for (int i = 0; i < kWidth; ++i) part[i] = features(m, at[i], d, D);
        }
    }
};

// A panel: kPanel tokens, one to a lane, feature d of them at panel[d kPanel]. `token(lane)` is the token in a lane, -1
// for zeros. Unless `rows` is null, the same goes there, as rows of `count`, zeros behind D.
template <class T, class F>
void pack_panel(const Metric& m, int64_t b, int D, float* panel, const F& token, float* rows = nullptr,
                int64_t count = 0) {
    const int64_t columns = columns_of(D);
    for (int v = 0; v < kVectors; ++v) {
        const Tokens<T> tokens(m, b, [&](int i) { return token(v * kWidth + i); });
        for (int d = 0; d < (rows == nullptr ? D : columns); d += kWidth) {
            Floats part[kWidth];
            tokens.load_features(m, d, D, part);
            if (rows != nullptr) {
                STTM_UNROLL
                for (int i = 0; i < kWidth; ++i) store(rows + in_strip(count, v * kWidth + i, d), part[i]);
            }
            transpose<kWidth / 2>(part);
            float* const to = panel + int64_t(d) * kPanel + v * kWidth;
            if (d + kWidth <= D) {
                STTM_UNROLL
                for (int i = 0; i < kWidth; ++i) store(to + i * kPanel, part[i]);
            } else {
                STTM_UNROLL
                for (int i = 0; i < kWidth; ++i)
                    if (d + i < D) store(to + i * kPanel, part[i]);
            }
        }
    }
}

// |q|^2 of the tokens of a panel.
inline void squares(const float* panel, int D, Floats (&square)[kVectors]) {
    for (int v = 0; v < kVectors; ++v) square[v] = Floats{};
    for (int d = 0; d < D; ++d)
        for (int v = 0; v < kVectors; ++v) {
            const Floats x = load(panel + int64_t(d) * kPanel + v * kWidth);
            square[v] += x * x;
        }
}
// 1 / max(|q|, floor) of |q|^2.
inline Floats inverse_norm(Floats square) {
    for (int i = 0; i < kWidth; ++i) square[i] = __builtin_sqrtf(square[i]);
    return 1.0f / (square < kNormFloor ? splat(kNormFloor) : square);
}

// kRows rows of `count`, as a block of D features.
inline void block_of_rows(const float* rows, int64_t count, int64_t D, float* block) {
    for (int64_t d = 0; d < D; d += kWidth) STTM_UNROLL
    for (int r = 0; r < kRows; r += kWidth) {
        constexpr int kLast = kRows % kWidth == 0 ? kWidth : kRows % kWidth;
        const int lanes = r + kWidth <= kRows ? kWidth : kLast;
        Floats part[kWidth];
        STTM_UNROLL
        for (int i = 0; i < kWidth; ++i) part[i] = i < lanes ? load(rows + in_strip(count, r + i, d)) : Floats{};
        transpose<kWidth / 2>(part);
        STTM_UNROLL
        for (int i = 0; i < kWidth; ++i)
            if (d + i < D) __builtin_memcpy(block + (d + i) * kRows + r, &part[i], sizeof(float) * lanes);
    }
}

// A block of tokens, of unit length if `unit`; zeros for tokens of -1. The same as rows of `count`, zeros behind D.
// Writes 1 / max(|q|, floor) to inverse and |q|^2 to square, unless they are null.
template <class T, class F>
void pack_block(const Metric& m, int64_t b, int D, bool unit, float* block, float* rows, int64_t count, const F& token,
                float* inverse = nullptr, float* square = nullptr) {
    for (int r = 0; r < kRows; ++r) {
        const T* const from = features_of<T>(m, b, token(r));
        const bool dense = from != nullptr && m.heads == 1 && m.stride_d == 1;
        Floats sum{};
        for (int d = 0; d < columns_of(D); d += kWidth) {
            const Floats x = dense && d + kWidth <= D ? load(from + d) : features(m, from, d, D);
            sum += x * x;
            store(rows + in_strip(count, r, d), x);
        }
        const float total = sum_of(sum), norm = __builtin_sqrtf(total);
        const float scale = 1 / (norm < kNormFloor ? kNormFloor : norm);
        if (inverse != nullptr) inverse[r] = scale;
        if (square != nullptr) square[r] = total;
        for (int d = 0; d < D && unit; d += kWidth) {
            float* const at = rows + in_strip(count, r, d);
            store(at, load(at) * scale);
        }
    }
    block_of_rows(rows, count, D, block);
}

}  // namespace
}  // namespace sttm::cpu::STTM_ISA
