"""The training example, in two processes that talk by gloo: a run that is stopped goes on as if it had not been."""

import os
import socket
import sys
from pathlib import Path

import conftest  # noqa: F401  the processes need what it declares, too
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

EXAMPLES = Path(__file__).parent.parent / "examples"
RANKS = 2


def on_rank(rank, folder, how, ports):
    sys.path.insert(0, str(EXAMPLES))
    import train_video

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "localhost"}

    def train(steps, checkpoint):
        os.environ["MASTER_PORT"] = str(ports.pop())
        small = ["--device", "cpu", "--batch", "1", "--r", "6", "--save-every", "2"]
        return train_video.main([*small, *how, "--steps", str(steps), "--checkpoint", f"{folder}/{checkpoint}"])

    unbroken, stopped, resumed = train(4, "unbroken"), train(2, "stopped"), train(4, "stopped")
    assert [len(losses) for losses in (unbroken, stopped, resumed)] == [4, 2, 2]
    assert stopped + resumed == pytest.approx(unbroken, rel=1e-5)


def free_ports(count):
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("how", [["--parallel", "ddp"], ["--checkpointing"]], ids=["ddp", "fsdp with checkpointing"])
def test_training_goes_on_where_it_was_stopped(tmp_path, how):
    pytest.importorskip("transformers")
    mp.spawn(on_rank, (tmp_path, how, free_ports(3)), nprocs=RANKS)
