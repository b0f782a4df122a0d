#include "sttm/assign.cuh"

namespace sttm {

cudaError_t assign(const AssignArguments& arguments, cudaStream_t stream) {
    return with_product(arguments.dtype, arguments.tf32, [&](auto type, auto exact) {
        return launch_assign<decltype(type), decltype(exact)::value>(arguments, stream);
    });
}

}  // namespace sttm
