"""The operators: schema, implementation, fake kernel and autograd of each verb, in that order.

Torch only. Every operator returns fresh contiguous tensors, mutates nothing, and picks its implementation when it runs.
A tensor that was not asked for comes back with shape (0,). Differentiating a backward goes through the specification.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sttm_kernels import dispatch, reference
from sttm_kernels.plan import MergePlan
from sttm_kernels.reference import acc_dtype

NAMESPACE = "sttm_kernels"
_lib = torch.library.Library(NAMESPACE, "DEF")


_functions: dict[str, type[torch.autograd.Function]] = {}
_functorch = torch._C._functorch


def _define(name: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Registers an operator whose last argument is `impl` and whose first tensor decides device and dtype.

    Returns the function to call it by. The dispatcher is asked only where something may listen to it: a tracer, a mode,
    a transform, a tensor subclass, a device without data. Elsewhere its price, more than the rest of a small verb, buys
    nothing.
    """
    _lib.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))

    _lib.impl(name, partial(_run, name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_lib)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or _listened_to() or not _PLAIN.issuperset(map(type, args)):
            return overload(*args)
        lead = _lead(args)
        device_type = _device_type(lead.device)
        if device_type == "meta":
            return overload(*args)
        if torch.is_grad_enabled() and name in _functions and any(map(_requires_grad, args)):
            return _functions[name].apply(*args)
        return dispatch.kernel(name, args[-1], device_type, lead.dtype)(*args[:-1])

    return call


def _run(name: str, *args: Any) -> Any:
    lead = _lead(args)
    return dispatch.kernel(name, args[-1], _device_type(lead.device), lead.dtype)(*args[:-1])


@cache
def _device_type(device: torch.device) -> str:
    """Its type, which PyTorch writes out anew every time."""
    return device.type


def _requires_grad(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.requires_grad


def _lead(args: tuple[Any, ...]) -> Tensor:
    return args[0] if args[0] is not None else next(arg for arg in args if isinstance(arg, Tensor))


_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None), str, int, float, bool, list})


