// What the launchers take: pointers, extents and strides in elements. No PyTorch, no Python, any C++17 compiler.
//
// Unless said otherwise an array is dense, row-major, and a pointer that is null stands for an argument not given or a
// result not asked for. `x`, `q`, `meta` may have any strides. The launchers of CUDA allocate nothing, wait for nothing
// and can be captured in a CUDA graph. Those of the CPU (STTM_CPU) return when the results are there, take scratch
// memory of their own and leave alone what is called scratch here.
#pragma once

#include <cstdint>

#if defined(STTM_HOST)
#include "../../host/cuda_on_host.hpp"
#elif !defined(STTM_CPU)
#include <cuda_runtime_api.h>
#endif

namespace sttm {

#if defined(STTM_CPU)
using Error = void;  // what goes wrong is thrown
struct Stream {
    int threads;  // how many may work
};
#else
using Error = cudaError_t;
using Stream = cudaStream_t;
#endif

// Of features. Scores, weights, sizes, positions and masses are float, indices int32_t, masks bytes of 0 or 1.
enum class DType : int32_t { float32, float16, bfloat16 };

enum class Reduce : int32_t { mean, sum, max, first };

enum class Similarity : int32_t { cosine, dot, l2 };

// Rows of features: item b, row n, channel c at data[b * stride_b + n * stride_n + c * stride_c].
struct Rows {
    const void* data;
    int64_t stride_b, stride_n, stride_c;
};

// y (B, N, C) = row index[b, n] of x (B, K, C), 0 where index is outside of [0, K).
struct UnmergeArguments {
    DType dtype;
    int B, N, K, C;
    Rows x;
    const int32_t* index;
    void* y;
};
Error unmerge(const UnmergeArguments&, Stream);

// out (B, N) = index2[b, index1[b, n]], index1 (B, N), index2 (B, K); -1 where either leads nowhere.
struct ComposeArguments {
    int B, N, K, num_groups;
    const int32_t *index1, *index2;
    int32_t* out;
};
Error compose(const ComposeArguments&, Stream);

#if !defined(STTM_CPU)
// Whether kernels can run on the current device: a driver that is new enough, code for its architecture.
Error probe();
#endif

// How often N numbers are the scratch that sorting the tokens of an item takes, and match.
#if defined(STTM_CPU)
constexpr int kSortRoom = 1, kMatchRoom = 1;
#else
constexpr int kSortRoom = 2, kMatchRoom = 8;
#endif

// order (B, N), the tokens sorted by group and then by token, those without a group last; offsets (B, K + 1), where in
// it each group begins. other (kSortRoom, B, N) is scratch.
struct CsrArguments {
    int B, N, K;
    const int32_t* index;
    int32_t *order, *offsets, *other;
};
Error csr(const CsrArguments&, Stream);

// What similarity is measured on: item b, head h, row n, feature d at data[b * stride_b + h * stride_h + n * stride_n +
// d * stride_d], averaged over the heads.
struct Metric {
    const void* data;
    int heads;
    int64_t stride_b, stride_h, stride_n, stride_d;
};

// One float, or one byte of 0 or 1, per row of a batch item; data null if there is none.
struct Column {
    const float* data;
    int64_t stride_b, stride_n;
};
struct Mask {
    const uint8_t* data;
    int64_t stride_b, stride_n;
};

// One of several sequences that are packed one after another into the tokens of an item: `length` of them from `start`
// on, whose groups are `groups` from `first_group` on. At most `limit` merge.
struct PackedSequence {
    int32_t start, length, first_group, groups, limit;
    int32_t first_tile;  // of kSequenceTile tokens each, the last one ragged: how many the sequences before it have
};
constexpr int kSequenceTile = 128;

// Every src token finds its most similar dst token by cosine, the r best merge. Without lists, tokens behind the prefix
// are src at even positions and dst at odd ones; with lists, src (B or 1, windows, num_src) and dst (B or 1, windows,
// num_dst) are the tokens of each window, ascending, padded with -1.
//
// A token that mask leaves out is neither src nor dst and has index -1. Of item b at most r merge and at most limit[b],
// if that is given, and only where the score is above threshold, unless that is -inf. So items may have fewer than
// num_groups groups, and the last ones are empty; of more, those beyond the last join it.
//
// With sequences (num_sequences), in any order, that have `tiles` tiles together, B is 1 and each sequence is matched
// as if it were alone, without mask, limit and r. With lists, which then have one item, a window lies in one sequence,
// and a token in none of them stays, behind the prefix of its sequence.
//
// index, order and score are (B, N), offsets (B, num_groups + 1); score is -inf where there was nothing to find. order
// and offsets may be null. partner, of kMatchRoom * B * N + B numbers, at a multiple of 8 bytes, is scratch; so is mean
// (B, N, D rounded up to a multiple of 8) of the metric's dtype, which a metric of several heads needs, and one of
// 16-bit features that cannot be read 16 bytes at a time is faster with.
struct MatchArguments {
    DType dtype;
    bool tf32;  // whether float32 products may round to TF32
    int B, N, D;
    Metric metric;
    bool listed;  // src and dst are lists, which may be empty; else every second token
    const int32_t *src, *dst;
    int64_t stride_src, stride_dst;  // from item to item
    int windows, num_src, num_dst;
    Mask mask;
    const int32_t* limit;
    const PackedSequence* sequences;
    int num_sequences, tiles;
    int r, num_groups, num_prefix;
    float threshold;
    float* score;
    int32_t *index, *order, *offsets;
    int32_t* partner;
    void* mean;
};
Error match(const MatchArguments&, Stream);

// merge x (B, N, C) to y (B, K, C); positions (B, N, P), items dense; fill (B, K, C), items dense, or null.
// The tokens of each group come from `order` (B, N) and `offsets` (B, K + 1). If `other` (kSortRoom, B, N), scratch, is
// given, they are made here of `index` (B, N), else `index` is not read. Sizes and masses are (B, K), positions (B, K,
// P).
struct MergeArguments {
    DType dtype;
    Reduce reduce;
    int B, N, K, C, P;
    Rows x;
    const int32_t* index;
    int32_t *order, *offsets, *other;
    const float *weight, *size, *positions;
    int64_t stride_pb;
    const void* fill;
    int64_t stride_fb;
    void* y;
    float *size_out, *positions_out, *mass_out;
};
Error merge(const MergeArguments&, Stream);

// Gradients of what is asked for. `order` and `offsets` are needed for max and first and with `dot`, and are made of
// `index` if `other` is given, as in merge. `dot`, scratch (1, or 2 for sum, B, N), is needed where the gradient of
// weights depends on the mean over a group: weights or sizes are differentiated, and y of a mean or positions is.
struct MergeBackwardArguments {
    DType dtype;
    Reduce reduce;
    int B, N, K, C, P;
    Rows grad_y;  // data null if none
    const float *grad_size, *grad_positions;
    int64_t stride_qb;  // of grad_positions
    Rows x;
    const int32_t* index;
    int32_t *order, *offsets, *other;
    const float *weight, *size, *positions;
    int64_t stride_pb;
    const void* y;  // for max
    const float* mass;
    void* grad_x;
    float *grad_weight, *grad_size_in, *grad_positions_in, *dot;
    bool to_winners;  // set by the launcher
};
Error merge_backward(const MergeBackwardArguments&, Stream);

// Sequences in the verbs below: each of the B is an item whose rows are among the N of all of them. Then whatever has
// rows of tokens (q, x, a mask, ..., and results for tokens) has 1 item in place of B, and what has meta tokens or
// groups has B as without sequences. first_group / K says which of those is a sequence's own, and the index of its
// tokens counts from first_group on.

// Every row of q (B, heads, N, D) finds its most similar row of meta (B, heads, K, D). Results are (B, N): index and
// score; lse; weight, which needs lse. Rows of q that `mask` leaves out have index -1 and 0s, rows of meta that
// `meta_mask` leaves out are not looked at.
struct AssignArguments {
    DType dtype;
    bool tf32;  // whether float32 products may round to TF32
    Similarity similarity;
    float inverse_temperature;
    int B, N, K, D;
    const PackedSequence* sequences;  // B of them, or null
    bool swapped;                     // with sequences: q are the meta tokens, N of each, and meta are the K tokens
    bool earlier;                     // without: meta is q, whose rows look at those before them alone
    int left_out;                     // tokens of sequences of at most so many have no group; not on CPUs
    Metric q, meta;
    Mask mask, meta_mask;
    int32_t* index;
    float *score, *lse, *weight;
};
Error assign(const AssignArguments&, Stream);

// Gradients of score, lse and weight, each null if there is none, with respect to q (its shape) and meta (B, K, D),
// either null if not asked for. A row whose index is outside of [0, K) has none. Those of lse and weight need lse and,
// with respect to meta, `scratch`, of partial_floats(..., B, K, N, D, 1) if that is not 0.
//
// With grad_merged (B, K, D), dense, the mean over the heads of q was merged along index, too, by mean with `weight` and
// `size`: what comes back from there is added to grad_q. Masses are (B, K).
struct AssignBackwardArguments {
    DType dtype;
    bool tf32;
    Similarity similarity;
    float inverse_temperature;
    int B, N, K, D;
    const PackedSequence* sequences;
    Metric q, meta;
    const int32_t* index;
    const float *score, *lse, *weight;
    Column grad_score, grad_lse, grad_weight;
    const void* grad_merged;
    const float *size, *mass;
    void *grad_q, *grad_meta;
    float* scratch;
};
// Whether similarities to all meta tokens have a gradient, not that to the chosen one alone.
static inline bool is_soft(const AssignBackwardArguments& a) {
    return a.grad_lse.data != nullptr || a.grad_weight.data != nullptr;
}
Error assign_backward(const AssignBackwardArguments&, Stream);

// assign, then merge by mean along its index, of at most kAssignMergeTokens tokens and kAssignMergeGroups groups, in
// one launch. Both parts must agree; merge.weight is assign.weight, and merge has no other; its order and offsets are
// made, unless null. With sequences these are null, merge is of one item with the groups of all, and sequences that are
// longer are passed over.
struct AssignMergeArguments {
    AssignArguments assign;
    MergeArguments merge;
};
#if defined(STTM_CPU)
constexpr int kAssignMergeTokens = INT32_MAX;
constexpr int kAssignMergeGroups = INT32_MAX;
#else
constexpr int kAssignMergeTokens = 256;
constexpr int kAssignMergeGroups = 128;
#endif
Error assign_merge(const AssignMergeArguments&, Stream);

// What soft_merge and its gradients are made of: x (B, N, C), q (B, heads, N, D), meta (B, heads, K, D), positions
// (B, N, P), of floats. The softmax is over meta tokens (over_meta) or over tokens.
struct SoftMergeInputs {
    DType dtype;
    bool tf32;
    Similarity similarity;
    float inverse_temperature;
    bool over_meta;
    int B, N, K, C, D, P;
    const PackedSequence* sequences;
    Rows x;
    Metric q, meta;
    Column size;
    Mask mask;
    Rows positions;
};

// y (B, K, C), size_out (B, K), positions_out (B, K, P); lse is (B, N) over meta tokens and (B, K) over tokens. scratch
// has as many floats as partial_floats of spans.hpp says, for C columns and P + 2 more.
struct SoftMergeArguments : SoftMergeInputs {
    void* y;
    float *size_out, *positions_out, *lse, *scratch;
};
Error soft_merge(const SoftMergeArguments&, Stream);

// Gradients of what is asked for, given those of y (B, K, C), size_out and positions_out (B, K, P), each null if there
// is none. `mass` is size_out. shift (B, K) is scratch that grad_q, grad_meta and grad_size_in (B, N) need; grad_q and
// grad_meta need grad_size_in as well if over_meta. grad_meta needs scratch, as many floats as partial_floats of
// spans.hpp says for D columns and one more.
struct SoftMergeBackwardArguments : SoftMergeInputs {
    Rows grad_y;
    Column grad_size;
    Rows grad_positions;
    const void* y;
    const float *mass, *positions_out, *lse;
    void *grad_x, *grad_q, *grad_meta;
    float *grad_size_in, *grad_positions_in, *shift, *scratch;
};
Error soft_merge_backward(const SoftMergeBackwardArguments&, Stream);

}  // namespace sttm
