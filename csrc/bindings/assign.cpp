#include "metric.hpp"

namespace sttm {

static void assign_arrays(const Array& q, const Array& meta, const MaybeArray& mask, const MaybeArray& sequences,
                          int left_out, const std::string& similarity, double temperature, bool tf32,
                          const MaybeArray& index, const MaybeArray& score, const MaybeArray& lse,
                          const MaybeArray& weight, uint64_t stream) {
    Validate validate("assign");
    AssignArguments a{};
    a.B = validate.extent(meta, "meta", 3, 0);
    a.N = validate.metric_extent(q, "q", 0);
    a.dtype = validate.dtype(q, "q");
    read_similarity(validate, a, q, meta, sequences, similarity, temperature, tf32);
    a.mask = validate.mask(mask, items_of(a), a.N);
    read_assignment(validate, a, index, score, lse, weight);
    if (weight && !lse) throw py::value_error("weight needs lse");
    if (left_out > 0 && (a.sequences == nullptr || a.index == nullptr))
        throw py::value_error("left_out needs sequences and index");
    a.left_out = left_out;
    validate.run(assign, a, stream);
}

static void assign_earlier_arrays(const Array& q, const std::string& similarity, double temperature, bool tf32,
                                  const Array& score, uint64_t stream) {
    Validate validate("assign_earlier");
    AssignArguments a{};
    a.B = validate.extent(q, "q", 3, 0);
    a.N = validate.extent(q, "q", 3, 1);
    a.dtype = validate.dtype(q, "q");
    a.earlier = true;
    read_similarity(validate, a, q, q, std::nullopt, similarity, temperature, tf32);
    a.score = validate.dense<float>(score, "score", {a.B, a.N});
    validate.run(assign, a, stream);
}

// How many floats of scratch the gradient of lse with respect to meta takes.
static int64_t assign_scratch(const Array& q, const Array& meta) {
    Validate validate("assign_scratch");
    const int B = validate.extent(meta, "meta", 3, 0), K = validate.extent(meta, "meta", 3, 1);
    const bool packed = q.size(0) != B;
    return partial_floats(packed, validate.dtype(q, "q"), B, K, validate.metric_extent(q, "q", 0),
                          validate.extent(meta, "meta", 3, 2), 1);
}

static void assign_backward_arrays(const MaybeArray& grad_score, const MaybeArray& grad_lse,
                                   const MaybeArray& grad_weight, const Array& q, const Array& meta,
                                   const Array& index, const Array& score, const MaybeArray& lse,
                                   const MaybeArray& weight, const MaybeArray& grad_merged, const MaybeArray& size,
                                   const MaybeArray& mass, const MaybeArray& sequences, const std::string& similarity,
                                   double temperature, bool tf32, const MaybeArray& grad_q,
                                   const MaybeArray& grad_meta, const MaybeArray& scratch, uint64_t stream) {
    Validate validate("assign_backward");
    AssignBackwardArguments a{};
    a.B = validate.extent(meta, "meta", 3, 0);
    a.N = validate.metric_extent(q, "q", 0);
    a.dtype = validate.dtype(q, "q");
    read_similarity(validate, a, q, meta, sequences, similarity, temperature, tf32);
    const int items = items_of(a);
    a.index = validate.dense<int32_t>(index, "index", {items, a.N});
    a.score = validate.dense<float>(score, "score", {items, a.N});
    a.lse = validate.dense<float>(lse, "lse", {items, a.N});
    a.weight = validate.dense<float>(weight, "weight", {items, a.N});
    a.grad_score = validate.column(grad_score, "grad_score", items, a.N);
    a.grad_lse = validate.column(grad_lse, "grad_lse", items, a.N);
    a.grad_weight = validate.column(grad_weight, "grad_weight", items, a.N);
    if (is_soft(a) && !lse) throw py::value_error("grad_lse and grad_weight need lse");
    const int sets = a.sequences == nullptr ? a.B : 1, groups = a.sequences == nullptr ? a.K : a.B * a.K;
    a.grad_merged = validate.dense_features(grad_merged, "grad_merged", a.dtype, {sets, groups, a.D});
    a.size = validate.dense<float>(size, "size", {items, a.N});
    a.mass = validate.dense<float>(mass, "mass", {sets, groups});
    if (grad_merged && !mass) throw py::value_error("grad_merged needs mass");
    read_metric_gradients(validate, a, q, grad_q, grad_meta);
    if (is_soft(a) && grad_meta)
        a.scratch = read_scratch(validate, scratch,
                                 partial_floats(a.sequences != nullptr, a.dtype, a.B, a.K, a.N, a.D, 1));
    validate.run(assign_backward, a, stream);
}

void bind_assign(py::module_& m) {
    m.def("assign", &assign_arrays, py::arg("q"), py::arg("meta"), py::arg("mask"), py::arg("sequences"),
          py::arg("left_out"), py::arg("similarity"), py::arg("temperature"), py::arg("tf32"), py::arg("index"),
          py::arg("score"), py::arg("lse"), py::arg("weight"), py::arg("stream"),
          "index, score, lse, weight (B, N), each or None: the most similar row of meta (B, K, D) to each row of q; "
          "(1, N) "
          "with sequences int32 (B, 6)");
    m.def("assign_earlier", &assign_earlier_arrays, py::arg("q"), py::arg("similarity"), py::arg("temperature"),
          py::arg("tf32"), py::arg("score"), py::arg("stream"),
          "score (B, N): the similarity of each row of q (B, N, D) to the most similar one before it");
    m.def("assign_scratch", &assign_scratch, py::arg("q"), py::arg("meta"),
          "floats of scratch that the gradient of lse with respect to meta takes");
    m.def("assign_backward", &assign_backward_arrays, py::arg("grad_score"), py::arg("grad_lse"),
          py::arg("grad_weight"), py::arg("q"), py::arg("meta"), py::arg("index"), py::arg("score"), py::arg("lse"),
          py::arg("weight"), py::arg("grad_merged"), py::arg("size"), py::arg("mass"), py::arg("sequences"),
          py::arg("similarity"), py::arg("temperature"), py::arg("tf32"), py::arg("grad_q"), py::arg("grad_meta"),
          py::arg("scratch"), py::arg("stream"),
          "Gradients of score, lse and weight with respect to q and meta, each or None; with grad_merged that of q "
          "merged along index is added");
}

}  // namespace sttm