def _listened_to() -> bool:
    """Whether a dispatch mode, a functorch transform, forward-mode AD or a tracer is active."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or _functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def _differentiable(name: str, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Gives an operator its gradient, in the dispatcher and in a `Function` for calls that do not go through it."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup, lib=_lib)

    def forward(ctx: Any, *args: Any) -> Any:
        output = _run(name, *args)
        setup(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    _functions[name] = type(name, (torch.autograd.Function,), members)


def _through_reference(
    run: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of `run(*inputs)` that can themselves be differentiated."""
    inputs = [None if t is None else t.view_as(t) for t in inputs]  # one tensor given twice stays two inputs
    outputs = run(*inputs)
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out is not None and grad is not None]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs], wanted, [grad for _, grad in pairs], create_graph=True, allow_unused=True
        )
    )
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def _only(wanted: Sequence[bool], tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [tensor if want else None for want, tensor in zip(wanted, tensors, strict=True)]


# assign


def _assign_fake(
    q: Tensor, meta: Tensor, mask: Tensor | None, similarity: str, temperature: float, soft: bool, impl: str
) -> tuple[Tensor, ...]:
    rows = (q.shape[0], q.shape[-2])
    score = q.new_empty(rows, dtype=acc_dtype(q.dtype))
    lse = torch.empty_like(score) if soft else score.new_empty(0)
    return q.new_empty(rows, dtype=torch.int32), score, lse, torch.empty_like(lse)


def _assign_backward_fake(
    grad_score: Tensor, grad_lse: Tensor | None, q: Tensor, meta: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    need_q, need_meta = rest[-2]
    return (
        q.new_empty(q.shape if need_q else 0),
        meta.new_empty(meta.shape if need_meta else 0),
    )


assign = _define(
    "assign",
    "(Tensor q, Tensor meta, Tensor? mask, str similarity, float temperature, bool soft, str impl)"
    " -> (Tensor index, Tensor score, Tensor lse, Tensor weight)",
    _assign_fake,
)
assign_backward = _define(
    "assign_backward",
    "(Tensor grad_score, Tensor? grad_lse, Tensor q, Tensor meta, Tensor index, Tensor score, Tensor lse,"
    " str similarity, float temperature, bool[2] needs, str impl) -> (Tensor grad_q, Tensor grad_meta)",
    _assign_backward_fake,
)


def _assign_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, meta, mask, ctx.similarity, ctx.temperature, ctx.soft, ctx.impl = inputs
    index, score, lse, weight = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, meta, mask, index, score, lse, weight)


def _assign_grads(ctx: Any, _: None, grad_score: Tensor | None, grad_lse: Tensor | None, grad_weight: Tensor | None):
    q, meta, mask, index, score, lse, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    nothing = (None,) * 5
    if not ctx.soft:
        grad_lse = grad_weight = None
    if grad_score is None and grad_lse is None and grad_weight is None:
        return None, None, *nothing
    if torch.is_grad_enabled():

        def run(q: Tensor, meta: Tensor) -> list[Tensor | None]:
            chosen = "softmax" if ctx.soft else "uniform"
            plan = reference.assign(q, meta, ctx.similarity, ctx.temperature, chosen, mask)
            return [plan.score, plan.lse, plan.weight]

        return *_through_reference(run, (q, meta), (grad_score, grad_lse, grad_weight)), *nothing
    grads = _pull_back_assign(
        grad_score, grad_lse, grad_weight, q, meta, index, score, lse, weight, ctx.similarity, ctx.temperature, needs,
        ctx.impl,
    )  # fmt: skip
    return *_only(needs, grads), *nothing


def _pull_back_assign(
    grad_score: Tensor | None, grad_lse: Tensor | None, grad_weight: Tensor | None, q: Tensor, meta: Tensor,
    index: Tensor, score: Tensor, lse: Tensor, weight: Tensor, similarity: str, temperature: float,
    needs: list[bool], impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of q and meta; that of weight = exp(score - lse) joins those of score and lse."""
    if grad_weight is not None:
        through_weight = grad_weight * weight
        grad_score = through_weight if grad_score is None else grad_score + through_weight
        grad_lse = -through_weight if grad_lse is None else grad_lse - through_weight
    if grad_score is None:
        grad_score = torch.zeros_like(score)
    return assign_backward(grad_score, grad_lse, q, meta, index, score, lse, similarity, temperature, needs, impl)


_differentiable("assign", _assign_setup, _assign_grads)


# match


def _match_fake(
    metric: Tensor, src: Tensor | None, dst: Tensor | None, r: int, num_prefix: int, impl: str
) -> tuple[Tensor, ...]:
    B, N = metric.shape[0], metric.shape[-2]
    index = metric.new_empty((B, N), dtype=torch.int32)
    score = metric.new_empty((B, N), dtype=acc_dtype(metric.dtype))
    return index, score, torch.empty_like(index), index.new_empty((B, N - r + 1))


match = _define(
    "match",
    "(Tensor metric, Tensor? src, Tensor? dst, SymInt r, SymInt num_prefix, str impl)"
    " -> (Tensor index, Tensor score, Tensor order, Tensor offsets)",
    _match_fake,
)


# merge


def _merge_fake(
    x: Tensor, index: Tensor, num_groups: int, weight: Tensor | None, size: Tensor | None, positions: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    groups = (x.shape[0], num_groups)
    mass = x.new_empty(groups, dtype=acc_dtype(x.dtype))
    features = 0 if positions is None else positions.shape[-1]
    return x.new_empty((*groups, x.shape[-1])), torch.empty_like(mass), mass.new_empty((*groups, features)), mass


def _merge_backward_fake(
    grad_y: Tensor | None, grad_size: Tensor | None, grad_positions: Tensor | None, x: Tensor, index: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    positions, (need_x, need_weight, need_size, need_positions) = rest[3], rest[-2]
    rows = x.new_empty(index.shape, dtype=acc_dtype(x.dtype))
    return (
        x.new_empty(x.shape if need_x else 0),
        rows.new_empty(rows.shape if need_weight else 0),
        rows.new_empty(rows.shape if need_size else 0),
        rows.new_empty(positions.shape if need_positions else 0),
    )


merge = _define(
    "merge",
    "(Tensor x, Tensor index, SymInt num_groups, Tensor? weight, Tensor? size, Tensor? positions, Tensor? fill,"
    " Tensor? order, Tensor? offsets, str reduce, str impl)"
    " -> (Tensor y, Tensor size_out, Tensor positions_out, Tensor mass)",
    _merge_fake,
)
merge_backward = _define(
    "merge_backward",
    "(Tensor? grad_y, Tensor? grad_size, Tensor? grad_positions, Tensor x, Tensor index, SymInt num_groups,"
    " Tensor? weight, Tensor? size, Tensor? positions, Tensor y, Tensor positions_out, Tensor mass,"
    " Tensor? order, Tensor? offsets, str reduce, bool[4] needs, str impl)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_size_in, Tensor grad_positions_in)",
    _merge_backward_fake,
)


def _merge_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, index, ctx.num_groups, weight, size, positions, fill, order, offsets, ctx.reduce, ctx.impl = inputs
    y, _, positions_out, mass = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mass)
    ctx.save_for_backward(x, index, weight, size, positions, fill, order, offsets, y, positions_out, mass)


def _merge_grads(ctx: Any, grad_y: Tensor | None, grad_size: Tensor | None, grad_positions: Tensor | None, _: None):
    x, index, weight, size, positions, fill, order, offsets, y, positions_out, mass = ctx.saved_tensors
    need_x, _, _, need_weight, need_size, need_positions, need_fill = ctx.needs_input_grad[:7]
    if positions is None:
        grad_positions = None
    if torch.is_grad_enabled():

        def run(x, weight, size, positions, fill):
            plan = MergePlan(index, ctx.num_groups, weight=weight)
            out = reference.merge(x, plan, size, positions, ctx.reduce, fill)
            return [out.x, out.size, out.positions]

        grad_x, grad_weight, grad_size_in, grad_positions_in, grad_fill = _through_reference(
            run, (x, weight, size, positions, fill), (grad_y, grad_size, grad_positions)
        )
    else:
        needs = [need_x, need_weight, need_size, need_positions]
        grad_x, grad_weight, grad_size_in, grad_positions_in = _only(
            needs,
            merge_backward(
                grad_y, grad_size, grad_positions, x, index, ctx.num_groups, weight, size, positions, y,
                positions_out, mass, order, offsets, ctx.reduce, needs, ctx.impl,
            ),
        )  # fmt: skip
        grad_fill = None
        if need_fill and grad_y is not None:
            grad_fill = torch.where((mass == 0)[..., None], grad_y, 0)
    return grad_x, None, None, grad_weight, grad_size_in, grad_positions_in, grad_fill, None, None, None, None


_differentiable("merge", _merge_setup, _merge_grads)


# assign_merge


def _assign_merge_fake(
    x: Tensor, q: Tensor | None, meta: Tensor, mask: Tensor | None, size: Tensor | None, positions: Tensor | None,
    fill: Tensor | None, similarity: str, temperature: float, soft: bool, impl: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    plan = _assign_fake(x if q is None else q, meta, mask, similarity, temperature, soft, impl)
    return *plan, *_merge_fake(x, plan[0], meta.shape[1], None, size, positions)


assign_merge = _define(
    "assign_merge",
    "(Tensor x, Tensor? q, Tensor meta, Tensor? mask, Tensor? size, Tensor? positions, Tensor? fill, str similarity,"
    " float temperature, bool soft, str impl) -> (Tensor index, Tensor score, Tensor lse, Tensor weight, Tensor y,"
    " Tensor size_out, Tensor positions_out, Tensor mass)",
    _assign_merge_fake,
)


def _assign_merge_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, q, meta, mask, size, positions, fill, ctx.similarity, ctx.temperature, ctx.soft, ctx.impl = inputs
    index, score, lse, weight, y, _, positions_out, mass = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mass)
    ctx.save_for_backward(x, q, meta, mask, size, positions, fill, index, score, lse, weight, y, positions_out, mass)


def _assign_merge_grads(
    ctx: Any, _: None, grad_score: Tensor | None, grad_lse: Tensor | None, grad_weight: Tensor | None,
    grad_y: Tensor | None, grad_size: Tensor | None, grad_positions: Tensor | None, __: None,
):  # fmt: skip
    x, q, meta, mask, size, positions, fill, index, score, lse, weight, y, positions_out, mass = ctx.saved_tensors
    need_x, need_q, need_meta, _, need_size, need_positions, need_fill = ctx.needs_input_grad[:7]
    if positions is None:
        grad_positions = None
    if not ctx.soft:
        grad_lse = grad_weight = None
    nothing = (None,) * 4
    if torch.is_grad_enabled():

        def run(x, q, meta, size, positions, fill):
            chosen = "softmax" if ctx.soft else "uniform"
            plan = reference.assign(x if q is None else q, meta, ctx.similarity, ctx.temperature, chosen, mask)
            out = reference.merge(x, plan, size, positions, "mean", fill)
            return [plan.score, plan.lse, plan.weight, out.x, out.size, out.positions]

        grad_x, grad_q, grad_meta, grad_size_in, grad_positions_in, grad_fill = _through_reference(
            run,
            (x, q, meta, size, positions, fill),
            (grad_score, grad_lse, grad_weight, grad_y, grad_size, grad_positions),
        )
        return grad_x, grad_q, grad_meta, None, grad_size_in, grad_positions_in, grad_fill, *nothing

    metric = x if q is None else q
    needs_assign = [need_x if q is None else need_q, need_meta]
    grad_x = grad_size_in = grad_positions_in = grad_metric = grad_meta = None
    if any(grad is not None for grad in (grad_y, grad_size, grad_positions)):
        needs = [need_x, ctx.soft and any(needs_assign), need_size, need_positions]
        grad_x, through_merge, grad_size_in, grad_positions_in = _only(
            needs,
            merge_backward(
                grad_y, grad_size, grad_positions, x, index, meta.shape[1], weight if ctx.soft else None, size,
                positions, y, positions_out, mass, None, None, "mean", needs, ctx.impl,
            ),
        )  # fmt: skip
        if through_merge is not None:
            grad_weight = through_merge if grad_weight is None else grad_weight + through_merge
    if any(needs_assign) and any(grad is not None for grad in (grad_score, grad_lse, grad_weight)):
        grad_metric, grad_meta = _only(
            needs_assign,
            _pull_back_assign(
                grad_score, grad_lse, grad_weight, metric, meta, index, score, lse, weight, ctx.similarity,
                ctx.temperature, needs_assign, ctx.impl,
            ),
        )  # fmt: skip
    if q is None and grad_metric is not None:
        grad_x = grad_metric if grad_x is None else grad_x + grad_metric
    grad_q = None if q is None else grad_metric
    grad_fill = torch.where((mass == 0)[..., None], grad_y, 0) if need_fill and grad_y is not None else None
    return grad_x, grad_q, grad_meta, None, grad_size_in, grad_positions_in, grad_fill, *nothing


_differentiable("assign_merge", _assign_merge_setup, _assign_merge_grads)


# unmerge


def _unmerge_fake(x: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor | None, impl: str) -> Tensor:
    return x.new_empty((*index.shape, x.shape[-1]))


unmerge = _define(
    "unmerge",
    "(Tensor x, Tensor index, Tensor? order, Tensor? offsets, str impl) -> Tensor",
    _unmerge_fake,
)


def _unmerge_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, order, offsets, ctx.impl = inputs
    ctx.num_groups = x.shape[1]
    ctx.save_for_backward(index, order, offsets)


def _unmerge_grads(ctx: Any, grad: Tensor):
    index, order, offsets = ctx.saved_tensors
    summed = merge(grad, index, ctx.num_groups, None, None, None, None, order, offsets, "sum", ctx.impl)[0]
    return summed, None, None, None, None


_differentiable("unmerge", _unmerge_setup, _unmerge_grads)


# compose


def _compose_fake(index1: Tensor, index2: Tensor, num_groups: int, impl: str) -> Tensor:
    return torch.empty_like(index1, memory_format=torch.contiguous_format)


compose = _define("compose", "(Tensor index1, Tensor index2, SymInt num_groups, str impl) -> Tensor", _compose_fake)


# soft_merge


def _soft_merge_fake(
    x: Tensor, q: Tensor, meta: Tensor, size: Tensor | None, positions: Tensor | None, mask: Tensor | None,
    similarity: str, temperature: float, normalize: str, impl: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    groups = (x.shape[0], meta.shape[1])
    mass = x.new_empty(groups, dtype=acc_dtype(x.dtype))
    features = 0 if positions is None else positions.shape[-1]
    lse_shape = x.shape[:2] if normalize == "meta" else groups
    return (
        x.new_empty((*groups, x.shape[-1])),
        mass,
        mass.new_empty((*groups, features)),
        x.new_empty(lse_shape, dtype=acc_dtype(q.dtype)),
    )


def _soft_merge_backward_fake(
    grad_y: Tensor | None, grad_size: Tensor | None, grad_positions: Tensor | None, x: Tensor, q: Tensor, meta: Tensor,
    size: Tensor | None, positions: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    need_x, need_q, need_meta, need_size, need_positions = rest[-2]
    acc = acc_dtype(x.dtype)
    return (
        x.new_empty(x.shape if need_x else 0),
        q.new_empty(q.shape if need_q else 0),
        meta.new_empty(meta.shape if need_meta else 0),
        x.new_empty(x.shape[:2] if need_size else 0, dtype=acc),
        x.new_empty(positions.shape if need_positions and positions is not None else 0, dtype=acc),
    )


soft_merge = _define(
    "soft_merge",
    "(Tensor x, Tensor q, Tensor meta, Tensor? size, Tensor? positions, Tensor? mask, str similarity,"
    " float temperature, str normalize, str impl)"
    " -> (Tensor y, Tensor size_out, Tensor positions_out, Tensor lse)",
    _soft_merge_fake,
)
soft_merge_backward = _define(
    "soft_merge_backward",
    "(Tensor? grad_y, Tensor? grad_size, Tensor? grad_positions, Tensor x, Tensor q, Tensor meta, Tensor? size,"
    " Tensor? positions, Tensor? mask, Tensor y, Tensor mass, Tensor positions_out, Tensor lse, str similarity,"
    " float temperature, str normalize, bool[5] needs, str impl)"
    " -> (Tensor grad_x, Tensor grad_q, Tensor grad_meta, Tensor grad_size_in, Tensor grad_positions_in)",
    _soft_merge_backward_fake,
)


def _soft_merge_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, q, meta, size, positions, mask, ctx.similarity, ctx.temperature, ctx.normalize, ctx.impl = inputs
    y, mass, positions_out, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(x, q, meta, size, positions, mask, y, mass, positions_out, lse)


def _soft_merge_grads(
    ctx: Any, grad_y: Tensor | None, grad_size: Tensor | None, grad_positions: Tensor | None, _: None
):
    x, q, meta, size, positions, mask, y, mass, positions_out, lse = ctx.saved_tensors
    settings = (ctx.similarity, ctx.temperature, ctx.normalize)
    if positions is None:
        grad_positions = None
    if torch.is_grad_enabled():

        def run(x, q, meta, size, positions):
            out = reference.soft_merge(x, q, meta, *settings, size, positions, mask)
            return [out.x, out.size, out.positions]

        grads = _through_reference(run, (x, q, meta, size, positions), (grad_y, grad_size, grad_positions))
    else:
        needs = list(ctx.needs_input_grad[:5])
        grads = _only(
            needs,
            soft_merge_backward(
                grad_y, grad_size, grad_positions, x, q, meta, size, positions, mask, y, mass, positions_out, lse,
                *settings, needs, ctx.impl,
            ),
        )  # fmt: skip
    return *grads, None, None, None, None, None


_differentiable("soft_merge", _soft_merge_setup, _soft_merge_grads)
