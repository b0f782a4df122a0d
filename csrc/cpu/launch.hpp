#pragma once

namespace sttm::cpu {

// The instruction set whose kernels run. Throws std::runtime_error if there is none, or STTM_CPU_ISA asks for one that
// is not there.
const char* isa();

}  // namespace sttm::cpu
