"""What `apply` tries out on a layer before it trusts its own idea of it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sttm_kernels.integrations.merging import Layer, Step, Told

COPIES = 8
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def kind(layer: nn.Module) -> Any:
    """None; but of a layer on the meta device what it has in common with others that would pass the same checks."""
    on_meta = any(each.is_meta for each in (*layer.parameters(), *layer.buffers()))
    return (type(layer), repr(layer)) if on_meta else None


def with_numbers(layer: Layer) -> Layer:
    """A copy of a layer that has none, on the CPU, with random ones."""
    copied = copy.deepcopy(layer).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for each in (*copied.parameters(), *copied.buffers()):
            if each.is_floating_point():
                each.copy_(0.1 * torch.randn(each.shape, generator=generator, device="cpu"))
            else:
                each.zero_()
    return copied


def dtype_of(layer: nn.Module) -> torch.dtype:
    """That of the first floating parameter: quantised weights are integers."""
    return next((each.dtype for each in layer.parameters() if each.is_floating_point()), torch.get_default_dtype())


@contextmanager
def quietly(layer: nn.Module) -> Iterator[None]:
    """In evaluation mode, without gradients, without autocast and without hooks, which belong to the user."""
    training = {module: module.training for module in layer.modules()}
    hooks = [(module, name, getattr(module, name)) for module in training for name in HOOKS if getattr(module, name)]
    layer.eval()
    for module, name, _ in hooks:
        setattr(module, name, OrderedDict())
    try:
        with torch.no_grad(), torch.autocast(next(layer.parameters()).device.type, enabled=False):
            yield
    finally:
        for module, name, found in hooks:
            setattr(module, name, found)
        for module, mode in training.items():
            module.training = mode


def random_tokens(layer: nn.Module, num_tokens: int, dim: int) -> Tensor:
    """`(2, num_tokens, dim)` in the layer's dtype, on its device."""
    x = torch.randn(2, num_tokens, dim, generator=torch.Generator().manual_seed(0), device="cpu")
    return x.to(next(layer.parameters()).device, dtype_of(layer))


def beside(x: Tensor, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments on x's device, floating ones in its dtype, with random numbers for tensors that have none."""

    def placed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(placed(each) for each in value)
        if not isinstance(value, Tensor):
            return value
        if value.is_meta:
            generator = torch.Generator().manual_seed(0)
            value = torch.rand(value.shape, generator=generator, device="cpu").to(value.dtype)
        return value.to(x.device, x.dtype if value.is_floating_point() else value.dtype)

    return {name: placed(value) for name, value in arguments.items()}


def run(layer: Layer, x: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, bool]:
    """What the layer makes of x, and whether it returned that in a tuple."""
    with quietly(layer):
        out = layer.forward(x, **arguments)
    return (out[0], True) if isinstance(out, tuple) else (out, False)


def counts_work(layer: Layer, step: Step, x: Tensor, arguments: dict[str, Any], unit: int) -> bool:
    """Whether a token that counts for several is attended to as that many tokens.

    x holds the prefix and then pieces of `unit` tokens; the last piece is the one that is repeated.
    """

    def attend(x: Tensor, size: Tensor | None, places: Tensor) -> Tensor:
        told = Told(size, places.expand(x.shape[0], -1) if step.rotary else None, step.method)
        with told:
            return step.family.attend(layer, x, told, arguments)[0]

    tokens = x.shape[1]
    places = torch.arange(tokens - step.num_prefix, device=x.device)
    size = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
    size[:, -unit:] = COPIES
    with quietly(layer):
        plain = attend(x, None, places)
        counted = attend(x, size, places)
        copies = torch.cat((x, *[x[:, -unit:]] * (COPIES - 1)), 1)
        copied = attend(copies, None, torch.cat((places, *[places[-unit:]] * (COPIES - 1))))[:, :tokens]
    plain, counted, copied = (each.double() for each in (plain, counted, copied))
    rounding = 4 * torch.finfo(x.dtype).eps * copied.norm()
    return bool((counted - copied).norm() <= 0.1 * (plain - copied).norm() + rounding)
