"""A Transformer layer that merges its tokens between attention and MLP, whatever library it comes from.

A module of a library is given a subclass of its own class, made by `merging_class`: modules, parameters and hooks stay
what they are, so state_dict, checkpointing, sharding and pickling do too. How a kind of layer attends and feeds
forward is said by its `Family`; everything else is here.

Modules keep nothing but what `apply` was told. What is known of the tokens of one call, its `State`, is an attribute of
the hidden tensor between layers, and an argument inside a layer: `MergingLayer.__call__` takes it off the tensor before
any hook of the module runs and puts the new one on what comes out after them. So hooks, sharding and casts may replace
tensors, a checkpointed layer that runs again finds the state of its own input, and threads do not meet. The last layer
copies the groups back to their tokens, so whatever follows (norm, mean pooling, attentive pooling, dense heads) sees
every token and weighs every group by its count.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from sttm_kernels.functional import compose, match, merge, unmerge
from sttm_kernels.integrations.amounts import Amount, Toward, described, merges, of_tokens
from sttm_kernels.nn.sttm import nearest_place
from sttm_kernels.plan import MergePlan
from sttm_kernels.torch_private import exporting, in_backward

STATE = "_sttm_state"
"""The attribute of a hidden tensor that holds its `State`."""
FOUND = "_sttm_found"
"""That of a tensor that something put in place of one, for the call that found it out."""

Grid = tuple[int, int, int]
Layer = Any
"""A module of another library, known by its parts."""


@dataclass(frozen=True)
class LayerTrace:
    """What one layer merged in the last forward.

    Attributes:
        layer: which, counted from 0.
        size: float32 `(B, K)`: how many of the first tokens stand behind each token that left the layer's attention.
        index: int32 `(B, N0)`: the group in [0, K) of each of the first tokens.
        r: how many tokens the layer was told to merge away.
        merged: how many it merged away: fewer, where that was more than can merge.
    """

    layer: int
    size: Tensor = field(repr=False)
    index: Tensor = field(repr=False)
    r: int
    merged: int


@dataclass(frozen=True)
class State:
    """What is known of the tokens of one call.

    Attributes:
        size: `(B, N)`, float32: how many of the first tokens stand behind each; None while none has merged.
        index: int32 `(B, N0)`: where each of the first tokens is now.
        ids: int64 `(B, N - num_prefix)` or None: which first token, prefix aside, lends its place to a group. Only in
            models with rotary positions.
        first_grid: (T, H, W) of the first tokens, where it is asked for.
        grid, positions: of the tokens, when STTM merged them.
        padded: whether some of the first tokens were padding, which counts 0.
        dense: whether every layer's tokens are copied back to all places, for who looks at them between layers.
        tokens: the merged tokens, if the tensor that carries this is their copy back to all places.
        traced: what the layers merged, if it is to be kept.
        lengths: of tokens that merge in pieces of one row, how many each piece has now.
        applied: the `Step.applied` of the layer that this comes from.
    """

    size: Tensor | None = None
    index: Tensor | None = None
    ids: Tensor | None = None
    first_grid: Grid | None = None
    grid: Grid | None = None
    positions: Tensor | None = None
    padded: bool = False
    dense: bool = False
    tokens: Tensor | None = None
    traced: tuple[LayerTrace, ...] = ()
    lengths: tuple[int, ...] | None = None
    applied: int | None = None

    def of(self, x: Tensor, step: Step) -> State:
        """The state on x's device; `RuntimeError` if x `(B, N, C)` cannot be the tokens that it tells a layer of."""
        if self.size is None:
            return self
        layer = step.layer
        if self.applied != step.applied:
            raise RuntimeError(
                f"layer {layer} must be told by one and the same apply what the layer before it was told: call apply "
                "neither on a part of the layers nor between a forward and the backward in which checkpointing runs "
                "it again"
            )
        if self.size.shape != x.shape[:2]:
            raise RuntimeError(
                f"the hidden states that layer {layer} got must be the {tuple(self.size.shape)} tokens that the layer "
                f"before it returned, got {tuple(x.shape[:2])}: a hook may replace them, but not by others"
            )
        if self.size.device == x.device:
            return self
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        moved: dict[str, Any] = {name: v.to(x.device) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


NOTHING = State()


class Passage:
    """The state before and after a call of a layer; an argument of the call, so that checkpointing keeps it.

    No dataclass: FSDP casts and copies what is in those.
    """

    def __init__(self, before: State) -> None:
        self.before = before
        self.after: State | None = None


class Now:
    """What modules of a library, which pass on none of our arguments, find out while a layer calls them.

    Attributes:
        told: what attention is told.
        dense: whether tokens are copied back to all places after every layer.
        left: what the last layer returned, while somebody has it.
        merged_after: the layer that was called last, if it left tokens merged.
    """

    def __init__(self) -> None:
        self.told: Told | None = None
        self.dense = False
        self.left: weakref.ref[Tensor] | None = None
        self.merged_after: int | None = None


class _Thread(threading.local):
    """Each thread has a `Now` of its own. What compiled code sets in that stays; what it sets here does not."""

    def __init__(self) -> None:
        self.now = Now()


THREAD = _Thread()


def runs_again() -> bool:
    """Whether this forward is one that checkpointing repeats in a backward."""
    return not torch.compiler.is_compiling() and in_backward()


def left_for(x: Tensor) -> State | None:
    """The state of what the last layer returned, if x is that or its copy."""
    left = THREAD.now.left() if THREAD.now.left is not None else None
    if left is None or left.shape != x.shape:
        return None
    moved = left.detach().to(x.device, x.dtype)
    same = x.is_meta or moved.data_ptr() == x.data_ptr() or torch.equal(moved, x.detach())
    return getattr(left, STATE) if same else None


def _find(x: Tensor, layer: int) -> State:
    """The state of a hidden tensor; of one without, that of what the last layer returned, if it is that or its copy.

    Wrappers of a layer, hooks of theirs and casts between layers put other tensors in place of that. What was found so
    holds for this call, for which a checkpointed layer may ask again: other values may come in the same tensor.
    """
    compiling = torch.compiler.is_compiling()
    if runs_again() and hasattr(x, FOUND):
        return getattr(x, FOUND)
    state: State | None = getattr(x, STATE, None)
    carried = state
    if state is None and not compiling:
        state = left_for(x) if layer > 0 else None
        THREAD.now.left = None
    if THREAD.now.dense and not (state is not None and state.dense):  # the embeddings do not know
        state = replace(state or NOTHING, dense=True)
    if state is None:
        return NOTHING
    if state is not carried and not compiling:
        setattr(x, FOUND, state)
    return state


def _leave(x: Tensor, state: State) -> None:
    setattr(x, STATE, state)
    if not torch.compiler.is_compiling():
        THREAD.now.left = weakref.ref(x)


class Told:
    """What the attention of one call is told, and the keys it tells; a context in which it can be found.

    Attributes:
        size: `(B, N)` counts, or None before the first merge.
        ids: the places `(B, N - num_prefix)` of rotary positions, or None before the first merge.
        method: of `sttm_kernels.nn.proportional_attention`.
        lengths: `State.lengths`.
        keys: `(B, H, N, D)`, not rotated.
        rotations: pairs (rotated, not rotated).
    """

    def __init__(
        self, size: Tensor | None, ids: Tensor | None, method: str, lengths: tuple[int, ...] | None = None
    ) -> None:
        self.size = size
        self.ids = ids
        self.method = method
        self.lengths = lengths
        self.keys: Tensor | None = None
        self.rotations: list[tuple[Tensor, Tensor]] = []
        self.outer: Told | None = None

    def __enter__(self) -> None:
        self.outer, THREAD.now.told = THREAD.now.told, self

    def __exit__(self, *error: object) -> None:
        THREAD.now.told = self.outer

    @property
    def size_of_row(self) -> Tensor | None:
        """The counts of tokens in one row."""
        return None if self.size is None else self.size.flatten()

    def take_keys(self) -> Tensor | None:
        """The keys, which checkpointing is not to keep with this."""
        keys, self.keys = self.keys, None
        self.rotations.clear()
        return keys


@contextmanager
def densely() -> Iterator[None]:
    """Within it, tokens of this thread are copied back to all places after every layer."""
    outer, THREAD.now.dense = THREAD.now.dense, True
    try:
        yield
    finally:
        THREAD.now.dense = outer


@dataclass(frozen=True)
class Family:
    """How a kind of layer works, in functions that find its parts by name.

    Attributes:
        parts: `(layer, method) -> [(module, mixin, told)]`: what to `swap` so that attention tells its keys and takes
            counts; method is that of `Told`.
        heads: `(layer) -> int`: of the attention.
        attend: `(layer, x, told, arguments) -> (x, rest)`: norm, attention, residual; `arguments` are those of the
            layer by name; `rest` is what the layer returns after x, if it returns a tuple.
        feed: `(layer, x) -> x`: norm, MLP, residual; of packed tokens the row `(T, C)`.
        merge: `(layer, x, keys, step, state) -> (x, State)`, if `merge_tokens` is not it.
        start: `(x, arguments, state) -> State`: of tokens of which none has merged, before the first do.
        packed: whether hidden states are tokens in one row, `(T, C)`; to the functions here they are `(1, T, C)`.
    """

    parts: Callable[[Layer, str], list[tuple[nn.Module, type, Any]]]
    heads: Callable[[Layer], int]
    attend: Callable[..., tuple[Tensor, tuple[Any, ...]]]
    feed: Callable[[Layer, Tensor], Tensor]
    merge: Callable[..., tuple[Tensor, State]] | None = None
    start: Callable[[Tensor, dict[str, Any], State], State] | None = None
    packed: bool = False


@dataclass(frozen=True)
class Anatomy:
    """What `apply` has to know of a model.

    Attributes:
        layers: in their order.
        families: that the layers may be of; the first that passes the check is it.
        num_prefix: class, distillation and register tokens at the front.
        dim: C.
        rotary: whether attention rotates keys by their places.
        num_tokens, arguments: tokens, and arguments by name, that a layer can be tried out with.
        gridded: what to `swap`, as in `Family.parts`, so that the first layer gets the grid of its tokens.
        unit: of how many tokens each piece is, where they merge in pieces.
        example: the name and shape of one input of the configured size, or what makes the arguments of one on the meta
            device; None if it is not known.
        body: what takes that, where it is not the model.
        refused: what this model cannot do, as argument name to reason: "method" 'sttm', "window" or "protect".
        mixin: of `merging_class` for the model itself.
        swaps: what else to `swap`, as in `Family.parts`.
    """

    layers: Sequence[Layer]
    families: Sequence[Family]
    num_prefix: int
    dim: int
    rotary: bool
    num_tokens: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    gridded: Sequence[tuple[nn.Module, type, Any]] = ()
    unit: int | None = None
    example: tuple[str, tuple[int, ...]] | Callable[[], dict[str, Any]] | None = None
    body: nn.Module | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    mixin: type | None = None
    swaps: Sequence[tuple[nn.Module, type, Any]] = ()


@dataclass
class Record:
    """What the layers of a model merged in the last forward, of whichever thread that was."""

    traced: tuple[LayerTrace, ...] = ()


@dataclass
class Step:
    """What a layer has to do, beside what its class does.

    Attributes:
        layer: its number.
        family: how.
        heads: of its attention.
        num_prefix: tokens at the front that stay.
        method: `prop_attn`.
        names: of the positional parameters of the layer's own forward, hidden states aside.
        returns_tuple: whether the layer returns a tuple.
        rotary: whether places must be carried.
        r: how many tokens to merge away here.
        protect: which of the first tokens never merge, by place in the sequence, prefix aside; of pieces, the pieces.
        planned: tokens that come and go for an input of the configured size, where r was said by intent.
        begun: whether a layer before this one merges.
        last: whether the tokens are copied back here.
        window: of `match`.
        empties: whether groups may be empty.
        record: where to keep what was merged, or None.
        applied: a number that all layers get from one apply.
    """

    layer: int
    family: Family
    heads: int
    num_prefix: int
    method: str
    names: tuple[str, ...]
    returns_tuple: bool
    rotary: bool
    r: Amount = 0
    protect: tuple[int, ...] = ()
    planned: tuple[int, int] | None = None
    begun: bool = False
    last: bool = False
    window: Grid | None = None
    empties: bool = False
    record: Record | None = None
    applied: int = 0


# Classes


class Swapped:
    """Base of what `merging_class` puts in front of a library's class."""

    _mixin: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is in no module for pickle to find: it is made again from the library's.
        return _empty, (library_class(self), self._mixin), self.__dict__

    def _restored(self) -> None:
        """Called before the class changes back."""


_CLASSES: dict[tuple[type, type], Any] = {}


def merging_class(base: type, mixin: type) -> Any:
    """The subclass of a library's class with `mixin` in front, for `module.__class__ = ...`; always the same one."""
    if (base, mixin) not in _CLASSES:
        members = {"__module__": base.__module__, "__doc__": base.__doc__, "_mixin": mixin}
        _CLASSES[base, mixin] = type(base.__name__, (mixin, base), members)
    return _CLASSES[base, mixin]


def library_class(module: Layer) -> type:
    """Undoes `merging_class`; `RuntimeError` if something else has made another class of that since."""
    if "_mixin" not in vars(type(module)):
        raise RuntimeError(
            f"token merging must be removed before what came after it: a {type(module).__name__} has a class that was "
            "made from the merging one, as fully_shard does"
        )
    return type(module).__bases__[1]


def _empty(base: type, mixin: type) -> Any:
    made = merging_class(base, mixin)
    return made.__new__(made)


def swap(module: Layer, mixin: type, told: Any = None) -> None:
    """Puts `mixin` in front of the class of a module, which finds `told` in its `_sttm`."""
    drop_own_forward(module)
    module.__class__ = merging_class(type(module), mixin)
    module._sttm = told


def unswap(model: nn.Module) -> Callable[[], None]:
    """Undoes `swap` in all modules of a model, or in none if it cannot be undone in one; returns what does it again."""
    swapped = [module for module in model.modules() if isinstance(module, Swapped)]
    classes = [library_class(module) for module in swapped]
    for module in swapped:
        drop_own_forward(module)
    before = [(module, type(module), dict(vars(module)), dict(module._modules)) for module in swapped]
    for module, own in zip(swapped, classes, strict=True):
        module._restored()
        del module._sttm
        module.__class__ = own

    def again() -> None:
        for module, merging, attributes, modules in before:
            module.__class__ = merging
            vars(module).update(attributes)
            module._modules.update(modules)

    return again


def drop_own_forward(module: Layer) -> None:
    """Deletes a `forward` of the instance that is only that of its class, bound: transformers 4 leaves one behind after
    `output_hidden_states`, and it would outlive a change of class. `ValueError` if it is anything else."""
    own = vars(module).get("forward")
    if own is None:
        return
    if getattr(own, "__func__", None) is not type(module).forward:
        raise ValueError(
            f"model must have modules without a forward of their own, a {type(module).__name__} has {own!r}: undo "
            "that, apply or remove, and then do it again"
        )
    del module.forward


WRAPPERS = {
    "_orig_mod": "compiled",
    "_fsdp_wrapped_module": "wrapped by FullyShardedDataParallel",
}


def unwrapped(module: Layer) -> Layer:
    """The module inside of activation checkpointing."""
    while "_checkpoint_wrapped_module" in module._modules:
        module = module._modules["_checkpoint_wrapped_module"]
    return module


def own_layers(layers: Sequence[nn.Module]) -> list[Layer]:
    """The layers inside of activation checkpointing; `ValueError` if they are wrapped in what must come after."""
    found: list[Layer] = []
    for number, layer in enumerate(map(unwrapped, layers)):
        if layer in found:
            raise ValueError(
                f"model must have layers of its own at every depth, layer {number} is the same module as layer "
                f"{found.index(layer)}"
            )
        for name, how in WRAPPERS.items():
            if name in layer._modules:
                raise ValueError(
                    f"model must have plain layers, layer {number} is {how}: apply first, and then do that"
                )
        if any(is_sharded(parameter) for parameter in layer.parameters()):
            raise ValueError(f"model must have whole layers, layer {number} is sharded: apply first, and then shard it")
        found.append(layer)
    return found


def is_sharded(parameter: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(parameter, module.DTensor)


class Attends(Swapped):
    """Attention as a layer calls it. It is given what it is told, too, so that it is told so again if checkpointing
    runs it alone, without its layer."""

    def __call__(self, *args: Any, sttm: Told | None = None, **kwargs: Any) -> Any:
        if sttm is None or sttm is THREAD.now.told:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with sttm:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]


def told_to(attention: nn.Module) -> dict[str, Told | None]:
    """The argument for attention that takes what it is told, inside of activation checkpointing or not."""
    return {"sttm": THREAD.now.told} if isinstance(unwrapped(attention), Attends) else {}


class ShowsKeys(Swapped):
    """A module inside of attention that puts out its keys `(B, H, N, D)`."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        keys = super().forward(*args, **kwargs)  # type: ignore[misc]
        if THREAD.now.told is not None:
            THREAD.now.told.keys = keys
        return keys


class Carries(Swapped):
    """A module between embeddings and layers: what it puts out is in the state of what it got."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state = getattr(x, STATE, None)
        x = super().__call__(x, *args, **kwargs)  # type: ignore[misc]
        if state is not None:
            setattr(x, STATE, state)
        return x


class HoldsLayers(Swapped):
    """A module that holds all of the layers: what it puts out is made of tokens that are back at their places."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, HoldsLayers):  # it was compiled, and then merging was removed
            return self(*args, **kwargs)
        return self._ended(super().__call__, *args, **kwargs)  # type: ignore[misc]

    def _ended(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a call that runs the layers returns; `RuntimeError` if the last of them was none that ends merging."""
        THREAD.now.merged_after = None
        out = call(*args, **kwargs)
        all_tokens_are_back()
        return out


def all_tokens_are_back() -> None:
    """`RuntimeError` if the last of the layers that ran left tokens merged."""
    number, THREAD.now.merged_after = THREAD.now.merged_after, None
    if number is not None:
        raise RuntimeError(
            f"model must have all of its layers: layer {number} left tokens merged, and what came after it, whose "
            "last layer copies them back, was taken out, skipped, or is in another process; remove, and then apply "
            "again"
        )


class Behind(Swapped):
    """A module that is called when all layers have run, and would fail where tokens are left merged."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        all_tokens_are_back()
        return super().__call__(*args, **kwargs)  # type: ignore[misc]


class MergingModel(HoldsLayers):
    """A model whose layers merge."""

    @property
    def r(self) -> int:
        raise AttributeError("r")

    @r.setter
    def r(self, value: Any) -> None:
        raise AttributeError(
            f"r is no attribute of a model that merges tokens, got {value!r}: give it to sttm.apply(model, r=..., "
            "schedule=...)"
        )


class MergingLayer(Swapped, nn.Module):
    """The part of a merging layer that is the same for all."""

    _sttm: Step

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, MergingLayer):  # it was compiled, and then merging was removed
            return self(hidden_states, *args, **kwargs)
        if isinstance(hidden_states, torch.fx.Proxy):
            raise RuntimeError("token merging needs torch.export or hooks in place of torch.fx.symbolic_trace")
        state = _find(hidden_states, self._sttm.layer)
        x = hidden_states if state.tokens is None else state.tokens
        passage = Passage(state)
        out = super().__call__(x, *args, sttm=passage, **kwargs)
        after, passage.after = passage.after, None
        merged = after is not None and after.index is not None and not after.dense
        THREAD.now.merged_after = self._sttm.layer if merged else None
        if after is None:
            return out
        x, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, ())
        tokens = None
        if after.dense and after.index is not None:
            tokens, x = x, _unmerged(self._sttm, x, after.index)
        _leave(x, replace(after, tokens=tokens))
        return (x, *rest) if isinstance(out, tuple) else x

    def forward(self, hidden_states: Tensor, *args: Any, sttm: Passage | None = None, **kwargs: Any) -> Any:
        if "_sttm" not in vars(self):
            raise RuntimeError("remove must not be called before a backward in which checkpointing runs layers again")
        step = self._sttm
        x = hidden_states[None] if step.family.packed else hidden_states
        if sttm is None:
            raise RuntimeError(
                f"layer {step.layer} merges tokens: it must be called, not its forward, and hooks with_kwargs must "
                "pass on the argument sttm"
            )
        state = sttm.before.of(x, step)
        if state.size is None and step.begun:
            if runs_again():
                raise RuntimeError(
                    f"layer {step.layer}, which a backward runs again, got hidden states without their token counts, "
                    "which travel with that tensor: a hook of saved tensors, such as save_on_cpu, must be inside of "
                    "the checkpointed layer and not around it, or leave checkpointing to the library of the model"
                )
            raise RuntimeError(
                f"the hidden states that layer {step.layer} got are not those that layer {step.layer - 1} returned: "
                "token counts travel with that tensor, and something outside of the layers replaced it. A hook of the "
                "layer may: register_forward_pre_hook, register_forward_hook"
            )
        if getattr(self, "_is_replica", False):
            raise RuntimeError("token merging needs DistributedDataParallel in place of DataParallel")
        merging = merges(step.r) or hasattr(self, "sttm")
        if merging and torch.jit.is_tracing():
            raise RuntimeError("token merging needs torch.export or torch.compile in place of torch.jit.trace")
        if x.requires_grad and not torch.is_grad_enabled() and (merging or state.size is not None):
            raise RuntimeError(
                "token merging needs activation checkpointing with use_reentrant=False, got use_reentrant=True"
            )
        arguments = {**dict(zip(step.names[: len(args)], args, strict=True)), **kwargs}
        told = Told(_counts(step, state), state.ids, "auto" if step.method == "off" else step.method, state.lengths)
        with told:
            x, rest = step.family.attend(self, x, told, arguments)
        keys = _all_heads(self, told.take_keys())
        if merging and state.size is None and step.family.start is not None:
            state = step.family.start(x, arguments, state)
        if merging:
            before = x.shape[1]
            x, state = (step.family.merge or merge_tokens)(self, x, keys, step, state)
            if step.record is not None:
                state = _trace(step, state, before - x.shape[1])
        elif step.record is not None and state.size is not None:
            state = _trace(step, state, 0)
        x = step.family.feed(self, x)
        if not step.last:
            sttm.after = None if state is NOTHING else replace(state, applied=step.applied)
        elif state.index is not None:
            x = _unmerged(step, x, state.index)
        return (x, *rest) if step.returns_tuple else x

    def _restored(self) -> None:
        self._modules.pop("sttm", None)

    def extra_repr(self) -> str:
        what = "sttm" if hasattr(self, "sttm") else described(self._sttm.r, self._sttm.planned)
        return ", ".join(part for part in (super().extra_repr(), f"merges {what}") if part)


def _trace(step: Step, state: State, merged: int) -> State:
    """The state, with what a layer merged noted in it and kept."""
    assert step.record is not None
    assert state.size is not None
    assert state.index is not None
    r = step.r if isinstance(step.r, int) else merged
    here = LayerTrace(step.layer, state.size.detach(), state.index, r, merged)
    state = replace(state, traced=(*state.traced, here))
    # Neither the tensors of an export nor the layers that checkpointing runs again are of the last forward.
    if not (runs_again() or exporting()):
        step.record.traced = state.traced
    return state


def _unmerged(step: Step, x: Tensor, index: Tensor) -> Tensor:
    """Every token of index `(B, N)`, of hidden states."""
    if step.family.packed:
        return unmerge(x[None], MergePlan(index, x.shape[0]))[0]
    return unmerge(x, MergePlan(index, x.shape[1]))


def real_tokens(name: str, mask: Tensor) -> Tensor:
    """bool `(B or 1, N)`: which tokens an attention mask `(B or 1, 1, N or 1, N)` of a layer leaves; `ValueError` if it
    does anything but mark padding. What queries that are padding attend to does not matter."""
    if mask.dim() != 4 or mask.shape[1] != 1 or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"{name} must say which tokens are padding, bool or floating (B, 1, N, N) or (B, 1, 1, N), in a model that "
            f"merges tokens, got {mask.dtype} {tuple(mask.shape)}"
        )
    allowed = mask if mask.dtype == torch.bool else mask == 0
    real = allowed.any(2)[:, 0]
    if torch.compiler.is_compiling():
        return real
    if mask.is_floating_point() and bool((~allowed & (mask > torch.finfo(mask.dtype).min / 2)).any()):
        raise ValueError(f"{name} must be 0 or the lowest number there is in a model that merges tokens, got another")
    rows = allowed[:, 0]
    if rows.shape[1] > 1 and bool(((rows != real[:, None]) & real[..., None]).any()):
        raise ValueError(f"{name} must be the same for every query in a model that merges tokens, got others")
    return real


def with_padding(x: Tensor, counts: Tensor, state: State) -> State:
    """The state of tokens x `(B, N, C)` of which none has merged, of counts `(B or 1, N)`, 0 for padding."""
    token = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
    size = counts.expand(x.shape[:2]).float()
    return replace(state, size=size, index=torch.where(size > 0, token, -1), padded=True)


def _counts(step: Step, state: State) -> Tensor | None:
    """What attention is told of the counts."""
    if state.size is None or step.method != "off":
        return state.size
    # Empty groups, which STTM may leave, and padding are never attended to.
    return (state.size > 0).to(state.size.dtype) if step.empties or state.padded else None


def _all_heads(layer: MergingLayer, keys: Tensor | None) -> Tensor:
    """Keys whose mean over heads is that of all heads, from those `(B, H, N, D)` that this process computes."""
    step = layer._sttm
    if keys is None:
        raise RuntimeError(f"the attention of layer {step.layer} gave no keys to match tokens by: what gives them was "
                           "replaced; apply again")  # fmt: skip
    here = keys.shape[1]
    if here == step.heads:
        return keys
    mesh = next((p.device_mesh for p in layer.parameters() if is_sharded(p)), None)  # type: ignore[attr-defined]
    if mesh is None or here * mesh.size() != step.heads:
        raise RuntimeError(f"layer {step.layer} must have {step.heads} heads, as when merging was applied, got {here}")
    if hasattr(layer, "sttm"):
        raise RuntimeError("method must be 'tome' where the heads of a layer are in several processes, got 'sttm'")
    from torch.distributed import _functional_collectives as collectives

    total = collectives.all_reduce(keys.detach().sum(1, keepdim=True), "sum", mesh)
    return total / step.heads


def find_pairs(
    metric: Tensor, step: Step, prefix: int, grid: Grid | None = None, mask: Tensor | None = None
) -> MergePlan:
    """`match` of what may merge in a layer, as many as it is told; of those of each item that `mask` calls real."""
    fixed = prefix + len(step.protect)
    each = mask is not None and not isinstance(step.r, int)
    # A number is the same for all items, to which `match` adds what they have; else they are counted.
    tokens = mask.sum(1).tolist() if mask is not None and each else [metric.shape[-2]]
    amounts = [of_tokens(step.r, max(count - fixed, 0)) for count in tokens]
    r = amounts if each else amounts[0]
    if step.begun:  # then the protected tokens are behind the prefix already
        plan = match(metric, r, fixed, grid=grid, window=step.window, mask=mask)
    else:
        plan = match(metric, r, prefix, grid=grid, window=step.window, protect=step.protect or None, mask=mask)
    if each:
        plan = MergePlan(plan.index, max(1, 1 + int(plan.index.max())))
    must_reach(step, plan.num_groups - fixed)
    return plan


def must_reach(step: Step, left: int) -> None:
    """`RuntimeError` if a layer left more tokens that may merge than are to be left in the end."""
    if isinstance(step.r, Toward) and step.r.layers == 1 and left > step.r.keep:
        raise RuntimeError(
            f"keep must be within reach of the merging layers, layer {step.layer} must leave "
            f"{len(step.protect) + step.r.keep} tokens of this input, got {len(step.protect) + left}"
        )


def merge_tokens(layer: Layer, x: Tensor, keys: Tensor, step: Step, state: State) -> tuple[Tensor, State]:
    """Merges x `(B, N, C)` by keys `(B, H, N, D)`, with the layer's STTM if it has one, else as Token Merging does."""
    prefix = step.num_prefix
    sttm = getattr(layer, "sttm", None)
    ids = None
    grid = state.first_grid if state.grid is None else state.grid
    if grid is None and (sttm is not None or step.window is not None):
        raise RuntimeError(
            f"the grid of the tokens of layer {step.layer} is not known: it travels with what the embeddings return, "
            "and some of the tokens were left out or something replaced that tensor"
        )
    mask = None if not state.padded or state.size is None else state.size > 0
    if sttm is not None:
        out, plan = sttm(x, grid, state.size, state.positions, metric=keys, return_plan=True, mask=mask)
        if step.rotary:
            assert state.first_grid is not None
            ids = nearest_place(out.positions[:, prefix:], state.first_grid)
        new = replace(state, grid=sttm.output_grid(grid), positions=out.positions)
    else:
        plan = find_pairs(keys, step, prefix, grid if step.window else None, mask)
        out = merge(x, plan, state.size)
        if step.rotary:
            ids = _places(plan, state.ids, prefix)
        new = state
    index = plan.index if state.index is None else compose(MergePlan(state.index, x.shape[1]), plan).index
    return out.x, replace(new, size=out.size, index=index, ids=ids)


def _places(plan: MergePlan, ids: Tensor | None, prefix: int) -> Tensor:
    """The place of every group: that of the token others merged into, of odd position in the sequence; 0 of an empty
    one."""
    groups = plan.num_groups - prefix
    group = torch.where(plan.index < 0, groups, plan.index - prefix)[:, prefix:].long()
    if ids is None:
        ids = torch.arange(group.shape[1], device=group.device).expand_as(group)
    places = ids.new_zeros((group.shape[0], groups + 1)).scatter(1, group, ids)  # the last is that of padding
    odd = slice(1 - prefix % 2, None, 2)
    return places.scatter(1, group[:, odd], ids[:, odd])[:, :groups]


def rows(table: Tensor, ids: Tensor) -> Tensor:
    """The rows `ids` `(B, N')` of rotary tables `([[B,] heads,] N, E)`, as `(B, 1 or heads, N', E)`."""
    table = table.reshape(*(1,) * (4 - table.dim()), *table.shape).expand(ids.shape[0], -1, -1, -1)
    return table.gather(2, ids[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3]))


def holders(model: nn.Module, layers: Sequence[Layer]) -> list[nn.Module]:
    """The modules that hold all layers of a model, their list and the model itself aside; a single layer holds none."""
    aside = {model, *layers}
    parts = [
        part for part in model.modules() if part not in aside and not isinstance(part, nn.ModuleList | nn.Sequential)
    ]
    return [part for part in parts if set(layers) <= set(part.modules())]


def find_layers(model: nn.Module) -> list[MergingLayer]:
    """The layers of a model that `apply` has changed, in their order."""
    found = [module for module in model.modules() if isinstance(module, MergingLayer)]
    return sorted(found, key=lambda layer: layer._sttm.layer)
