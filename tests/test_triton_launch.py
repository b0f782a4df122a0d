"""Launching without a GPU: what is compiled again and what is not, the device guard, what fits a GPU."""

import importlib.util

import pytest
import torch

from sttm_kernels import dispatch, functional

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from benchmarks.host_overhead import FUNCTIONS, calls, functions_called, stubbed_driver
from sttm_kernels.impl.triton import config, launch, similarity
from sttm_kernels.impl.triton.unmerge import compose_kernel

compiled = pytest.mark.skipif(dispatch.interpreting(), reason="TRITON_INTERPRET=1 replaces what is looked at")

LENGTHS = (197, 129, 130, 131, 144, 160, 192, 196, 208, 224, 225, 240, 249, 250, 251, 252, 253, 254, 255, 256)


@compiled
@pytest.mark.parametrize("C", [64, 20], ids=lambda C: f"C={C}")
@pytest.mark.parametrize("verb", list(calls(N=8)))
def test_another_length_compiles_nothing(verb, C):
    """Triton's own launch path runs with its compiler and its driver replaced by stubs: it looks every launch up in its
    cache by the types, the specialised values and the compile-time constants, and the stub counts the misses."""
    with stubbed_driver() as seen, torch.no_grad():
        calls(LENGTHS[0], C)[verb]()
        first = list(seen.compiled)
        for N in LENGTHS[1:]:
            calls(N, C)[verb]()
    assert first
    assert seen.compiled == first
    assert seen.launched >= len(LENGTHS)


@compiled
def test_another_length_compiles_nothing_backward():
    def step(N):
        x = torch.randn(2, N, 64, requires_grad=True)
        size = torch.ones(2, N, requires_grad=True)
        plan = functional.MergePlan(torch.zeros(2, N, dtype=torch.int32), 40)
        out = functional.merge(x, plan, size, impl="triton")
        (out.x.sum() + out.size.sum()).backward()

    with stubbed_driver() as seen:
        step(LENGTHS[0])
        first = list(seen.compiled)
        for N in LENGTHS[1:]:
            step(N)
    assert len(first) >= 2
    assert seen.compiled == first


@compiled
@pytest.mark.parametrize("verb", list(calls(N=8)))
def test_match_and_merge_take_at_most_three_launches(verb):
    with stubbed_driver() as seen, torch.no_grad():
        calls(128)[verb]()
    assert 1 <= seen.launched <= {"match": 2, "merge of a sorted plan": 1, "assign_merge": 1}.get(verb, 3)


@compiled
@pytest.mark.unpoisoned
@pytest.mark.parametrize("verb", list(calls(N=8)))
def test_a_verb_calls_few_functions_on_the_host(verb):
    with stubbed_driver(), torch.no_grad(), launch.launching_instead(lambda *args: None):
        call = calls(128)[verb]
        for _ in range(2):
            call()
        assert functions_called(call) <= FUNCTIONS[verb]


@compiled
def test_the_device_of_the_tensors_is_made_current(monkeypatch):
    entered = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *error):
            entered.append("left")

    class Kernel:
        params = compose_kernel.params[:2]

        def __getitem__(self, grid):
            return lambda *args, **options: entered.append(grid)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    settings = config.Config(4, 1, {})
    with torch._subclasses.FakeTensorMode():
        here, there = (torch.empty(2, device=f"cuda:{i}") for i in (0, 1))
    launch.launch(Kernel(), (3,), None, there, config=settings)
    assert entered == [torch.device("cuda:1"), (3,), "left"]
    entered.clear()
    launch.launch(Kernel(), (3,), None, here, config=settings)
    assert entered == [(3,)]
    launch.launch(Kernel(), (0, 3), None, here, config=settings)
    assert entered == [(3,)]


@pytest.mark.parametrize(("setting", "expected"), [("tf32", "tf32"), ("ieee", "ieee"), ("none", "ieee")])
def test_float32_products_round_as_pytorch_is_told_to(setting, expected):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = setting
    try:
        assert similarity.precision(torch.float32) == expected
    finally:
        matmul.fp32_precision = before


def test_a_configuration_must_fit_shared_memory():
    device = torch.device("cpu")
    candidates = [config.Config(4, stages, {"BLOCK": 64}) for stages in (4, 2, 1)]
    asked = []

    @config.configured("none", lambda one, size: one.num_stages * size)
    def choose(arch, size):
        asked.append(arch)
        return *candidates, None

    def chosen(arch, size):
        with config.forced_architecture(arch):
            return choose(device, size)

    for _ in range(2):
        stages = [chosen(arch, 60 * 1024).num_stages for arch in (80, 86, 89, 90, 100, 120)]
        assert stages == [2, 1, 1, 2, 2, 1]
    assert asked == [80, 80, 80, 90, 100, 100]
    assert chosen(90, 2**30) is None
    with config.forced("none", 8, 3, BLOCK=16):
        assert choose(device, 1).blocks == {"BLOCK": 16}
    assert choose(device, 1) is candidates[0]


@compiled
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_the_fused_assign_merge_fits_every_gpu(arch):
    x = torch.randn(1, 256, 64).bfloat16()
    with stubbed_driver(arch) as seen, config.forced_architecture(arch), torch.no_grad():
        functional.assign_merge(x, None, x[:, :128], impl="triton")
    assert seen.launched == 1
