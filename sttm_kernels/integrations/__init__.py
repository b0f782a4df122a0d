"""Token merging inside models of timm and Hugging Face transformers: `apply`, `remove`, `restore`, `trace`.

Neither library is imported unless the model is of it.
"""

from __future__ import annotations

import inspect
import itertools
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sttm_kernels import validate
from sttm_kernels.compat.tome import parse_r
from sttm_kernels.integrations import budget, checkpoints, selfcheck
from sttm_kernels.integrations.amounts import Amount, merges
from sttm_kernels.integrations.merging import (
    NOTHING,
    Anatomy,
    Grid,
    HoldsLayers,
    Layer,
    LayerTrace,
    MergingLayer,
    Passage,
    Record,
    Step,
    drop_own_forward,
    find_layers,
    holders,
    swap,
    unswap,
)
from sttm_kernels.nn.attention import METHODS
from sttm_kernels.nn.sttm import STTM

__all__ = ["LayerTrace", "apply", "remove", "restore", "trace"]

Model = TypeVar("Model", bound=nn.Module)

MERGES = ("tome", "sttm")
APPLIED = itertools.count(1)
SCHEDULES = {"constant": 0.0, "rising": 1.0, "falling": -1.0}


def apply(
    model: Model,
    r: float | list[int] | None = None,
    schedule: str | float = "constant",
    method: str = "tome",
    layers: Sequence[int] | None = None,
    prop_attn: str = "auto",
    window: tuple[int, int, int] | None = None,
    trace: bool = False,
    *,
    keep: int | None = None,
    flops: float | None = None,
    protect: Tensor | Iterable[int] | None = None,
    **sttm: Any,
) -> Model:
    """Makes a model merge its tokens, in place; applied again, it starts from the model as it was before.

    Every chosen layer merges between its attention and its MLP: "tome" matches tokens by the mean of the attention keys
    over heads (before rotary positions) and merges them weighted by their counts; the layers after it attend in
    proportion to counts. The last layer copies every group back to its tokens, so outputs have the shapes they had and
    pooling is exact. Class, distillation and register tokens stay as they are.

    Args:
        model: timm's VisionTransformer (ViT, DeiT, DeiT III, DINOv2, SigLIP), Eva (EVA02, rotary ViTs, DINOv3) or
            NaFlexVit; or ViT, DeiT, VideoMAE, ViViT, V-JEPA 2, TimeSformer, DINOv2 (with registers), DINOv3 or the
            vision model of CLIP, SigLIP, SigLIP 2, InternVL, Qwen2.5-VL or Qwen3-VL of transformers, with or without a
            head; or of the last three, or LLaVA-OneVision, the whole video-language model.
        r: for "tome", the tokens to merge away in each layer, or a list with one number per layer, filled up with 0;
            clamped in each layer to half of what can merge, which `trace` shows. A float between 0 and 0.5 is a share
            of the tokens that are there, prefix and protected ones aside, rounded down. In TimeSformer's divided
            attention r and `keep` are of places: each of them is a token in every frame. In Qwen2.5-VL and Qwen3-VL
            they are of each window, or of each frame.
        schedule: of a single whole r over the layers: "constant"; "rising", from 0 to 2 r; "falling", from 2 r to 0; or
            a number between -1 (falling) and 1 (rising).
        method: "tome"; or "sttm", a `sttm_kernels.STTM` at one layer for its spatial stage and at another for its
            temporal stage. What they learn are parameters of the model: `<layer>.sttm.motion.weight`, which starts at
            0, and with meta="topk" or "learned" `<layer>.sttm.spatial_meta.*` and `<layer>.sttm.temporal_meta.*`.
        layers: which layers merge, counted from 0, -1 the last; default all. For "sttm" the two layers (spatial,
            temporal), default a third and two thirds down; None for one of them leaves that stage out.
        prop_attn: `method` of `sttm_kernels.nn.proportional_attention`; "off" attends without regard to counts.
        window: (t, h, w) of `sttm_kernels.match`, in the grid of the input. Only with a single merging layer, which
            still finds the grid.
        trace: whether to keep what each layer merged, for `trace(model)`.
        keep: in place of r: how many tokens are left after the last merging layer, the prefix not counted, from inputs
            of any size; in equal steps, the first ones greater where they must be.
        flops: in place of r: the floating-point operations of the model as a share of those without merging, at most 1.
            It gets the `keep` whose count comes nearest, for one input of the size it is configured for, by running a
            copy on PyTorch's meta device. In Qwen2.5-VL and Qwen3-VL it is a share r, for an image of 448 x 448 pixels;
            of a video-language model, the operations are those of its vision tower.
        protect: tokens that never merge, as in `sttm_kernels.match`, counted in the sequence that comes to the layers,
            prefix included. In TimeSformer's divided attention the places of these tokens.
        **sttm: for "sttm", arguments of `STTM`: spatial_keep, temporal_keep, meta, motion and so on.

    Returns:
        The model.

    The `repr` of the model says what each layer merges away; where it was said by intent and the size of the input is
    known, with the tokens that come and go.

    Before anything is changed, every layer is run on random tokens, without hooks: merging nothing it must give what it
    gave, bit for bit, and a token that counts for several must be attended to as that many tokens. On the meta device a
    copy with random numbers is run instead, of one layer of each kind.

    Applied again, it keeps the parameters that "sttm" added. No state of a call is kept in the model, so threads may
    share it. What changes or wraps layers comes after: `fully_shard`, `torch.compile`, `parallelize_module`.

    Errors: `TypeError` or `ValueError` with the reason for a model that is not supported, an argument out of range, a
    layer that fails the check, sharded or compiled layers, trained parameters of "sttm" that would be lost. A forward
    raises if it is given an attention mask that is not one of padding, under reentrant checkpointing or DataParallel,
    and if something outside of the layers puts other values in place of the hidden states.
    Source: Token Merging (Bolya et al., arXiv 2210.09461); Spatial-temporal Token Merger (doi 10.1145/3633781).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise TypeError("model must not be compiled yet: apply, and then torch.compile")
    parts = _anatomy(model)
    wanted = _wanted(model, parts, r, schedule, method, layers, prop_attn, window, keep, flops, protect, sttm)
    _keep_trained(model, wanted.stages)
    put_back = unswap(model)
    try:
        _put_in(model, parts, wanted, Record() if trace else None)
    except BaseException:
        unswap(model)
        put_back()
        raise
    return model


@dataclass(frozen=True)
class Wanted:
    """What `apply` was told, checked.

    Attributes:
        amounts: by layer, what "tome" merges away.
        stages: by number of the layer, the STTM that it gets.
        protected: the places that never merge.
        by_intent: whether r is a share, or `keep` or `flops` was given.
    """

    amounts: list[Amount]
    stages: dict[int, STTM]
    protected: tuple[int, ...]
    prop_attn: str
    window: tuple[int, int, int] | None
    keep: int | None
    flops: float | None
    by_intent: bool

    @property
    def merging(self) -> list[int]:
        """The layers that merge."""
        return [n for n, amount in enumerate(self.amounts) if merges(amount) or n in self.stages]


def _wanted(
    model: nn.Module,
    parts: Anatomy,
    r: float | list[int] | None,
    schedule: str | float,
    method: str,
    layers: Sequence[int] | None,
    prop_attn: str,
    window: tuple[int, int, int] | None,
    keep: int | None,
    flops: float | None,
    protect: Tensor | Iterable[int] | None,
    sttm: dict[str, Any],
) -> Wanted:
    validate.one_of("method", method, MERGES)
    validate.one_of("prop_attn", prop_attn, METHODS)
    if window is not None:
        window = validate.extents("window", window, 3, "(t, h, w)")
    depth = len(parts.layers)
    protected = () if protect is None else _pieces(parts, validate.tokens("protect", protect, None))
    amounts: list[Amount] = [0] * depth
    stages, by_intent = dict[int, STTM](), False
    if method == "tome":
        if sttm:
            raise TypeError(f"{min(sttm)} must be left out with method 'tome', got {sttm[min(sttm)]!r}")
        by_intent = budget.check(r, keep, flops, schedule)
        numbers = list(range(depth)) if layers is None else _layer_numbers(depth, layers)
        if by_intent:
            spread = budget.amounts(len(numbers), r, keep, flops, len(protected))
        else:
            spread = _counts(len(numbers), r, schedule)
        for number, amount in zip(numbers, spread, strict=True):
            amounts[number] = amount
    else:
        _must_be_none(r=r, keep=keep, flops=flops, protect=protect)
        with torch.inference_mode(False):  # parameters are to be trained, wherever they were made
            stages = _stages(parts, layers, sttm)
    wanted = Wanted(amounts, stages, protected, prop_attn, window, keep, flops, by_intent)
    if protected and "protect" in parts.refused:
        text = f"protect must be left out for {type(model).__name__}, got {len(protected)} tokens"
        raise ValueError(f"{text}: {parts.refused['protect']}")
    _check_grid(type(model).__name__, parts, method, window, wanted.merging, flops)
    return wanted


def _put_in(model: nn.Module, parts: Anatomy, wanted: Wanted, record: Record | None) -> None:
    """Makes every layer a merging one, and tells it what to merge."""
    depth, merging, stages, applied = len(parts.layers), wanted.merging, wanted.stages, next(APPLIED)
    plain = budget.try_on_meta(model) if wanted.by_intent else None
    tried = dict[Any, Step]()
    for number in range(depth):
        _install(parts, number, wanted.prop_attn, number in (0, depth - 1), tried)
    for number, layer in enumerate(parts.layers):
        step: Step = layer._sttm
        step.r, step.protect, step.window = wanted.amounts[number], wanted.protected, wanted.window
        step.begun, step.last = any(other < number for other in merging), number == depth - 1
        step.empties, step.record, step.applied = bool(stages), record, applied
        if number in stages:
            device, dtype = next(layer.parameters()).device, selfcheck.dtype_of(layer)
            with torch.inference_mode(False):
                layer.add_module("sttm", stages[number].to(device, dtype))
    if wanted.window is not None or stages:
        for part in parts.gridded:
            swap(*part)
    for part in parts.swaps:
        swap(*part)
    if parts.mixin is not None:
        swap(model, parts.mixin)
    for holder in holders(model, parts.layers):
        if not isinstance(holder, HoldsLayers):
            swap(holder, HoldsLayers)
    if wanted.by_intent:
        budget.fit(model, plain, parts, wanted.keep, wanted.flops)


def remove(model: Model) -> Model:
    """Undoes `apply`, in place; a model that was not changed stays as it is.

    The parameters that "sttm" added go too. Returns the model.

    Errors: `RuntimeError` or `ValueError`, with the model as it was, if something else has changed its modules since.
    """
    unswap(model)
    return model


def restore(model: Model, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> Model:
    """Loads the parameters that "sttm" added from where a model was saved, into a model it was applied to again.

        model = VideoMAEForVideoClassification.from_pretrained(folder)  # says that it does not know them
        sttm.restore(sttm.apply(model, method="sttm", layers=(3, 7)), folder)

    Args:
        model: after `apply(model, method="sttm", ...)` with the arguments that it had.
        source: a folder of `save_pretrained`, a file of `safetensors` or `torch.save`, or a state_dict.

    Returns:
        The model. `load_state_dict` after `apply` loads these parameters with the others, so it needs no `restore`.

    Errors: `RuntimeError` if the model has no such parameters, `ValueError` if the source has others.
    """
    mergers: dict[int, Layer] = {
        layer._sttm.layer: layer.sttm for layer in find_layers(model) if hasattr(layer, "sttm")
    }
    if not mergers:
        raise RuntimeError("restore needs a model changed by apply(model, method='sttm', ...)")
    found = checkpoints.added(source)
    for number, merger in mergers.items():
        have, want = set(found.get(number, ())), set(merger.state_dict())
        if have != want or set(found) != set(mergers):
            raise ValueError(
                f"source must have the parameters of method 'sttm' at layers {sorted(mergers)}, {sorted(want)} at "
                f"layer {number}; got layers {sorted(found)}, {sorted(have)} at layer {number}"
            )
    for number, merger in mergers.items():
        merger.load_state_dict(found[number])
    return model


def trace(model: nn.Module) -> list[LayerTrace]:
    """What every layer of a model changed by `apply(..., trace=True)` merged in its last forward.

    Returns:
        One `LayerTrace` for each layer from the first that merges: which layer, size `(B, K)`, index `(B, N0)`.

    Errors: `RuntimeError` if nothing was kept.
    """
    records = [layer._sttm.record for layer in find_layers(model) if layer._sttm.record is not None]
    if not records:
        raise RuntimeError("trace needs a model changed by apply(model, ..., trace=True)")
    if not records[0].traced:
        raise RuntimeError("trace needs a forward of the model first, with at least one layer that merges")
    return list(records[0].traced)


def _known(model: nn.Module) -> Anatomy | None:
    """What a model is made of, None if it is of no known library, `ValueError` if it is but cannot be merged."""
    found = None
    if "transformers" in sys.modules:
        from sttm_kernels.integrations import huggingface

        found = huggingface.anatomy(model)
    if found is None:
        from sttm_kernels.integrations import timm

        found = timm.anatomy(model)
    return found


def _anatomy(model: nn.Module) -> Anatomy:
    found = _known(model)
    if found is not None:
        return found
    message = (
        "model must be a vision Transformer of timm or transformers, with blocks and num_prefix_tokens or a supported "
        f"config.model_type, got {type(model).__name__}"
    )
    for name, module in model.named_modules():
        with suppress(ValueError):
            if name and _known(module) is not None:
                message += f"; inside of it, model.{name} is one: apply to that"
                break
    raise TypeError(message)


def _keep_trained(model: nn.Module, stages: dict[int, STTM]) -> None:
    """Gives new mergers the parameters that a model has of theirs; `ValueError` if some that were trained are lost."""
    for layer in find_layers(model):
        old, number = getattr(layer, "sttm", None), layer._sttm.layer
        if old is None:
            continue
        state = old.state_dict(keep_vars=True)
        shapes = {name: value.shape for name, value in state.items()}
        if number in stages and shapes == {name: value.shape for name, value in stages[number].state_dict().items()}:
            frozen = [each for each in old.parameters() if not each.requires_grad]
            stages[number].load_state_dict(state, assign=True)  # the same parameters, which an optimizer may know
            for parameter in frozen:
                parameter.requires_grad_(False)
        elif lost := [name for name, value in state.items() if name != "motion.weight" or bool(value.any())]:
            raise ValueError(
                f"model must not lose what it may have learned: {', '.join(lost)} of layer {number}, of method 'sttm', "
                "have no place in what is to be applied; remove(model) first if they are not wanted"
            )


def _layer_numbers(depth: int, layers: Sequence[int]) -> list[int]:
    layers = [validate.integer("every entry of layers", layer, -depth) for layer in layers]
    for layer in layers:
        if layer >= depth:
            raise ValueError(f"layers must be below the depth of {depth}, got {layer}")
    numbers = [layer % depth for layer in layers]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"layers must be different from each other, got {tuple(layers)}")
    return numbers


def _check_grid(
    name: str, parts: Anatomy, method: str, window: Grid | None, merging: Sequence[int], flops: float | None
) -> None:
    """Checks what needs the grid of the tokens of a model of this name."""
    if window is not None and (method == "sttm" or len(merging) > 1):
        raise ValueError(
            "window must be None unless a single layer merges, by 'tome': later layers have no grid; "
            f"got {window} with merging layers {merging}"
        )
    if window is not None and flops is not None:
        raise ValueError(f"window must be None with flops, got {window}")
    for what, used, given in (("method", method == "sttm", method), ("window", window is not None, window)):
        if used and what in parts.refused:
            raise ValueError(f"{what} must be left out for {name}, got {given}: {parts.refused[what]}")
        if used and not parts.gridded:
            raise ValueError(f"{what} must be left out for {name}, got {given}: its grid is not known")


def _must_be_none(**arguments: Any) -> None:
    """Checks that what is of the other method was left out."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{name} must be None with method 'sttm', which takes spatial_keep and temporal_keep, got {value}"
            )


