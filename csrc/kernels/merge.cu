#include "sttm/merge.cuh"

namespace sttm {

cudaError_t merge(const MergeArguments& arguments, cudaStream_t stream) {
    return with_type(arguments.dtype, [&](auto type) { return launch_merge<decltype(type)>(arguments, stream); });
}

}  // namespace sttm
