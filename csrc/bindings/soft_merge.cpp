#include "metric.hpp"

namespace sttm {

static void read_inputs(Validate& validate, SoftMergeInputs& a, const Array& x, const Array& q, const Array& meta,
                        const MaybeArray& size, const MaybeArray& positions, const MaybeArray& mask,
                        const MaybeArray& sequences, const std::string& similarity, double temperature, bool over_meta,
                        bool tf32) {
    a.B = validate.extent(meta, "meta", 3, 0);
    a.N = validate.extent(x, "x", 3, 1);
    a.C = validate.extent(x, "x", 3, 2);
    a.P = positions ? validate.extent(*positions, "positions", 3, 2) : 0;
    a.dtype = validate.dtype(x, "x");
    a.over_meta = over_meta;
    read_similarity(validate, a, q, meta, sequences, similarity, temperature, tf32);
    const int items = items_of(a);
    a.x = validate.rows(x, "x", a.dtype, {items, a.N, a.C});
    a.size = validate.column(size, "size", items, a.N);
    a.mask = validate.mask(mask, items, a.N);
    a.positions = validate.float_rows(positions, "positions", items, a.N, a.P);
}

// How many floats of scratch a sum over the tokens of x (B, N, any) takes, or of B packed sequences (1, N, any), by the
// rows of a (B, K, columns), with so many numbers `beside` the columns.
static int64_t soft_merge_scratch(const Array& x, int num_sets, int num_groups, int columns, int beside) {
    Validate validate("soft_merge_scratch");
    const bool packed = validate.extent(x, "x", 3, 0) != num_sets;
    return partial_floats(packed, validate.dtype(x, "x"), num_sets, num_groups, validate.extent(x, "x", 3, 1), columns,
                          beside);
}

static void soft_merge_arrays(const Array& x, const Array& q, const Array& meta, const MaybeArray& size,
                              const MaybeArray& positions, const MaybeArray& mask, const MaybeArray& sequences,
                              const std::string& similarity, double temperature, bool over_meta, bool tf32,
                              const Array& y, const Array& size_out, const MaybeArray& positions_out, const Array& lse,
                              const MaybeArray& scratch, uint64_t stream) {
    Validate validate("soft_merge");
    SoftMergeArguments a{};
    read_inputs(validate, a, x, q, meta, size, positions, mask, sequences, similarity, temperature, over_meta, tf32);
    a.y = validate.dense_features(y, "y", a.dtype, {a.B, a.K, a.C});
    a.size_out = validate.dense<float>(size_out, "size_out", {a.B, a.K});
    a.positions_out = validate.dense<float>(positions_out, "positions_out", {a.B, a.K, a.P});
    a.lse = validate.dense<float>(lse, "lse", {over_meta ? items_of(a) : a.B, over_meta ? a.N : a.K});
    if (positions.has_value() != positions_out.has_value()) {
        throw py::value_error("positions and positions_out go together");
    }
    a.scratch = read_scratch(validate, scratch,
                             partial_floats(a.sequences != nullptr, a.dtype, a.B, a.K, a.N, a.C, a.P + 2));
    validate.run(soft_merge, a, stream);
}

static void soft_merge_backward_arrays(const MaybeArray& grad_y, const MaybeArray& grad_size,
                                       const MaybeArray& grad_positions, const Array& x, const Array& q,
                                       const Array& meta, const MaybeArray& size, const MaybeArray& positions,
                                       const MaybeArray& mask, const MaybeArray& sequences, const Array& y,
                                       const Array& mass, const MaybeArray& positions_out, const Array& lse,
                                       const std::string& similarity, double temperature, bool over_meta, bool tf32,
                                       const MaybeArray& grad_x, const MaybeArray& grad_q, const MaybeArray& grad_meta,
                                       const MaybeArray& grad_size_in, const MaybeArray& grad_positions_in,
                                       const MaybeArray& shift, const MaybeArray& scratch, uint64_t stream) {
    Validate validate("soft_merge_backward");
    SoftMergeBackwardArguments a{};
    read_inputs(validate, a, x, q, meta, size, positions, mask, sequences, similarity, temperature, over_meta, tf32);
    if (grad_y) a.grad_y = validate.rows(*grad_y, "grad_y", a.dtype, {a.B, a.K, a.C});
    a.grad_size = validate.column(grad_size, "grad_size", a.B, a.K);
    a.grad_positions = validate.float_rows(grad_positions, "grad_positions", a.B, a.K, a.P);
    a.y = validate.dense_features(y, "y", a.dtype, {a.B, a.K, a.C});
    a.mass = validate.dense<float>(mass, "mass", {a.B, a.K});
    a.positions_out = validate.dense<float>(positions_out, "positions_out", {a.B, a.K, a.P});
    a.lse = validate.dense<float>(lse, "lse", {over_meta ? items_of(a) : a.B, over_meta ? a.N : a.K});
    a.grad_x = validate.dense_features(grad_x, "grad_x", a.dtype, {items_of(a), a.N, a.C});
    read_metric_gradients(validate, a, q, grad_q, grad_meta);
    a.grad_size_in = validate.dense<float>(grad_size_in, "grad_size_in", {items_of(a), a.N});
    a.grad_positions_in = validate.dense<float>(grad_positions_in, "grad_positions_in", {items_of(a), a.N, a.P});
    a.shift = validate.dense<float>(shift, "shift", {a.B, a.K});
    if (grad_positions && (!positions || !positions_out)) {
        throw py::value_error("grad_positions needs positions and positions_out");
    }
    const bool of_metric = grad_q || grad_meta;  // an array without items has no address
    if ((of_metric || grad_size_in) && !shift) throw py::value_error("shift is needed");
    if (of_metric && over_meta && !grad_size_in) throw py::value_error("grad_size_in is needed");
    if (grad_meta)
        a.scratch = read_scratch(validate, scratch,
                                 partial_floats(a.sequences != nullptr, a.dtype, a.B, a.K, a.N, a.D, 1));
    validate.run(soft_merge_backward, a, stream);
}

void bind_soft_merge(py::module_& m) {
    m.def("soft_merge_scratch", &soft_merge_scratch, py::arg("x"), py::arg("num_sets"), py::arg("num_groups"),
          py::arg("columns"), py::arg("beside"),
          "floats of scratch that sums over the tokens of x take, num_groups rows of so many columns for each set");
    m.def("soft_merge", &soft_merge_arrays, py::arg("x"), py::arg("q"), py::arg("meta"), py::arg("size"),
          py::arg("positions"), py::arg("mask"), py::arg("sequences"), py::arg("similarity"), py::arg("temperature"),
          py::arg("over_meta"), py::arg("tf32"), py::arg("y"), py::arg("size_out"), py::arg("positions_out"),
          py::arg("lse"), py::arg("scratch"), py::arg("stream"),
          "y (B, K, C), sizes and positions of x (B, N, C), merged by softmax weights");
    m.def("soft_merge_backward", &soft_merge_backward_arrays, py::arg("grad_y"), py::arg("grad_size"),
          py::arg("grad_positions"), py::arg("x"), py::arg("q"), py::arg("meta"), py::arg("size"), py::arg("positions"),
          py::arg("mask"), py::arg("sequences"), py::arg("y"), py::arg("mass"), py::arg("positions_out"),
          py::arg("lse"), py::arg("similarity"), py::arg("temperature"), py::arg("over_meta"), py::arg("tf32"),
          py::arg("grad_x"), py::arg("grad_q"), py::arg("grad_meta"), py::arg("grad_size_in"),
          py::arg("grad_positions_in"), py::arg("shift"), py::arg("scratch"), py::arg("stream"),
          "Gradients of what is not None");
}

}  // namespace sttm
