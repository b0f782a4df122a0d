// The Python module sttm_kernels._C: the launchers, with checks. Outputs and scratch are arguments.
#include <pybind11/pybind11.h>

#if !defined(STTM_HOST)
#include "sttm_build_info.hpp"  // setup.py writes it
#endif

namespace py = pybind11;

namespace sttm {

void bind_assign(py::module_& m);
void bind_assign_merge(py::module_& m);
void bind_match(py::module_& m);
void bind_merge(py::module_& m);
void bind_soft_merge(py::module_& m);
void bind_unmerge(py::module_& m);

static py::dict build_info() {
    py::dict info;
#if defined(STTM_HOST)
    info["host"] = true;
    info["nvcc"] = py::none();
    info["architectures"] = py::tuple();
#else
    info["host"] = false;
    info["nvcc"] = STTM_NVCC_VERSION;
    info["architectures"] = py::tuple(py::str(STTM_ARCHITECTURES).attr("split")());
#endif
    return info;
}

}  // namespace sttm

PYBIND11_MODULE(_C, m) {
    m.doc() = "CUDA kernels of sttm_kernels. Arrays are anything that speaks DLPack; `stream` is a cudaStream_t.";
    m.def("build_info", &sttm::build_info, "nvcc's version, the architectures, and whether this runs on the host");
    sttm::bind_assign(m);
    sttm::bind_assign_merge(m);
    sttm::bind_match(m);
    sttm::bind_merge(m);
    sttm::bind_soft_merge(m);
    sttm::bind_unmerge(m);
}
