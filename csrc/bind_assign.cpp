#include "bind_metric.hpp"

namespace sttm {

static void assign_arrays(const Array& q, const Array& meta, const MaybeArray& mask, const std::string& similarity,
                          double temperature, bool tf32, const MaybeArray& index, const MaybeArray& score,
                          const MaybeArray& lse, const MaybeArray& weight, uint64_t stream) {
    Checks checks("assign");
    AssignArguments a{};
    a.B = checks.extent(meta, "meta", 3, 0);
    a.K = checks.extent(meta, "meta", 3, 1);
    a.D = checks.extent(meta, "meta", 3, 2);
    a.N = metric_extent(checks, q, "q", 0);
    a.dtype = checks.dtype(q, "q");
    a.tf32 = tf32;
    a.similarity = similarity_from(similarity);
    a.inverse_temperature = static_cast<float>(1 / temperature);
    a.q = metric_of(checks, q, "q", a.dtype, a.B, a.N, a.D);
    a.meta = metric_of(checks, meta, "meta", a.dtype, a.B, a.K, a.D);
    a.mask = mask_of(checks, mask, a.B, a.N);
    a.index = checks.dense<int32_t>(index, "index", {a.B, a.N});
    a.score = checks.dense<float>(score, "score", {a.B, a.N});
    a.lse = checks.dense<float>(lse, "lse", {a.B, a.N});
    a.weight = checks.dense<float>(weight, "weight", {a.B, a.N});
    if (a.weight != nullptr && a.lse == nullptr) throw py::value_error("weight needs lse");
    checks.run(stream, [&](cudaStream_t s) { return assign(a, s); });
}

static void assign_backward_arrays(const Array& grad_score, const MaybeArray& grad_lse, const Array& q,
                                   const Array& meta, const Array& index, const Array& score, const MaybeArray& lse,
                                   const std::string& similarity, double temperature, bool tf32,
                                   const MaybeArray& grad_q, const MaybeArray& grad_meta, uint64_t stream) {
    Checks checks("assign_backward");
    AssignBackwardArguments a{};
    a.B = checks.extent(meta, "meta", 3, 0);
    a.K = checks.extent(meta, "meta", 3, 1);
    a.D = checks.extent(meta, "meta", 3, 2);
    a.N = metric_extent(checks, q, "q", 0);
    a.dtype = checks.dtype(q, "q");
    a.tf32 = tf32;
    a.similarity = similarity_from(similarity);
    a.inverse_temperature = static_cast<float>(1 / temperature);
    a.q = metric_of(checks, q, "q", a.dtype, a.B, a.N, a.D);
    a.meta = metric_of(checks, meta, "meta", a.dtype, a.B, a.K, a.D);
    a.index = checks.dense<int32_t>(index, "index", {a.B, a.N});
    a.score = checks.dense<float>(score, "score", {a.B, a.N});
    a.lse = checks.dense<float>(lse, "lse", {a.B, a.N});
    a.grad_score = column_of(checks, grad_score, "grad_score", a.B, a.N);
    a.grad_lse = column_of(checks, grad_lse, "grad_lse", a.B, a.N);
    if (grad_lse && a.lse == nullptr) throw py::value_error("grad_lse needs lse");
    if (q.dims() == 4) {
        a.grad_q = checks.dense_features(grad_q, "grad_q", a.dtype, {a.B, a.q.heads, a.N, a.D});
    } else {
        a.grad_q = checks.dense_features(grad_q, "grad_q", a.dtype, {a.B, a.N, a.D});
    }
    a.grad_meta = checks.dense_features(grad_meta, "grad_meta", a.dtype, {a.B, a.K, a.D});
    checks.run(stream, [&](cudaStream_t s) { return assign_backward(a, s); });
}

void bind_assign(py::module_& m) {
    m.def("assign", &assign_arrays, py::arg("q"), py::arg("meta"), py::arg("mask"), py::arg("similarity"),
          py::arg("temperature"), py::arg("tf32"), py::arg("index"), py::arg("score"), py::arg("lse"),
          py::arg("weight"), py::arg("stream"),
          "index, score, lse, weight (B, N), each or None: the most similar row of meta (B, K, D) to each row of q");
    m.def("assign_backward", &assign_backward_arrays, py::arg("grad_score"), py::arg("grad_lse"), py::arg("q"),
          py::arg("meta"), py::arg("index"), py::arg("score"), py::arg("lse"), py::arg("similarity"),
          py::arg("temperature"), py::arg("tf32"), py::arg("grad_q"), py::arg("grad_meta"), py::arg("stream"),
          "Gradients of score and lse with respect to q and meta, each or None");
}

}  // namespace sttm
