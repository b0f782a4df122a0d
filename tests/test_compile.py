"""The operators under the machinery of PyTorch: opcheck, compile, export, checkpointing, pytrees, pickle."""

import copy
import io
import pickle
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing._internal.optests import aot_autograd_check
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import sttm_kernels as sttm
from sttm_kernels import dispatch, operator, sequences
from sttm_kernels.testing import assert_equal, make_index, make_tokens

pytestmark = pytest.mark.unpoisoned


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# opcheck

IMPL = "torch"


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return (value.abs() + 0.5 if len(shape) == 2 else value).requires_grad_()


def bare(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return leaf(*shape, seed=seed, dtype=dtype).detach()


MASK = torch.tensor([[True, True, False, True, True, True]]).expand(2, -1)
INDEX = make_index(2, 6, 3)
SRC, DST = torch.tensor([[[0, 2, 4]]], dtype=torch.int32), torch.tensor([[[1, 3, 5]]], dtype=torch.int32)
PADDED = torch.tensor([[[0, 2], [4, -1]]], dtype=torch.int32), torch.tensor([[[1, 3], [5, -1]]], dtype=torch.int32)
SEQUENCES = sequences.table((4, 5), (3, 3), (1, 2), torch.device("cpu"))
OPS = torch.ops.sttm_kernels
ASSIGNED = OPS.assign(bare(2, 6, 4), bare(2, 3, 4), None, None, "cosine", 1.0, "softmax", IMPL)
EACH = sequences.table((4, 5), (3, 3), (0, 0), torch.device("cpu"))
APART = OPS.assign(bare(1, 9, 4), bare(2, 3, 4), None, EACH, "cosine", 1.0, "softmax", IMPL)
FREE = (None, IMPL)  # the last arguments of a match without a threshold
MATCHED = OPS.match(bare(2, 6, 4), None, None, None, None, 2, 4, 0, *FREE)
SIZE, WEIGHT, POSITIONS = bare(2, 6, seed=1), bare(2, 6, seed=2), bare(2, 6, 2, seed=3)
MERGED_TOO = leaf(2, 3, 4), leaf(2, 6, seed=1), bare(2, 3)
APART_TOO = bare(1, 6, 4), None, bare(1, 6)
EXTRAS = MASK, leaf(2, 6), leaf(2, 6, 2), leaf(2, 3, 5)
ROW = leaf(1, 9), leaf(1, 9, 2), leaf(1, 6, 5)


def merge_backward_sample(reduce, needs, order=None, offsets=None, index=INDEX, K=3):
    x = bare(2, 6, 5)
    y, size, positions, mass, *_ = OPS.merge(x, index, K, WEIGHT, SIZE, POSITIONS, None, order, offsets, reduce, IMPL)
    grads = (bare(*y.shape, seed=7), bare(*size.shape, seed=8), bare(*positions.shape, seed=9))
    return (
        *grads, x, index, K, WEIGHT, SIZE, POSITIONS, y, positions, mass, order, offsets, reduce, needs, IMPL,
    )  # fmt: skip


def assign_backward_sample(grads, assigned, merged, similarity, needs, at=None):
    rows = (2, 6) if at is None else (1, 9)
    return *grads, bare(*rows, 4), bare(2, 3, 4), *assigned, *merged, at, similarity, 0.5, needs, IMPL


def soft_backward_sample(normalize, needs, mask=None, positions=POSITIONS, at=None):
    rows = (2, 6) if at is None else (1, 9)
    x, q, meta, size = bare(*rows, 5), bare(*rows, 4), bare(2, 3, 4), bare(*rows, seed=1)
    settings = ("dot", 0.5, normalize)
    y, mass, positions_out, lse = OPS.soft_merge(x, q, meta, size, positions, mask, at, *settings, IMPL)
    grad_positions = None if positions is None else bare(*positions_out.shape, seed=9)
    return (
        bare(*y.shape, seed=7), None, grad_positions, x, q, meta, size, positions, mask, at, y, mass,
        positions_out, lse, *settings, needs, IMPL,
    )  # fmt: skip


SAMPLES = {
    "assign": [
        (leaf(2, 6, 4), leaf(2, 3, 4), None, None, "cosine", 1.0, "softmax", IMPL),
        (leaf(2, 3, 6, 4), leaf(2, 3, 4), MASK, None, "l2", 0.5, "uniform", IMPL),
        (
            bare(2, 6, 4, dtype=torch.bfloat16),
            bare(2, 3, 4, dtype=torch.bfloat16),
            MASK,
            None,
            "dot",
            1.0,
            "softmax",
            "auto",
        ),
        (leaf(1, 2, 9, 4), leaf(2, 3, 4), None, EACH, "l2", 0.5, "softmax", IMPL),
        (leaf(1, 9, 4), leaf(2, 3, 4), None, EACH, "dot", 0.5, "uniform", "auto"),
    ],
    "assign_earlier": [(bare(2, 6, 4), "cosine", 1.0, IMPL), (bare(2, 6, 4), "l2", 0.5, "auto")],
    "assign_backward": [
        assign_backward_sample([bare(2, 6), bare(2, 6), None], ASSIGNED, [None] * 3, "cosine", [True, True]),
        assign_backward_sample([bare(2, 6), None, None], ASSIGNED, [None] * 3, "l2", [False, True]),
        assign_backward_sample([None, None, leaf(2, 6)], ASSIGNED, MERGED_TOO, "cosine", [True, True]),
        assign_backward_sample([bare(1, 9), bare(1, 9), None], APART, [None] * 3, "cosine", [True, True], EACH),
        assign_backward_sample([None, None, bare(1, 9)], APART, APART_TOO, "dot", [True, True], EACH),
    ],
    "match": [
        (bare(2, 6, 4), None, None, None, None, 2, 4, 0, *FREE),
        (bare(2, 3, 6, 4, dtype=torch.bfloat16), None, None, None, None, 2, 4, 1, *FREE),
        (bare(2, 6, 4), SRC, DST, None, None, 1, 5, 0, *FREE),
        (bare(2, 6, 4), *PADDED, None, None, 2, 4, 0, *FREE),
        (bare(2, 6, 4), None, None, MASK, torch.tensor([2, 1], dtype=torch.int32), 2, 5, 0, 0.5, IMPL),
    ],
    "match_packed": [(bare(1, 9, 4), SEQUENCES, None, None, 6, 1, 2, 8, *FREE)],
    "merge": [
        (leaf(2, 6, 5), INDEX, 3, None, None, None, None, None, None, "mean", IMPL),
        (leaf(2, 6, 5), INDEX, 3, leaf(2, 6), leaf(2, 6), leaf(2, 6, 2), leaf(2, 3, 5), None, None, "sum", IMPL),
        (leaf(2, 6, 5), MATCHED[0], 4, None, leaf(2, 6), None, None, *MATCHED[2:], "max", IMPL),
        (bare(2, 6, 5, dtype=torch.bfloat16), INDEX, 3, None, SIZE, None, None, None, None, "first", IMPL),
    ],
    "merge_backward": [
        merge_backward_sample("mean", [True] * 4),
        merge_backward_sample("max", [True, False, True, False]),
        merge_backward_sample("sum", [False, True, False, True], *MATCHED[2:], MATCHED[0], 4),
    ],
    "assign_merge": [
        (leaf(2, 6, 4), None, leaf(2, 3, 4), None, None, None, None, None, "cosine", 1.0, "softmax", IMPL),
        (leaf(2, 6, 5), leaf(2, 6, 4), leaf(2, 3, 4), *EXTRAS, None, "l2", 0.5, "uniform", IMPL),
        (leaf(1, 9, 5), leaf(1, 9, 4), leaf(2, 3, 4), None, *ROW, EACH, "dot", 0.5, "softmax", IMPL),
    ],
    "unmerge": [(leaf(2, 3, 5), INDEX, 3, None, None, IMPL), (leaf(2, 4, 5), MATCHED[0], 4, *MATCHED[2:], IMPL)],
    "compose": [(INDEX, make_index(2, 3, 2), 2, IMPL)],
    "soft_merge": [
        (leaf(2, 6, 5), leaf(2, 6, 4), leaf(2, 3, 4), None, None, None, None, "cosine", 1.0, "meta", IMPL),
        (leaf(2, 6, 5), leaf(2, 6, 4), leaf(2, 3, 4), leaf(2, 6), leaf(2, 6, 2), MASK, None, "l2", 0.5, "tokens", IMPL),
        (leaf(1, 9, 5), leaf(1, 9, 4), leaf(2, 3, 4), leaf(1, 9), leaf(1, 9, 2), None, EACH, "l2", 0.5, "tokens", IMPL),
    ],
    "soft_merge_backward": [
        soft_backward_sample("meta", [True] * 5),
        soft_backward_sample("tokens", [True, False, True, False, False], MASK, None),
        soft_backward_sample("meta", [True] * 5, None, bare(1, 9, 2), EACH),
    ],
}


@pytest.mark.parametrize(("name", "sample"), [(name, i) for name, many in SAMPLES.items() for i in range(len(many))])
def test_opcheck(name, sample):
    op, args = getattr(torch.ops.sttm_kernels, name).default, SAMPLES[name][sample]
    if name not in ("assign", "assign_merge"):
        torch.library.opcheck(op, args)
        return
    # opcheck adds up the outputs in place, first to last, which an integer in front makes fail: these go last.
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    integers_last = partial(sorted, key=lambda t: t.dtype == torch.int32)
    aot_autograd_check(lambda *args: integers_last(op(*args)), args, {}, dynamic=True, check_gradients="auto")


def test_every_operator_is_checked():
    names = torch._C._dispatch_get_all_op_names()
    defined = {name.split("::")[1].split(".")[0] for name in names if name.startswith(f"{operator.NAMESPACE}::")}
    verbs = {name for name in defined if dispatch.verb_of(name) in dispatch.VERBS}
    assert verbs == set(SAMPLES)


# compile


def assign_merge(x: Tensor, meta: Tensor) -> Tensor:
    positions = torch.ones(x.shape[1], 3)
    out = sttm.merge(x, sttm.assign(x, meta, temperature=0.5), positions=positions)
    return torch.cat([out.x, out.size[..., None], out.positions], -1)


def match_merge(x: Tensor, meta: Tensor) -> Tensor:
    plan = sttm.match(x, 8, num_prefix=1)
    out = sttm.merge(x, plan, torch.ones(x.shape[:2]))
    return torch.cat([out.x, out.size[..., None]], -1)


def match_frames(x: Tensor, meta: Tensor) -> Tensor:
    return sttm.merge(x, sttm.match(x, 8, partition="frames", grid=(x.shape[1] // 8, 2, 4))).x


def match_windows(x: Tensor, meta: Tensor) -> Tensor:
    return sttm.merge(x, sttm.match(x, 8, grid=(x.shape[1] // 8, 2, 4), window=(2, 2, 2))).x


def match_protected(x: Tensor, meta: Tensor) -> Tensor:
    plan = sttm.match(x, 8, num_prefix=1, protect=[3, 30, 8])
    out = sttm.merge(x, plan)
    return torch.cat([out.x, out.size[..., None]], -1)


def match_protected_windows(x: Tensor, meta: Tensor) -> Tensor:
    plan = sttm.match(x, 8, partition="frames", grid=(x.shape[1] // 8, 2, 4), protect=[3, 30, 8])
    return sttm.merge(x, plan).x


def match_bounded(x: Tensor, meta: Tensor) -> Tensor:
    mask = torch.arange(x.shape[1]) < torch.tensor([[20], [31]])
    out = sttm.merge(x, sttm.match(x, [8, 9], num_prefix=1, mask=mask))
    near = sttm.match(out.x.detach(), 8, mask=out.size > 0, threshold=0.1)
    return torch.cat([sttm.unmerge(sttm.merge(out.x, near).x, near), out.size[..., None]], -1)


def soft(x: Tensor, meta: Tensor) -> Tensor:
    out = sttm.soft_merge(x, x, meta, temperature=0.5)
    return torch.cat([out.x, out.size[..., None]], -1)


def unmerge(x: Tensor, meta: Tensor) -> Tensor:
    return sttm.unmerge(meta, sttm.assign(x.detach(), meta.detach(), weight="uniform"))


def reduce_max(x: Tensor, meta: Tensor) -> Tensor:
    first = sttm.match(x, 8)
    merged = sttm.merge(x, first, reduce="max").x
    second = sttm.assign(merged, meta)
    return sttm.unmerge(sttm.merge(merged, second).x, sttm.compose(first, second)) + x


PROGRAMS = [
    assign_merge, match_merge, match_frames, match_windows, match_protected, match_protected_windows, match_bounded,
    soft, unmerge, reduce_max,
]  # fmt: skip


def run(program, N: int) -> list[Tensor]:
    """Output and gradients, at N tokens."""
    x, meta = make_tokens(2, N, 12, seed=N).requires_grad_(), make_tokens(2, 5, 12, seed=1).requires_grad_()
    out = program(x, meta)
    grads = torch.autograd.grad((out * out.detach().cos()).sum(), (x, meta), allow_unused=True)
    return [out.detach(), *(torch.zeros(()) if g is None else g for g in grads)]


def graphs(counter: CompileCounterWithBackend) -> int:
    """How many graphs were compiled. One that Dynamo emptied to begin again, to fold a constant in, is not one."""
    return sum(any(node.op == "call_function" for node in graph.graph.nodes) for graph in counter.graphs)


def assert_same(compiled: list[Tensor], eager: list[Tensor]) -> None:
    """Bit for bit, which the aot_eager backend must keep: it traces the operators and fuses nothing."""
    for name, got, expected in zip(("output", "gradient of x", "gradient of meta"), compiled, eager, strict=True):
        assert_equal(name, got, expected)


def test_match_of_a_metric_that_requires_grad_goes_through_the_dispatcher():
    """As in an exported model that is called with gradients on."""
    metric = torch.randn(2, 6, 4, requires_grad=True)
    found = OPS.match(metric, None, None, None, None, 2, 4, 0, *FREE)
    assert_equal("index", found[0], sttm.match(metric, 2, impl=IMPL).index)


@pytest.mark.table
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_compiles_once_for_every_number_of_tokens(program):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(program, fullgraph=True, dynamic=True, backend=counter)
    for N in (64, 48, 96, 40, 128):
        assert_same(run(compiled, N), run(program, N))
    assert graphs(counter) == 1


@pytest.mark.parametrize("program", [assign_merge, match_merge, soft, unmerge], ids=lambda program: program.__name__)
def test_compiles_twice_when_dynamic_shapes_are_discovered(program):
    """By default the first N is taken for a constant; the second makes it dynamic, and no later one compiles again."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(program, fullgraph=True, backend=counter)
    for N in (65, 57, 103, 38):
        assert_same(run(compiled, N), run(program, N))
    assert graphs(counter) == 2


def test_compiles_twice_for_packed_sequences_of_any_length():
    """The first lengths are taken for constants, the second make them dynamic."""

    def program(x, lengths):
        plan = sttm.match(x, [4, 2, 0], lengths=lengths)
        return sttm.merge(x, plan).x, plan.index

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(program, fullgraph=True, backend=counter)
    for lengths in ([9, 6, 4], [7, 13, 3], [30, 5, 8], [11, 12, 13]):
        x = make_tokens(1, sum(lengths), 8)[0]
        for got, expected in zip(compiled(x, lengths), program(x, lengths), strict=True):
            assert_equal(f"of {lengths}", got, expected)
    assert graphs(counter) == 2


def test_compiled_by_inductor():
    compiled = torch.compile(match_merge, fullgraph=True, dynamic=True)
    for N in (33, 46):
        for got, expected in zip(run(compiled, N), run(match_merge, N), strict=True):
            torch.testing.assert_close(got, expected)


def test_plans_pass_through_a_compiled_function():
    compiled = torch.compile(lambda x: sttm.match(x, 5), fullgraph=True, backend="aot_eager")
    x = make_tokens(2, 20, 4)
    plan, expected = compiled(x), sttm.match(x, 5)
    assert isinstance(plan, sttm.MergePlan)
    assert plan.num_groups == 15
    merge = torch.compile(lambda x, plan: sttm.merge(x, plan), fullgraph=True, backend="aot_eager")
    assert_equal("x", merge(x, plan).x, sttm.merge(x, expected).x)


# export


class Merger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(make_tokens(1, 4, 8, seed=1)[0])

    def forward(self, x: Tensor) -> tuple[Tensor, sttm.MergedTokens, sttm.MergePlan]:
        plan = sttm.match(x, 6, num_prefix=1)
        merged = sttm.merge(x, plan)
        out = sttm.merge(merged.x, sttm.assign(merged.x, self.queries), merged.size)
        return sttm.unmerge(merged.x, plan), out, plan


def test_export_with_any_number_of_tokens():
    module = Merger()
    tokens = torch.export.Dim("tokens", min=16, max=4096)
    program = torch.export.export(module, (make_tokens(2, 40, 8),), dynamic_shapes={"x": {1: tokens}})
    held = io.BytesIO()
    torch.export.save(program, held)
    held.seek(0)
    for exported in (program.module(), torch.export.load(held).module()):
        for N in (40, 23, 150):
            x = make_tokens(2, N, 8, seed=N)
            (full, out, plan), (full_, out_, plan_) = exported(x), module(x)
            assert isinstance(out, sttm.MergedTokens)
            assert isinstance(plan, sttm.MergePlan)
            assert plan.num_groups == N - 6
            for name, got, expected in (
                ("full", full, full_), ("x", out.x, out_.x), ("size", out.size, out_.size),
                ("index", plan.index, plan_.index),
            ):  # fmt: skip
                assert_equal(name, got, expected)


class Protecting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return sttm.merge(x, sttm.match(x, 6, num_prefix=1, protect=[4, 5, 11])).x


def test_protection_is_exported_with_any_number_of_tokens():
    module, tokens = Protecting(), torch.export.Dim("tokens", min=24, max=4096)
    program = torch.export.export(module, (make_tokens(2, 40, 8),), dynamic_shapes={"x": {1: tokens}})
    for N in (40, 24, 151):
        x = make_tokens(2, N, 8, seed=N)
        assert_equal("x", program.module()(x), module(x))


# pytrees, checkpointing, copies


def plans() -> dict[str, sttm.MergePlan]:
    x = make_tokens(2, 12, 4)
    return {
        "assign": sttm.assign(x, x[:, :3]),
        "uniform": sttm.assign(x, x[:, :3], weight="uniform"),
        "match": sttm.match(x, 4),
    }


FIELDS = ("index", "score", "lse", "weight", "order", "offsets")


def assert_same_plan(plan: sttm.MergePlan, expected: sttm.MergePlan) -> None:
    assert type(plan) is sttm.MergePlan
    assert plan.num_groups == expected.num_groups
    for name in FIELDS:
        got, wanted = getattr(plan, name), getattr(expected, name)
        assert (got is None) == (wanted is None), name
        if got is not None:
            assert_equal(name, got, wanted)


@pytest.mark.parametrize("kind", plans())
def test_plans_are_pytrees(kind):
    plan = plans()[kind]
    leaves, spec = pytree.tree_flatten(plan)
    assert [leaf for leaf in leaves if isinstance(leaf, Tensor)] != []
    assert_same_plan(pytree.tree_unflatten(leaves, spec), plan)
    moved = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, plan)
    assert_same_plan(moved, plan)
    assert moved.index is not plan.index


def test_merged_tokens_are_pytrees():
    plan = plans()["match"]
    for positions in (None, torch.ones(12, 3)):
        out = sttm.merge(make_tokens(2, 12, 5), plan, positions=positions)
        again = pytree.tree_unflatten(*pytree.tree_flatten(out))
        assert isinstance(again, sttm.MergedTokens)
        assert_equal("x", again.x, out.x)
        assert (again.positions is None) == (positions is None)


@pytest.mark.parametrize("kind", plans())
def test_plans_copy_and_pickle(kind):
    plan = plans()[kind]
    for again in (copy.copy(plan), copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert_same_plan(again, plan)
    held = io.BytesIO()
    torch.save(plan, held)
    held.seek(0)
    assert_same_plan(torch.load(held), plan)


def test_plans_are_frozen():
    with pytest.raises(AttributeError):
        plans()["match"].num_groups = 3


def test_checkpointing_recomputes_the_same_gradients():
    meta = make_tokens(2, 5, 8, seed=1).requires_grad_()

    def block(x: Tensor, meta: Tensor, plan: sttm.MergePlan, size: Tensor) -> tuple[sttm.MergePlan, sttm.MergedTokens]:
        merged = sttm.merge(x, plan, size)
        chosen = sttm.assign(merged.x, meta)
        return chosen, sttm.merge(merged.x.sin(), chosen, merged.size, torch.ones(16, 3))

    def gradients(through_checkpoint: bool) -> list[Tensor]:
        x, size = make_tokens(2, 20, 8).requires_grad_(), torch.ones(2, 20, requires_grad=True)
        plan = sttm.match(x, 4)
        args = (x, meta, plan, size)
        chosen, out = checkpoint(block, *args, use_reentrant=False) if through_checkpoint else block(*args)
        loss = out.x.square().sum() + out.size.square().sum() + chosen.score.sum()
        return list(torch.autograd.grad(loss, (x, meta, size)))

    for got, expected in zip(gradients(True), gradients(False), strict=True):
        assert_equal("gradient", got, expected)
