#include "sttm/soft_merge.cuh"

namespace sttm {

cudaError_t soft_merge(const SoftMergeArguments& arguments, cudaStream_t stream) {
    return with_product(arguments.dtype, arguments.tf32, [&](auto type, auto exact) {
        return launch_soft_merge<decltype(type), decltype(exact)::value>(arguments, stream);
    });
}

}  // namespace sttm
