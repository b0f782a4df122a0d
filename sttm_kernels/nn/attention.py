"""Proportional attention: a key that stands for s tokens is attended to as those s tokens would be."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sttm_kernels import validate
from sttm_kernels.reference import acc_dtype

METHODS = ("mask", "off")


def proportional_attention(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, scale: float | None = None, method: str = "mask"
) -> Tensor:
    """softmax_m(scale <q_n, k_m> + log size_m) v_m, by PyTorch's fused attention.

    Args:
        q: `(B, H, M, D)`.
        k, v: `(B, H, N, D)`, `(B, H, N, Dv)`.
        size: `(B, N)` token counts, or None for ones. A key of size 0 is never attended to; if all keys of a batch item
            have size 0, its output is undefined.
        scale: default 1 / sqrt(D).
        method: "mask" passes log(size) as a float mask `(B, 1, 1, N)`, which PyTorch's cuDNN, memory-efficient and CPU
            attention take as it is, broadcast, and FlashAttention does not. The mask has q's dtype, so in bfloat16 a
            size is exact to about 1 part in 64 at size 1000, 1 part in 250 at size 2. "off" leaves size out.

    Returns:
        `(B, H, M, Dv)` in q's dtype.

    Differentiable with respect to q, k and v; size is a constant, since a mask that wants a gradient gives up the fused
    paths. Deterministic as `torch.nn.functional.scaled_dot_product_attention` is.
    Errors: `TypeError` for a wrong type, `ValueError` for a wrong shape, device or method.
    Source: Token Merging (Bolya et al., arXiv 2210.09461).
    """
    validate.floating("q", q)
    validate.dims("q", q, "(B, H, M, D)", 4)
    validate.one_of("method", method, METHODS)
    if size is None or method == "off":
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    validate.tensor("size", size)
    validate.shape("size", size, "(B, N)", (k.shape[0], k.shape[2]))
    validate.same_device("size", size, "k", k)
    bias = size.detach().to(acc_dtype(q.dtype)).log().to(q.dtype)[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
