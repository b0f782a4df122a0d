"""What only the CPU kernels have: threads, which change no bit and survive fork, and several instruction sets."""

import importlib
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cases import draw, each, run
from test_every_verb import VERBS, calling

import sttm_kernels as sttm
from sttm_kernels import dispatch
from sttm_kernels.testing import assert_equal, make_tokens

if dispatch.on_host() or dispatch.interpreting():
    pytest.skip("needs neither STTM_CUDA_HOST nor TRITON_INTERPRET=1", allow_module_level=True)
if dispatch.why_not("merge", "cpu", "cpu") is not None:
    pytest.skip(str(dispatch.why_not("merge", "cpu", "cpu")), allow_module_level=True)

HERE = Path(__file__).parent
SUITES = {
    "baseline": ("test_match.py", "test_unmerge.py"),  # the others run on it under sanitizers
    "avx2": ("test_assign.py", "test_match.py", "test_merge.py", "test_soft_merge.py", "test_unmerge.py"),
}


@pytest.fixture
def threads():
    """Sets the number of threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(verb, inputs):
    return run(calling(verb, "cpu"), inputs)


@each("verb", VERBS)
@each("dtype", (torch.float32, torch.bfloat16))
def test_the_number_of_threads_changes_no_bit(verb, dtype, threads):
    inputs = draw((3, 700, 96, 70, 200), dtype)
    threads(1)
    expected = everything(verb, inputs)
    for count in (2, 5):
        threads(count)
        for _ in range(3):
            for name, value in everything(verb, inputs).items():
                assert_equal(f"{name} with {count} threads", value, expected[name])


@each("reduce", ("mean", "sum", "max"))
@each("dtype", (torch.float32, torch.bfloat16))
def test_a_large_x_of_few_groups_has_the_bits_of_a_small_one(reduce, dtype, threads):
    """It is read from front to back, a small one by groups: a hundred of its channels at a time."""
    B, N, C, K = 2, 700, 803, 41
    x, size, fill = make_tokens(B, N, C).to(dtype), make_tokens(B, N, 1)[..., 0].abs(), make_tokens(B, K, C).to(dtype)
    index = torch.randint(-1, K, (B, N), dtype=torch.int32)
    index[index == 3] = -1
    index[:, 5] = 7
    index[0, 9] = 3
    x[0, 11, 13] = torch.nan
    plan = sttm.MergePlan(index, K, weight=make_tokens(B, N, 1)[..., 0])
    threads(2)
    merged = sttm.merge(x, plan, size, reduce=reduce, fill=fill, impl="cpu").x
    for c in range(0, C, 100):
        part = slice(c, c + 100)
        few = sttm.merge(x[..., part], plan, size, reduce=reduce, fill=fill[..., part].contiguous(), impl="cpu").x
        assert_equal(f"channels from {c} on", merged[..., part], few)


def _match_merge(metric, x):
    plan = sttm.match(metric, metric.shape[1] // 3, impl="cpu")
    return plan.index, sttm.merge(x, plan, impl="cpu").x


def _in_child(metric, x, expected):
    for _ in range(3):
        for found, value in zip(_match_merge(metric, x), expected, strict=True):
            assert (found.numpy() == value.numpy()).all()  # PyTorch's own threads do not survive a fork


@pytest.mark.unpoisoned  # PyTorch fills with threads, which a child does not have
def test_a_forked_child_has_threads_of_its_own(threads):
    """As the workers of a DataLoader, whose parent has used the kernels."""
    threads(3)
    metric, x = make_tokens(2, 900, 64), make_tokens(2, 900, 300)
    expected = _match_merge(metric, x)
    forked = multiprocessing.get_context("fork").Process
    children = [forked(target=_in_child, args=(metric, x, expected)) for _ in range(2)]
    for child in children:
        child.start()
    _in_child(metric, x, expected)
    for child in children:
        child.join(60)
        if child.is_alive():
            child.kill()
        assert child.exitcode == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux how many threads a process has")
def test_the_threads_are_those_of_pytorch(threads):
    """Others would fight with them for the cores."""
    threads(2)
    metric, x = make_tokens(2, 900, 64), make_tokens(2, 900, 300)
    if "OpenMP" not in torch.__config__.parallel_info().split("ATen parallel backend:")[1]:
        pytest.skip("PyTorch was built without OpenMP")
    torch.randn(1 << 20).exp()
    before = set(os.listdir("/proc/self/task"))
    _match_merge(metric, x)
    assert set(os.listdir("/proc/self/task")) <= before  # one of an earlier test may end meanwhile


def test_several_callers_at_once(threads):
    """Whichever of them have the threads, everyone gets the same bits."""
    threads(3)
    inputs = draw((2, 500, 40, 64, 200))
    expected = everything("match, merge", inputs)
    wrong = []

    def call():
        torch.set_num_threads(3)
        for _ in range(10):
            for name, value in everything("match, merge", inputs).items():
                if not torch.equal(value, expected[name]):
                    wrong.append(name)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def python(*command, **variables):
    path = os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=900)


@each("isa", SUITES)
def test_suites_on_older_instruction_sets(isa):
    if importlib.import_module("sttm_kernels.impl.cpu").build_info()["isa"] == isa:
        pytest.skip(f"{isa} is what all tests run on here")
    found = python("-c", "from sttm_kernels.impl import cpu; print(cpu.build_info())", STTM_CPU_ISA=isa).stdout
    if f"'isa': '{isa}'" not in found:
        pytest.skip(found)
    suites = [str(HERE / suite) for suite in SUITES[isa]]
    done = python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "cpu-cpu", *suites, STTM_CPU_ISA=isa)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_an_instruction_set_that_does_not_exist_is_the_reason():
    program = "from sttm_kernels import dispatch; print(dispatch.why_not('merge', 'cpu', 'cpu'))"
    done = python("-c", program, STTM_CPU_ISA="mmx")
    assert done.returncode == 0, done.stderr
    assert "STTM_CPU_ISA must be one of " in done.stdout
    assert "got 'mmx'" in done.stdout


def test_the_extension_checks_its_arguments():
    cpu = importlib.import_module("sttm_kernels.impl.cpu")._extension()
    x, index, y = torch.zeros(2, 3, 4), torch.zeros(2, 5, dtype=torch.int32), torch.zeros(2, 5, 4)
    with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16, got float64"):
        cpu.unmerge(x.double(), index, y, 1)
    with pytest.raises(ValueError, match=r"y must have shape \(2, 5, 4\), got \(2, 5, 3\)"):
        cpu.unmerge(x, index, y[..., :3].contiguous(), 1)


@each("verb", ("assign", "soft_merge"))
def test_meta_tokens_that_no_item_shares_are_not_read(verb):
    q, meta = (torch.zeros(shape, requires_grad=True) for shape in ((0, 9, 4), (3, 4)))
    if verb == "assign":
        found = sttm.assign(q, meta, impl="cpu").score
    else:
        found = sttm.soft_merge(q, q, meta, impl="cpu").x
    found.sum().backward()
    assert found.shape[0] == 0
    assert_equal("gradient", meta.grad, torch.zeros(3, 4))


def test_float64_is_left_to_others():
    assert "not float64" in dispatch.why_not("merge", "cpu", "cpu", torch.float64)
    x = make_tokens(1, 9, 4, torch.float64)
    assert sttm.merge(x, sttm.match(x, 3)).x.dtype == torch.float64
    with pytest.raises(RuntimeError, match=r"impl='cpu' cannot run match: .* not float64"):
        sttm.match(x, 3, impl="cpu")


def test_auto_takes_them():
    for verb in dispatch.VERBS:
        assert dispatch.choose(verb, "cpu", torch.float32) == "cpu"
        assert dispatch.choose(verb, "cpu", torch.float64) == "torch"
