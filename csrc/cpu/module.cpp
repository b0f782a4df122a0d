// The Python module sttm_kernels._cpu: the launchers, with checks. Outputs are arguments, `stream` a number of threads.
#include <pybind11/pybind11.h>

#include "launch.hpp"

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
    info["compiler"] = __VERSION__;
    info["isa"] = cpu::isa();
    return info;
}

}  // namespace sttm

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of sttm_kernels. Arrays are anything that speaks DLPack; `stream` is the number of threads.";
    m.def("build_info", &sttm::build_info, "the compiler, and the instruction set whose kernels run");
    sttm::bind_assign(m);
    sttm::bind_assign_merge(m);
    sttm::bind_match(m);
    sttm::bind_merge(m);
    sttm::bind_soft_merge(m);
    sttm::bind_unmerge(m);
}
