#include "sttm/assign_merge.cuh"

namespace sttm {

cudaError_t assign_merge(const AssignMergeArguments& arguments, cudaStream_t stream) {
    return with_product(arguments.assign.dtype, arguments.assign.tf32, [&](auto type, auto exact) {
        return launch_assign_merge<decltype(type), decltype(exact)::value>(arguments, stream);
    });
}

}  // namespace sttm
