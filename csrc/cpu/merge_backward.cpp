// Gradients of a merge: every token gathers from its group.
#include "groups.hpp"

namespace sttm::cpu::STTM_ISA {

namespace {

constexpr int64_t kElements = 16 << 10;  // of x that a task looks at

inline float size_at(const MergeBackwardArguments& a, int64_t i) { return a.size == nullptr ? 1.0f : a.size[i]; }
inline float weight_at(const MergeBackwardArguments& a, int64_t i) {
    return a.weight == nullptr ? size_at(a, i) : size_at(a, i) * a.weight[i];
}

// Token i of all tokens, its group of all groups (-1 if it has none), and its share of that group, 0 in an empty one.
struct Token {
    int64_t i, b, n, group;
    float mass, w, share;
};
Token token_at(const MergeBackwardArguments& a, int64_t i) {
    Token t{i, i / a.N, i % a.N, -1, 0, 0, 0};
    const int32_t k = a.index[i];
    if (k < 0 || k >= a.K) return t;
    t.group = t.b * a.K + k;
    t.mass = a.mass[t.group];
    t.w = weight_at(a, i);
    t.share = t.mass == 0 ? 0 : t.w / t.mass;
    return t;
}

template <class F>
void each_token(const MergeBackwardArguments& a, Stream stream, int64_t elements, const F& run) {
    const int64_t tokens = int64_t(a.B) * a.N, step = max<int64_t>(1, kElements / max<int64_t>(elements, 1));
    parallel_for(ceil_div(tokens, step), threads_for(stream, tokens * elements * 4), [&](int64_t task, int) {
        for (int64_t i = task * step; i < min(tokens, (task + 1) * step); ++i) run(token_at(a, i));
        fence();
    });
}

// factor g_k to grad_x, unless that is null; returns <g_k, x_n> if kDot.
template <class T, bool kDot>
float gather_row(const MergeBackwardArguments& a, const Token& t, float factor, T* grad_x, bool streamed) {
    const T* const g =
        static_cast<const T*>(a.grad_y.data) + t.b * a.grad_y.stride_b + (t.group - t.b * a.K) * a.grad_y.stride_n;
    const T* const x = static_cast<const T*>(a.x.data) + t.b * a.x.stride_b + t.n * a.x.stride_n;
    Floats dot{};
    for (int c = 0; c < a.C; c += kWidth) {
        const Floats here = load_up_to(g + c * a.grad_y.stride_c, a.C - c, a.grad_y.stride_c);
        if (grad_x != nullptr && streamed)
            stream(grad_x + c, here * factor);
        else if (grad_x != nullptr)
            store_up_to(grad_x + c, here * factor, a.C - c);
        if (kDot) dot += here * load_up_to(x + c * a.x.stride_c, a.C - c, a.x.stride_c);
    }
    return kDot ? sum_of(dot) : 0;
}

// By mean or sum: to grad_x, and <g_k, x_n> to dot unless that is null.
template <class T>
void gather(const MergeBackwardArguments& a, Stream stream, float* dot) {
    const bool streamed = is_streamed(static_cast<const T*>(a.grad_x), int64_t(a.B) * a.N, a.C);
    each_token(a, stream, a.C, [&](const Token& t) {
        T* const grad_x = a.grad_x == nullptr ? nullptr : static_cast<T*>(a.grad_x) + t.i * a.C;
        const float factor = a.reduce == Reduce::mean ? t.share : t.w;
        if (t.mass == 0) {
            if (grad_x != nullptr) __builtin_memset(grad_x, 0, sizeof(T) * a.C);
            if (dot != nullptr) dot[t.i] = 0;
        } else if (dot != nullptr) {
            dot[t.i] = gather_row<T, true>(a, t, factor, grad_x, streamed);
        } else {
            gather_row<T, false>(a, t, factor, grad_x, streamed);
        }
    });
}

// By max or first: g_k to the lowest of the tokens that y_k was taken from.
template <class T>
void scatter_to_winners(const MergeBackwardArguments& a, Stream stream) {
    T* const grad_x = static_cast<T*>(a.grad_x);
    __builtin_memset(grad_x, 0, sizeof(T) * a.B * a.N * a.C);
    if (a.grad_y.data == nullptr) return;
    const int64_t groups = int64_t(a.B) * a.K, step = max<int64_t>(1, kElements / max(a.C, 1));
    const int threads = threads_for(stream, int64_t(a.B) * a.N * a.C * sizeof(T));
    parallel_for(ceil_div(groups, step), threads, [&](int64_t task, int) {
        for (int64_t group = task * step; group < min(groups, (task + 1) * step); ++group) {
            if (a.mass[group] == 0) continue;
            const int64_t b = group / a.K;
            const int k = static_cast<int>(group % a.K);
            const Members m = members(a.order, a.offsets, a.N, a.K, b, k);
            const T* const x = static_cast<const T*>(a.x.data) + b * a.x.stride_b;
            const T* const g = static_cast<const T*>(a.grad_y.data) + b * a.grad_y.stride_b + k * a.grad_y.stride_n;
            const T* const y = static_cast<const T*>(a.y) + group * a.C;
            for (int c = 0; c < a.C; ++c) {
                const float best = to_float(y[c]);
                for (int i = m.begin; i < m.end; ++i) {
                    const int32_t n = m.order[i];
                    if (!is_token(n, a.N)) continue;
                    const float value = to_float(x[n * a.x.stride_n + c * a.x.stride_c]);
                    if (a.reduce == Reduce::max && value != best && (value == value || best == best)) continue;
                    grad_x[(b * a.N + n) * a.C + c] = g[c * a.grad_y.stride_c];
                    break;
                }
            }
        }
    });
}

// Gradients of sizes and weights. With a_n = <g_k, x_n> of a mean, and <gradient of p_k, p_n>, that of w_n is
// (a_n - sum of share_m a_m over its group) / mass_k: y, which is rounded, is not looked at.
void of_weights(const MergeBackwardArguments& a, Stream stream, const float* dot) {
    const bool is_mean = a.reduce == Reduce::mean, by_positions = a.grad_positions != nullptr && a.positions != nullptr;
    const bool centred = (is_mean && dot != nullptr) || by_positions;
    float *const worth = take<float>(int64_t(a.B) * a.N), *const mean = take<float>(int64_t(a.B) * a.K);
    if (centred) {
        each_token(a, stream, a.P + 1, [&](const Token& t) {
            float found = is_mean && dot != nullptr ? dot[t.i] : 0;
            if (by_positions && t.group >= 0) {
                const float* const g = a.grad_positions + t.b * a.stride_qb + (t.group - t.b * a.K) * a.P;
                const float* const p = a.positions + t.b * a.stride_pb + t.n * a.P;
                for (int i = 0; i < a.P; ++i) found += g[i] * p[i];
            }
            worth[t.i] = found;
        });
        for (int64_t group = 0; group < int64_t(a.B) * a.K; ++group) {
            const int64_t b = group / a.K;
            const Members m = members(a.order, a.offsets, a.N, a.K, b, static_cast<int>(group % a.K));
            float total = 0;
            for (int i = m.begin; i < m.end; ++i)
                if (is_token(m.order[i], a.N) && a.mass[group] != 0)
                    total += weight_at(a, b * a.N + m.order[i]) / a.mass[group] * worth[b * a.N + m.order[i]];
            mean[group] = total;
        }
    }
    each_token(a, stream, 1, [&](const Token& t) {
        float found = centred && t.mass != 0 ? (worth[t.i] - mean[t.group]) / t.mass : 0;
        if (a.reduce == Reduce::sum && dot != nullptr && t.mass != 0) found += dot[t.i];
        const bool real = t.group >= 0;
        if (a.grad_weight != nullptr) a.grad_weight[t.i] = real ? found * size_at(a, t.i) : 0;
        if (a.grad_size_in != nullptr) {
            const float of_size = a.grad_size == nullptr || !real ? 0 : a.grad_size[t.group];
            a.grad_size_in[t.i] = real ? (a.weight == nullptr ? found : found * a.weight[t.i]) + of_size : 0;
        }
    });
}

void of_positions(const MergeBackwardArguments& a, Stream stream) {
    each_token(a, stream, a.P, [&](const Token& t) {
        float* const to = a.grad_positions_in + t.i * a.P;
        const bool given = a.grad_positions != nullptr && t.mass != 0;
        const float* const g = a.grad_positions + t.b * a.stride_qb + (t.group - t.b * a.K) * a.P;
        for (int p = 0; p < a.P; ++p) to[p] = given ? t.share * g[p] : 0;
    });
}

}  // namespace

void merge_backward(const MergeBackwardArguments& a, Stream stream) {
    if (a.other != nullptr) STTM_ISA::csr({a.B, a.N, a.K, a.index, a.order, a.offsets, a.other}, stream);
    const bool linear = a.reduce == Reduce::mean || a.reduce == Reduce::sum;
    const bool weights = a.grad_weight != nullptr || a.grad_size_in != nullptr;
    float* const dot = weights && linear && a.grad_y.data != nullptr ? take<float>(int64_t(a.B) * a.N) : nullptr;
    if (a.grad_x != nullptr || dot != nullptr) {
        with_type(a.dtype, [&](auto type) {
            using T = decltype(type);
            if (a.grad_x != nullptr) expect_large(a.grad_x, sizeof(T) * a.B * a.N * a.C);
            if (linear && a.grad_y.data != nullptr)
                gather<T>(a, stream, dot);
            else if (linear)
                __builtin_memset(a.grad_x, 0, sizeof(T) * a.B * a.N * a.C);
            else if (a.grad_x != nullptr)
                scatter_to_winners<T>(a, stream);
        });
    }
    if (weights) of_weights(a, stream, dot);
    if (a.grad_positions_in != nullptr) of_positions(a, stream);
}

}  // namespace sttm::cpu::STTM_ISA
