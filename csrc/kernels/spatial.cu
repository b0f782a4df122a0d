#include "sttm/spatial.cuh"

namespace sttm {

cudaError_t spatial(const SpatialArguments& arguments, cudaStream_t stream) {
    return with_type(arguments.assign.dtype, [&](auto type) {
        using T = decltype(type);
        if constexpr (std::is_same_v<T, float>)
            if (!arguments.assign.tf32) return launch_spatial<T, true>(arguments, stream);
        return launch_spatial<T, false>(arguments, stream);
    });
}

}  // namespace sttm
