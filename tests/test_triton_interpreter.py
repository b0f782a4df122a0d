"""Every verb runs through the interpreter of whatever Triton and NumPy are installed."""

import importlib.util

import pytest

from sttm_kernels import dispatch

if importlib.util.find_spec("triton") is None or not dispatch.interpreting():
    pytest.skip("needs TRITON_INTERPRET=1: runs in a process of its own", allow_module_level=True)

from benchmarks.host_overhead import calls
from sttm_kernels.impl.triton.launch import launch as launch


@pytest.mark.parametrize("verb", list(calls(N=8)))
def test_every_verb_runs(verb):
    calls(N=8, C=16, K=3, B=1)[verb]()
