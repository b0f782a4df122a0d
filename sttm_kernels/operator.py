"""What every operator is made of: schema, fake kernel, batching rule and derivatives in every mode, all by field name.

An operator has a flat schema for the dispatcher; everyone else sees its arguments and results as NamedTuples. The
first derivative in reverse mode is written by each verb. All others (forward mode, derivatives of a derivative) go
through the specification, which is plain PyTorch: O(N K) memory for `assign` and `soft_merge`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sttm_kernels import crossover, dispatch
from sttm_kernels.autocast import without_autocast
from sttm_kernels.torch_private import (
    below_autograd,
    dispatching,
    forward_differentiating,
    is_mapped_by_autograd,
    map_by_func,
    observed,
    outer_levels_of_forward_mode,
    transforming,
    unwrapped,
)

NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")
"""sttm_kernels; another for a copy of the package under another name, as a hub of kernels loads it."""
_lib = torch.library.Library(NAMESPACE, "DEF")

OPERATORS: dict[str, Operator] = {}
"""Every operator by its name."""


_SCHEMA = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "int": "SymInt",
    "float": "float",
    "float | None": "float?",
    "str": "str",
    "Sequence[bool]": "bool[]",
}
_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_PLAIN = _TENSORS | {type(None), str, int, float, bool, list}


def _requires_grad(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.requires_grad


def _lead(args: Sequence[Any]) -> Tensor:
    return args[0] if args[0] is not None else next(arg for arg in args if isinstance(arg, Tensor))


def _own(t: Tensor) -> Tensor:
    """A view has no tangent, and cannot be modified in place by who gets it."""
    return t.detach() if t._is_view() else t


def _primal(value: Any) -> Any:
    return forward_ad.unpack_dual(value).primal if isinstance(value, Tensor) else value


def _is_listened_to(args: Sequence[Any]) -> bool:
    """Whether a mode, a tracer, a tensor subclass, a device without data or a lazy sign wants the operator.

    The dispatcher writes such a sign down, of `z.conj().imag` for instance; a kernel would not see it.
    """
    if dispatching() or not _PLAIN.issuperset(map(type, args)) or _lead(args).is_meta:
        return True
    return any(type(arg) in _TENSORS and arg.is_neg() for arg in args)


class Operator:
    """`torch.ops.sttm_kernels.<name>`.

    Args:
        name: a verb or a form of one: `_backward`, `_packed`, `_earlier`.
        inputs, outputs: NamedTuples, from whose annotations the schema is written. The first tensor among the inputs
            decides device and dtype; the last input is `impl`.
        run: calls the implementation it is given with these inputs. Results not asked for are None, and leave the
            operator with shape (0,).
        fake: the results without data.
        formula: the results that are differentiable, None for others, in plain PyTorch, from inputs and results; None
            if there are none.
        backward: gradients by name of input, from inputs, results, gradients of the results, and which are needed.
            Without it the formula is differentiated.
        differentiable: names of the results that are.
        constants: inputs with respect to which nothing is differentiated, for the formula does not look at them.
        unsaved: what `backward` does not look at.
        shape: of the inputs, what the choice of `impl="auto"` depends on where it was measured.

    Every operator returns fresh contiguous tensors, mutates nothing, and picks its implementation when it runs.
    """

    def __init__(
        self,
        name: str,
        inputs: type[Any],
        outputs: type[Any],
        run: Callable[[Callable[..., Any], Any], Any],
        fake: Callable[[Any], Sequence[Tensor | None]],
        formula: Callable[[Any, Any], Sequence[Tensor | None]] | None = None,
        backward: Callable[[Any, Any, Any, Any], dict[str, Tensor | None]] | None = None,
        differentiable: Sequence[str] = (),
        constants: Sequence[str] = (),
        unsaved: Sequence[str] = (),
        shape: Callable[[Any], Sequence[int]] | None = None,
    ):
        OPERATORS[name] = self
        self.shape, self.verb = shape, dispatch.verb_of(name)
        self.name, self.inputs, self.outputs, self.run, self.formula = name, inputs, outputs, run, formula
        self.backward, self.differentiable, self.constants = backward, differentiable, constants
        self.kept = [field not in (*constants, *unsaved) for field in (*inputs._fields, *outputs._fields)]
        kinds = [str(getattr(kind, "__forward_arg__", kind)) for kind in inputs.__annotations__.values()]
        arguments = ", ".join(f"{_SCHEMA[kind]} {field}" for field, kind in zip(inputs._fields, kinds, strict=True))
        results = ", ".join(f"Tensor {field}" for field in outputs._fields)
        _lib.define(f"{name}({arguments}) -> ({results})", tags=(torch.Tag.pt2_compliant_tag,))
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        _lib.impl(name, self._kernel, "CompositeExplicitAutograd")
        _lib.impl(name, self._autograd, "Autograd")
        torch.library.register_fake(
            f"{NAMESPACE}::{name}", lambda *args: self.flat(inputs(*args), fake(inputs(*args))), lib=_lib
        )

    def implementation(self, a: tuple[Any, ...]) -> Callable[..., Any] | None:
        """The function of the implementation, to be called at once; None where something listens or differentiates.

        A tracer, a mode, a transform, a tensor subclass, a device without data, a lazy sign need the operator.
        Elsewhere the dispatcher's price, more than the rest of a small verb, buys nothing.
        """
        if torch.compiler.is_compiling() or observed() or not _PLAIN.issuperset(map(type, a)):
            return None
        lead = a[0] if a[0] is not None else _lead(a)
        if lead.is_meta:
            return None
        differentiating = torch.is_grad_enabled()
        for arg in a:
            if type(arg) in _TENSORS and (arg.is_neg() or (differentiating and arg.requires_grad)):
                return None
        impl = self._fastest(a, lead) if a[-1] == "auto" and crossover.table(lead.device) else a[-1]
        return dispatch.kernel(self.name, impl, lead.device, lead.dtype)

    def _fastest(self, a: tuple[Any, ...], lead: Tensor) -> str:
        if self.shape is None:
            return "auto"
        shape = crossover.rounded(self.shape(self.inputs(*a)))
        return dispatch.choose(self.verb, lead.device, lead.dtype, shape)

    def __call__(self, a: Any) -> Any:
        run = self.implementation(a)
        return self.run(run, a) if run is not None else self.listened(a)

    def listened(self, a: tuple[Any, ...]) -> Any:
        """The results, by way of whoever listens or differentiates."""
        if torch.jit.is_tracing():
            # It would make constants of the numbers of tokens and groups.
            raise RuntimeError(f"{self.name} needs torch.export or torch.compile in place of torch.jit.trace")
        if any(isinstance(arg, Tensor) and hasattr(arg, "device_mesh") for arg in a):
            return self._over_ranks(self.inputs(*a))
        if torch.compiler.is_compiling():
            found = self.overload(*a)
        elif transforming():
            found = self._transformable.apply(*a)
        elif _is_listened_to(a):
            found = self.overload(*a)
        else:
            found = self._autograd(*a)
        return self.outputs(*found) if len(self.outputs._fields) > 1 else self.outputs(found)

    def _over_ranks(self, a: Any) -> Any:
        from sttm_kernels import sharding  # not before there are DTensors: it imports torch.distributed.tensor

        return sharding.run(self, a)

    def flat(self, a: Any, results: Sequence[Tensor | None]) -> Any:
        """Results as the operator returns them."""
        if len(results) == 1:
            return results[0]
        return tuple(_lead(a).new_empty(0) if result is None else result for result in results)

    def _kernel(self, *args: Any) -> Any:
        a, lead = self.inputs(*args), _lead(args)
        impl = self._fastest(args, lead) if args[-1] == "auto" and crossover.table(lead.device) else args[-1]
        return self.flat(a, self.run(dispatch.kernel(self.name, impl, lead.device, lead.dtype), a))

    def _below(self, *args: Any) -> Any:
        """The results without derivatives."""
        if _is_listened_to(args):
            with below_autograd():
                return self.overload(*args)
        return self._kernel(*args)

    def _autograd(self, *args: Any) -> Any:
        if transforming():
            raise RuntimeError(
                f"torch.ops.{NAMESPACE}.{self.name} cannot be transformed by torch.func, as it would be in a"
                f" compiled or exported program; call sttm_kernels.{self.name} in a function that is not compiled"
            )
        if forward_differentiating() or (torch.is_grad_enabled() and any(map(_requires_grad, args))):
            return self._differentiable.apply(*args)
        return self._below(*args)

    def _setup(self, ctx: Any, args: Sequence[Any], found: Any) -> None:
        results = found if isinstance(found, tuple) else (found,)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(t for t, varies in zip(results, self._varying(results), strict=True) if not varies)
        )
        ctx.rest = [None if isinstance(arg, Tensor) else arg for arg in args]
        tensors = [arg if isinstance(arg, Tensor) else None for arg in args] + list(results)
        ctx.save_for_backward(*(t if keep else None for t, keep in zip(tensors, self.kept, strict=True)))
        if forward_differentiating():
            ctx.save_for_forward(*tensors)

    def _varying(self, results: Sequence[Tensor]) -> list[bool]:
        """Which results are differentiable and were asked for."""
        named = zip(self.outputs._fields, results, strict=True)
        return [field in self.differentiable and t.dim() > 1 for field, t in named]

    def _saved(self, ctx: Any) -> tuple[Any, Any]:
        saved = [None if t is None else unwrapped(t) for t in ctx.saved_tensors]
        count = len(self.inputs._fields)
        arguments = (rest if t is None else t for t, rest in zip(saved[:count], ctx.rest, strict=True))
        return self.inputs(*arguments), self.outputs(*saved[count:])

    def _pull(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        formula, fields = self.formula, self.inputs._fields
        needs = [need and field not in self.constants for need, field in zip(ctx.needs_input_grad, fields, strict=True)]
        if formula is None or not any(needs) or all(grad is None for grad in grads):
            return (None,) * len(fields)
        if is_mapped_by_autograd(grads):
            return map_by_func(partial(self._pull, ctx), grads)
        a, out = self._saved(ctx)
        if self.backward is None:
            return tuple(pull_back(lambda *given: formula(self.inputs(*given), out), a, needs, grads))
        found = self.backward(a, out, self.outputs(*grads), self.inputs(*needs))
        return tuple(found.get(field) if need else None for field, need in zip(fields, needs, strict=True))

    def _push(self, ctx: Any, *tangents: Tensor | None) -> Any:
        a, out = self._saved(ctx)
        given = [None if field in self.constants else t for t, field in zip(tangents, a._fields, strict=True)]
        found: Sequence[Tensor | None] = [None] * len(out)
        formula = self.formula
        if formula is not None and any(tangent is not None for tangent in given):
            with outer_levels_of_forward_mode():
                a, out = self.inputs(*map(_primal, a)), self.outputs(*map(_primal, out))
                found = push_forward(lambda *values: formula(self.inputs(*values), out), a, given)
        # PyTorch takes no None for the tangent of a result that is differentiable.
        found = tuple(
            (torch.zeros_like(t) if tangent is None else tangent) if varies else None
            for t, tangent, varies in zip(out, found, self._varying(out), strict=True)
        )
        return found if len(found) > 1 else found[0]

    def _batch(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """vmap: the mapped dimension joins the batch, of which no item knows of the others."""
        V, lead = info.batch_size, next(i for i, arg in enumerate(args) if isinstance(arg, Tensor))
        if getattr(self.inputs(*args), "sequences", None) is not None:  # which have no batch that could be joined
            return self._each(V, in_dims, args)
        B = args[lead].shape[0 if in_dims[lead] is None else int(in_dims[lead] == 0)]
        results = self(self.inputs(*(joined(V, B, arg, dim) for arg, dim in zip(args, in_dims, strict=True))))
        asked = [t is not None and t.dim() > 1 for t in results]
        lead_result = next(t for t in results if t is not None)
        split = [
            t.unflatten(0, (V, B)) if was else lead_result.new_empty(0) for t, was in zip(results, asked, strict=True)
        ]
        dims = tuple(0 if was else None for was in asked)
        return (tuple(split), dims) if len(split) > 1 else (split[0], dims[0])

    def _each(self, V: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        """vmap, one after another."""
        pairs = list(zip(args, in_dims, strict=True))

        def alone(v: int) -> Any:
            return self.inputs(*(arg.select(dim, v) if isinstance(dim, int) else arg for arg, dim in pairs))

        each = [self(alone(v)) for v in range(V)]
        empty = _lead(args).new_empty(0)
        asked = tuple(t is not None and t.dim() > 1 for t in each[0])
        results = [torch.stack(ts) if was else empty for was, ts in zip(asked, zip(*each, strict=True), strict=True)]
        return tuple(results), tuple(0 if was else None for was in asked)

    @cached_property
    def _differentiable(self) -> type[torch.autograd.Function]:
        """Reverse and forward mode. Without `setup_context`, which costs ten microseconds a call."""

        def forward(ctx: Any, *args: Any) -> Any:
            found = self._below(*args)
            found = tuple(map(_own, found)) if isinstance(found, tuple) else _own(found)
            self._setup(ctx, args, found)
            return found

        return self._function(forward=forward)

    @cached_property
    def _transformable(self) -> type[torch.autograd.Function]:
        """What the transforms of torch.func take."""
        return self._function(forward=self._below, setup_context=self._setup, vmap=self._batch)

    def _function(self, **members: Callable[..., Any]) -> type[torch.autograd.Function]:
        members = {"backward": self._pull, "jvp": self._push, **members}
        static = {name: staticmethod(_function(member)) for name, member in members.items()}
        return type(self.name, (torch.autograd.Function,), static)


def _function(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method as the function that compiled autograd asks for."""
    return lambda *args: method(*args)


