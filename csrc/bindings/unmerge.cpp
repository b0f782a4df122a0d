#include "validate.hpp"

namespace sttm {

static void unmerge_arrays(const Array& x, const Array& index, const Array& y, uint64_t stream) {
    Validate validate("unmerge");
    UnmergeArguments a{};
    a.B = validate.extent(x, "x", 3, 0);
    a.K = validate.extent(x, "x", 3, 1);
    a.C = validate.extent(x, "x", 3, 2);
    a.N = validate.extent(index, "index", 2, 1);
    a.dtype = validate.dtype(x, "x");
    a.x = validate.rows(x, "x", a.dtype, {a.B, a.K, a.C});
    a.index = validate.dense<int32_t>(index, "index", {a.B, a.N});
    a.y = validate.dense_features(y, "y", a.dtype, {a.B, a.N, a.C});
    validate.run(unmerge, a, stream);
}

static void compose_arrays(const Array& index1, const Array& index2, int64_t num_groups, const Array& out,
                           uint64_t stream) {
    Validate validate("compose");
    ComposeArguments a{};
    a.B = validate.extent(index1, "index1", 2, 0);
    a.N = validate.extent(index1, "index1", 2, 1);
    a.K = validate.extent(index2, "index2", 2, 1);
    a.num_groups = validate.groups(num_groups, "num_groups");
    a.index1 = validate.dense<int32_t>(index1, "index1", {a.B, a.N});
    a.index2 = validate.dense<int32_t>(index2, "index2", {a.B, a.K});
    a.out = validate.dense<int32_t>(out, "out", {a.B, a.N});
    validate.run(compose, a, stream);
}

#if !defined(STTM_CPU)
static std::optional<std::string> problem() {
    const Error error = probe();
    return error == cudaSuccess ? std::nullopt : std::optional<std::string>(cudaGetErrorString(error));
}
#endif

void bind_unmerge(py::module_& m) {
#if !defined(STTM_CPU)
    m.def("problem", &problem, "why no kernel can run on the current device, or None");
#endif
    m.def("unmerge", &unmerge_arrays, py::arg("x"), py::arg("index"), py::arg("y"), py::arg("stream"),
          "y (B, N, C) = rows of x (B, K, C) along index (B, N)");
    m.def("compose", &compose_arrays, py::arg("index1"), py::arg("index2"), py::arg("num_groups"), py::arg("out"),
          py::arg("stream"), "out (B, N) = index2 (B, K) along index1 (B, N)");
}

}  // namespace sttm
