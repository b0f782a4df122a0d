"""Functions run in two processes that talk by gloo, forked from one that has imported the tests' models."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver, get_context
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
PRELOADED = [
    "conftest",
    "test_how_models_are_run",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
]
"""What takes long to import."""


def together(function: Callable[..., None], *args: Any) -> None:
    """`function(*args)` in every process; raises what is raised in one, with its message."""
    get_context("forkserver").set_forkserver_preload(PRELOADED)
    before = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "PYTHONPATH")}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_on_rank, (f"file://{folder}/store", function, args), RANKS, start_method="forkserver")


def _on_rank(rank: int, store: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    try:
        function(*args)
    finally:
        dist.destroy_process_group()
