#include "array.hpp"

namespace sttm {

static void unmerge_arrays(const Array& x, const Array& index, const Array& y, uint64_t stream) {
    Checks checks("unmerge");
    UnmergeArguments a{};
    a.B = checks.extent(x, "x", 3, 0);
    a.K = checks.extent(x, "x", 3, 1);
    a.C = checks.extent(x, "x", 3, 2);
    a.N = checks.extent(index, "index", 2, 1);
    a.dtype = checks.dtype(x, "x");
    a.x = checks.rows(x, "x", a.dtype, {a.B, a.K, a.C});
    a.index = checks.dense<int32_t>(index, "index", {a.B, a.N});
    a.y = checks.dense_features(y, "y", a.dtype, {a.B, a.N, a.C});
    checks.run(stream, [&](cudaStream_t s) { return unmerge(a, s); });
}

static void compose_arrays(const Array& index1, const Array& index2, int64_t num_groups, const Array& out,
                           uint64_t stream) {
    Checks checks("compose");
    ComposeArguments a{};
    a.B = checks.extent(index1, "index1", 2, 0);
    a.N = checks.extent(index1, "index1", 2, 1);
    a.K = checks.extent(index2, "index2", 2, 1);
    a.num_groups = checks.groups(num_groups, "num_groups");
    a.index1 = checks.dense<int32_t>(index1, "index1", {a.B, a.N});
    a.index2 = checks.dense<int32_t>(index2, "index2", {a.B, a.K});
    a.out = checks.dense<int32_t>(out, "out", {a.B, a.N});
    checks.run(stream, [&](cudaStream_t s) { return compose(a, s); });
}

static std::optional<std::string> problem() {
    const cudaError_t error = probe();
    return error == cudaSuccess ? std::nullopt : std::optional<std::string>(cudaGetErrorString(error));
}

void bind_unmerge(py::module_& m) {
    m.def("problem", &problem, "why no kernel can run on the current device, or None");
    m.def("unmerge", &unmerge_arrays, py::arg("x"), py::arg("index"), py::arg("y"), py::arg("stream"),
          "y (B, N, C) = rows of x (B, K, C) along index (B, N)");
    m.def("compose", &compose_arrays, py::arg("index1"), py::arg("index2"), py::arg("num_groups"), py::arg("out"),
          py::arg("stream"), "out (B, N) = index2 (B, K) along index1 (B, N)");
}

}  // namespace sttm
