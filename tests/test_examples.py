"""The training example, in two processes that talk by gloo: a run that is stopped goes on as if it had not been. And
the shorter prompt of a video-language model."""

import os
import shutil
import socket
import sys
from pathlib import Path

import conftest  # noqa: F401  the processes need what it declares, too
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import sttm_kernels as sttm
from sttm_kernels.testing import assert_equal

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


@pytest.mark.table
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("how", [["--parallel", "ddp"], ["--checkpointing"]], ids=["ddp", "fsdp with checkpointing"])
def test_training_goes_on_where_it_was_stopped(tmp_path, how):
    pytest.importorskip("transformers")
    mp.spawn(on_rank, (tmp_path, how, free_ports(3)), nprocs=RANKS)


@pytest.fixture
def shorter_prompt(monkeypatch):
    pytest.importorskip("transformers", minversion="5")
    monkeypatch.syspath_prepend(EXAMPLES)
    import shorter_prompt

    return shorter_prompt


@pytest.mark.unpoisoned  # models initialise their weights in torch.empty
@pytest.mark.parametrize("method", ["sttm", "uniform"])
def test_a_prompt_gets_shorter_and_keeps_its_positions(shorter_prompt, method, capsys):
    shorter_prompt.main(["--keep", "1.0", "--method", method])
    whole, same = capsys.readouterr().out.splitlines()
    assert whole.removeprefix("whole") == same.removeprefix("shorter")
    shorter_prompt.main(["--keep", "0.25", "--method", method])
    assert "shorter: 24 tokens" in capsys.readouterr().out

    model = shorter_prompt.small()
    inputs = shorter_prompt.prompt(model, (4, 8, 8))
    fewer, whole = (shorter_prompt.shortened(model, inputs, keep, method) for keep in (0.75, 1.0))
    t, h, w = fewer["position_ids"][:, 0, 4:52].unbind()
    assert ((16 * t + h) * 16 + w).diff().min() >= 0
    text = torch.cat((torch.arange(4), torch.arange(68, 72)))
    kept = torch.cat((torch.arange(4), torch.arange(52, 56)))
    assert_equal("positions of text", fewer["position_ids"][..., kept], whole["position_ids"][..., text])

    tower = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
    clip = sttm.compress(tower, [(4, 4, 4)], 0.75, method)
    alone = (clip.size == 1).nonzero().flatten()
    own = torch.stack([(clip.plan.index[0] == group).int().argmax() for group in alone])
    assert_equal("positions", fewer["position_ids"][..., 4 + alone], whole["position_ids"][..., 4 + own])
    assert len(alone) > 0


@pytest.mark.table
@pytest.mark.unpoisoned
@pytest.mark.parametrize("form", ["pt2", "onnx", "aoti", "kernels"])
def test_a_merging_videomae_is_the_same_in_a_fresh_process(tmp_path, monkeypatch, form):
    pytest.importorskip("transformers")
    if form == "onnx":
        for needed in ("onnxruntime", "onnxscript"):
            pytest.importorskip(needed)
    if form in ("aoti", "kernels") and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    import clips
    import deploy

    small = {"num_hidden_layers": 1, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96}
    monkeypatch.setattr(clips, "SMALL", {**small, "image_size": 32, "num_frames": 4})
    deploy.main(["--device", "cpu", "--r", "3", "--format", form, "--folder", str(tmp_path / "deployed")])
