#include "bind_metric.hpp"

namespace sttm {

static void assign_merge_arrays(const Array& x, const Array& q, const Array& meta, const MaybeArray& mask,
                                const MaybeArray& size, const MaybeArray& positions, const MaybeArray& fill,
                                const std::string& similarity, double temperature, bool tf32, const Array& index,
                                const Array& score, const MaybeArray& lse, const MaybeArray& weight, const Array& y,
                                const Array& size_out, const Array& positions_out, const Array& mass_out,
                                uint64_t stream) {
    Checks checks("assign_merge");
    SpatialArguments both{};
    AssignArguments& a = both.assign;
    MergeArguments& m = both.merge;
    m.dtype = a.dtype = checks.dtype(x, "x");
    m.B = a.B = checks.extent(x, "x", 3, 0);
    m.N = a.N = checks.extent(x, "x", 3, 1);
    m.K = a.K = checks.extent(meta, "meta", 3, 1);
    m.C = checks.extent(x, "x", 3, 2);
    m.P = checks.extent(positions_out, "positions_out", 3, 2);
    a.D = checks.extent(meta, "meta", 3, 2);
    if (a.N > kSpatialTokens || a.K > kSpatialGroups)
        throw py::value_error("x and meta must have at most " + std::to_string(kSpatialTokens) + " and " +
                              std::to_string(kSpatialGroups) + " rows, got " + x.shape_text() + " and " +
                              meta.shape_text());
    a.tf32 = tf32;
    a.similarity = similarity_from(similarity);
    a.inverse_temperature = static_cast<float>(1 / temperature);
    a.q = metric_of(checks, q, "q", a.dtype, a.B, a.N, a.D);
    a.meta = metric_of(checks, meta, "meta", a.dtype, a.B, a.K, a.D);
    a.mask = mask_of(checks, mask, a.B, a.N);
    a.index = checks.dense<int32_t>(index, "index", {a.B, a.N});
    a.score = checks.dense<float>(score, "score", {a.B, a.N});
    a.lse = checks.dense<float>(lse, "lse", {a.B, a.N});
    a.weight = checks.dense<float>(weight, "weight", {a.B, a.N});
    if (lse.has_value() != weight.has_value()) throw py::value_error("lse and weight must both be arrays or both None");

    m.reduce = Reduce::mean;
    m.x = checks.rows(x, "x", m.dtype, {m.B, m.N, m.C});
    m.index = a.index;
    m.weight = a.weight;
    m.size = checks.dense<float>(size, "size", {m.B, m.N});
    m.positions = checks.items<float>(positions, "positions", {m.B, m.N, m.P}, m.stride_pb);
    if (!positions && m.P > 0) throw py::value_error("positions must be an array where positions_out has features");
    m.fill = checks.item_features(fill, "fill", m.dtype, {m.B, m.K, m.C}, m.stride_fb);
    m.y = checks.dense_features(y, "y", m.dtype, {m.B, m.K, m.C});
    m.size_out = checks.dense<float>(size_out, "size_out", {m.B, m.K});
    m.positions_out = checks.dense<float>(positions_out, "positions_out", {m.B, m.K, m.P});
    m.mass_out = checks.dense<float>(mass_out, "mass_out", {m.B, m.K});
    checks.run(stream, [&](cudaStream_t s) { return spatial(both, s); });
}

void bind_spatial(py::module_& m) {
    m.attr("SPATIAL_TOKENS") = kSpatialTokens;
    m.attr("SPATIAL_GROUPS") = kSpatialGroups;
    m.def("assign_merge", &assign_merge_arrays, py::arg("x"), py::arg("q"), py::arg("meta"), py::arg("mask"),
          py::arg("size"), py::arg("positions"), py::arg("fill"), py::arg("similarity"), py::arg("temperature"),
          py::arg("tf32"), py::arg("index"), py::arg("score"), py::arg("lse"), py::arg("weight"), py::arg("y"),
          py::arg("size_out"), py::arg("positions_out"), py::arg("mass_out"), py::arg("stream"),
          "assign and merge of at most SPATIAL_TOKENS tokens to SPATIAL_GROUPS groups");
}

}  // namespace sttm
