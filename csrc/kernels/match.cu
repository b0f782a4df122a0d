#include "sttm/match.cuh"

namespace sttm {

cudaError_t match(const MatchArguments& arguments, cudaStream_t stream) {
    return with_product(arguments.dtype, arguments.tf32, [&](auto type, auto exact) {
        return launch_match<decltype(type), decltype(exact)::value>(arguments, stream);
    });
}

cudaError_t csr(const CsrArguments& a, cudaStream_t stream) {
    return csr(a.index, a.B, a.N, a.K, a.order, a.offsets, a.other, stream);
}

}  // namespace sttm
