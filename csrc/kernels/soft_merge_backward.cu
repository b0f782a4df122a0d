#include "sttm/soft_merge_backward.cuh"

namespace sttm {

cudaError_t soft_merge_backward(const SoftMergeBackwardArguments& arguments, cudaStream_t stream) {
    return with_product(arguments.dtype, arguments.tf32, [&](auto type, auto exact) {
        return launch_soft_merge_backward<decltype(type), decltype(exact)::value>(arguments, stream);
    });
}

}  // namespace sttm
