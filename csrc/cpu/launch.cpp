// Chooses, once, the kernels for the instruction set of this CPU, or of STTM_CPU_ISA.
#include "launch.hpp"

#include <cstdlib>
#include <stdexcept>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "pool.hpp"
#include "sttm/arguments.hpp"

#define STTM_VERBS(DO)                           \
    DO(unmerge, UnmergeArguments)                \
    DO(compose, ComposeArguments)                \
    DO(csr, CsrArguments)                        \
    DO(match, MatchArguments)                    \
    DO(merge, MergeArguments)                    \
    DO(merge_backward, MergeBackwardArguments)   \
    DO(assign, AssignArguments)                  \
    DO(assign_backward, AssignBackwardArguments) \
    DO(assign_merge, AssignMergeArguments)       \
    DO(soft_merge, SoftMergeArguments)           \
    DO(soft_merge_backward, SoftMergeBackwardArguments)

// Best first: its name, and whether this CPU can run it.
#if defined(__x86_64__) && !defined(STTM_BASELINE_ONLY)
#define STTM_ISAS(DO)                                                                        \
    DO(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&    \
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) \
    DO(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())  \
    DO(baseline, true)
#else
#define STTM_ISAS(DO) DO(baseline, true)
#endif

#define STTM_DECLARE(verb, Arguments) void verb(const Arguments&, Stream);
#define STTM_MEMBER(verb, Arguments) void (*verb)(const Arguments&, Stream);

namespace sttm {

namespace cpu {

#define STTM_DECLARE_ALL(isa, runs) \
    namespace isa {                 \
    STTM_VERBS(STTM_DECLARE)        \
    }
STTM_ISAS(STTM_DECLARE_ALL)

namespace {

#if defined(__x86_64__) && !defined(STTM_BASELINE_ONLY)
// Not every compiler's __builtin_cpu_supports knows the name.
bool has_f16c() {
    unsigned a, b, c = 0, d;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

struct Kernels {
    const char* isa;
    bool (*can_run)();
    STTM_VERBS(STTM_MEMBER)
};

#define STTM_LIST(isa, runs)        \
    {#isa,                          \
     []() -> bool { return runs; }, \
     isa::unmerge,                  \
     isa::compose,                  \
     isa::csr,                      \
     isa::match,                    \
     isa::merge,                    \
     isa::merge_backward,           \
     isa::assign,                   \
     isa::assign_backward,          \
     isa::assign_merge,             \
     isa::soft_merge,               \
     isa::soft_merge_backward},
const Kernels kKernels[] = {STTM_ISAS(STTM_LIST)};

struct Scratch {
    ~Scratch() { release(); }
};

const Kernels& choose() {
    const char* const asked = std::getenv("STTM_CPU_ISA");
    if (asked == nullptr || *asked == 0) {
        for (const Kernels& one : kKernels)
            if (one.can_run()) return one;
        throw std::runtime_error("this build of sttm_kernels has no kernels that this CPU can run");
    }
    std::string known;
    for (const Kernels& one : kKernels) {
        if (one.isa == std::string(asked)) {
            if (one.can_run()) return one;
            throw std::runtime_error(std::string("STTM_CPU_ISA is ") + asked + ", which this CPU cannot run");
        }
        known += (known.empty() ? "" : ", ") + std::string(one.isa);
    }
    throw std::runtime_error("STTM_CPU_ISA must be one of " + known + ", got '" + asked + "'");
}

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace

const char* isa() { return kernels().isa; }

}  // namespace cpu

#define STTM_DEFINE(verb, Arguments)                       \
    void verb(const Arguments& arguments, Stream stream) { \
        const cpu::Scratch scratch;                        \
        cpu::kernels().verb(arguments, stream);            \
    }
STTM_VERBS(STTM_DEFINE)

}  // namespace sttm
