"""Token merging inside models of timm and Hugging Face transformers: `apply`, `remove` and `trace`.

Neither library is imported unless the model is of it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeVar

from torch import Tensor, nn

from sttm_kernels import validate
from sttm_kernels.compat.tome import parse_r
from sttm_kernels.integrations import selfcheck
from sttm_kernels.integrations.merging import (
    Anatomy,
    LayerTrace,
    MergingLayer,
    Step,
    Swapped,
    drop_own_forward,
    find_layers,
    merging_class,
    restore_class,
)
from sttm_kernels.nn.attention import METHODS
from sttm_kernels.nn.sttm import STTM

__all__ = ["LayerTrace", "apply", "remove", "trace"]

Model = TypeVar("Model", bound=nn.Module)

MERGES = ("tome", "sttm")
SCHEDULES = {"constant": 0.0, "rising": 1.0, "falling": -1.0}


def apply(
    model: Model,
    r: int | list[int] | None = None,
    schedule: str | float = "constant",
    method: str = "tome",
    layers: Sequence[int] | None = None,
    prop_attn: str = "auto",
    window: tuple[int, int, int] | None = None,
    trace: bool = False,
    **sttm: Any,
) -> Model:
    """Makes a model merge its tokens, in place; applied again, it starts from the model as it was before.

    Every chosen layer merges between its attention and its MLP: "tome" matches tokens by the mean of the attention keys
    over heads (before rotary positions) and merges them weighted by their counts; the layers after it attend in
    proportion to counts. The last layer copies every group back to its tokens, so outputs have the shapes they had and
    pooling is exact. Class, distillation and register tokens stay as they are.

    Args:
        model: timm's VisionTransformer (ViT, DeiT, DeiT III, DINOv2, SigLIP) or Eva (EVA02, rotary ViTs, DINOv3); or
            ViT, VideoMAE, ViViT, V-JEPA 2 or TimeSformer of transformers, with or without a head.
        r: for "tome", the tokens to merge away in each layer, or a list with one number per layer, filled up with 0;
            clamped in each layer to half of what can merge. In TimeSformer's divided attention, of places: each of them
            is a token in every frame.
        schedule: of a single r over the layers: "constant"; "rising", from 0 to 2 r; "falling", from 2 r to 0; or a
            number between -1 (falling) and 1 (rising).
        method: "tome"; or "sttm", a `sttm_kernels.STTM` at one layer for its spatial stage and at another for its
            temporal stage. Motion features are parameters of the model, `<layer>.sttm.motion.weight`, and start at 0.
        layers: which layers merge, counted from 0, -1 the last; default all. For "sttm" the two layers (spatial,
            temporal), default a third and two thirds down; None for one of them leaves that stage out.
        prop_attn: `method` of `sttm_kernels.nn.proportional_attention`; "off" attends without regard to counts.
        window: (t, h, w) of `sttm_kernels.match`. Only with a single merging layer, which still finds the grid.
        trace: whether to keep what each layer merged, for `trace(model)`.
        **sttm: for "sttm", arguments of `STTM`: spatial_keep, temporal_keep, meta, motion and so on.

    Returns:
        The model.

    Before anything is changed, every layer is run on random tokens: merging nothing it must give what it gave, bit for
    bit, and a token that counts for several must be attended to as that many tokens.

    Errors: `TypeError` or `ValueError` with the reason for a model that is not supported, an argument out of range, a
    layer that fails the check. A forward raises if it is given an attention mask that is not one of padding, and under
    reentrant checkpointing or DataParallel.
    Source: Token Merging (Bolya et al., arXiv 2210.09461); Spatial-temporal Token Merger (doi 10.1145/3633781).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise TypeError("model must not be compiled yet: apply, and then torch.compile")
    validate.one_of("method", method, MERGES)
    validate.one_of("prop_attn", prop_attn, METHODS)
    if window is not None:
        window = validate.extents("window", window, 3, "(t, h, w)")
    remove(model)
    parts = _anatomy(model)
    depth = len(parts.layers)
    counts, stages = [0] * depth, dict[int, STTM]()
    if method == "tome":
        if sttm:
            raise TypeError(f"{min(sttm)} must be left out with method 'tome', got {sttm[min(sttm)]!r}")
        counts = _counts(depth, r, schedule, layers)
    else:
        if r is not None:
            raise ValueError(f"r must be None with method 'sttm', which takes spatial_keep and temporal_keep, got {r}")
        stages = _stages(parts, layers, sttm)
    merging = [layer for layer in range(depth) if counts[layer] or layer in stages]
    if window is not None and (stages or len(merging) > 1):
        raise ValueError(
            "window must be None unless a single layer merges, by 'tome': later layers have no grid; "
            f"got {window} with merging layers {merging}"
        )
    for name, used, given in (("method", bool(stages), method), ("window", window is not None, window)):
        if used and name in parts.refused:
            raise ValueError(f"{name} must be left out for {type(model).__name__}, got {given}: {parts.refused[name]}")
        if used and parts.grid is None:
            raise ValueError(f"{name} must be left out for {type(model).__name__}, got {given}: its grid is not known")

    try:
        for number in range(depth):
            _install(parts, number, prop_attn, check_counts=number in (0, depth - 1))
        for number, layer in enumerate(parts.layers):
            step: Step = layer._sttm
            step.r = counts[number]
            step.begun = any(other < number for other in merging)
            step.last = number == depth - 1
            step.window, step.empties, step.trace = window, bool(stages), trace
            if number in stages:
                parameter = next(layer.parameters())
                layer.add_module("sttm", stages[number].to(parameter.device))
        if parts.mixin is not None:
            model.__class__ = merging_class(type(model), parts.mixin)
    except BaseException:
        remove(model)
        raise
    return model


