"""What `apply` tries out on a layer before it trusts its own idea of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sttm_kernels.integrations.merging import Step

COPIES = 8


@contextmanager
def quietly(layer: nn.Module) -> Iterator[None]:
    """In evaluation mode, without gradients and without autocast."""
    training = {module: module.training for module in layer.modules()}
    layer.eval()
    try:
        device = next(layer.parameters()).device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def random_tokens(layer: nn.Module, num_tokens: int, dim: int) -> Tensor:
    """`(2, num_tokens, dim)` in the layer's dtype, on its device."""
    parameter = next(layer.parameters())
    x = torch.randn(2, num_tokens, dim, generator=torch.Generator().manual_seed(0))
    return x.to(parameter.device, parameter.dtype)


def run(layer: nn.Module, x: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, bool]:
    """What the layer makes of x, and whether it returned that in a tuple."""
    with quietly(layer):
        out = layer(x, **arguments)
    return (out[0], True) if isinstance(out, tuple) else (out, False)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.is_meta or torch.equal(a, b))


def counts_work(layer: nn.Module, step: Step, x: Tensor, arguments: dict[str, Any], unit: int) -> bool:
    """Whether a token that counts for several is attended to as that many tokens.

    x holds the prefix and then pieces of `unit` tokens; the last piece is the one that is repeated.
    """

    def attend(x: Tensor, size: Tensor | None, places: Tensor) -> Tensor:
        ids = places.expand(x.shape[0], -1) if step.rotary else None
        out = step.family.attend(layer, x, step.call, size, ids, arguments)[0]
        step.call.take_keys()
        return out

    tokens = x.shape[1]
    places = torch.arange(tokens - step.num_prefix, device=x.device)
    size = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
    size[:, -unit:] = COPIES
    with quietly(layer):
        plain = attend(x, None, places)
        counted = attend(x, size, places)
        copies = torch.cat((x, *[x[:, -unit:]] * (COPIES - 1)), 1)
        copied = attend(copies, None, torch.cat((places, *[places[-unit:]] * (COPIES - 1))))[:, :tokens]
    if x.is_meta:
        return counted.shape == copied.shape
    plain, counted, copied = (each.double() for each in (plain, counted, copied))
    rounding = 4 * torch.finfo(x.dtype).eps * copied.norm()
    return bool((counted - copied).norm() <= 0.1 * (plain - copied).norm() + rounding)
