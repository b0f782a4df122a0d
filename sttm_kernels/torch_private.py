"""Every name of PyTorch used here that its documentation does not promise, and what replaces it where it is gone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad

P = ParamSpec("P")
R = TypeVar("R")


def _find(path: str, instead: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.<path>`, or `instead` where this PyTorch has none."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return instead if found is None else found


_modes: Callable[[], int] = _find("_C._len_torch_dispatch_stack", lambda: 1)
_tracing_state: Callable[[], Any] = _find("_C._get_tracing_state", torch.jit.is_tracing)
_transform: Callable[[], Any] = _find("_C._functorch.peek_interpreter_stack", lambda: None)
_precision: Callable[[str, str], str] | None = getattr(torch._C, "_get_fp32_precision_getter", None)
_graph_task: Callable[[], int] = _find("_C._current_graph_task_id", lambda: -1)
raw_stream: Callable[[int], int] = _find(
    "_C._cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream
)


def dispatching() -> bool:
    """Whether a dispatch mode or a tracer listens to the operators. Where that cannot be known, one may."""
    return _modes() > 0 or bool(_tracing_state())


def transforming() -> bool:
    """Whether a transform of `torch.func` is active."""
    return _transform() is not None


def in_backward() -> bool:
    """Whether autograd is at work in this thread: a forward that runs now is one that checkpointing repeats."""
    return _graph_task() != -1


def forward_differentiating() -> bool:
    """Whether a level of forward-mode differentiation is open."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def observed() -> bool:
    """Whether anything of these three is so, in one call: it is asked before every verb."""
    return (
        _modes() > 0
        or _transform() is not None
        or getattr(forward_ad, "_current_level", 0) >= 0
        or bool(_tracing_state())
    )


unwrapped: Callable[[torch.Tensor], torch.Tensor] = _find("_C._functorch.unwrap_if_dead", lambda t: t)
"""A tensor without the wrapper of a transform that has ended, which the transforms of torch.func trip over."""


def outer_levels_of_forward_mode() -> AbstractContextManager[Any]:
    """Within it the outer levels go on, which PyTorch halts for the `jvp` of a `Function`: a tangent of a tangent
    would be zero."""
    return forward_ad._set_fwd_grad_enabled(True)


def below_autograd() -> AbstractContextManager[Any]:
    """Within it operators go past their derivatives."""
    return torch._C._AutoDispatchBelowAutograd()


_wrapped: Callable[[torch.Tensor], bool] = _find("_C._functorch.is_functorch_wrapped_tensor", lambda t: False)
_batched: Callable[[torch.Tensor], bool] = _find("_C._functorch.is_batchedtensor", lambda t: False)
_unwrapped: Callable[[torch.Tensor], torch.Tensor] = _find("_C._functorch.get_unwrapped", lambda t: t)


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether `torch.func.vmap` maps this, at any level of transforms."""
    while _wrapped(tensor):
        if _batched(tensor):
            return True
        tensor = _unwrapped(tensor)
    return False


_mapped_by_autograd: Callable[[torch.Tensor], bool] = _find("_C._functorch.is_legacy_batchedtensor", lambda t: False)


def is_mapped_by_autograd(grads: Sequence[torch.Tensor | None]) -> bool:
    """Whether `torch.autograd.grad(is_grads_batched=True)` maps these: with a vmap older than that of torch.func."""
    return any(grad is not None and _mapped_by_autograd(grad) for grad in grads)


def map_by_func(
    pull: Callable[..., Sequence[torch.Tensor | None]], grads: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor | None, ...]:
    """`pull(*grads)` of gradients that autograd maps, mapped by the vmap of torch.func."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    which = [i for i, grad in enumerate(grads) if grad is not None and _mapped_by_autograd(grad)]
    here: list[bool] = []

    def mapped(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = list(grads)
        for i, value in zip(which, values, strict=True):
            given[i] = value
        found = pull(*given)
        here[:] = [t is not None for t in found]
        return tuple(t for t in found if t is not None)

    values = (torch._remove_batch_dim(grads[i], level, 1, 0) for i in which)  # type: ignore[arg-type]
    found = iter(torch.func.vmap(mapped)(*values))
    return tuple(torch._add_batch_dim(next(found), 0, level) if is_here else None for is_here in here)


def constant_when_compiled(run: Callable[P, R]) -> Callable[P, R]:
    """What `torch.compiler.assume_constant_result` makes of a function, without importing the compiler."""
    run._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return run


@constant_when_compiled
def exporting() -> bool:
    """`torch.compiler.is_exporting`, which the compiler of PyTorch 2.9 to 2.11 takes to be true of all it compiles."""
    return torch.compiler.is_exporting()


def tf32() -> bool:
    """Whether PyTorch may round the float32 operands of a product on a GPU to TF32.

    `allow_tf32` raises once somebody has set `fp32_precision`, which knows of both.
    """
    if _precision is None:
        return torch.backends.cuda.matmul.allow_tf32
    return _precision("cuda", "matmul") == "tf32"
