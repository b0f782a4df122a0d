#include "merged.hpp"

namespace sttm {

// `index`, `order` and `offsets`, and `other` if the latter are to be made.
template <class Arguments>
static void read_groups(Validate& validate, Arguments& a, const Array& index, const MaybeArray& order,
                        const MaybeArray& offsets, const MaybeArray& other) {
    a.index = validate.dense<int32_t>(index, "index", {a.B, a.N});
    a.order = validate.dense<int32_t>(order, "order", {a.B, a.N});
    a.offsets = validate.dense<int32_t>(offsets, "offsets", {a.B, int64_t(a.K) + 1});
    a.other = validate.dense<int32_t>(other, "other", {kSortRoom * a.B, a.N});
    if (other && (!order || !offsets)) throw py::value_error("order and offsets must be arrays where other is one");
}

static void merge_arrays(const Array& x, const Array& index, int64_t num_groups, const MaybeArray& weight,
                         const MaybeArray& size, const MaybeArray& positions, const MaybeArray& fill,
                         const Array& order, const Array& offsets, const MaybeArray& other, const std::string& reduce,
                         const Array& y, const Array& size_out, const Array& positions_out, const Array& mass_out,
                         uint64_t stream) {
    Validate validate("merge");
    MergeArguments a{};
    a.B = validate.extent(x, "x", 3, 0);
    a.N = validate.extent(x, "x", 3, 1);
    a.C = validate.extent(x, "x", 3, 2);
    a.K = validate.groups(num_groups, "num_groups");
    a.P = validate.extent(positions_out, "positions_out", 3, 2);
    a.dtype = validate.dtype(x, "x");
    a.reduce = reduce_from(reduce);
    a.x = validate.rows(x, "x", a.dtype, {a.B, a.N, a.C});
    read_groups(validate, a, index, order, offsets, other);
    a.weight = validate.dense<float>(weight, "weight", {a.B, a.N});
    read_merge(validate, a, size, positions, fill, y, size_out, positions_out, mass_out);
    validate.run(merge, a, stream);
}

static void merge_backward_arrays(const MaybeArray& grad_y, const MaybeArray& grad_size,
                                  const MaybeArray& grad_positions, const Array& x, const Array& index,
                                  int64_t num_groups, const MaybeArray& weight, const MaybeArray& size,
                                  const MaybeArray& positions, const Array& y, const Array& mass,
                                  const MaybeArray& order, const MaybeArray& offsets, const MaybeArray& other,
                                  const std::string& reduce, const MaybeArray& grad_x, const MaybeArray& grad_weight,
                                  const MaybeArray& grad_size_in, const MaybeArray& grad_positions_in,
                                  const MaybeArray& dot, uint64_t stream) {
    Validate validate("merge_backward");
    MergeBackwardArguments a{};
    a.B = validate.extent(x, "x", 3, 0);
    a.N = validate.extent(x, "x", 3, 1);
    a.C = validate.extent(x, "x", 3, 2);
    a.K = validate.groups(num_groups, "num_groups");
    a.P = positions ? validate.extent(*positions, "positions", 3, 2) : 0;
    a.dtype = validate.dtype(x, "x");
    a.reduce = reduce_from(reduce);
    if (grad_y) a.grad_y = validate.rows(*grad_y, "grad_y", a.dtype, {a.B, a.K, a.C});
    a.grad_size = validate.dense<float>(grad_size, "grad_size", {a.B, a.K});
    a.grad_positions = validate.items<float>(grad_positions, "grad_positions", {a.B, a.K, a.P}, a.stride_qb);
    a.x = validate.rows(x, "x", a.dtype, {a.B, a.N, a.C});
    read_groups(validate, a, index, order, offsets, other);
    a.weight = validate.dense<float>(weight, "weight", {a.B, a.N});
    a.size = validate.dense<float>(size, "size", {a.B, a.N});
    a.positions = validate.items<float>(positions, "positions", {a.B, a.N, a.P}, a.stride_pb);
    a.y = validate.dense_features(y, "y", a.dtype, {a.B, a.K, a.C});
    a.mass = validate.dense<float>(mass, "mass", {a.B, a.K});
    a.grad_x = validate.dense_features(grad_x, "grad_x", a.dtype, {a.B, a.N, a.C});
    a.grad_weight = validate.dense<float>(grad_weight, "grad_weight", {a.B, a.N});
    a.grad_size_in = validate.dense<float>(grad_size_in, "grad_size_in", {a.B, a.N});
    a.grad_positions_in = validate.dense<float>(grad_positions_in, "grad_positions_in", {a.B, a.N, a.P});
    a.dot = validate.dense<float>(dot, "dot", {a.reduce == Reduce::sum ? 2 : 1, a.B, a.N});
    const bool to_first = a.reduce == Reduce::max || a.reduce == Reduce::first;
    if ((!order || !offsets) && (dot || (to_first && grad_x && grad_y)))
        throw py::value_error("order and offsets must be arrays for reduce='" + reduce + "' or with dot");
    validate.run(merge_backward, a, stream);
}

void bind_merge(py::module_& m) {
    m.def("merge", &merge_arrays, py::arg("x"), py::arg("index"), py::arg("num_groups"), py::arg("weight"),
          py::arg("size"), py::arg("positions"), py::arg("fill"), py::arg("order"), py::arg("offsets"),
          py::arg("other"), py::arg("reduce"), py::arg("y"), py::arg("size_out"), py::arg("positions_out"),
          py::arg("mass_out"), py::arg("stream"),
          "y (B, K, C) of x (B, N, C); order and offsets are made if other is given");
    m.def("merge_backward", &merge_backward_arrays, py::arg("grad_y"), py::arg("grad_size"), py::arg("grad_positions"),
          py::arg("x"), py::arg("index"), py::arg("num_groups"), py::arg("weight"), py::arg("size"),
          py::arg("positions"), py::arg("y"), py::arg("mass"), py::arg("order"), py::arg("offsets"), py::arg("other"),
          py::arg("reduce"), py::arg("grad_x"), py::arg("grad_weight"), py::arg("grad_size_in"),
          py::arg("grad_positions_in"), py::arg("dot"), py::arg("stream"), "gradients of merge; None is not wanted");
}

}  // namespace sttm
