#include "sttm/unmerge.cuh"

namespace sttm {

cudaError_t unmerge(const UnmergeArguments& arguments, cudaStream_t stream) {
    return with_type(arguments.dtype, [&](auto type) { return launch_unmerge<decltype(type)>(arguments, stream); });
}

cudaError_t compose(const ComposeArguments& arguments, cudaStream_t stream) {
    return launch_compose(arguments, stream);
}

cudaError_t probe() {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, compose_kernel<kUnmergeThreads>);
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}

}  // namespace sttm
