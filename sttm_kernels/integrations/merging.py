"""A Transformer layer that merges its tokens between attention and MLP, whatever library it comes from.

A layer of a library is given a subclass of its own class, made by `merging_class`: modules, parameters and hooks stay
what they are, so state_dict, checkpointing, sharding and pickling do too. How a kind of layer attends and feeds
forward is said by its `Family`; everything else is here.

Between layers, counts and maps travel as an attribute of the hidden tensor, never in the model: a checkpointed layer
that runs again, or a second forward before the first backward, finds those of its own input. The last layer copies the
groups back to their tokens, so whatever follows (norm, mean pooling, attentive pooling, dense heads) sees every token
and weighs every group by its count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sttm_kernels.functional import compose, match, merge, unmerge
from sttm_kernels.plan import MergePlan

STATE = "_sttm_state"
"""The attribute of a hidden tensor that holds its `State`."""

Grid = tuple[int, int, int]
Layer = Any
"""A module of another library, known by its parts."""


@dataclass(frozen=True)
class State:
    """What is known of merged tokens.

    Attributes:
        size: `(B, N)`, float32: how many of the first tokens stand behind each.
        index: int32 `(B, N0)`: where each of the first tokens is now.
        ids: int64 `(B, N - num_prefix)` or None: which first token, prefix aside, lends its place to a group. Only in
            models with rotary positions.
        grid, positions: of the tokens, when STTM merged them.
        padded: whether some of the first tokens were padding, which counts 0.
        tokens: the merged tokens, if the tensor that carries this is their copy back to all places.
    """

    size: Tensor
    index: Tensor
    ids: Tensor | None = None
    grid: Grid | None = None
    positions: Tensor | None = None
    padded: bool = False
    tokens: Tensor | None = None


@dataclass(frozen=True)
class LayerTrace:
    """What one layer merged in the last forward.

    Attributes:
        layer: which, counted from 0.
        size: float32 `(B, K)`: how many of the first tokens stand behind each token that left the layer's attention.
        index: int32 `(B, N0)`: the group in [0, K) of each of the first tokens.
    """

    layer: int
    size: Tensor
    index: Tensor


class Call:
    """What an attention module is told and what it tells while its layer runs; empty in between.

    One thread at a time may run a layer.
    """

    def __init__(self, method: str, num_heads: int | None = None) -> None:
        self.method = method
        self.num_heads = num_heads
        self.size: Tensor | None = None
        self.keys: Tensor | None = None

    def take_keys(self) -> Tensor:
        """The keys `(B, H, N, D)` of the call that just ended."""
        keys, self.keys, self.size = self.keys, None, None
        if keys is None:
            raise RuntimeError("the attention of this layer gave no keys to match tokens by")
        return keys


class KeyHook:
    """A forward hook that keeps the keys an inner module of attention puts out.

    `layout` is that of the output: "heads" `(B, H, N, D)`, "flat" `(B, N, H * D)` or "qkv" `(B, N, 3 * H * D)`.
    """

    def __init__(self, call: Call, layout: str) -> None:
        self.call = call
        self.layout = layout

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.layout == "qkv":
            output = output.chunk(3, -1)[1]
        if self.layout != "heads":
            output = output.unflatten(-1, (self.call.num_heads, -1)).transpose(1, 2)
        self.call.keys = output


def remove_key_hooks(module: nn.Module) -> None:
    for part in module.modules():
        for number, hook in list(part._forward_hooks.items()):
            if isinstance(hook, KeyHook):
                del part._forward_hooks[number]


@dataclass(frozen=True)
class Family:
    """How a kind of layer works, in functions that find its parts by name.

    Attributes:
        install: `(layer, method) -> Call`: makes the layer's attention give its keys and take counts.
        uninstall: `(layer)`: undoes that.
        attend: `(layer, x, call, size, ids, arguments) -> (x, rest)`: norm, attention, residual; `size` and `ids` are
            None before the first merge, `arguments` those of the layer by name; `rest` is what the layer returns after
            x, if it returns a tuple.
        feed: `(layer, x) -> x`: norm, MLP, residual.
        merge: `(layer, x, keys, step, state) -> (x, State)`, if `merge_tokens` is not it.
        counts: `(arguments) -> (B, N)` or None: the counts the tokens start with, 0 for padding.
    """

    install: Callable[[Layer, str], Call]
    uninstall: Callable[[Layer], None]
    attend: Callable[..., tuple[Tensor, tuple[Any, ...]]]
    feed: Callable[[Layer, Tensor], Tensor]
    merge: Callable[..., tuple[Tensor, State]] | None = None
    counts: Callable[[dict[str, Any]], Tensor | None] | None = None


@dataclass(frozen=True)
class Anatomy:
    """What `apply` has to know of a model.

    Attributes:
        layers: in their order.
        families: that the layers may be of; the first that passes the check is it.
        num_prefix: class, distillation and register tokens at the front.
        dim: C.
        rotary: whether attention rotates keys by their places.
        grid: (T, H, W) of the tokens, or None if it cannot be said.
        num_tokens, arguments: tokens, and arguments by name, that a layer can be tried out with.
        unit: how many tokens merge as one piece.
        refused: what this model cannot do, as argument name to reason: "method" 'sttm' or "window".
        mixin: of `merging_class` for the model itself.
    """

    layers: Sequence[Layer]
    families: Sequence[Family]
    num_prefix: int
    dim: int
    rotary: bool
    grid: Grid | None
    num_tokens: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    unit: int = 1
    refused: Mapping[str, str] = field(default_factory=dict)
    mixin: type | None = None


@dataclass
class Step:
    """What a layer has to do, beside what its class does.

    Attributes:
        layer: its number.
        family, call: how.
        num_prefix: tokens at the front that stay.
        method: `prop_attn`.
        names: of the positional parameters of the layer's own forward, hidden states aside.
        returns_tuple: whether the layer returns a tuple.
        rotary: whether places must be carried.
        grid: (T, H, W) of all tokens, or None if it is not known.
        r: how many tokens to merge away here.
        begun: whether a layer before this one merges.
        last: whether the tokens are copied back here.
        window: of `match`.
        empties: whether groups may be empty.
        trace: whether to keep `traced`.
        dense: whether this layer, too, copies its tokens back for who looks at them.
    """

    layer: int
    family: Family
    call: Call
    num_prefix: int
    method: str
    names: tuple[str, ...]
    returns_tuple: bool
    rotary: bool
    grid: Grid | None
    r: int = 0
    begun: bool = False
    last: bool = False
    window: Grid | None = None
    empties: bool = False
    trace: bool = False
    dense: bool = False
    traced: LayerTrace | None = None


class Swapped:
    """Base of what `merging_class` puts in front of a library's class."""

    _mixin: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is in no module for pickle to find: it is made again from the library's.
        base = next(each for each in type(self).__mro__ if not issubclass(each, Swapped))
        return _empty, (base, self._mixin), self.__dict__


