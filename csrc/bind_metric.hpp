// Checks of the arguments that verbs built on similarities share.
#pragma once

#include "array.hpp"

namespace sttm {

// (B, N, D), or (B, heads, N, D) for the mean over heads.
inline Metric metric_of(Checks& checks, const Array& array, const char* name, DType dtype, int64_t B, int64_t N,
                        int64_t D) {
    if (array.dims() != 4) {
        checks.features(array, name, dtype, {B, N, D});
        return {array.data(), 1, array.stride(0), 0, array.stride(1), array.stride(2)};
    }
    checks.features(array, name, dtype, {B, Checks::kAny, N, D});
    const int heads = checks.extent(array, name, 4, 1);
    return {array.data(), heads, array.stride(0), array.stride(1), array.stride(2), array.stride(3)};
}

// Extent i of (N, D), the last dimensions of a metric.
inline int metric_extent(Checks& checks, const Array& array, const char* name, int i) {
    const int dims = array.dims() == 4 ? 4 : 3;
    return checks.extent(array, name, dims, dims - 2 + i);
}

inline Column column_of(Checks& checks, const MaybeArray& array, const char* name, int64_t B, int64_t N) {
    if (!array) return {};
    return {checks.strided<float>(*array, name, {B, N}), array->stride(0), array->stride(1)};
}

inline Mask mask_of(Checks& checks, const MaybeArray& array, int64_t B, int64_t N) {
    if (!array) return {};
    return {checks.strided<uint8_t>(*array, "mask", {B, N}), array->stride(0), array->stride(1)};
}

}  // namespace sttm
