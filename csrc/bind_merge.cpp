#include "array.hpp"

namespace sttm {

// `order` and `offsets`, and `other` if they are to be made.
template <class Arguments>
static void check_groups(Checks& checks, Arguments& a, const MaybeArray& order, const MaybeArray& offsets,
                         const MaybeArray& other) {
    a.order = checks.dense<int32_t>(order, "order", {a.B, a.N});
    a.offsets = checks.dense<int32_t>(offsets, "offsets", {a.B, int64_t(a.K) + 1});
    a.other = checks.dense<int32_t>(other, "other", {a.B, a.N});
    if (other && (!order || !offsets))
        throw py::value_error("order and offsets must be arrays where other is one");
}

static void merge_arrays(const Array& x, const Array& index, int64_t num_groups, const MaybeArray& weight,
                         const MaybeArray& size, const MaybeArray& positions, const MaybeArray& fill,
                         const Array& order, const Array& offsets, const MaybeArray& other, const std::string& reduce,
                         const Array& y, const Array& size_out, const Array& positions_out, const Array& mass_out,
                         uint64_t stream) {
    Checks checks("merge");
    MergeArguments a{};
    a.B = checks.extent(x, "x", 3, 0);
    a.N = checks.extent(x, "x", 3, 1);
    a.C = checks.extent(x, "x", 3, 2);
    a.K = checks.groups(num_groups, "num_groups");
    a.P = checks.extent(positions_out, "positions_out", 3, 2);
    a.dtype = checks.dtype(x, "x");
    a.reduce = reduce_from(reduce);
    a.x = checks.rows(x, "x", a.dtype, {a.B, a.N, a.C});
    a.index = checks.dense<int32_t>(index, "index", {a.B, a.N});
    check_groups(checks, a, order, offsets, other);
    a.weight = checks.dense<float>(weight, "weight", {a.B, a.N});
    a.size = checks.dense<float>(size, "size", {a.B, a.N});
    a.positions = checks.items<float>(positions, "positions", {a.B, a.N, a.P}, a.stride_pb);
    if (!positions && a.P > 0) throw py::value_error("positions must be an array where positions_out has features");
    a.fill = checks.item_features(fill, "fill", a.dtype, {a.B, a.K, a.C}, a.stride_fb);
    a.y = checks.dense_features(y, "y", a.dtype, {a.B, a.K, a.C});
    a.size_out = checks.dense<float>(size_out, "size_out", {a.B, a.K});
    a.positions_out = checks.dense<float>(positions_out, "positions_out", {a.B, a.K, a.P});
    a.mass_out = checks.dense<float>(mass_out, "mass_out", {a.B, a.K});
    checks.run(stream, [&](cudaStream_t s) { return merge(a, s); });
}

static void merge_backward_arrays(const MaybeArray& grad_y, const MaybeArray& grad_size,
                                  const MaybeArray& grad_positions, const Array& x, const Array& index,
                                  int64_t num_groups, const MaybeArray& weight, const MaybeArray& size,
                                  const MaybeArray& positions,
                                  const Array& y, const Array& mass, const MaybeArray& order,
                                  const MaybeArray& offsets, const MaybeArray& other, const std::string& reduce,
                                  const MaybeArray& grad_x, const MaybeArray& grad_weight,
                                  const MaybeArray& grad_size_in, const MaybeArray& grad_positions_in,
                                  const MaybeArray& dot, uint64_t stream) {
    Checks checks("merge_backward");
    MergeBackwardArguments a{};
    a.B = checks.extent(x, "x", 3, 0);
    a.N = checks.extent(x, "x", 3, 1);
    a.C = checks.extent(x, "x", 3, 2);
    a.K = checks.groups(num_groups, "num_groups");
    a.P = positions ? checks.extent(*positions, "positions", 3, 2) : 0;
    a.dtype = checks.dtype(x, "x");
    a.reduce = reduce_from(reduce);
    if (grad_y) a.grad_y = checks.rows(*grad_y, "grad_y", a.dtype, {a.B, a.K, a.C});
    a.grad_size = checks.dense<float>(grad_size, "grad_size", {a.B, a.K});
    a.grad_positions = checks.items<float>(grad_positions, "grad_positions", {a.B, a.K, a.P}, a.stride_qb);
    a.x = checks.rows(x, "x", a.dtype, {a.B, a.N, a.C});
    a.index = checks.dense<int32_t>(index, "index", {a.B, a.N});
    check_groups(checks, a, order, offsets, other);
    a.weight = checks.dense<float>(weight, "weight", {a.B, a.N});
    a.size = checks.dense<float>(size, "size", {a.B, a.N});
    a.positions = checks.items<float>(positions, "positions", {a.B, a.N, a.P}, a.stride_pb);
    a.y = checks.dense_features(y, "y", a.dtype, {a.B, a.K, a.C});
    a.mass = checks.dense<float>(mass, "mass", {a.B, a.K});
    a.grad_x = checks.dense_features(grad_x, "grad_x", a.dtype, {a.B, a.N, a.C});
    a.grad_weight = checks.dense<float>(grad_weight, "grad_weight", {a.B, a.N});
    a.grad_size_in = checks.dense<float>(grad_size_in, "grad_size_in", {a.B, a.N});
    a.grad_positions_in = checks.dense<float>(grad_positions_in, "grad_positions_in", {a.B, a.N, a.P});
    a.dot = checks.dense<float>(dot, "dot", {a.reduce == Reduce::sum ? 2 : 1, a.B, a.N});
    const bool to_first = a.reduce == Reduce::max || a.reduce == Reduce::first;
    if ((!order || !offsets) && (dot || (to_first && grad_x && grad_y)))
        throw py::value_error("order and offsets must be arrays for reduce='" + reduce + "' or with dot");
    checks.run(stream, [&](cudaStream_t s) { return merge_backward(a, s); });
}

void bind_merge(py::module_& m) {
    m.def("merge", &merge_arrays, py::arg("x"), py::arg("index"), py::arg("num_groups"), py::arg("weight"),
          py::arg("size"), py::arg("positions"), py::arg("fill"), py::arg("order"), py::arg("offsets"),
          py::arg("other"), py::arg("reduce"), py::arg("y"), py::arg("size_out"), py::arg("positions_out"),
          py::arg("mass_out"), py::arg("stream"),
          "y (B, K, C) of x (B, N, C); order and offsets are made if other is given");
    m.def("merge_backward", &merge_backward_arrays, py::arg("grad_y"), py::arg("grad_size"),
          py::arg("grad_positions"), py::arg("x"), py::arg("index"), py::arg("num_groups"), py::arg("weight"),
          py::arg("size"), py::arg("positions"), py::arg("y"), py::arg("mass"), py::arg("order"), py::arg("offsets"),
          py::arg("other"), py::arg("reduce"), py::arg("grad_x"), py::arg("grad_weight"), py::arg("grad_size_in"),
          py::arg("grad_positions_in"), py::arg("dot"), py::arg("stream"), "gradients of merge; None is not wanted");
}

}  // namespace sttm