_CLASSES: dict[tuple[type, type], Any] = {}


def merging_class(base: type, mixin: type) -> Any:
    """The subclass of a library's class with `mixin` in front, for `module.__class__ = ...`; always the same one."""
    if (base, mixin) not in _CLASSES:
        members = {"__module__": base.__module__, "__doc__": base.__doc__, "_mixin": mixin}
        _CLASSES[base, mixin] = type(base.__name__, (mixin, base), members)
    return _CLASSES[base, mixin]


def _empty(base: type, mixin: type) -> Any:
    made = merging_class(base, mixin)
    return made.__new__(made)


def drop_own_forward(module: Layer) -> None:
    """Deletes a `forward` of the instance that is only that of its class, bound: transformers 4 leaves one behind after
    `output_hidden_states`, and it would outlive a change of class. `ValueError` if it is anything else."""
    own = vars(module).get("forward")
    if own is None:
        return
    if getattr(own, "__func__", None) is not type(module).forward:
        raise ValueError(
            f"model must have layers without a forward of their own, a {type(module).__name__} has {own!r}: undo that "
            "first"
        )
    del module.forward


def restore_class(module: Layer) -> None:
    """Undoes `module.__class__ = merging_class(...)`."""
    drop_own_forward(module)
    module.__class__ = next(each for each in type(module).__mro__ if not issubclass(each, Swapped))


