"""What only a GPU can show: CUDA graphs, and the same bits on every stream."""

import importlib.util

import pytest
import torch
from torch.utils import _pytree as pytree

from sttm_kernels import dispatch
from sttm_kernels.testing import assert_equal

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from benchmarks.host_overhead import calls

pytestmark = [pytest.mark.gpu, pytest.mark.unpoisoned]


@pytest.fixture(params=["triton", "cuda"])
def impl(request):
    reason = dispatch.why_not("merge", request.param, "cuda")
    if reason is not None:
        pytest.skip(reason)
    return request.param


def check_bits(found, expected):
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
    for at, (one, other) in enumerate(pairs):
        if isinstance(one, torch.Tensor):
            assert_equal(f"output {at}", one, other)


@pytest.mark.parametrize("verb", list(calls(N=8)))
def test_a_captured_graph_replays(verb, impl):
    call = calls(N=197, impl=impl, device="cuda")[verb]
    with torch.no_grad():
        expected = call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call()
        for _ in range(2):
            graph.replay()
            torch.cuda.synchronize()
            check_bits(found, expected)


@pytest.mark.parametrize("verb", list(calls(N=8)))
def test_every_stream_gives_the_same_bits(verb, impl):
    call = calls(N=197, impl=impl, device="cuda")[verb]
    with torch.no_grad():
        expected = call()
        torch.cuda.synchronize()
        for _ in range(3):
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                found = call()
            stream.synchronize()
            check_bits(found, expected)