def _pieces(parts: Anatomy, protected: Sequence[int]) -> tuple[int, ...]:
    """Protected tokens behind the prefix; where tokens merge in pieces, the pieces that hold them."""
    behind = [n for n in protected if n >= parts.num_prefix]
    if parts.unit is None:
        return tuple(behind)
    return tuple(sorted({(n - parts.num_prefix) // parts.unit for n in behind}))


def _counts(layers: int, r: float | list[int] | None, schedule: str | float) -> list[Amount]:
    """Tokens to merge away in each of so many layers."""
    if isinstance(schedule, str):
        validate.one_of("schedule", schedule, tuple(SCHEDULES))
        inflection = SCHEDULES[schedule]
    else:
        if isinstance(schedule, bool) or not isinstance(schedule, Real):
            raise TypeError(f"schedule must be a str or a float, got {type(schedule).__name__}")
        if not -1 <= schedule <= 1:
            raise ValueError(f"schedule must be between -1 and 1, got {schedule}")
        inflection = float(schedule)
    if isinstance(r, tuple):
        raise TypeError(
            f"r must be an int or a list with one number per layer, got {r}: ToMe's (r, inflection) is "
            "r=r, schedule=inflection"
        )
    if isinstance(r, list):
        if inflection:
            raise ValueError(f"schedule must be 'constant' where r is a list, got {schedule!r}")
        if len(r) > layers:
            raise ValueError(f"r must have at most one entry per merging layer, {layers}, got {len(r)}")
        r = [validate.integer("every entry of r", each, 0) for each in r]
        return [*parse_r(layers, r)] if layers else []
    r = validate.integer("r", r, 0)
    return [*parse_r(layers, (r, inflection))] if layers else []


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
            number = next(numbers)
            keys = parts.dim // parts.families[0].heads(parts.layers[number])  # their mean over heads is the metric
            stages[number] = STTM(parts.dim, num_prefix=parts.num_prefix, metric_dim=keys, **only, **options)
    if layers[0] is not None and layers[1] is not None and list(stages) != sorted(stages):
        raise ValueError(f"layers must name the spatial layer before the temporal one, got {tuple(layers)}")
    return stages


def _install(parts: Anatomy, number: int, prop_attn: str, check_counts: bool, tried: dict[Any, Step]) -> None:
    """Makes a layer a merging one that merges nothing yet, of the first family that passes the checks.

    A layer on the meta device is tried out as a copy that has numbers, unless one of its kind is in `tried`.
    """
    layer = parts.layers[number]
    what = f"layer {number}, a {type(layer).__name__},"
    drop_own_forward(layer)
    kind = selfcheck.kind(layer)
    if kind in tried:
        _become(layer, replace(tried[kind], layer=number))
        return
    trial = layer if kind is None else selfcheck.with_numbers(layer)
    x = tokens = selfcheck.random_tokens(trial, parts.num_tokens, parts.dim)
    if parts.families[0].packed:
        x = tokens.flatten(0, 1)
    parameters = list(inspect.signature(type(layer).forward).parameters.values())[2:]
    takes = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    arguments = dict.fromkeys([each.name for each in takes if each.default is each.empty])
    arguments.update(selfcheck.beside(x, parts.arguments))
    try:
        before, returns_tuple = selfcheck.run(trial, x, arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"model must take any number of tokens: {what} cannot take {x.shape[1]}: {error}") from error
    names = tuple(each.name for each in takes)
    for family in parts.families:
        step = Step(
            number,
            family,
            family.heads(layer),
            num_prefix=parts.num_prefix,
            method=prop_attn,
            names=names,
            returns_tuple=returns_tuple,
            rotary=parts.rotary,
        )
        _become(trial, step)
        try:
            after = selfcheck.run(trial, x, {**arguments, "sttm": Passage(NOTHING)})[0]
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"model must be of a known kind: {what} fails without merging: {error}") from error
        if torch.equal(before, after):
            break
        remove(trial)
    else:
        raise ValueError(f"model must be of a known kind: {what} without merging does not give what it gave before")
    if check_counts and prop_attn != "off":
        must = f"model must take token counts into its attention: {what}"
        try:
            heeded = selfcheck.counts_work(trial, step, tokens, arguments, parts.unit or 1)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{must} fails with them: {error}") from error
        if not heeded:
            raise ValueError(f"{must} takes no heed of them")
    if kind is not None:
        tried[kind] = step
        _become(layer, step)


def _become(layer: Layer, step: Step) -> None:
    for part in step.family.parts(layer, step.method):
        swap(*part)
    swap(layer, MergingLayer, step)
