// Arguments that verbs built on similarities share.
#pragma once

#include "sttm/spans.hpp"
#include "validate.hpp"

namespace sttm {

// How q and meta are compared, given B, N and dtype.
template <class Arguments>
void read_similarity(Validate& validate, Arguments& a, const Array& q, const Array& meta, const std::string& similarity,
                     double temperature, bool tf32) {
    a.K = validate.extent(meta, "meta", 3, 1);
    a.D = validate.extent(meta, "meta", 3, 2);
    a.tf32 = tf32;
    a.similarity = similarity_from(similarity);
    a.inverse_temperature = static_cast<float>(1 / temperature);
    a.q = validate.metric(q, "q", a.dtype, a.B, a.N, a.D);
    a.meta = validate.metric(meta, "meta", a.dtype, a.B, a.K, a.D);
}

// Room for the gradients of q, in its shape, and of meta.
template <class Arguments>
void read_metric_gradients(Validate& validate, Arguments& a, const Array& q, const MaybeArray& grad_q,
                           const MaybeArray& grad_meta) {
    if (q.dims() == 4) {
        a.grad_q = validate.dense_features(grad_q, "grad_q", a.dtype, {a.B, a.q.heads, a.N, a.D});
    } else {
        a.grad_q = validate.dense_features(grad_q, "grad_q", a.dtype, {a.B, a.N, a.D});
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
    a.index = validate.dense<int32_t>(index, "index", {a.B, a.N});
    a.score = validate.dense<float>(score, "score", {a.B, a.N});
    a.lse = validate.dense<float>(lse, "lse", {a.B, a.N});
    a.weight = validate.dense<float>(weight, "weight", {a.B, a.N});
}

}  // namespace sttm