def remove(model: Model) -> Model:
    """Undoes `apply`, in place; a model that was not changed stays as it is.

    The parameters that "sttm" added go too. Returns the model.
    """
    layers = find_layers(model)
    if isinstance(model, Swapped) and model not in layers:
        restore_class(model)
    for layer in layers:
        layer._sttm.family.uninstall(layer)
        restore_class(layer)
        del layer._sttm
        layer._modules.pop("sttm", None)
    return model


def trace(model: nn.Module) -> list[LayerTrace]:
    """What every layer of a model changed by `apply(..., trace=True)` merged in its last forward.

    Returns:
        One `LayerTrace` for each layer from the first that merges: which layer, size `(B, K)`, index `(B, N0)`.

    Errors: `RuntimeError` if nothing was kept.
    """
    layers = find_layers(model)
    if not any(layer._sttm.trace for layer in layers):
        raise RuntimeError("trace needs a model changed by apply(model, ..., trace=True)")
    kept = [layer._sttm.traced for layer in layers if layer._sttm.traced is not None]
    if not kept:
        raise RuntimeError("trace needs a forward of the model first, with at least one layer that merges")
    return kept


def _anatomy(model: nn.Module) -> Anatomy:
    found = None
    if "transformers" in sys.modules:
        from sttm_kernels.integrations import huggingface

        found = huggingface.anatomy(model)
    if found is None:
        from sttm_kernels.integrations import timm

        found = timm.anatomy(model)
    if found is None:
        raise TypeError(
            "model must be a vision Transformer of timm or transformers, with blocks and num_prefix_tokens or a "
            f"supported config.model_type, got {type(model).__name__}"
        )
    return found


def _layer_numbers(depth: int, layers: Sequence[int]) -> list[int]:
    layers = [validate.integer("every entry of layers", layer, -depth) for layer in layers]
    for layer in layers:
        if layer >= depth:
            raise ValueError(f"layers must be below the depth of {depth}, got {layer}")
    numbers = [layer % depth for layer in layers]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"layers must be different from each other, got {tuple(layers)}")
    return numbers


