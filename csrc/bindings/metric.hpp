// Arguments that verbs built on similarities share.
#pragma once

#include "sttm/spans.hpp"
#include "validate.hpp"

namespace sttm {

// Where B sequences of K groups each are among N rows; null if there are none, or one, which is an item as it is. What
// a CPU can read is checked.
template <class Arguments>
const PackedSequence* read_sequences(Validate& validate, const Arguments& a, const MaybeArray& sequences) {
    constexpr int64_t kNumbers = sizeof(PackedSequence) / sizeof(int32_t);
    const auto* const found =
        reinterpret_cast<const PackedSequence*>(validate.dense<int32_t>(sequences, "sequences", {a.B, kNumbers}));
    if (found != nullptr && (a.K < 1 || int64_t(a.B) * a.K > INT_MAX))
        throw py::value_error("sequences must have at least 1 and together fewer than 2^31 groups");
#if defined(STTM_CPU) || defined(STTM_HOST)
    for (int s = 0; found != nullptr && s < a.B; ++s) {
        const PackedSequence& it = found[s];
        const bool inside = it.start >= 0 && it.length >= 0 && it.length <= a.N - it.start && it.first_group >= 0 &&
                            it.groups == a.K && it.first_group <= (int64_t(a.B) - 1) * a.K && it.first_group % a.K == 0;
        if (!inside) throw py::value_error("sequence " + std::to_string(s) + " must lie in the tokens and groups");
    }
#endif
    return a.B == 1 ? nullptr : found;
}

// How many items arrays of tokens have.
template <class Arguments>
int items_of(const Arguments& a) {
    return a.sequences == nullptr ? a.B : 1;
}

// How q and meta are compared, given B, N and dtype.
template <class Arguments>
void read_similarity(Validate& validate, Arguments& a, const Array& q, const Array& meta, const MaybeArray& sequences,
                     const std::string& similarity, double temperature, bool tf32) {
    a.K = validate.extent(meta, "meta", 3, 1);
    a.D = validate.extent(meta, "meta", 3, 2);
    a.tf32 = tf32;
    a.similarity = similarity_from(similarity);
    a.inverse_temperature = static_cast<float>(1 / temperature);
    a.sequences = read_sequences(validate, a, sequences);
    a.q = validate.metric(q, "q", a.dtype, items_of(a), a.N, a.D);
    a.meta = validate.metric(meta, "meta", a.dtype, a.B, a.K, a.D);
}

// Room for the gradients of q, in its shape, and of meta.
template <class Arguments>
void read_metric_gradients(Validate& validate, Arguments& a, const Array& q, const MaybeArray& grad_q,
                           const MaybeArray& grad_meta) {
    if (q.dims() == 4) {
        a.grad_q = validate.dense_features(grad_q, "grad_q", a.dtype, {items_of(a), a.q.heads, a.N, a.D});
    } else {
        a.grad_q = validate.dense_features(grad_q, "grad_q", a.dtype, {items_of(a), a.N, a.D});
    }
    a.grad_meta = validate.dense_features(grad_meta, "grad_meta", a.dtype, {a.B, a.K, a.D});
}

// Room for partial sums; null where none is needed.
inline float* read_scratch(Validate& validate, const MaybeArray& scratch, int64_t floats) {
    if (floats > 0 && !scratch) throw py::value_error("scratch is needed, of " + std::to_string(floats) + " floats");
    return floats > 0 ? validate.dense<float>(scratch, "scratch", {floats}) : nullptr;
}

// Index, score, lse and weight of every row of q.
inline void read_assignment(Validate& validate, AssignArguments& a, const MaybeArray& index, const MaybeArray& score,
                            const MaybeArray& lse, const MaybeArray& weight) {
    a.index = validate.dense<int32_t>(index, "index", {items_of(a), a.N});
    a.score = validate.dense<float>(score, "score", {items_of(a), a.N});
    a.lse = validate.dense<float>(lse, "lse", {items_of(a), a.N});
    a.weight = validate.dense<float>(weight, "weight", {items_of(a), a.N});
}

}  // namespace sttm
