"""Proportional attention: a key that stands for s tokens is attended to as those s tokens would be."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sttm_kernels import packed, validate
from sttm_kernels.reference import acc_dtype

METHODS = ("auto", "mask", "augment", "flex", "off")
PACKED_METHODS = (*METHODS, "varlen")


def proportional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    scale: float | None = None,
    method: str = "auto",
    dropout: float = 0.0,
    *,
    lengths: Sequence[int] | Tensor | None = None,
    key_lengths: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """softmax_m(scale <q_n, k_m> + log size_m) v_m, by PyTorch's fused attention.

    Args:
        q: `(B, H, M, D)`.
        k, v: `(B, H, N, D)`, `(B, H, N, Dv)`.
        size: `(B, N)` token counts, or None for ones. A key of size 0 is never attended to; if all keys of a batch item
            have size 0, its output is undefined.
        scale: default 1 / sqrt(D).
        method: how log(size) gets into a fused kernel.
            "mask" passes it as a float mask `(B, 1, 1, N)`, which PyTorch's cuDNN, memory-efficient and CPU attention
            take as it is, broadcast, and FlashAttention does not. The mask has q's dtype, so in bfloat16 a size is
            exact to about 1 part in 64 at size 1000, 1 part in 250 at size 2.
            "augment" lengthens the head dimension to a multiple of 8: q by (1, 1, 0...), k by log(size) / scale as the
            sum of two numbers of q's dtype. Any kernel takes that, FlashAttention too; a bfloat16 size is exact to
            about 1 part in 2000.
            "flex" adds it in float32 inside `flex_attention`, compiled on a GPU; no dropout, and no gradients on a CPU.
            "auto" is `choose_method`. "off" leaves size out, for keys of size 0 too.
        dropout: probability of dropping an attention weight.
        lengths: of packed sequences how many queries each has, on the host; then q is `(H, M, D)`, k `(H, N, D)`,
            v `(H, N, Dv)` and size `(N,)`, and each sequence attends within itself. Sequences of the same lengths are
            one call of the fused attention, so none is padded; "flex" is one call for all, with a block mask; and
            `method="varlen"` is one call of PyTorch's `varlen_attn`, with the head dimension that "augment" makes:
            on a GPU, in float16 or bfloat16, without dropout.
        key_lengths: how many keys each has, at least 1 where there are queries; default `lengths`.

    Returns:
        `(B, H, M, Dv)` in q's dtype; `(H, M, Dv)` of packed sequences.

    Differentiable with respect to q, k and v; size is a constant, since a mask that wants a gradient gives up the fused
    paths. Deterministic as `torch.nn.functional.scaled_dot_product_attention` is.
    Errors: `TypeError` for a wrong type; `ValueError` for a wrong shape, device or method; `RuntimeError` where
    "varlen" cannot run, with the reason.
    Source: Token Merging (Bolya et al., arXiv 2210.09461).
    """
    if lengths is not None:
        return _packed(q, k, v, size, scale, method, dropout, lengths, lengths if key_lengths is None else key_lengths)
    if key_lengths is not None:
        raise ValueError(f"key_lengths must be None without lengths, got {key_lengths}")
    validate.features("q", q, "(B, H, M, D)", 4)
    validate.one_of("method", method, METHODS)
    if size is None or method == "off":
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    validate.tensor("size", size)
    validate.shape("size", size, "(B, N)", (k.shape[0], k.shape[2]))
    validate.same_device("size", size, "k", k)
    if method == "auto":
        method = choose_method(q.device, q.dtype, q.shape[-1])
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if method == "mask":
        bias = size_bias(size, q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
    if method == "augment":
        return _augmented(q, k, v, _log(size, q.dtype), scale, dropout)
    if dropout:
        raise ValueError(f"dropout must be 0 with method 'flex', got {dropout}")
    return _flex(q, k, v, _log(size, q.dtype), scale)


def _packed(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, scale: float | None, method: str, dropout: float,
    lengths: Sequence[int] | Tensor, key_lengths: Sequence[int] | Tensor,
) -> Tensor:  # fmt: skip
    shape, keys = validate.features("q", q, "(H, M, D)", 3), validate.features("k", k, "(H, N, D)", 3)
    queries, keys_of = (
        validate.lengths(name, given, extent)
        for name, given, extent in (("lengths", lengths, shape[1]), ("key_lengths", key_lengths, keys[1]))
    )
    validate.features("v", v, "(H, N, Dv)", 3)
    validate.shape("v", v, "(H, N, Dv)", (shape[0], keys[1], v.shape[2]))
    if size is not None:
        validate.beside("size", size, "(N,)", (keys[1],), "k", k)
    if len(queries) != len(keys_of):
        raise ValueError(f"key_lengths must have one number for each of {len(queries)} sequences, got {len(keys_of)}")
    if any(m > 0 and n == 0 for m, n in zip(queries, keys_of, strict=True)):
        raise ValueError("key_lengths must be at least 1 where there are queries, got 0")
    validate.one_of("method", method, PACKED_METHODS)
    if method in ("flex", "varlen"):
        if dropout:
            raise ValueError(f"dropout must be 0 with method {method!r}, got {dropout}")
        log_size = None if size is None else _log(size, q.dtype)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return (_flex_packed if method == "flex" else _varlen)(q, k, v, log_size, scale, queries, keys_of)

    alike: dict[tuple[int, int], list[int]] = {}
    for number, each in enumerate(zip(queries, keys_of, strict=True)):
        if each[0] > 0:
            alike.setdefault(each, []).append(number)
    results, rows = [], []
    for (m, n), numbers in alike.items():
        at, at_keys = _rows(queries, numbers, m, q.device), _rows(keys_of, numbers, n, q.device)
        own_q, own_k, own_v = (
            (t if where is None else t.index_select(1, where)).unflatten(1, (len(numbers), -1)).transpose(0, 1)
            for t, where in ((q, at), (k, at_keys), (v, at_keys))
        )
        own_size = size if size is None or at_keys is None else size.index_select(0, at_keys)
        own_size = None if own_size is None else own_size.view(len(numbers), n)
        out = proportional_attention(own_q, own_k, own_v, own_size, scale, method, dropout)
        results.append(out.transpose(0, 1).flatten(1, 2))
        rows.append(at)
    if len(results) == 1:
        return results[0]
    order = torch.cat([each for each in rows if each is not None])
    return torch.cat(results, 1).index_select(1, order.argsort())


def _rows(lengths: Sequence[int], numbers: Sequence[int], length: int, device: torch.device) -> Tensor | None:
    """Where the tokens of these sequences, which have this length, are; None if they are all that there are."""
    if len(numbers) * length == sum(lengths):
        return None
    start = packed.starts(lengths)
    first = torch.tensor([start[number] for number in numbers], device="cpu")
    return (first[:, None] + torch.arange(length, device="cpu")).flatten().to(device)


def choose_method(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The `method` of `proportional_attention` that "auto" takes, by rule rather than by measurement.

    "mask" on CPUs; on GPUs where cuDNN's attention is PyTorch's first choice and takes the mask (Hopper and later,
    PyTorch 2.11 and later); and for dtypes that FlashAttention lacks. Elsewhere "augment" if the longer head dimension
    stays inside the one FlashAttention rounds to (80 to 88, in 96), "mask" if it would cost a larger one (64 to 72).
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return "mask"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version >= (2, 11) and torch.cuda.get_device_capability(device)[0] >= 9:
        return "mask"
    return "augment" if _flash_extent(_augmented_extent(head_dim)) == _flash_extent(head_dim) else "mask"


def _flash_extent(head_dim: int) -> int:
    return next((extent for extent in (64, 96, 128, 192, 256) if head_dim <= extent), 0)


def _augmented_extent(head_dim: int) -> int:
    return (head_dim + 2 + 7) // 8 * 8


def _log(size: Tensor, dtype: torch.dtype) -> Tensor:
    return size.detach().to(acc_dtype(dtype)).log()


def size_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """log(size) `(B, N)` as a mask `(B, 1, 1, N)` in `dtype`, -inf for a size of 0."""
    return _log(size, dtype).to(dtype)[:, None, None, :]


def _augmented(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor, scale: float, dropout: float) -> Tensor:
    q, k, wide_v = _lengthened(q, k, v, log_size, scale)
    return F.scaled_dot_product_attention(q, k, wide_v, dropout_p=dropout, scale=scale)[..., : v.shape[-1]]


def _lengthened(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with a head dimension that holds log(size)."""
    B, H, N, D = k.shape
    # Far below any logit, yet finite: an infinite product with the zeros of the padding would be NaN.
    lowest = -min(torch.finfo(q.dtype).max / 2, 1e30)
    bias = (log_size / scale).clamp(min=lowest)
    high = bias.to(q.dtype)
    low = (bias - high.to(bias.dtype)).to(q.dtype)
    pad = _augmented_extent(D) - D
    columns = torch.stack((high, low), -1)[:, None].expand(B, H, N, 2)
    ones = torch.ones((*q.shape[:3], 2), dtype=q.dtype, device=q.device)
    q = torch.cat((q, F.pad(ones, (0, pad - 2))), -1)
    k = torch.cat((k, F.pad(columns, (0, pad - 2))), -1)
    return q, k, F.pad(v, (0, pad))  # FlashAttention wants v as wide as q and k


