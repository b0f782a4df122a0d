#include "sttm/match.cuh"

namespace sttm {

cudaError_t match(const MatchArguments& arguments, cudaStream_t stream) {
    return with_type(arguments.dtype, [&](auto type) {
        using T = decltype(type);
        if constexpr (std::is_same_v<T, float>)
            if (!arguments.tf32) return launch_match<T, true>(arguments, stream);
        return launch_match<T, false>(arguments, stream);
    });
}

cudaError_t csr(const CsrArguments& a, cudaStream_t stream) {
    return csr(a.index, a.B, a.N, a.K, a.order, a.offsets, a.other, stream);
}

}  // namespace sttm
