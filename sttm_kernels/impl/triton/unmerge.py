"""unmerge and compose: gathers along an index, 0 or -1 where it points outside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sttm_kernels.impl.triton.config import Config, configured, fixed
from sttm_kernels.impl.triton.launch import launch
from sttm_kernels.impl.triton.layout import aligned, alignment
from sttm_kernels.impl.triton.similarity import power_of_two
from sttm_kernels.plan import MergePlan


@triton.jit(do_not_specialize=["N", "K", "stride_xb", "stride_xk"], do_not_specialize_on_alignment=["stride_xc"])
def unmerge_kernel(
    x, stride_xb, stride_xk, stride_xc, index, y, N, K,
    C: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per block of tokens and slice of channels."""
    tiles = tl.cdiv(N, BLOCK_N)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.load(index + item * N + n, mask=n < N, other=-1)
    member = (k >= 0) & (k < K)
    at = x + item * aligned(stride_xb, ALIGN) + (k.to(tl.int64) * aligned(stride_xk, ALIGN))[:, None]
    at += (c.to(tl.int64) * stride_xc)[None, :]
    value = tl.load(at, mask=member[:, None] & (c < C)[None, :], other=0.0)
    tl.store(y + (item * N + n)[:, None] * C + c[None, :], value, mask=(n < N)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["N", "K", "num_groups"])
def compose_kernel(index1, index2, out, N, K, num_groups, BLOCK: tl.constexpr):
    """One program per block of tokens."""
    tiles = tl.cdiv(N, BLOCK)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    k = tl.load(index1 + item * N + n, mask=n < N, other=-1)
    onward = tl.load(index2 + item * K + k, mask=(k >= 0) & (k < K), other=-1)
    onward = tl.where((onward >= 0) & (onward < num_groups), onward, -1)
    tl.store(out + item * N + n, onward, mask=n < N)


@configured("unmerge")
def _unmerge_config(arch: int, C: int) -> tuple[Config, ...]:
    block_c = min(power_of_two(C), 512)
    return (Config(4, 1, {"BLOCK_N": 4096 // block_c, "BLOCK_C": block_c}),)


COMPOSE = Config(4, 1, {"BLOCK": 512})


def unmerge(x: Tensor, plan: MergePlan) -> Tensor:
    index = plan.index
    (B, K, C), N, strides = x.shape, index.shape[1], x.stride()
    y = x.new_empty(B, N, C)
    config = _unmerge_config(x.device, C)
    grid = (B * -(-N // config.blocks["BLOCK_N"]), -(-C // config.blocks["BLOCK_C"]))
    args = (x, *strides, index.contiguous(), y, N, K)
    launch(unmerge_kernel, grid, *args, config=config, C=C, ALIGN=alignment(strides))
    return y


def compose(plan1: MergePlan, plan2: MergePlan) -> MergePlan:
    index1, index2, num_groups = plan1.index.contiguous(), plan2.index.contiguous(), plan2.num_groups
    (B, N), K = index1.shape, index2.shape[1]
    out = torch.empty_like(index1)
    config = fixed("compose", COMPOSE)
    grid = (B * -(-N // config.blocks["BLOCK"]),)
    launch(compose_kernel, grid, index1, index2, out, N, K, num_groups, config=config)
    return MergePlan(out, num_groups)
