"""merge: features, positions, counts and masses of each group in one pass over x; and the way back.

`merge_kernel` takes the tokens of each group from a CSR, which `match` supplies and `csr` makes of any other index. A
program owns a few groups and a slice of the channels. It walks through its short groups side by side, one token of each
at a time, and then through its long ones, many tokens of one at a time. Everything is added up in float32, in an order
that the group's own tokens decide: not who owns it, nor what is beside it. The way back is a gather by
`merge_backward_kernel`.

A plan may be the caller's, and its `order` and `offsets` anything: what is no token is not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sttm_kernels.impl.triton.config import Config, configured, fixed
from sttm_kernels.impl.triton.csr import csr, parts
from sttm_kernels.impl.triton.launch import launch
from sttm_kernels.impl.triton.layout import aligned, alignment, dense, items
from sttm_kernels.impl.triton.similarity import power_of_two
from sttm_kernels.plan import Merged, MergedGrads, MergePlan, OfMerge

LONG_GROUPS = 16
"""Tokens per group on average from which on a program owns one group; the order of its sums is the same."""

_EXTENTS = ["N", "K", "stride_xb", "stride_xn", "stride_pb", "stride_fb", "stride_gb", "stride_qb"]


@triton.jit
def _weights(weight, size, n, inside):
    """w_n = size_n weight_n and size_n, which are 1 unless given; 0 outside."""
    ones = inside.to(tl.float32)
    count, w = ones, ones
    if size is not None:
        count = tl.load(size + n, mask=inside, other=0.0)
        w = count
    if weight is not None:
        w = w * tl.load(weight + n, mask=inside, other=0.0)
    return w, count


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _span(offsets, k, N, K):
    """Where the tokens of groups k start and end in `order`, within it."""
    start = tl.minimum(tl.maximum(tl.load(offsets + k, mask=k < K, other=0), 0), N)
    end = tl.load(offsets + k + 1, mask=k < K, other=0)
    return start, tl.maximum(tl.minimum(end, N), start)


@triton.jit
def _members(order, at, inside, N):
    """The tokens at these places of `order`, and which of them are tokens."""
    n = tl.load(order + at, mask=inside, other=-1)
    return n, (n >= 0) & (n < N)


@triton.jit
def _long_group(
    x_at, step, order, weight, size, positions, tokens, N, start, end, c, p, lead,
    REDUCE: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Of the tokens at [start, end) of `order`: features, mass, count, positions.

    Every BLOCK_R-th token goes into one sum, and in the end these are added up.
    """
    total = tl.full([BLOCK_R, BLOCK_C], float("-inf") if REDUCE == "max" else 0.0, tl.float32)
    mass = tl.zeros([BLOCK_R], tl.float32)
    count = tl.zeros([BLOCK_R], tl.float32)
    position = tl.zeros([BLOCK_R, BLOCK_P], tl.float32)
    for first in tl.range(start, end, BLOCK_R, loop_unroll_factor=UNROLL):
        i = first + tl.arange(0, BLOCK_R)
        n, here = _members(order, i, i < end, N)
        w, one = _weights(weight, size, tokens + n, here)
        mass += w
        count += one
        read = here
        if REDUCE == "first":
            read = here & (i == start)
        at = x_at + (n.to(tl.int64) * step)[:, None]
        value = tl.load(at, mask=read[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        total = _add(total, value, w, here, weight is None and size is None, REDUCE)
        if P > 0:
            at_position = positions + n.to(tl.int64)[:, None] * P + p[None, :]
            place = tl.load(at_position, mask=here[:, None] & (p < P)[None, :] & lead, other=0.0)
            position += w[:, None] * place
    if REDUCE == "max":
        feature = tl.reduce(total, 0, _larger)
    else:
        feature = tl.sum(total, 0)
    return feature, tl.sum(mass, 0), tl.sum(count, 0), tl.sum(position, 0)


@triton.jit
def _add(total, value, w, here, ONES: tl.constexpr, REDUCE: tl.constexpr):
    """`total` and the tokens `value`, which are 0 where there is none. ONES: they weigh 1."""
    if REDUCE == "max":
        total = tl.where(here[:, None], _larger(total, value), total)
    elif REDUCE == "first" or ONES:
        total += value
    else:
        total += w[:, None] * value
    return total


@triton.jit
def _store_groups(
    y, size_out, positions_out, mass_out, fill,
    total, mass, count, position, group, k, c, p, inside, lead,
    REDUCE: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Writes groups `group` = b K + k: y from the sums `total`, and if `lead` what has no channels."""
    empty = mass == 0
    divisor = tl.where(empty, 1.0, mass)
    if REDUCE == "mean":
        total = total / divisor[:, None]
    here = inside[:, None] & (c < C)[None, :]
    replacement = tl.zeros(total.shape, tl.float32)
    if fill is not None:
        replacement = tl.load(
            fill + k.to(tl.int64)[:, None] * C + c[None, :], mask=here & empty[:, None], other=0.0
        ).to(tl.float32)
    total = tl.where(empty[:, None], replacement, total)
    tl.store(y + group[:, None] * C + c[None, :], total.to(y.dtype.element_ty), mask=here)
    if P > 0:
        mean = tl.where(empty[:, None], 0.0, position / divisor[:, None])
        at = positions_out + group[:, None] * P + p[None, :]
        tl.store(at, mean, mask=inside[:, None] & (p < P)[None, :] & lead)
    tl.store(size_out + group, count, mask=inside & lead)
    tl.store(mass_out + group, mass, mask=inside & lead)


@triton.jit(do_not_specialize=_EXTENTS[:6], do_not_specialize_on_alignment=["stride_xc"])
def merge_kernel(
    x, stride_xb, stride_xn, stride_xc, order, offsets, weight, size,
    positions, stride_pb, fill, stride_fb,
    y, size_out, positions_out, mass_out, N, K,
    REDUCE: tl.constexpr, C: tl.constexpr, P: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """One program per block of groups and slice of channels; those of the first slice write what has no channels.

    Without `offsets`, `order` is what `csr` returns.
    """
    tiles = tl.cdiv(K, BLOCK_K)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_K
    k = first + tl.arange(0, BLOCK_K)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    lead = tl.program_id(1) == 0
    x_at = x + item * aligned(stride_xb, ALIGN) + (c.to(tl.int64) * stride_xc)[None, :]
    step = aligned(stride_xn, ALIGN)
    if offsets is None:
        offsets = order + (tl.num_programs(0) // tiles).to(tl.int64) * N
    order += item * N
    offsets += item * (K + 1)
    tokens = item * N
    if P > 0:
        positions += item * stride_pb
    begin, end = _span(offsets, k, N, K)
    length = end - begin

    total = tl.full([BLOCK_K, BLOCK_C], float("-inf") if REDUCE == "max" else 0.0, tl.float32)
    mass = tl.zeros([BLOCK_K], tl.float32)
    count = tl.zeros([BLOCK_K], tl.float32)
    position = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
    short = tl.where(length <= STEPS, length, 0)
    for i in range(tl.max(short, 0)):
        n, here = _members(order, begin + i, i < short, N)
        w, one = _weights(weight, size, tokens + n, here)
        mass += w
        count += one
        read = here
        if REDUCE == "first":
            read = here & (i == 0)
        at = x_at + (n.to(tl.int64) * step)[:, None]
        value = tl.load(at, mask=read[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        total = _add(total, value, w, here, weight is None and size is None, REDUCE)
        if P > 0:
            at_position = positions + n.to(tl.int64)[:, None] * P + p[None, :]
            place = tl.load(at_position, mask=here[:, None] & (p < P)[None, :] & lead, other=0.0)
            position += w[:, None] * place
    if tl.max(length, 0) > STEPS:
        for j in range(BLOCK_K):
            start, stop = _span(offsets, first + j, N, K)
            if stop - start > STEPS:
                mine = tl.arange(0, BLOCK_K) == j
                long_total, long_mass, long_count, long_position = _long_group(
                    x_at, step, order, weight, size, positions, tokens, N,
                    start, stop, c, p, lead, REDUCE, C, P, BLOCK_R, BLOCK_C, BLOCK_P, UNROLL,
                )  # fmt: skip
                total = tl.where(mine[:, None], long_total[None, :], total)
                mass = tl.where(mine, long_mass, mass)
                count = tl.where(mine, long_count, count)
                position = tl.where(mine[:, None], long_position[None, :], position)
    if fill is not None:
        fill += item * stride_fb
    _store_groups(
        y, size_out, positions_out, mass_out, fill,
        total, mass, count, position, item * K + k, k, c, p, k < K, lead, REDUCE, C, P,
    )  # fmt: skip


def _channels(C: int) -> int:
    return min(power_of_two(C), 256)


@configured("merge")
def _merge_config(arch: int, C: int, P: int, long: bool, element: int) -> tuple[Config, ...]:
    """Tiles small enough that nothing spills: the compiler aims at many programs per SM, lowest on sm_100.

    `long` decides who owns a group, and nothing of its sums.
    """
    block_c, block_p = _channels(C), power_of_two(max(P, 1), 1)
    rows = (2048 if element == 2 and arch < 100 else 1024) // block_c
    blocks = {"BLOCK_R": rows, "BLOCK_C": block_c, "BLOCK_P": block_p, "STEPS": 8}
    return (Config(4, 1, blocks | ({"BLOCK_K": 1, "UNROLL": 2} if long else {"BLOCK_K": rows, "UNROLL": 1})),)


def merge(
    x: Tensor, plan: MergePlan, size: Tensor | None, positions: Tensor | None, reduce: str, fill: Tensor | None
) -> Merged:
    index, num_groups, weight, order, offsets = plan.index, plan.num_groups, plan.weight, plan.order, plan.offsets
    (B, N, C), K, strides = x.shape, num_groups, x.stride()
    P = 0 if positions is None else positions.shape[2]
    y = x.new_empty(B, K, C)
    size_out = x.new_empty(B, K, dtype=torch.float32)
    mass, positions_out = torch.empty_like(size_out), size_out.new_empty(B, K, P)
    features = (dense(weight), dense(size), *items(positions), *items(fill), y, size_out, positions_out, mass, N, K)
    constants = {"REDUCE": reduce, "C": C, "P": P, "ALIGN": alignment(strides)}
    made: tuple[Tensor | None, Tensor | None] = (None, None)
    if order is None or offsets is None:
        order, offsets = csr(index.contiguous(), K), None
        made = parts(order, B, N, K)
    else:
        order, offsets = order.contiguous(), offsets.contiguous()
    config = _merge_config(x.device, C, P, N >= LONG_GROUPS * K, x.element_size())
    grid = (B * -(-K // config.blocks["BLOCK_K"]), -(-C // config.blocks["BLOCK_C"]))
    launch(merge_kernel, grid, x, *strides, order, offsets, *features, config=config, **constants)
    return Merged(y, size_out, None if positions is None else positions_out, mass, *made)


@triton.jit(
    do_not_specialize=[one for one in _EXTENTS if one != "stride_fb"],
    do_not_specialize_on_alignment=["stride_xc", "offsets"],
)
def merge_backward_kernel(
    grad_y, stride_gb, grad_size, grad_positions, stride_qb,
    x, stride_xb, stride_xn, stride_xc, index, order, offsets, weight, size,
    positions, stride_pb, mass,
    grad_x, grad_weight, grad_size_in, grad_positions_in, dot_out, N, K,
    REDUCE: tl.constexpr, CENTRED: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_G: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program per block of tokens. What is None is not wanted.

    grad_x_n = (w_n / mass_k) g_k for "mean", w_n g_k for "sum", g_k of the first token for "first"; nothing for "max".
    The gradient of w_n is written unless CENTRED: then the products it is made of go to `dot_out` (2, B, N), one plane
    for those from which `centre_kernel` takes their mean over the group, and one for the others.
    """
    tiles = tl.cdiv(N, BLOCK_N)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    token = item * N + n
    k = tl.load(index + token, mask=n < N, other=-1)
    member = (k >= 0) & (k < K)
    w, one = _weights(weight, size, token, member)
    group_mass = tl.load(mass + item * K + k, mask=member, other=0.0)
    full = group_mass != 0
    share = tl.where(full, w / tl.where(full, group_mass, 1.0), 0.0)
    coefficient = tl.where(full, w, 0.0)
    if REDUCE == "mean":
        coefficient = share
    if REDUCE == "first":
        head = tl.load(offsets + item * (K + 1) + k, mask=member, other=-1)
        head = tl.load(order + item * N + head, mask=(head >= 0) & (head < N), other=-1)
        coefficient = (full & (head == n)).to(tl.float32)
    row = k.to(tl.int64)[:, None]

    WANTS_W: tl.constexpr = (grad_weight is not None) or (grad_size_in is not None)
    LINEAR: tl.constexpr = (REDUCE == "mean") or (REDUCE == "sum")
    dot = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    if grad_x is not None or (WANTS_W and LINEAR and grad_y is not None):
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            inside = (c < C)[None, :]
            g = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
            if grad_y is not None:
                at = grad_y + item * aligned(stride_gb, ALIGN_G) + row * C + c[None, :]
                g = tl.load(at, mask=full[:, None] & inside, other=0.0).to(tl.float32)
            if WANTS_W and LINEAR and grad_y is not None:
                at = x + item * aligned(stride_xb, ALIGN) + n.to(tl.int64)[:, None] * aligned(stride_xn, ALIGN)
                at += c.to(tl.int64)[None, :] * stride_xc
                dot += g * tl.load(at, mask=full[:, None] & inside, other=0.0).to(tl.float32)
            if grad_x is not None:
                value = (coefficient[:, None] * g).to(grad_x.dtype.element_ty)
                tl.store(grad_x + token[:, None] * C + c[None, :], value, mask=(n < N)[:, None] & inside)
    moved = tl.zeros([BLOCK_N], tl.float32)
    if P > 0:
        p = tl.arange(0, BLOCK_P)
        inside = full[:, None] & (p < P)[None, :]
        g = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
        if grad_positions is not None:
            at = grad_positions + item * stride_qb + row * P + p[None, :]
            g = tl.load(at, mask=inside, other=0.0)
        if grad_positions_in is not None:
            at = grad_positions_in + token[:, None] * P + p[None, :]
            tl.store(at, share[:, None] * g, mask=(n < N)[:, None] & (p < P)[None, :])
        if WANTS_W and CENTRED:
            at = positions + item * stride_pb + n.to(tl.int64)[:, None] * P + p[None, :]
            moved = tl.sum(g * tl.load(at, mask=inside, other=0.0), 1)
    if WANTS_W:
        plain = tl.sum(dot, 1)
        if CENTRED:
            if REDUCE == "mean":
                moved += plain
            elif REDUCE == "sum":
                tl.store(dot_out + (tl.num_programs(0) // tiles).to(tl.int64) * N + token, plain, mask=n < N)
            tl.store(dot_out + token, moved, mask=n < N)
        mine = n < N
        if CENTRED:
            mine = mine & (member == 0)
        _store_weight_grads(
            plain, grad_size, weight, size, grad_weight, grad_size_in, token, item * K + k, mine, member
        )


@triton.jit
def _store_weight_grads(
    grad_w, grad_size, weight, size, grad_weight, grad_size_in, token, group, inside, member
):  # fmt: skip
    """dL/dweight_n = size_n dL/dw_n and dL/dsize_n = weight_n dL/dw_n + dL/dsize'_k."""
    if grad_weight is not None:
        value = grad_w
        if size is not None:
            value = value * tl.load(size + token, mask=member, other=0.0)
        tl.store(grad_weight + token, tl.where(member, value, 0.0), mask=inside)
    if grad_size_in is not None:
        value = grad_w
        if weight is not None:
            value = value * tl.load(weight + token, mask=member, other=0.0)
        if grad_size is not None:
            value += tl.load(grad_size + group, mask=member, other=0.0)
        tl.store(grad_size_in + token, tl.where(member, value, 0.0), mask=inside)


@triton.jit(do_not_specialize=["N", "K"], do_not_specialize_on_alignment=["offsets"])
def centre_kernel(
    dot, order, offsets, weight, size, mass, grad_size, grad_weight, grad_size_in, N, K,
    REDUCE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program per block of groups: dL/dw_n = (dot_n - sum_m w_m dot_m / mass_k) / mass_k + the second plane.

    This is <g_k, x_n - y_k> / mass_k without the rounding error of y.
    """
    tiles = tl.cdiv(K, BLOCK_K)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    second = (tl.num_programs(0) // tiles).to(tl.int64) * N
    k = tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    begin, end = _span(offsets + item * (K + 1), k, N, K)
    begin, length = begin[:, None], (end - begin)[:, None]
    group_mass = tl.load(mass + item * K + k, mask=k < K, other=0.0)[:, None]
    full = group_mass != 0
    inverse = tl.where(full, 1.0 / tl.where(full, group_mass, 1.0), 0.0)
    longest = tl.max(tl.max(length, 1), 0)
    at = tl.arange(0, BLOCK_R)[None, :]
    total = tl.zeros([BLOCK_K, BLOCK_R], tl.float32)
    for start in range(0, longest, BLOCK_R):
        n, here = _members(order + item * N, begin + start + at, start + at < length, N)
        token = item * N + n
        w, one = _weights(weight, size, token, here)
        total += w * tl.load(dot + token, mask=here, other=0.0)
    mean = tl.sum(total, 1)[:, None] * inverse
    for start in range(0, longest, BLOCK_R):
        n, here = _members(order + item * N, begin + start + at, start + at < length, N)
        token = item * N + n
        # A token alone in its group is its mean: its weight moves nothing, rounding aside.
        grad_w = tl.where(length > 1, (tl.load(dot + token, mask=here, other=0.0) - mean) * inverse, 0.0)
        if REDUCE == "sum":
            grad_w += tl.load(dot + second + token, mask=here & full, other=0.0)
        group = item * K + k[:, None] + tl.zeros_like(token)
        _store_weight_grads(grad_w, grad_size, weight, size, grad_weight, grad_size_in, token, group, here, here)


@triton.jit(
    do_not_specialize=["N", "K", "stride_gb", "stride_xb", "stride_xn"],
    do_not_specialize_on_alignment=["stride_xc", "offsets"],
)
def merge_max_backward_kernel(
    grad_y, stride_gb, x, stride_xb, stride_xn, stride_xc, y, order, offsets, mass, grad_x, N, K,
    C: tl.constexpr, ALIGN: tl.constexpr, ALIGN_G: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per group and slice of channels: g goes to the first token that has the maximum, 0 to the others.

    The tokens that follow the last group have none, and get 0.
    """
    item = (tl.program_id(0) // (K + 1)).to(tl.int64)
    k = tl.program_id(0) % (K + 1)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.minimum(tl.maximum(tl.load(offsets + item * (K + 1) + k), 0), N)
    end = tl.minimum(tl.load(offsets + item * (K + 1) + k + 1, mask=k < K, other=2147483647), N)
    real = (k < K) & (tl.load(mass + item * K + k, mask=k < K, other=0.0) != 0)
    inside = (c < C) & real
    best = tl.load(y + (item * K + k) * C + c, mask=inside, other=0.0)
    g = tl.load(grad_y + item * aligned(stride_gb, ALIGN_G) + k.to(tl.int64) * C + c, mask=inside, other=0.0)
    x_at = x + item * aligned(stride_xb, ALIGN) + (c.to(tl.int64) * stride_xc)[None, :]
    rows = tl.arange(0, BLOCK_R)
    winner = tl.full([BLOCK_C], 2147483647, tl.int32)
    for start in range(begin, end, BLOCK_R):
        i = start + rows
        n, is_token = _members(order + item * N, i, i < end, N)
        here = is_token[:, None] & inside[None, :]
        value = tl.load(x_at + (n.to(tl.int64) * aligned(stride_xn, ALIGN))[:, None], mask=here, other=0.0)
        hit = (value == best[None, :]) | ((value != value) & (best != best)[None, :])
        winner = tl.minimum(winner, tl.min(tl.where(here & hit, i[:, None], 2147483647), 0))
    for start in range(begin, end, BLOCK_R):
        i = start + rows
        n, is_token = _members(order + item * N, i, i < end, N)
        value = tl.where(i[:, None] == winner[None, :], g[None, :], tl.zeros_like(g)[None, :])
        tl.store(grad_x + (item * N + n)[:, None] * C + c[None, :], value, mask=is_token[:, None] & (c < C)[None, :])


@configured("merge_backward")
def _backward_config(arch: int, C: int, P: int) -> tuple[Config, ...]:
    block_c = _channels(C)
    blocks = {
        "BLOCK_N": (2048 if arch < 100 else 1024) // block_c,
        "BLOCK_C": block_c,
        "BLOCK_P": power_of_two(max(P, 1), 1),
    }
    return (Config(4, 1, blocks),)


@configured("merge_max_backward")
def _max_config(arch: int, C: int) -> tuple[Config, ...]:
    return (Config(4, 1, {"BLOCK_R": 8, "BLOCK_C": _channels(C)}),)


CENTRE = Config(4, 1, {"BLOCK_K": 8, "BLOCK_R": 64})


def merge_backward(
    grads: MergedGrads,
    x: Tensor,
    plan: MergePlan,
    size: Tensor | None,
    positions: Tensor | None,
    out: Merged,
    reduce: str,
    needs: OfMerge,
) -> OfMerge:
    index, num_groups, weight, order, offsets = plan.index, plan.num_groups, plan.weight, plan.order, plan.offsets
    (grad_y, grad_size, grad_positions), y, mass = grads, out.x, out.mass
    (B, N, C), K, P = x.shape, num_groups, 0 if positions is None else positions.shape[2]
    need_x, need_weight, need_size, need_positions = needs
    need_positions = need_positions and positions is not None
    grad_x = x.new_empty(B, N, C) if need_x else None
    grad_weight, grad_size_in = (mass.new_empty(B, N) if need else None for need in (need_weight, need_size))
    grad_positions_in = mass.new_empty(B, N, P) if need_positions else None

    index, weight, size, grad_size = index.contiguous(), dense(weight), dense(size), dense(grad_size)
    need_w = need_weight or need_size
    through_y = need_w and grad_y is not None and reduce == "mean"
    through_positions = need_w and grad_positions is not None and positions is not None
    centred = through_y or through_positions
    to_winners = need_x and grad_y is not None and reduce == "max"
    if centred or to_winners or reduce == "first":
        if order is None or offsets is None:
            order, offsets = parts(csr(index, K), B, N, K)
        order, offsets = order.contiguous(), offsets.contiguous()
    else:
        order = offsets = None

    grad_y, stride_gb = items(grad_y)
    align = {"ALIGN": alignment(x.stride()), "ALIGN_G": alignment((stride_gb, 1))}
    if to_winners:
        config = _max_config(x.device, C)
        launch(
            merge_max_backward_kernel,
            (B * (K + 1), -(-C // config.blocks["BLOCK_C"])),
            grad_y, stride_gb, x, *x.stride(), y.contiguous(), order, offsets, mass, grad_x, N, K,
            config=config, C=C, **align,
        )  # fmt: skip
    gather_x = need_x and not to_winners
    if not (gather_x or need_w or need_positions):
        return OfMerge(grad_x, grad_weight, grad_size_in, grad_positions_in)
    dot = mass.new_empty((2 if reduce == "sum" else 1, B, N) if centred else 0)
    config = _backward_config(x.device, C, P)
    launch(
        merge_backward_kernel,
        (B * -(-N // config.blocks["BLOCK_N"]),),
        grad_y, stride_gb, grad_size, *items(grad_positions), x, *x.stride(),
        index, order, offsets, weight, size, *items(positions), mass,
        grad_x if gather_x else None, grad_weight, grad_size_in, grad_positions_in, dot, N, K,
        config=config, REDUCE=reduce, CENTRED=centred, C=C, P=P, **align,
    )  # fmt: skip
    if centred:
        config = fixed("centre", CENTRE)
        launch(
            centre_kernel,
            (B * -(-K // config.blocks["BLOCK_K"]),),
            dot, order, offsets, weight, size, mass, grad_size,
            grad_weight, grad_size_in, N, K,
            config=config, REDUCE=reduce,
        )  # fmt: skip
    return OfMerge(grad_x, grad_weight, grad_size_in, grad_positions_in)