def joined(V: int, B: int, arg: Any, dim: int | None) -> Any:
    """An argument of `B` items, of which vmap maps over the dimension `dim` of `V`, with that joined to its batch."""
    if not isinstance(arg, Tensor):
        return arg
    arg = arg.expand(V, *arg.shape) if dim is None else arg.movedim(dim, 0)
    return arg.expand(V, B, *arg.shape[2:]).flatten(0, 1)


def pull_back(
    run: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Any], needs: Sequence[bool], grads: Sequence[Any]
) -> list[Tensor | None]:
    """The gradients that are needed of `run(*inputs)`, None for others; they can be differentiated again."""
    which = [i for i, need in enumerate(needs) if need]
    known: list[Tensor] = []

    def outputs(*values: Tensor) -> list[Tensor]:
        results = run(*_replaced(inputs, which, values))
        pairs = [(t, grad) for t, grad in zip(results, grads, strict=True) if t is not None and grad is not None]
        known[:] = [grad for _, grad in pairs]
        return [t for t, _ in pairs]

    with without_autocast(inputs[which[0]].device.type):
        pull = torch.func.vjp(outputs, *(inputs[i] for i in which))[1]
        found = dict(zip(which, pull(known), strict=True))
    return [found.get(i) for i in range(len(inputs))]


def push_forward(
    run: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Any], tangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The tangents of `run(*inputs)`, None where it has no result.

    Pulling back is linear in the gradients, and its own pull-back pushes forward: unlike PyTorch's forward mode this
    nests in every other mode.
    """
    which = [i for i, tangent in enumerate(tangents) if tangent is not None]
    primals, here = [inputs[i] for i in which], [False]

    def outputs(*values: Tensor) -> list[Tensor]:
        results = run(*_replaced(inputs, which, values))
        here[:] = [t is not None for t in results]
        return [t for t in results if t is not None]

    zeros = [torch.zeros_like(t) for t in outputs(*primals)]
    with without_autocast(primals[0].device.type):
        push = torch.func.vjp(lambda *grads: torch.func.vjp(outputs, *primals)[1](list(grads)), *zeros)[1]
        found = iter(push(tuple(tangents[i] for i in which)))
    return [next(found) if is_here else None for is_here in here]


def _replaced(inputs: Sequence[Any], which: Sequence[int], values: Sequence[Tensor]) -> list[Any]:
    given = list(inputs)
    for i, value in zip(which, values, strict=True):
        given[i] = value
    return given
