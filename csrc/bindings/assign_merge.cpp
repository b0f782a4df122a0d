#include "merged.hpp"
#include "metric.hpp"

namespace sttm {

static void assign_merge_arrays(const Array& x, const Array& q, const Array& meta, const MaybeArray& mask,
                                const MaybeArray& size, const MaybeArray& positions, const MaybeArray& fill,
                                const MaybeArray& sequences, const std::string& similarity, double temperature,
                                bool tf32, const Array& index, const Array& score, const MaybeArray& lse,
                                const MaybeArray& weight, const Array& y, const Array& size_out,
                                const Array& positions_out, const Array& mass_out, const MaybeArray& order,
                                const MaybeArray& offsets, uint64_t stream) {
    Validate validate("assign_merge");
    AssignMergeArguments both{};
    AssignArguments& a = both.assign;
    MergeArguments& m = both.merge;
    m.dtype = a.dtype = validate.dtype(x, "x");
    m.B = validate.extent(x, "x", 3, 0);
    a.B = validate.extent(meta, "meta", 3, 0);
    m.N = a.N = validate.extent(x, "x", 3, 1);
    m.C = validate.extent(x, "x", 3, 2);
    m.P = validate.extent(positions_out, "positions_out", 3, 2);
    read_similarity(validate, a, q, meta, sequences, similarity, temperature, tf32);
    if (m.B != items_of(a))
        throw py::value_error("x must have " + std::to_string(items_of(a)) + " items, got " + x.shape_text());
    m.K = a.sequences == nullptr ? a.K : a.B * a.K;
    if ((a.N > kAssignMergeTokens && a.sequences == nullptr) || a.K > kAssignMergeGroups)
        throw py::value_error("x and meta must have at most " + std::to_string(kAssignMergeTokens) + " and " +
                              std::to_string(kAssignMergeGroups) + " rows, got " + x.shape_text() + " and " +
                              meta.shape_text());
    a.mask = validate.mask(mask, m.B, a.N);
    read_assignment(validate, a, index, score, lse, weight);
    if (lse.has_value() != weight.has_value()) throw py::value_error("lse and weight must both be arrays or both None");

    m.reduce = Reduce::mean;
    m.x = validate.rows(x, "x", m.dtype, {m.B, m.N, m.C});
    m.index = a.index;
    m.weight = a.weight;
    if (order.has_value() != offsets.has_value() || (order && a.sequences != nullptr))
        throw py::value_error("order and offsets must both be arrays, without sequences, or both None");
    m.order = validate.dense<int32_t>(order, "order", {m.B, m.N});
    m.offsets = validate.dense<int32_t>(offsets, "offsets", {m.B, int64_t(m.K) + 1});
    read_merge(validate, m, size, positions, fill, y, size_out, positions_out, mass_out);
    validate.run(assign_merge, both, stream);
}

void bind_assign_merge(py::module_& m) {
    m.attr("ASSIGN_MERGE_TOKENS") = kAssignMergeTokens;
    m.attr("ASSIGN_MERGE_GROUPS") = kAssignMergeGroups;
    m.def("assign_merge", &assign_merge_arrays, py::arg("x"), py::arg("q"), py::arg("meta"), py::arg("mask"),
          py::arg("size"), py::arg("positions"), py::arg("fill"), py::arg("sequences"), py::arg("similarity"),
          py::arg("temperature"), py::arg("tf32"), py::arg("index"), py::arg("score"), py::arg("lse"),
          py::arg("weight"), py::arg("y"), py::arg("size_out"), py::arg("positions_out"), py::arg("mass_out"),
          py::arg("order"), py::arg("offsets"), py::arg("stream"),
          "assign and merge of at most ASSIGN_MERGE_TOKENS tokens to ASSIGN_MERGE_GROUPS groups; with sequences int32 "
          "(S, 6) of those of at most so many tokens");
}

}  // namespace sttm
