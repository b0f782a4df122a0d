// Arguments that verbs share which merge tokens into groups.
#pragma once

#include "validate.hpp"

namespace sttm {

// What is merged with x, and room for what becomes of both, given B, N, K, C, P and dtype.
inline void read_merge(Validate& validate, MergeArguments& a, const MaybeArray& size, const MaybeArray& positions,
                       const MaybeArray& fill, const Array& y, const Array& size_out, const Array& positions_out,
                       const Array& mass_out) {
    a.size = validate.dense<float>(size, "size", {a.B, a.N});
    a.positions = validate.items<float>(positions, "positions", {a.B, a.N, a.P}, a.stride_pb);
    if (!positions && a.P > 0) throw py::value_error("positions must be an array where positions_out has features");
    a.fill = validate.item_features(fill, "fill", a.dtype, {a.B, a.K, a.C}, a.stride_fb);
    a.y = validate.dense_features(y, "y", a.dtype, {a.B, a.K, a.C});
    a.size_out = validate.dense<float>(size_out, "size_out", {a.B, a.K});
    a.positions_out = validate.dense<float>(positions_out, "positions_out", {a.B, a.K, a.P});
    a.mass_out = validate.dense<float>(mass_out, "mass_out", {a.B, a.K});
}

}  // namespace sttm
