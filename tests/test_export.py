"""Programs written out in plain ATen and in ONNX: what the verbs give, in processes without the package."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sttm_kernels as sttm
from sttm_kernels import checks, dispatch, export, ops
from sttm_kernels.nn.generators import GENERATORS, make
from sttm_kernels.operator import OPERATORS
from sttm_kernels.testing import assert_equal, make_tokens


@pytest.fixture
def plain(monkeypatch):
    """Verbs of impl="torch" run their plain forms."""
    kernel = dispatch.kernel
    monkeypatch.setattr(dispatch, "kernel", lambda name, *how: export._PLAIN.get(name) or kernel(name, *how))


GRID, SHAPE = (3, 4, 5), (2, 61, 7, 12, 20)  # B, N, K, D, C
FRAMES = torch.arange(61) % 4 == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_prefix": 3},
        {"num_prefix": 1, "partition": "frames", "grid": GRID},
        {"num_prefix": 1, "grid": GRID, "window": (1, 3, 2)},
        {"partition": FRAMES & (torch.arange(61) > 0), "protect": torch.arange(61) % 16 == 4},
    ],
    ids=lambda how: "-".join(how) or "alternate",
)
def test_matches(plain, how, dtype):
    metric = make_tokens(2, 3 * 61, 12, dtype=dtype).view(2, 3, 61, 12)
    for r in (0, 5, 1000):
        checks.check_match("torch", metric, r, **how)


@pytest.mark.parametrize("bounds", [{"threshold": 0.3}, {"r": [3, 20]}, {"r": [0, 3], "threshold": 0.1}], ids=str)
@pytest.mark.parametrize("way", [{}, {"partition": "frames", "grid": (4, 2, 5), "window": (2, 2, 3)}], ids=str)
def test_a_match_within_bounds(plain, way, bounds):
    """Of signs, whose scores are exact: with a mask and without one."""
    metric = torch.randint(2, (2, 41, 16), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    some = torch.rand(2, 41, generator=torch.Generator().manual_seed(1)) < 0.7
    for mask in (None, some):
        where = {"r": 9, "num_prefix": 1, "mask": mask, **way, **bounds}
        got, expected = (sttm.match(metric, impl=impl, **where) for impl in ("torch", "reference"))
        assert_equal("index", got.index, expected.index)
        assert_equal("score", got.score, expected.score)


def test_a_match_takes_the_lower_of_equal_tokens(plain):
    metric = torch.eye(4)[torch.randint(4, (3, 40), generator=torch.Generator().manual_seed(0))]
    for r in (1, 7, 15):
        got, expected = (sttm.match(metric, r, num_prefix=1, impl=impl) for impl in ("torch", "reference"))
        assert torch.equal(got.index, expected.index)


@pytest.mark.parametrize("how", [{}, {"grid": GRID, "window": (1, 3, 2)}], ids=["alternate", "window"])
@pytest.mark.parametrize("masked", [True, False])
def test_bounds_of_a_match(plain, how, masked):
    metric = make_tokens(3, 61, 12)
    mask = torch.arange(61) < torch.tensor([61, 40, 3])[:, None]
    given = {"num_prefix": 1, **how, **({"mask": mask} if masked else {})}
    for bounds in ({"r": 9}, {"r": [9, 2, 0]}, {"r": 20, "threshold": 0.3}):
        got, expected = (sttm.match(metric, impl=impl, **given, **bounds) for impl in ("torch", "reference"))
        assert got.num_groups == expected.num_groups
        assert torch.equal(got.index, expected.index)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("protect", [None, [3, 34]])
@pytest.mark.parametrize("num_prefix", [0, 1])
def test_packed_sequences(num_prefix, protect):
    """Of a program, in which the operator is written out; with protected tokens in windows, some of one column."""
    lengths = [12, 1, 30, 7] if protect is None else [num_prefix + 30, num_prefix + 10]
    given = {} if protect is None else {"grid": [(2, 3, 5), (1, 2, 5)], "window": (1, 2, 2), "protect": protect}
    amounts = [2, 1, 100, 3] if protect is None else [100, 2]

    class Matching(nn.Module):
        def forward(self, metric: Tensor) -> tuple[Tensor | None, ...]:
            plan = sttm.match(metric, amounts, num_prefix, lengths=lengths, impl="auto", **given)
            return plan.index, plan.score, plan.order, plan.offsets

    metric = make_tokens(1, sum(lengths), 12)[0]
    program = torch.export.export(Matching(), (metric,))
    for got, expected in zip(export.decompose(program).module()(metric), Matching()(metric), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "l2"])
@pytest.mark.parametrize("weight", ["softmax", "uniform"])
def test_assignments(plain, similarity, weight):
    given = checks.draw(SHAPE, torch.float32)
    mask = given["mask"]
    checks.check_assign("torch", given["q"], given["meta"], similarity, 3.0, weight, mask)
    extras = {name: given[name] for name in ("size", "positions", "mask")}
    checks.check_assign_merge("torch", given["x"], None, make_tokens(2, 7, 20), similarity, 3.0, weight, extras)
    for normalize in ("meta", "tokens"):
        checks.check_soft_merge(
            "torch", given["x"], given["q"], given["meta"], similarity, 3.0, normalize, given["size"],
            given["positions"], mask,
        )  # fmt: skip


@pytest.mark.parametrize("reduce", ["mean", "sum", "max", "first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_merges_and_back(plain, reduce, dtype):
    given = checks.draw(SHAPE, dtype)
    index = torch.randint(-1, 7, (2, 61), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    index[index == 3] = 4  # an empty group
    for fill in (None, make_tokens(2, 7, 20, dtype=dtype, seed=9)):
        checks.check_merge(
            "torch", given["x"], index, 7, given["size"], positions=given["positions"], fill=fill, reduce=reduce
        )
    checks.check_unmerge("torch", given["x"][:, :7].contiguous(), index)
    checks.check_compose("torch", index, index[:, :7].contiguous(), 7)


def test_every_verb_has_a_plain_form_that_knows_all_of_its_arguments():
    forward = {name for name in OPERATORS if "backward" not in name}
    assert set(export._PLAIN) == forward == {*dispatch.VERBS, "match_packed", "assign_earlier"}
    known = ("metric", "src", "dst", "mask", "limit", "r", "num_groups", "num_prefix", "threshold", "impl")
    assert ops.MatchIn._fields == known


class Verbs(nn.Module):
    """Every verb, in a chain as networks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(make_tokens(1, 5, 8, seed=1)[0])

    def forward(self, x: Tensor, size: Tensor) -> tuple[Tensor | None, ...]:
        plan = sttm.match(x, 6, num_prefix=1)
        out = sttm.merge(x, plan, size, positions=x[..., :3])
        queries = self.queries.expand(x.shape[0], -1, -1)
        again, assigned = sttm.assign_merge(out.x, None, queries, temperature=0.2, size=out.size)
        soft = sttm.soft_merge(x, x, queries, temperature=0.3, size=size)
        first = sttm.merge(x, plan, reduce="first")
        return (
            plan.index, sttm.compose(plan, assigned).index, plan.order, plan.offsets,
            out.x, out.size, out.positions, sttm.unmerge(out.x, plan), again.x, assigned.weight, soft.x, first.x,
        )  # fmt: skip


