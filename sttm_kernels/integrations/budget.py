"""Amounts to merge by intent: a share of the tokens, how many shall be left, or what the model may cost.

How many tokens an input has and what a model costs are found out on a copy on PyTorch's meta device, where nothing is
computed.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from sttm_kernels import validate
from sttm_kernels.integrations import selfcheck
from sttm_kernels.integrations.amounts import Amount, Share, Tokens, merges, nearest, toward
from sttm_kernels.integrations.merging import Anatomy, Step, find_layers

Input = tuple[str, tuple[int, ...]] | Callable[[], dict[str, Any]]
"""The name and shape of what a model is given, or what makes it on the meta device."""

SHARES = 1000
"""A share of the tokens is chosen in steps of 1 / SHARES."""
TOLERANCE = 0.01
"""How far beyond what the layers can reach a budget of operations may be, as a share of it."""


def check(r: Any, keep: Any, flops: Any, schedule: Any) -> bool:
    """Whether amounts are given by intent and not by numbers; exactly one of r, keep and flops must be given."""
    given = [name for name, value in (("r", r), ("keep", keep), ("flops", flops)) if value is not None]
    if len(given) != 1:
        raise TypeError(
            f"exactly one of r, keep and flops must be given with method 'tome', got {' and '.join(given) or 'none'}"
        )
    if r is not None and (not isinstance(r, Real) or isinstance(r, Integral)):
        return False
    if schedule != "constant":
        raise ValueError(f"schedule must be 'constant' unless r is an int, got {schedule!r}")
    return True


def amounts(layers: int, r: Any, keep: Any, flops: Any, num_protected: int) -> list[Amount]:
    """For each of so many merging layers; of `flops` the least there is, for `fit` chooses."""
    if r is not None:
        if not 0 <= r <= 0.5:
            raise ValueError(f"r as a share must be between 0 and 0.5, for more cannot merge in one layer, got {r}")
        share = Fraction(str(float(r)))
        return [Share(share.numerator, share.denominator) if share else 0] * layers
    if keep is not None:
        keep = validate.integer("keep", keep, 1)
        if keep < num_protected:
            raise ValueError(f"keep must be at least the {num_protected} protected tokens, got {keep}")
        return toward(keep - num_protected, layers)
    validate.positive("flops", flops)
    if flops > 1:
        raise ValueError(f"flops must be at most 1, what the model takes without merging, got {flops}")
    return toward(1, layers)


def fit(model: nn.Module, plain: Any, parts: Anatomy, keep: int | None, flops: float | None) -> None:
    """Notes in the steps of a model what is planned for the input it is configured for; chooses amounts for `flops`.

    `plain` is what `try_on_meta` made of the model before it was changed.
    """
    steps: list[Step] = [layer._sttm for layer in find_layers(model)]
    merging = [step for step in steps if merges(step.r)]
    packed = parts.families[0].packed
    if packed and flops is None:
        return  # its pieces are of many sizes
    try:
        if isinstance(plain, Exception):
            raise plain
        if parts.example is None:
            raise RuntimeError("the size of its input is not known")
        path = _path(model, model if parts.body is None else parts.body)
        body = plain.get_submodule(path)
        found = 0 if packed else probe(body, plain.get_submodule(_path(model, parts.layers[0])), parts.example)
        full = 0 if flops is None else operations(body, parts.example)
        tried: Any = None if flops is None else on_meta(model).get_submodule(path)
    except Exception as error:
        if flops is not None:
            raise ValueError(f"flops must be left out for {type(model).__name__}, got {flops}: {error}") from error
        return
    if packed:
        assert flops is not None
        share = share_within(flops, full, tried, parts.example)
        for step in merging:
            step.r = share or 0
        _begin(steps)
        return
    count, prefix, unit = found, parts.num_prefix, parts.unit
    if unit is not None:
        count, prefix = (found - prefix) // unit, 0
    tokens = Tokens(count, prefix, steps[0].protect)
    if keep is not None:
        fewest, most = tokens.fewest(len(merging)), count - prefix
        if not fewest <= keep <= most:
            raise ValueError(
                f"keep must be between {fewest} and {most}, what {len(merging)} merging layers can leave, got {keep}"
            )
    if flops is not None:
        chosen = _within(flops, full, tried, parts.example, tokens)
        for step, amount in zip(merging, chosen, strict=True):
            step.r = amount
    _begin(steps)
    if any(step.window is not None for step in steps):
        return  # what can merge within windows is known when the grid is
    before = found
    for step, left in zip(steps, tokens.after([step.r for step in steps]), strict=True):
        after = left if unit is None else parts.num_prefix + left * unit
        step.planned, before = (before, after), after


def _path(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


def _begin(steps: Sequence[Step]) -> None:
    """Tells every layer whether one before it merges."""
    for step in steps:
        step.begun = any(merges(other.r) for other in steps[: step.layer])


def share_within(flops: float, full: int, copied: nn.Module, given: Input) -> Share | None:
    """Of the tokens of every piece, in every merging layer of a model on the meta device, what brings its operations
    nearest to a share of full; None for none."""
    merging = [layer._sttm for layer in find_layers(copied) if merges(layer._sttm.r)]

    @cache
    def cost(minus: int) -> int:
        for step in merging:
            step.r = Share(-minus, SHARES)
        return operations(copied, given) if minus else full

    least = -SHARES // 2
    _must_reach(flops, full, cost(least), len(merging))
    share = -nearest(flops * full, least, 0, cost)
    return Share(share, SHARES) if share else None


def _must_reach(flops: float, full: int, least: int, layers: int) -> None:
    if flops * full < (1 - TOLERANCE) * least:
        reached = least / full
        raise ValueError(f"flops must be at least {reached:.3f}, what {layers} merging layers can reach, got {flops}")


def _within(flops: float, full: int, copied: nn.Module, given: Input, tokens: Tokens) -> Sequence[Amount]:
    """For each merging layer of a model on the meta device, what brings its operations nearest to a share of full."""
    merging = [layer._sttm for layer in find_layers(copied) if merges(layer._sttm.r)]
    layers = len(merging)
    least, most = tokens.fewest(layers) - len(tokens.protected), tokens.count - tokens.fixed

    @cache
    def cost(kept: int) -> int:
        if kept == most:
            return full
        for step, amount in zip(merging, toward(kept, layers), strict=True):
            step.r = amount
        return operations(copied, given)

    _must_reach(flops, full, cost(least), layers)
    kept = nearest(flops * full, least, most, cost)
    return toward(kept, layers) if kept < most else [0] * layers


# On the meta device


def on_meta(model: nn.Module) -> Any:
    """A copy on PyTorch's meta device, in evaluation mode and without hooks, which belong to the user."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        bare = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(bare, False) if isinstance(tensor, nn.Parameter) else bare
    for part in model.modules():
        memo |= {id(getattr(part, name)): OrderedDict() for name in selfcheck.HOOKS}
    return copy.deepcopy(model, memo).eval()


def try_on_meta(model: nn.Module) -> Any:
    """The copy, or the reason why there is none."""
    try:
        return on_meta(model)
    except Exception as error:
        return error


class _Found(Exception):
    """The tokens that the first layer was given."""


def probe(copied: nn.Module, first: nn.Module, given: Input) -> int:
    """How many tokens come to the layer `first` of a model on the meta device."""

    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        raise _Found(next(iter((*args, *kwargs.values()))).shape[1])

    hook = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        copied(**_made(copied, given))
    except _Found as found:
        return found.args[0]
    finally:
        hook.remove()
    raise RuntimeError("its first layer was not called")


def operations(copied: nn.Module, given: Input) -> int:
    """Floating-point operations of a model on the meta device."""
    from sttm_kernels.nn import flops  # registers formulas with PyTorch

    return flops.count(lambda: copied(**_made(copied, given)))


def _made(model: nn.Module, given: Input) -> dict[str, Any]:
    if callable(given):
        return given()
    name, shape = given
    return {name: torch.empty(shape, dtype=selfcheck.dtype_of(model), device="meta")}
