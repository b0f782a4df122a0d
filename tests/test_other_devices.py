"""What runs on devices that are not here: impl="torch" needs nothing of a CPU, Triton's kernels compile for AMD."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from elsewhere import elsewhere, strict

import sttm_kernels as sttm
from sttm_kernels import checks, dispatch
from sttm_kernels.impl import eager
from sttm_kernels.testing import make_tokens

ROOT = Path(__file__).parent.parent
SHAPE = (3, 61, 7, 12, 20)  # B, N, K, D, C
GRID = (3, 4, 5)


@pytest.fixture(params=[1 << 26, 700], ids=["one tile", "many tiles"])
def tiled_as_elsewhere(request, monkeypatch):
    """impl="torch" with the tiles of other devices, which hold several items of a batch."""
    tile_shape = eager._tile_shape
    monkeypatch.setattr(eager, "_tile_shape", lambda *extents: tile_shape(*extents[:3], torch.device("meta")))
    monkeypatch.setitem(eager.TILE_ELEMENTS, "cuda", request.param)


@pytest.mark.parametrize("similarity", ["cosine", "l2"])
def test_tiles_of_several_items(tiled_as_elsewhere, similarity):
    given = checks.draw(SHAPE)
    mask = given["mask"]
    extras = {name: given[name] for name in ("size", "positions", "mask")}
    checks.check_assign("torch", given["q"], given["meta"], similarity, 3.0, "softmax", mask)
    checks.check_assign_merge("torch", given["x"], given["q"], given["meta"], similarity, 3.0, "softmax", extras)
    for normalize in ("meta", "tokens"):
        checks.check_soft_merge(
            "torch", given["x"], given["q"], given["meta"], similarity, 3.0, normalize, given["size"],
            given["positions"], mask,
        )  # fmt: skip
    checks.check_match("torch", make_tokens(3, 61, 12), 9, 1)
    checks.check_match("torch", make_tokens(3, 61, 12), 9, 1, grid=GRID, window=(1, 2, 3))


def every_verb():
    """Every verb and its gradients, as a network has them."""
    x, meta = (make_tokens(2, n, 12, seed=n).requires_grad_() for n in (61, 7))
    size, positions = torch.ones(2, 61), make_tokens(2, 61, 3)
    mask = torch.arange(61).expand(2, -1) < 50
    plans = [
        sttm.match(x, 9, 1, impl="torch"),
        sttm.match(x, 9, 1, "frames", GRID, impl="torch"),
        sttm.match(x, 9, 1, grid=GRID, window=(1, 2, 3), impl="torch"),
        sttm.assign(x, meta, mask=mask, impl="torch"),
    ]
    results = [sttm.merge(x, plan, size, positions, impl="torch") for plan in plans]
    results += [sttm.merge(x, plans[0], size, reduce=reduce, impl="torch") for reduce in ("sum", "max", "first")]
    results += [
        sttm.soft_merge(x, x, meta, size=size, mask=mask, normalize=over, impl="torch") for over in ("meta", "tokens")
    ]
    results.append(sttm.assign_merge(x, None, meta, impl="torch")[0])
    full = sttm.unmerge(results[0].x, plans[0], impl="torch")
    sttm.compose(plans[0], sttm.assign(results[0].x, meta, impl="torch"), impl="torch")
    (full.sum() + sum(out.x.sum() for out in results)).backward()


@pytest.mark.unpoisoned
def test_no_verb_looks_at_data_or_mixes_devices():
    called = []
    with elsewhere(called):
        every_verb()
    assert set(called) == {*dispatch.VERBS, *(f"{verb}_backward" for verb in ("assign", "merge", "soft_merge"))}


TRICKS = [
    (lambda x: x * x.max().item(), "looks at data"),
    (lambda x: x[x > 0], "looks at data"),
    (lambda x: x.double().float(), "needs float64"),
    (lambda x: x + torch.ones(x.shape), "expected device meta"),
    (lambda x: torch.tensor(x.tolist()), "meta"),
    (lambda x: torch.from_numpy(x.numpy()), "meta"),
]


@pytest.mark.unpoisoned
@pytest.mark.parametrize(("trick", "said"), TRICKS, ids=["item", "mask", "float64", "device", "tolist", "numpy"])
def test_what_only_a_cpu_has_is_found(trick, said):
    with pytest.raises((AssertionError, RuntimeError, TypeError, NotImplementedError), match=said):
        strict("merge", trick)(make_tokens(1, 4, 3))


@pytest.mark.parametrize("verb", dispatch.VERBS)
def test_who_may_take_gpus_of_other_makers(monkeypatch, verb):
    why_not = dispatch.why_not.__wrapped__
    assert "GPU tensors, got mps" in why_not(verb, "triton", "mps")
    assert "CUDA tensors, got xpu" in why_not(verb, "cuda", "xpu")
    assert "GPU tensors" not in (why_not(verb, "triton", "xpu") or "")
    monkeypatch.setattr(dispatch, "NVIDIA", False)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name, *_: name)
    assert why_not(verb, "cuda", "cuda") == "the cuda kernels need an NVIDIA GPU, this PyTorch is built for AMD's"
    assert why_not(verb, "triton", "cuda") is None


COMPILE = """
import torch
torch.version.hip = "6.4"  # as in PyTorch for ROCm
import triton
from triton.backends.compiler import GPUTarget
from benchmarks.codegen import table
from sttm_kernels.impl.triton import config
assert not config.NVIDIA
wanted = {"nearest_kernel", "assign_kernel", "soft_merge_kernel", "merge_kernel", "unmerge_kernel"}
work = {one.kernel.__name__: one for _, one in reversed(table.specializations((80,)))}
assert wanted <= set(work), sorted(work)
for name in sorted(wanted):
    one = work[name]
    assert "maxnreg" not in one.options
    built = triton.compile(table.source(one), target=GPUTarget("hip", "gfx942", 64), options=dict(one.options))
    assert len(built.asm["hsaco"]) and built.metadata.shared <= 65536, name
    print(name)
"""


def test_kernels_compile_for_a_gpu_of_amd():
    backends = pytest.importorskip("triton.backends").backends
    if "amd" not in backends:
        pytest.skip("this Triton compiles for no GPU of AMD")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 5