class MetaTokens(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = make(name, 8, "cosine", "auto")

    def forward(self, x: Tensor, size: Tensor) -> Tensor:
        return self.generator(x, 4, 5, 3, size)


class Clips(nn.Module):
    """The Spatial-temporal Token Merger, with a tensor of each result."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.merger = sttm.STTM(8, 0.5, 0.5, name, num_prefix=1)
        nn.init.normal_(self.merger.motion.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.merger(x, (3, 2, 4))
        return out.x, out.size


class Training(nn.Module):
    """What has a gradient, in every way that it has one."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(make_tokens(1, 5, 8, seed=1)[0])

    def forward(self, x: Tensor, values: Tensor, size: Tensor) -> tuple[Tensor | None, ...]:
        plan, queries = sttm.match(x, 6, num_prefix=1), self.queries.expand(x.shape[0], -1, -1)
        found: list[Tensor | None] = [sttm.unmerge(sttm.merge(x, plan).x, plan)]
        found += [sttm.merge(values, plan, size, reduce=reduce).x for reduce in ("mean", "sum", "max", "first")]
        for similarity in ("cosine", "dot", "l2"):
            assigned = sttm.assign(x, queries, similarity=similarity, temperature=0.5)
            out = sttm.merge(x, assigned, size, positions=x[..., :3])
            found += [assigned.score, assigned.lse, out.x, out.size, out.positions]
            for over in ("meta", "tokens"):
                soft = sttm.soft_merge(x, x, queries, similarity=similarity, normalize=over, size=size)
                found += [soft.x, soft.size]
        return tuple(found)


def merging_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    small = {"img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 4, "global_pool": "avg"}
    return sttm.apply(timm.create_model("vit_tiny_patch16_224", num_classes=5, **small), r=9)


def tokens(B: int, N: int) -> tuple[Tensor, Tensor]:
    return make_tokens(B, N, 8, seed=B), torch.arange(1.0, 1 + B * N).view(B, N) % 4


def tokens_and_ties(B: int, N: int) -> tuple[Tensor, ...]:
    x, size = tokens(B, N)
    return x, make_tokens(B, N, 8, seed=9).round(), size


NETWORKS = {
    "verbs": (Verbs, lambda B: tokens(B, 41)),
    "training": (Training, lambda B: tokens_and_ties(B, 41)),
    **{name: (partial(MetaTokens, name), lambda B: tokens(B, 20)) for name in GENERATORS},
    **{f"STTM-{name}": (partial(Clips, name), lambda B: (make_tokens(B, 25, 8, seed=B),)) for name in GENERATORS},
    "vit": (merging_vit, lambda B: (torch.randn(B, 3, 24, 24, generator=torch.Generator().manual_seed(B)),)),
}
BATCHES = (2, 1, 5)
"""The first is the example, of at least two: one would be taken for a constant."""
ELSEWHERE = """
import sys
path = sys.argv[1]
if "kernels.aoti" in path:
    import sttm_kernels
else:
    sys.modules["sttm_kernels"] = None  # as where it is not installed
import torch
if path.endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(path)
    names = [each.name for each in session.get_inputs()]
    def program(*tensors):
        found = session.run(None, dict(zip(names, (tensor.numpy() for tensor in tensors))))
        return [torch.from_numpy(each) for each in found]
elif path.endswith(".aoti.pt2"):
    program = torch._inductor.aoti_load_package(path)
else:
    program = torch.export.load(path).module()
results = [program(*given) for given in torch.load(path + ".given")]
torch.save([[each] if isinstance(each, torch.Tensor) else each for each in results], path + ".results")
"""


@cache
def exported(
    name: str,
) -> tuple[nn.Module, torch.export.ExportedProgram, list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
    """A network, its program for any batch, inputs, and what it makes of them."""
    make_network, draw = NETWORKS[name]
    network, batches = make_network().eval(), [draw(B) for B in BATCHES]
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(network, batches[0], dynamic_shapes=tuple({0: batch} for _ in batches[0]))
        results = [network(*given) for given in batches]
    return network, program, batches, [each if isinstance(each, tuple) else (each,) for each in results]


def assert_same_elsewhere(path: Path, batches: list[tuple[Tensor, ...]], expected: list[tuple[Tensor, ...]]) -> None:
    """A fresh process that loads the program gets the same."""
    torch.save(batches, f"{path}.given")
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(path)], check=True, timeout=300)
    for found, wanted in zip(torch.load(f"{path}.results"), expected, strict=True):
        for got, value in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, value)