class MergingLayer(Swapped, nn.Module):
    """The part of a merging layer that is the same for all."""

    _sttm: Step

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        step: Step = self._sttm
        state: State | None = getattr(hidden_states, STATE, None)
        x = hidden_states
        if state is None and step.begun:
            raise RuntimeError(
                f"the hidden states that layer {step.layer} got are not those that layer {step.layer - 1} returned: "
                "token counts travel with that tensor. Something in between replaced it; if it is activation "
                "checkpointing, it must be called with use_reentrant=False"
            )
        if getattr(self, "_is_replica", False):
            raise RuntimeError("token merging needs DistributedDataParallel in place of DataParallel")
        merging = step.r > 0 or hasattr(self, "sttm")
        if x.requires_grad and not torch.is_grad_enabled() and (merging or state is not None):
            raise RuntimeError(
                "token merging needs activation checkpointing with use_reentrant=False, got use_reentrant=True"
            )
        if state is not None and state.tokens is not None:
            x = state.tokens
        arguments = {**dict(zip(step.names, args, strict=False)), **kwargs}
        ids = None if state is None else state.ids
        x, rest = step.family.attend(self, x, step.call, _counts(step, state), ids, arguments)
        keys = step.call.take_keys()
        if merging and state is None and step.family.counts is not None:
            state = _start(x, step.family.counts(arguments))
        if merging:
            x, state = (step.family.merge or merge_tokens)(self, x, keys, step, state)
        if step.trace:
            step.traced = None if state is None else LayerTrace(step.layer, state.size.detach(), state.index)
        x = step.family.feed(self, x)
        if state is not None:
            merged = x
            if step.last or step.dense:
                x = unmerge(x, MergePlan(state.index, x.shape[1]))
            if not step.last:
                setattr(x, STATE, replace(state, tokens=None if merged is x else merged))
        return (x, *rest) if step.returns_tuple else x


def _start(x: Tensor, counts: Tensor | None) -> State | None:
    """The state of tokens that none has merged, if some of them are padding."""
    if counts is None:
        return None
    token = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
    return State(counts.expand(x.shape[:2]).float(), token.expand(x.shape[0], -1).contiguous(), padded=True)


def _counts(step: Step, state: State | None) -> Tensor | None:
    """What attention is told of the counts."""
    if state is None or step.method != "off":
        return None if state is None else state.size
    # Empty groups, which STTM may leave, and padding are never attended to.
    return (state.size > 0).to(state.size.dtype) if step.empties or state.padded else None


def merge_tokens(layer: Layer, x: Tensor, keys: Tensor, step: Step, state: State | None) -> tuple[Tensor, State]:
    """Merges x `(B, N, C)` by keys `(B, H, N, D)`, with the layer's STTM if it has one, else as Token Merging does."""
    prefix = step.num_prefix
    sttm = getattr(layer, "sttm", None)
    ids = None
    if state is not None and state.padded:
        keys = keys.masked_fill((state.size == 0)[:, None, :, None], 0)  # like nothing: padding tells nothing
    if sttm is not None:
        grid = step.grid if state is None or state.grid is None else state.grid
        size, positions = (None, None) if state is None else (state.size, state.positions)
        out, plan = sttm(x, grid, size, positions, metric=keys, return_plan=True)
        if step.rotary:
            ids = _nearest_place(out.positions[:, prefix:], step.grid)
        new = State(out.size, plan.index, ids, sttm.output_grid(grid), out.positions)
    else:
        plan = match(keys, step.r, prefix, grid=step.grid if step.window else None, window=step.window)
        out = merge(x, plan, None if state is None else state.size)
        if step.rotary:
            ids = _places(plan, None if state is None else state.ids, prefix)
        new = State(out.size, plan.index, ids)
    if state is not None:
        index = compose(MergePlan(state.index, x.shape[1]), plan).index
        new = replace(new, index=index, padded=state.padded)
    return out.x, new


def _places(plan: MergePlan, ids: Tensor | None, prefix: int) -> Tensor:
    """The place of every group: that of the token others merged into, of odd position in the sequence."""
    group = plan.index[:, prefix:].long() - prefix
    if ids is None:
        ids = torch.arange(group.shape[1], device=group.device).expand_as(group)
    places = ids.new_zeros((group.shape[0], plan.num_groups - prefix)).scatter(1, group, ids)
    odd = slice(1 - prefix % 2, None, 2)
    return places.scatter(1, group[:, odd], ids[:, odd])


def _nearest_place(positions: Tensor, grid: Grid | None) -> Tensor:
    """The token of the grid nearest to each of the positions `(B, K, 3)`."""
    assert grid is not None
    t, y, x = positions[..., :3].detach().round().long().unbind(-1)
    return (t * grid[1] + y) * grid[2] + x


def find_layers(model: nn.Module) -> list[MergingLayer]:
    """The layers of a model that `apply` has changed, in their order."""
    found = [module for module in model.modules() if isinstance(module, MergingLayer)]
    return sorted(found, key=lambda layer: layer._sttm.layer)