def _counts(depth: int, r: int | list[int] | None, schedule: str | float, layers: Sequence[int] | None) -> list[int]:
    """Tokens to merge away in each layer."""
    numbers = list(range(depth)) if layers is None else _layer_numbers(depth, layers)
    if isinstance(schedule, str):
        validate.one_of("schedule", schedule, tuple(SCHEDULES))
        inflection = SCHEDULES[schedule]
    else:
        if isinstance(schedule, bool) or not isinstance(schedule, Real):
            raise TypeError(f"schedule must be a str or a float, got {type(schedule).__name__}")
        if not -1 <= schedule <= 1:
            raise ValueError(f"schedule must be between -1 and 1, got {schedule}")
        inflection = float(schedule)
    if isinstance(r, (list, tuple)):
        if inflection:
            raise ValueError(f"schedule must be 'constant' where r is a list, got {schedule!r}")
        if len(r) > len(numbers):
            raise ValueError(f"r must have at most one entry per merging layer, {len(numbers)}, got {len(r)}")
        r = [validate.integer("every entry of r", each, 0) for each in r]
        spread = parse_r(len(numbers), r) if numbers else []
    else:
        r = validate.integer("r", r, 0)
        spread = parse_r(len(numbers), (r, inflection)) if numbers else []
    counts = [0] * depth
    for number, count in zip(numbers, spread, strict=True):
        counts[number] = count
    return counts


def _stages(parts: Anatomy, layers: Sequence[int | None] | None, options: dict[str, Any]) -> dict[int, STTM]:
    """The STTM of each layer that has one: the spatial stage at one, the temporal stage at another."""
    depth = len(parts.layers)
    if layers is None:
        layers = (depth // 3, 2 * depth // 3)
    if len(layers) != 2 or (layers[0] is None and layers[1] is None):
        raise ValueError(
            f"layers must be (spatial, temporal) with method 'sttm', one of them may be None, got {layers}"
        )
    numbers = iter(_layer_numbers(depth, [layer for layer in layers if layer is not None]))
    keeps = {name: options.pop(name, 0.5) for name in ("spatial_keep", "temporal_keep")}
    stages = {}
    for name, layer in zip(keeps, layers, strict=True):
        if layer is not None:
            only = {**dict.fromkeys(keeps), name: keeps[name]}
            stages[next(numbers)] = STTM(parts.dim, num_prefix=parts.num_prefix, **only, **options)
    if layers[0] is not None and layers[1] is not None and list(stages) != sorted(stages):
        raise ValueError(f"layers must name the spatial layer before the temporal one, got {tuple(layers)}")
    return stages


def _install(parts: Anatomy, number: int, prop_attn: str, check_counts: bool) -> None:
    """Makes a layer a merging one that merges nothing yet, of the first family that passes the checks."""
    layer = parts.layers[number]
    what = f"layer {number}, a {type(layer).__name__},"
    drop_own_forward(layer)
    parameters = list(inspect.signature(type(layer).forward).parameters.values())[2:]
    names = tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)
    x = selfcheck.random_tokens(layer, parts.num_tokens, parts.dim)
    arguments = {
        name: value.to(x.device) if isinstance(value, Tensor) else value for name, value in parts.arguments.items()
    }
    try:
        before, returns_tuple = selfcheck.run(layer, x, arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"model must take any number of tokens: {what} cannot take {x.shape[1]}: {error}") from error
    for family in parts.families:
        call = family.install(layer, "auto" if prop_attn == "off" else prop_attn)
        step = Step(
            number,
            family,
            call,
            num_prefix=parts.num_prefix,
            method=prop_attn,
            names=names,
            returns_tuple=returns_tuple,
            rotary=parts.rotary,
            grid=parts.grid,
        )
        layer._sttm = step
        layer.__class__ = merging_class(type(layer), MergingLayer)
        after = selfcheck.run(layer, x, arguments)[0]
        if selfcheck.same_bits(before, after):
            break
        remove(layer)
    else:
        raise ValueError(f"model must be of a known kind: {what} without merging does not give what it gave before")
    if check_counts and prop_attn != "off" and not selfcheck.counts_work(layer, step, x, arguments, parts.unit):
        raise ValueError(f"model must take token counts into its attention: {what} takes no heed of them")