def check_written_out(name: str, kind: str, folder: Path) -> None:
    if kind == "onnx":
        for needed in ("onnxruntime", "onnxscript"):
            pytest.importorskip(needed)
    _, program, *given_and_results = exported(name)
    path = folder / f"{name}.{kind}"
    if kind == "pt2":
        torch.export.save(export.decompose(program), path)
    else:
        model = export.to_onnx(program, verbose=False)
        assert {node.domain for node in model.model.graph} == {""}
        model.save(path)
    assert_same_elsewhere(path, *given_and_results)


KINDS = pytest.mark.parametrize("kind", ["pt2", "onnx"])


@pytest.mark.unpoisoned
@KINDS
def test_written_out_programs_run_in_a_process_without_the_package(kind, tmp_path):
    check_written_out("verbs", kind, tmp_path)


@pytest.mark.table
@pytest.mark.unpoisoned
@KINDS
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "verbs"])
def test_written_out_models_and_generators_run_in_a_process_without_the_package(name, kind, tmp_path):
    """Generators with counts of which some are 0."""
    check_written_out(name, kind, tmp_path)


def gradients(network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor | None]:
    """Of the inputs and the parameters, by their names; of a sum that knows each element of the results."""
    given = {f"input {i}": tensor.clone().requires_grad_() for i, tensor in enumerate(batch)}
    given |= dict(network.named_parameters())
    results = network(*list(given.values())[: len(batch)])
    results = [each for each in (results if isinstance(results, tuple | list) else [results]) if each.requires_grad]
    total = sum((make_tokens(1, 1, each.numel()).view_as(each) * each).sum() for each in results)
    return dict(zip(given, torch.autograd.grad(total, list(given.values()), allow_unused=True), strict=True))


