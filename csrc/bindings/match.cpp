#include "validate.hpp"

namespace sttm {

// Room for the mean over heads, which the kernels of a GPU take of a metric that has several.
static void* read_mean(Validate& validate, const MatchArguments& a, const MaybeArray& mean) {
#if !defined(STTM_CPU)
    if (a.metric.heads > 1 && !mean) throw py::value_error("mean is needed for a metric of several heads");
#endif
    return validate.dense_features(mean, "mean", a.dtype, {a.B, a.N, (int64_t(a.D) + 7) / 8 * 8});
}

// The tokens of each window.
static void read_lists(Validate& validate, MatchArguments& a, const MaybeArray& src, const MaybeArray& dst) {
    if (src.has_value() != dst.has_value()) throw py::value_error("src and dst must both be arrays or both be None");
    a.listed = src.has_value();
    a.windows = 1;
    if (!a.listed) return;
    a.windows = validate.extent(*src, "src", 3, 1);
    if (a.windows < 1) throw py::value_error("src must have at least one window, got " + src->shape_text());
    a.num_src = validate.extent(*src, "src", 3, 2);
    a.num_dst = validate.extent(*dst, "dst", 3, 2);
    const int src_items = src->size(0) == 1 ? 1 : a.B, dst_items = dst->size(0) == 1 ? 1 : a.B;
    a.src = validate.dense<int32_t>(*src, "src", {src_items, a.windows, a.num_src});
    a.dst = validate.dense<int32_t>(*dst, "dst", {dst_items, a.windows, a.num_dst});
    a.stride_src = src_items == 1 ? 0 : int64_t(a.windows) * a.num_src;
    a.stride_dst = dst_items == 1 ? 0 : int64_t(a.windows) * a.num_dst;
}

static void match_arrays(const Array& metric, const MaybeArray& src, const MaybeArray& dst, const MaybeArray& mask,
                         const MaybeArray& limit, int r, int num_groups, int num_prefix, double threshold, bool tf32,
                         const Array& index, const Array& score, const MaybeArray& order, const MaybeArray& offsets,
                         const Array& scratch, const MaybeArray& mean, uint64_t stream) {
    Validate validate("match");
    MatchArguments a{};
    a.B = validate.extent(metric, "metric", metric.dims() == 4 ? 4 : 3, 0);
    a.N = validate.metric_extent(metric, "metric", 0);
    a.D = validate.metric_extent(metric, "metric", 1);
    a.dtype = validate.dtype(metric, "metric");
    a.metric = validate.metric(metric, "metric", a.dtype, a.B, a.N, a.D);
    a.tf32 = tf32;
    if (num_prefix < 0 || num_prefix > a.N)
        throw py::value_error("num_prefix must be in [0, N], got " + std::to_string(num_prefix));
    if (r < 0 || r >= a.N) throw py::value_error("r must be in [0, N), got " + std::to_string(r));
    if (num_groups < a.N - r || num_groups > a.N)
        throw py::value_error("num_groups must be in [N - r, N], got " + std::to_string(num_groups));
    a.r = r;
    a.num_groups = num_groups;
    a.num_prefix = num_prefix;
    a.mask = validate.mask(mask, a.B, a.N);
    a.limit = validate.dense<int32_t>(limit, "limit", {a.B});
    a.threshold = static_cast<float>(threshold);

    read_lists(validate, a, src, dst);
    if (!a.listed) {
        const int tokens = a.N - num_prefix, odd = num_prefix % 2;
        a.num_src = (tokens + 1 - odd) / 2;
        a.num_dst = (tokens + odd) / 2;
    }
    a.index = validate.dense<int32_t>(index, "index", {a.B, a.N});
    a.score = validate.dense<float>(score, "score", {a.B, a.N});
    if (order.has_value() != offsets.has_value())
        throw py::value_error("order and offsets must both be arrays or both be None");
    a.order = validate.dense<int32_t>(order, "order", {a.B, a.N});
    a.offsets = validate.dense<int32_t>(offsets, "offsets", {a.B, int64_t(num_groups) + 1});
    a.partner = validate.dense<int32_t>(scratch, "scratch", {a.B * (int64_t(kMatchRoom) * a.N + 1)});
    a.mean = read_mean(validate, a, mean);
    validate.run(match, a, stream);
}

#if defined(STTM_CPU)
// What the sequences say is written to, and can be read here.
static void check(const MatchArguments& a) {
    for (int s = 0; s < a.num_sequences; ++s) {
        const PackedSequence& it = a.sequences[s];
        const bool inside = it.start >= 0 && it.length >= 0 && it.length <= a.N - it.start && it.first_group >= 0 &&
                            it.groups >= 0 && it.groups <= a.num_groups - it.first_group && it.groups <= it.length;
        if (!inside) throw py::value_error("sequence " + std::to_string(s) + " must lie in the tokens and groups");
    }
}
#else
static void check(const MatchArguments&) {}
#endif

static void match_packed_arrays(const Array& metric, const Array& sequences, const MaybeArray& src,
                                const MaybeArray& dst, int tiles, int num_groups, int num_prefix, double threshold,
                                bool tf32, const Array& index, const Array& score, const Array& order,
                                const Array& offsets, const Array& scratch, const MaybeArray& mean, uint64_t stream) {
    Validate validate("match_packed");
    MatchArguments a{};
    a.B = 1;
    a.N = validate.metric_extent(metric, "metric", 0);
    a.D = validate.metric_extent(metric, "metric", 1);
    a.dtype = validate.dtype(metric, "metric");
    a.metric = validate.metric(metric, "metric", a.dtype, 1, a.N, a.D);
    a.tf32 = tf32;
    if (num_prefix < 0 || num_groups < 0 || num_groups > a.N || tiles < 0)
        throw py::value_error("num_prefix and tiles must be at least 0, num_groups in [0, T]");
    read_lists(validate, a, src, dst);
    a.num_groups = num_groups;
    a.num_prefix = num_prefix;
    a.threshold = static_cast<float>(threshold);
    a.num_sequences = validate.extent(sequences, "sequences", 2, 0);
    constexpr int64_t kNumbers = sizeof(PackedSequence) / sizeof(int32_t);
    a.sequences = reinterpret_cast<const PackedSequence*>(
        validate.dense<int32_t>(sequences, "sequences", {a.num_sequences, kNumbers}));
    a.tiles = tiles;
    a.index = validate.dense<int32_t>(index, "index", {1, a.N});
    a.score = validate.dense<float>(score, "score", {1, a.N});
    a.order = validate.dense<int32_t>(order, "order", {1, a.N});
    a.offsets = validate.dense<int32_t>(offsets, "offsets", {1, int64_t(num_groups) + 1});
    a.partner = validate.dense<int32_t>(scratch, "scratch", {int64_t(kMatchRoom) * a.N});
    a.mean = read_mean(validate, a, mean);
    check(a);
    validate.run(match, a, stream);
}

static void csr_arrays(const Array& index, int num_groups, const Array& order, const Array& offsets, const Array& other,
                       uint64_t stream) {
    Validate validate("csr");
    const int B = validate.extent(index, "index", 2, 0), N = validate.extent(index, "index", 2, 1);
    if (num_groups < 0 || num_groups > INT_MAX / 2)
        throw py::value_error("num_groups must be at least 0 and below 2^30, got " + std::to_string(num_groups));
    const CsrArguments a{B,
                         N,
                         num_groups,
                         validate.dense<int32_t>(index, "index", {B, N}),
                         validate.dense<int32_t>(order, "order", {B, N}),
                         validate.dense<int32_t>(offsets, "offsets", {B, int64_t(num_groups) + 1}),
                         validate.dense<int32_t>(other, "other", {kSortRoom * B, N})};
    validate.run(csr, a, stream);
}

void bind_match(py::module_& m) {
    m.def("csr", &csr_arrays, py::arg("index"), py::arg("num_groups"), py::arg("order"), py::arg("offsets"),
          py::arg("other"), py::arg("stream"),
          "order (B, N), the tokens sorted by group, and offsets (B, num_groups + 1) of index; other (kSortRoom * B, "
          "N) is scratch");
    m.def("match", &match_arrays, py::arg("metric"), py::arg("src"), py::arg("dst"), py::arg("mask"), py::arg("limit"),
          py::arg("r"), py::arg("num_groups"), py::arg("num_prefix"), py::arg("threshold"), py::arg("tf32"),
          py::arg("index"), py::arg("score"), py::arg("order"), py::arg("offsets"), py::arg("scratch"), py::arg("mean"),
          py::arg("stream"),
          "index (B, N) of the groups that the r best src of metric make with their dst; scratch int32 (B * (kSortRoom "
          "* N + 1))");
    m.def("match_packed", &match_packed_arrays, py::arg("metric"), py::arg("sequences"), py::arg("src"), py::arg("dst"),
          py::arg("tiles"), py::arg("num_groups"), py::arg("num_prefix"), py::arg("threshold"), py::arg("tf32"),
          py::arg("index"), py::arg("score"), py::arg("order"), py::arg("offsets"), py::arg("scratch"), py::arg("mean"),
          py::arg("stream"),
          "the same of sequences int32 (S, 6), one after another in metric (1, T, D); scratch int32 (kMatchRoom * T)");
}

}  // namespace sttm
