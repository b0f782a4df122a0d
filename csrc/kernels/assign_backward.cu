#include "sttm/assign_backward.cuh"

namespace sttm {

cudaError_t assign_backward(const AssignBackwardArguments& arguments, cudaStream_t stream) {
    return with_product(arguments.dtype, arguments.tf32, [&](auto type, auto exact) {
        return launch_assign_backward<decltype(type), decltype(exact)::value>(arguments, stream);
    });
}

}  // namespace sttm