def _flex(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor, scale: float) -> Tensor:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + log_size[b, j]

    # Inside a graph that is being compiled it is compiled along with the rest.
    run = _compiled_flex_attention() if q.is_cuda and not torch.compiler.is_compiling() else _flex_attention()
    return run(q, k, v, score_mod=score_mod, scale=scale)


def _flex_packed(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, scale: float, lengths: Sequence[int],
    key_lengths: Sequence[int],
) -> Tensor:  # fmt: skip
    from torch.nn.attention.flex_attention import create_block_mask

    def sequence(of: Sequence[int]) -> Tensor:
        return torch.arange(len(of), device="cpu").repeat_interleave(torch.tensor(of, device="cpu")).to(q.device)

    of_query, of_key = sequence(lengths), sequence(key_lengths)

    def within(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return of_query[i] == of_key[j]

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score if log_size is None else score + log_size[j]

    mask = create_block_mask(within, None, None, q.shape[1], k.shape[1], device=q.device)
    run = _compiled_flex_attention() if q.is_cuda and not torch.compiler.is_compiling() else _flex_attention()
    return run(q[None], k[None], v[None], score_mod=score_mod, block_mask=mask, scale=scale)[0]


def why_not_varlen(q: Tensor) -> str | None:
    """Why `varlen_attn` cannot attend with q, or None."""
    try:
        from torch.nn.attention import varlen  # noqa: F401  of PyTorch 2.10 and later
    except ImportError:
        return f"PyTorch {torch.__version__} has no varlen_attn"
    if q.device.type != "cuda":
        return f"it runs on GPUs, not on {q.device}"
    return None if q.dtype in (torch.float16, torch.bfloat16) else f"it takes float16 and bfloat16, not {q.dtype}"


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, scale: float, lengths: Sequence[int],
    key_lengths: Sequence[int],
) -> Tensor:  # fmt: skip
    reason = why_not_varlen(q)
    if reason is not None:
        raise RuntimeError(f"method 'varlen' cannot run: {reason}")
    from torch.nn.attention import varlen

    attend: Any = varlen.varlen_attn
    width = v.shape[-1]
    if log_size is not None:
        q, k, v = (t[0] for t in _lengthened(q[None], k[None], v[None], log_size[None], scale))
    ends = (torch.tensor(packed.starts(of), dtype=torch.int32, device=q.device) for of in (lengths, key_lengths))
    rows = (t.transpose(0, 1).contiguous() for t in (q, k, v))
    out = attend(*rows, *ends, max(lengths), max(key_lengths), scale=scale)
    return out.transpose(0, 1)[..., :width]


def _flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention  # imported late: it takes long

    return flex_attention


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(_flex_attention(), dynamic=True)
