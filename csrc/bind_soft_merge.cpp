#include "bind_metric.hpp"

namespace sttm {

// (B, N, P) of floats in any strides.
static Rows floats_of(Checks& checks, const MaybeArray& array, const char* name, int64_t B, int64_t N, int64_t P) {
    if (!array) return {};
    return {checks.strided<const float>(*array, name, {B, N, P}), array->stride(0), array->stride(1),
            array->stride(2)};
}

static void soft_merge_inputs(SoftMergeInputs& a, Checks& checks, const Array& x, const Array& q, const Array& meta,
                              const MaybeArray& size, const MaybeArray& positions, const MaybeArray& mask,
                              const std::string& similarity, double temperature, bool over_meta, bool tf32) {
    a.B = checks.extent(x, "x", 3, 0);
    a.N = checks.extent(x, "x", 3, 1);
    a.C = checks.extent(x, "x", 3, 2);
    a.K = checks.extent(meta, "meta", 3, 1);
    a.D = checks.extent(meta, "meta", 3, 2);
    a.P = positions ? checks.extent(*positions, "positions", 3, 2) : 0;
    a.dtype = checks.dtype(x, "x");
    a.tf32 = tf32;
    a.similarity = similarity_from(similarity);
    a.inverse_temperature = static_cast<float>(1 / temperature);
    a.over_meta = over_meta;
    a.x = checks.rows(x, "x", a.dtype, {a.B, a.N, a.C});
    a.q = metric_of(checks, q, "q", a.dtype, a.B, a.N, a.D);
    a.meta = metric_of(checks, meta, "meta", a.dtype, a.B, a.K, a.D);
    a.size = column_of(checks, size, "size", a.B, a.N);
    a.mask = mask_of(checks, mask, a.B, a.N);
    a.positions = floats_of(checks, positions, "positions", a.B, a.N, a.P);
}

static void soft_merge_arrays(const Array& x, const Array& q, const Array& meta, const MaybeArray& size,
                              const MaybeArray& positions, const MaybeArray& mask, const std::string& similarity,
                              double temperature, bool over_meta, bool tf32, const Array& y, const Array& size_out,
                              const MaybeArray& positions_out, const Array& lse, uint64_t stream) {
    Checks checks("soft_merge");
    SoftMergeArguments a{};
    soft_merge_inputs(a, checks, x, q, meta, size, positions, mask, similarity, temperature, over_meta, tf32);
    a.y = checks.dense_features(y, "y", a.dtype, {a.B, a.K, a.C});
    a.size_out = checks.dense<float>(size_out, "size_out", {a.B, a.K});
    a.positions_out = checks.dense<float>(positions_out, "positions_out", {a.B, a.K, a.P});
    a.lse = checks.dense<float>(lse, "lse", {a.B, over_meta ? a.N : a.K});
    if (positions.has_value() != positions_out.has_value()) {
        throw py::value_error("positions and positions_out go together");
    }
    checks.run(stream, [&](cudaStream_t s) { return soft_merge(a, s); });
}

static void soft_merge_backward_arrays(
    const MaybeArray& grad_y, const MaybeArray& grad_size, const MaybeArray& grad_positions, const Array& x,
    const Array& q, const Array& meta, const MaybeArray& size, const MaybeArray& positions, const MaybeArray& mask,
    const Array& y, const Array& mass, const MaybeArray& positions_out, const Array& lse,
    const std::string& similarity, double temperature, bool over_meta, bool tf32, const MaybeArray& grad_x,
    const MaybeArray& grad_q, const MaybeArray& grad_meta, const MaybeArray& grad_size_in,
    const MaybeArray& grad_positions_in, const MaybeArray& shift, uint64_t stream) {
    Checks checks("soft_merge_backward");
    SoftMergeBackwardArguments a{};
    soft_merge_inputs(a, checks, x, q, meta, size, positions, mask, similarity, temperature, over_meta, tf32);
    if (grad_y) a.grad_y = checks.rows(*grad_y, "grad_y", a.dtype, {a.B, a.K, a.C});
    a.grad_size = column_of(checks, grad_size, "grad_size", a.B, a.K);
    a.grad_positions = floats_of(checks, grad_positions, "grad_positions", a.B, a.K, a.P);
    a.y = checks.dense_features(y, "y", a.dtype, {a.B, a.K, a.C});
    a.mass = checks.dense<float>(mass, "mass", {a.B, a.K});
    a.positions_out = checks.dense<float>(positions_out, "positions_out", {a.B, a.K, a.P});
    a.lse = checks.dense<float>(lse, "lse", {a.B, over_meta ? a.N : a.K});
    a.grad_x = checks.dense_features(grad_x, "grad_x", a.dtype, {a.B, a.N, a.C});
    if (q.dims() == 4) {
        a.grad_q = checks.dense_features(grad_q, "grad_q", a.dtype, {a.B, a.q.heads, a.N, a.D});
    } else {
        a.grad_q = checks.dense_features(grad_q, "grad_q", a.dtype, {a.B, a.N, a.D});
    }
    a.grad_meta = checks.dense_features(grad_meta, "grad_meta", a.dtype, {a.B, a.K, a.D});
    a.grad_size_in = checks.dense<float>(grad_size_in, "grad_size_in", {a.B, a.N});
    a.grad_positions_in = checks.dense<float>(grad_positions_in, "grad_positions_in", {a.B, a.N, a.P});
    a.shift = checks.dense<float>(shift, "shift", {a.B, a.K});
    if (grad_positions && (!positions || !positions_out)) {
        throw py::value_error("grad_positions needs positions and positions_out");
    }
    const bool of_metric = a.grad_q != nullptr || a.grad_meta != nullptr;
    if ((of_metric || a.grad_size_in != nullptr) && a.shift == nullptr) throw py::value_error("shift is needed");
    if (of_metric && over_meta && a.grad_size_in == nullptr) throw py::value_error("grad_size_in is needed");
    checks.run(stream, [&](cudaStream_t s) { return soft_merge_backward(a, s); });
}

void bind_soft_merge(py::module_& m) {
    m.def("soft_merge", &soft_merge_arrays, py::arg("x"), py::arg("q"), py::arg("meta"), py::arg("size"),
          py::arg("positions"), py::arg("mask"), py::arg("similarity"), py::arg("temperature"), py::arg("over_meta"),
          py::arg("tf32"), py::arg("y"), py::arg("size_out"), py::arg("positions_out"), py::arg("lse"),
          py::arg("stream"), "y (B, K, C), sizes and positions of x (B, N, C), merged by softmax weights");
    m.def("soft_merge_backward", &soft_merge_backward_arrays, py::arg("grad_y"), py::arg("grad_size"),
          py::arg("grad_positions"), py::arg("x"), py::arg("q"), py::arg("meta"), py::arg("size"),
          py::arg("positions"), py::arg("mask"), py::arg("y"), py::arg("mass"), py::arg("positions_out"),
          py::arg("lse"), py::arg("similarity"), py::arg("temperature"), py::arg("over_meta"), py::arg("tf32"),
          py::arg("grad_x"), py::arg("grad_q"), py::arg("grad_meta"), py::arg("grad_size_in"),
          py::arg("grad_positions_in"), py::arg("shift"), py::arg("stream"), "Gradients of what is not None");
}

}  // namespace sttm
