#include "sttm/merge_backward.cuh"

namespace sttm {

cudaError_t merge_backward(const MergeBackwardArguments& arguments, cudaStream_t stream) {
    return with_type(arguments.dtype,
                     [&](auto type) { return launch_merge_backward<decltype(type)>(arguments, stream); });
}

}  // namespace sttm
