"""`sttm-kernels flops`: operations against a count by hand, settings nearest to the share, models of one's own."""

import sys

import pytest
import test_integrations_packed as packed
import torch
from transformers import VideoMAEConfig, VideoMAEModel

import sttm_kernels as sttm
from sttm_kernels.bench import models, shares
from sttm_kernels.bench.models import Encoder
from sttm_kernels.bench.runner import Settings
from sttm_kernels.bench.timing import Ceilings
from sttm_kernels.cli import main
from sttm_kernels.integrations import qwen
from sttm_kernels.integrations.amounts import Share
from sttm_kernels.integrations.merging import find_layers
from sttm_kernels.nn.flops import flops

D, MLP, DEPTH = 48, 96, 6
SMALL = {
    "hidden_size": D, "intermediate_size": MLP, "num_hidden_layers": DEPTH, "num_attention_heads": 4,
    "image_size": 64, "num_frames": 8,
}  # fmt: skip
N = 4 * 4 * 4
VIDEO = shares.Model(lambda: VideoMAEModel(VideoMAEConfig(**SMALL)), (8, 3, 64, 64))


def attention(n: int) -> int:
    return 2 * n * D * 3 * D + 2 * 2 * n * n * D + 2 * n * D * D


def feed_forward(n: int) -> int:
    return 2 * 2 * n * D * MLP


def matching(n: int) -> int:
    """Half of the tokens with the other half, by the mean of the keys over heads; then counts ride along."""
    return 2 * (n - n // 2) * (n // 2) * (D // 4) + 2 * n * D


def test_operations_by_hand_and_near_the_share():
    plain, tome, merged = shares.settings(VIDEO, 0.7)
    assert abs(merged.operations / plain.operations - 0.7) < 0.01
    embedding = 2 * N * D * 3 * 2 * 16 * 16
    assert plain.operations == embedding + DEPTH * (attention(N) + feed_forward(N))

    r = int(tome.says.split("r = ")[1].split()[0])
    counted, n = embedding, N
    for _ in range(DEPTH):
        counted += attention(n)
        counted += matching(n)
        n -= r
        counted += feed_forward(n)
    assert abs(counted / plain.operations - 0.7) < 0.03
    assert tome.operations == pytest.approx(counted, rel=0.002)  # what is left is copied back to all tokens for free


@pytest.mark.parametrize(
    ("kind", "options", "shape", "tokens"),
    [
        ("VJEPA2Model", {"crop_size": 64, "frames_per_clip": 8, "mlp_ratio": MLP / D}, (8, 3, 64, 64), N),
        ("SiglipVisionModel", {"patch_size": 16, "image_size": 64, "intermediate_size": MLP}, (3, 64, 64), 16),
    ],
)
def test_one_block_more_costs_a_block_by_hand(kind, options, shape, tokens):
    def operations(depth: int) -> int:
        sizes = {"hidden_size": D, "num_attention_heads": 4, "num_hidden_layers": depth}
        return flops(Encoder(shares._transformers(kind, shape, **sizes, **options).build().eval()), (1, *shape))

    assert operations(3) - operations(2) == attention(tokens) + feed_forward(tokens)


def test_a_model_that_is_refused_says_why(monkeypatch, capsys):
    assert main(["flops", "nobody-knows-it"]) == 2
    assert "MODEL must be one of vit-b, " in capsys.readouterr().err
    assert main(["flops", "resnet18"]) == 2
    assert "resnet18: " in capsys.readouterr().err


def test_a_package_that_cannot_be_loaded_leaves_out_its_models(tmp_path, monkeypatch, capsys):
    (tmp_path / "timm.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(shares.MODELS, "small", VIDEO)
    assert main(["flops", "vit-b", "small"]) == 1
    first, *others = capsys.readouterr().out.splitlines()
    assert "left out: operator torchvision::nms does not exist: the torchvision that is installed was built" in first
    assert len(others) == 3
    assert main(["flops", "vit_tiny_patch16_224"]) == 2
    assert "needs timm (operator torchvision::nms" in capsys.readouterr().err

    settings = Settings("models", torch.device("cpu"), torch.float32, ["cpu"], 0.01, 1.0, compiled=False)
    ((row,),) = models.measure("ViT-L", settings, Ceilings(1.0, 1.0), None)
    assert row["check"].startswith("left out: timm cannot be imported: operator torchvision::nms")


def test_a_folder_of_transformers(tmp_path, capsys):
    VideoMAEConfig(**SMALL).save_pretrained(tmp_path)
    assert main(["flops", str(tmp_path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3
    assert out[0].endswith(" without merging")
    assert "ToMe, r = " in out[1]
    assert "STTM, spatial_keep = temporal_keep = " in out[2]

    r, keep = out[1].split("r = ")[1].split()[0], out[2].rsplit(" = ")[-1]
    assert main(["flops", str(tmp_path), "--r", r, "--keep", keep]) == 0
    assert capsys.readouterr().out.splitlines() == out
    assert main(["flops", str(tmp_path), "--r", "0", "--keep", "1"]) == 0
    assert [line.split()[3] for line in capsys.readouterr().out.splitlines()[:2]] == ["1.000", "1.000"]


@pytest.mark.table
@pytest.mark.parametrize("family", [packed.qwen2_5, packed.qwen3])
def test_a_tower_of_packed_tokens_near_the_share(family, monkeypatch):
    small = shares.Model(lambda: family(torch.float32), (4, 3, 32, 32), row=True)
    plain, tome, merged = shares.settings(small, 0.7)
    assert abs(tome.operations / plain.operations - 0.7) < 0.02
    assert "method must be left out" in merged.says
    assert merged.operations is None
    r = float(tome.says.split("r = ")[1].split()[0])
    assert [each.operations for each in shares.settings(small, 0.7, r=0)][:2] == [plain.operations] * 2

    monkeypatch.setattr(qwen, "CONFIGURED", (32, 32))
    tower = sttm.apply(family(torch.float32), flops=0.7)
    assert {step.r for step in (block._sttm for block in tower.blocks)} == {Share(round(1000 * r), 1000)}
    with pytest.raises(ValueError, match="flops must be at least"):
        sttm.apply(tower, flops=0.1)
    with pytest.raises(ValueError, match=r"shape must be of multiples of 2 frames and of 8 pixels, got \(4, 30, 32\)"):
        next(shares.settings(shares.Model(small.build, (4, 3, 30, 32), row=True), 0.7))


def test_the_operations_of_a_video_language_model_are_those_of_its_tower():
    whole = packed.with_tower("InternVL")
    sttm.apply(whole, flops=0.7)
    alone = sttm.apply(packed.with_tower("InternVL").model.vision_tower, flops=0.7)
    assert [layer._sttm.r for layer in find_layers(whole)] == [layer._sttm.r for layer in find_layers(alone)]
    assert find_layers(whole)[0]._sttm.planned[0] == 37