def check_gradients(name: str, kind: str) -> None:
    network, program, batches, _ = exported(name)
    found = gradients((program if kind == "kernels" else export.decompose(program)).module(), batches[-1])
    for what, expected in gradients(network, batches[-1]).items():
        got = found[what]
        assert (got is None) == (expected is None), what
        if got is not None and expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


PROGRAMS = pytest.mark.parametrize("kind", ["kernels", "plain"])


@pytest.mark.unpoisoned
@PROGRAMS
def test_programs_have_the_gradients_of_the_model(kind):
    check_gradients("training", kind)


@pytest.mark.table
@pytest.mark.unpoisoned
@PROGRAMS
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "training"])
def test_programs_of_models_and_generators_have_their_gradients(name, kind):
    check_gradients(name, kind)


class There(nn.Module):
    """To fewer tokens and back, which is what a compiler of C++ has the least to do with."""

    def forward(self, x: Tensor) -> Tensor:
        plan = sttm.match(x, 6, num_prefix=1)
        return sttm.unmerge(sttm.merge(x, plan).x, plan)


@pytest.mark.long
@pytest.mark.table
@pytest.mark.unpoisoned
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
@pytest.mark.parametrize("kind", ["plain", "kernels"])
def test_programs_compiled_ahead_of_time_run_in_a_fresh_process(kind, tmp_path, monkeypatch):
    """With the kernels where the package is imported, and without it written out."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    batches, batch = [make_tokens(B, 41, 8, seed=B) for B in BATCHES], torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(There(), (batches[0],), dynamic_shapes=({0: batch},))
    path = tmp_path / f"{kind}.aoti.pt2"
    with torch._inductor.config.patch(compile_threads=1):
        compiled = export.decompose(program) if kind == "plain" else program
        torch._inductor.aoti_compile_and_package(compiled, package_path=str(path))
    assert_same_elsewhere(path, [(x,) for x in batches], [(There()(x),) for x in batches])


@pytest.mark.unpoisoned
def test_operators_in_graphs_within_a_graph_are_written_out():
    """STTM merges where autocast and gradients are switched off, which is a graph of its own."""
    merger, x = sttm.STTM(8, None, 0.5, "pool").eval(), make_tokens(2, 16, 8)
    program = torch.export.export(merger, (x, (2, 2, 4)))
    plain = export.decompose(program)
    graphs = [each.graph for each in plain.graph_module.modules() if isinstance(each, torch.fx.GraphModule)]
    assert "sttm_kernels" not in str({node.target for graph in graphs for node in graph.nodes})
    torch.testing.assert_close(plain.module()(x, (2, 2, 4)).x, merger(x, (2, 2, 4)).x)


@pytest.mark.unpoisoned
def test_what_has_no_plain_form_is_named():
    class Gradient(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            one, index = x[:, :1], torch.zeros(x.shape[:2], dtype=torch.int32)
            given = OPERATORS["merge_backward"].inputs(
                *(one, None, None, x, index, 1, None, None, None, one, None, torch.ones(2, 1), None, None),
                *("mean", [True, False, False, False], "auto"),
            )
            return OPERATORS["merge_backward"].overload(*given)[0]

    program = torch.export.export(Gradient(), (make_tokens(2, 4, 8),))
    with pytest.raises(
        ValueError, match=r"must hold operators that have a plain form, got sttm_kernels.merge_backward"
    ):
        export.decompose(program)


def test_traces_are_refused():
    with pytest.raises(
        RuntimeError, match=r"match needs torch\.export or torch\.compile in place of torch\.jit\.trace"
    ):
        torch.jit.trace(lambda x: sttm.match(x, 3).index, make_tokens(2, 20, 8))
