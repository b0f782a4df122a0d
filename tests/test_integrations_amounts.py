"""What is merged by intent: a share of the tokens, how many shall be left, what a model may cost; protected tokens."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sttm_kernels as sttm
from sttm_kernels.integrations import find_layers
from sttm_kernels.integrations.amounts import Share, Tokens, Toward, nearest, toward
from sttm_kernels.nn.flops import flops
from sttm_kernels.testing import assert_equal

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.unpoisoned  # models initialise their weights in torch.empty

WIDTH = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}


def vit(**changes) -> nn.Module:
    """Of 1 + 144 tokens."""
    torch.manual_seed(0)
    size = {"img_size": 48, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **{**size, **changes}).eval()


def videomae() -> nn.Module:
    """Of 72 tokens."""
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(**WIDTH, image_size=48, patch_size=8, num_frames=4, num_labels=5)
    return transformers.VideoMAEForVideoClassification(config).eval()


def vjepa2() -> nn.Module:
    """Of 72 tokens, and a pooler that costs what it costs."""
    torch.manual_seed(0)
    config = transformers.VJEPA2Config(
        hidden_size=48, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=2, patch_size=8, crop_size=48,
        frames_per_clip=4, num_pooler_layers=1, num_labels=5,
    )  # fmt: skip
    return transformers.VJEPA2ForVideoClassification(config).eval()


def timesformer() -> nn.Module:
    """Of 36 places, each a token in every one of 4 frames, and the class token."""
    torch.manual_seed(0)
    config = transformers.TimesformerConfig(**WIDTH, image_size=48, patch_size=8, num_frames=4, num_labels=5)
    return transformers.TimesformerForVideoClassification(config).eval()


MODELS = {"vit": vit, "videomae": videomae, "vjepa2": vjepa2, "timesformer": timesformer}
models = pytest.mark.parametrize("name", MODELS)


def pixels(name: str) -> Tensor:
    return torch.randn((2, 3, 48, 48) if name == "vit" else (2, 4, 3, 48, 48))


def counts(model: nn.Module, x: Tensor) -> list[int]:
    """How many tokens left each layer that merges."""
    with torch.no_grad():
        model(x)
    return [each.size.shape[1] for each in sttm.trace(model)]


# Arithmetic


@pytest.mark.parametrize("protected", [(), (4,), (1, 3, 5, 7, 9, 11), tuple(range(0, 30, 2))], ids=str)
def test_what_can_be_left_is_left(protected):
    """Every number within reach, in steps of which only those that must be are greater than equal ones."""
    for count, layers in itertools.product((2, 3, 16, 31, 40), (1, 2, 3, 5)):
        tokens = Tokens(count, 1, tuple(n for n in protected if 0 < n < count))
        free = count - tokens.fixed
        fewest = tokens.fewest(layers)
        for keep in range(fewest, count - 1 + 1):
            left = tokens.after(toward(keep - len(tokens.protected), layers))
            assert left[-1] - 1 == keep
        if not protected:
            steps = [a - b for a, b in itertools.pairwise([count, *tokens.after(toward(max(1, free - 3), layers))])]
            assert steps == sorted(steps, reverse=True)
            assert max(steps) - min(steps) <= 1
            assert fewest == -(-free // 2**layers)


def test_steps_are_equal_where_they_can_be():
    assert Tokens(197, 1).after(toward(100, 12)) == [189, 181, 173, 165, 157, 149, 141, 133, 125, 117, 109, 101]
    assert Tokens(16, 0).after(toward(2, 3)) == [8, 4, 2]  # 11 would be out of reach of the others
    assert Tokens(10, 0).after(toward(12, 3)) == [10, 10, 10]


def test_a_share_is_of_what_may_merge():
    assert Tokens(101, 1).after([Share(1, 10)] * 3) == [91, 82, 74]
    assert Tokens(101, 1, tuple(range(1, 51))).after([Share(1, 10), 0, Share(1, 2)]) == [96, 96, 74]


@pytest.mark.parametrize("power", [0.5, 1, 2, 6])
def test_the_nearest_cost_is_found_in_few_calls(power):
    for target in (0.0, 0.003, 0.2, 0.51, 0.999, 1.0, 7.0):
        asked = []

        def cost(n: int, asked: list[int] = asked) -> float:
            asked.append(n)
            return (n / 300) ** power

        found = nearest(target, 10, 300, cost)
        assert abs((found / 300) ** power - target) == min(abs((n / 300) ** power - target) for n in range(10, 301))
        assert len(asked) <= 16


def test_protected_tokens_are_not_compared():
    with FlopCounterMode(display=False) as counter:
        sttm.match(torch.empty(2, 20, 8, device="meta"), 4, 1, protect=[3, 5, 10])
    assert counter.get_total_flops() == 2 * 2 * 8 * (9 - 1) * (10 - 2)


# Models


@models
@pytest.mark.parametrize("protect", [None, [1, 7, 33, 40, 41]], ids=str)
def test_keep_is_what_is_left(name, protect):
    pieces, prefix = (4, 1) if name == "timesformer" else (1, int(name == "vit"))
    for keep in (30, 15):
        model = sttm.apply(MODELS[name](), keep=keep, protect=protect, trace=True)
        assert counts(model, pixels(name))[-1] == prefix + keep * pieces


def test_keep_holds_for_inputs_of_any_size():
    model = sttm.apply(vit(dynamic_img_size=True), keep=20, layers=[0, 2, 3], trace=True)
    assert counts(model, torch.randn(1, 3, 48, 48))[-1] == 21
    assert counts(model, torch.randn(1, 3, 32, 44))[-1] == 21
    assert counts(model, torch.randn(1, 3, 16, 16)) == [17, 17, 17, 17]
    model = sttm.apply(vit(dynamic_img_size=True), keep=80, layers=[1])
    with pytest.raises(RuntimeError, match=r"layer 1 must leave 80 tokens of this input, got 162"):
        model(torch.randn(1, 3, 72, 72))


@models
def test_a_share_is_what_merges_in_each_layer(name):
    model = sttm.apply(MODELS[name](), r=0.25, layers=[0, 2], trace=True)
    pieces, prefix, count = {
        "vit": (1, 1, 144), "videomae": (1, 0, 72), "vjepa2": (1, 0, 72), "timesformer": (4, 1, 36),
    }[name]  # fmt: skip
    first = count - count // 4
    second = first - first // 4
    expected = [prefix + n * pieces for n in (first, first, second)]
    assert counts(model, pixels(name))[:3] == expected


def test_intents_within_windows():
    x = pixels("vit")
    model = sttm.apply(vit(), keep=100, layers=[1], window=(1, 4, 4), trace=True)
    assert counts(model, x)[-1] == 101
    model = sttm.apply(model, r=0.25, layers=[1], window=(1, 4, 4), protect=[4, 9, 40, 41], trace=True)
    assert counts(model, x)[-1] == 145 - 140 // 4
    model = sttm.apply(model, keep=130, layers=[1], window=(1, 4, 1))  # columns: nothing of a window may meet
    with pytest.raises(RuntimeError, match="keep must be within reach of the merging layers"):
        model(x)
    with pytest.raises(ValueError, match="window must be None with flops"):
        sttm.apply(model, flops=0.9, layers=[1], window=(1, 4, 4))


def test_nothing_merges_of_a_share_of_none():
    model, x = vit(), pixels("vit")
    before = model(x)
    assert_equal("r = 0.0", sttm.apply(model, r=0.0)(x), before)
    assert_equal("flops = 1", sttm.apply(model, flops=1)(x), before)
    assert_equal("keep all", sttm.apply(model, keep=144)(x).argsort(), before.argsort())


def counted(model: nn.Module, name: str) -> int:
    """Operations of one forward, on the meta device."""
    shape = pixels(name).shape[1:]
    return flops(model, (1, *shape))


@models
@pytest.mark.parametrize("budget", [0.9, 0.75, 0.62])
def test_the_counted_operations_are_within_the_budget(name, budget):
    model = MODELS[name]()
    full = counted(model, name)
    sttm.apply(model, flops=budget)
    missed = abs(counted(model, name) / full - budget)
    if missed > 0.01 * budget:  # then nothing is nearer
        prefix, pieces = {"vit": (1, 1), "timesformer": (1, 4)}.get(name, (0, 1))
        kept = (find_layers(model)[-1]._sttm.planned[1] - prefix) // pieces
        for other in (kept - 1, kept + 1):
            with contextlib.suppress(ValueError):  # out of reach
                assert abs(counted(sttm.apply(model, keep=other), name) / full - budget) >= missed


def test_the_operations_of_a_real_forward_are_within_the_budget():
    """Without fused attention, whose kernel for CPUs PyTorch does not count."""

    def real(model: nn.Module) -> int:
        for block in model.blocks:
            block.attn.fused_attn = False
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.randn(1, 3, 48, 48))
        return counter.get_total_flops()

    full = real(vit())
    for budget in (0.8, 0.6):
        assert real(sttm.apply(vit(), flops=budget)) / full == pytest.approx(budget, rel=0.01)


def test_a_budget_holds_with_protected_tokens_and_some_layers():
    model = vit()
    full = counted(model, "vit")
    sttm.apply(model, flops=0.7, layers=[0, 1], protect=range(1, 40), trace=True)
    assert counted(model, "vit") / full == pytest.approx(0.7, rel=0.01)
    traced = counts(model, pixels("vit"))
    assert traced[1] == traced[-1] > 40


def test_counting_leaves_the_model_alone():
    """Neither hooks of the user nor the model see the tokens that are counted."""
    model, seen = vit(), []
    model.norm.register_forward_hook(lambda *_: seen.append("norm"))
    model.register_forward_pre_hook(lambda *_: seen.append("model"))
    weights = copy.deepcopy(model.state_dict())
    model.train()
    sttm.apply(model, flops=0.7, trace=True)
    assert seen == []
    assert model.training
    for key, value in model.state_dict().items():
        assert_equal(key, value, weights[key])
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="a forward of the model first"):
        sttm.trace(model)
    model.eval()(pixels("vit"))
    assert sorted(seen) == ["model", "norm"]


def test_what_was_chosen_is_in_the_repr():
    model = sttm.apply(vit(), keep=100, layers=[0, 3])
    text = repr(model)
    for part in ("r=22, tokens=145 -> 123", "r=0, tokens=123 -> 123", "r=22, tokens=123 -> 101"):
        assert part in text
    assert "merges r=3\n" in repr(sttm.apply(model, r=3))
    assert "merges" not in repr(sttm.remove(model))
    assert "r=32, tokens=145 -> 113" in repr(sttm.apply(timesformer(), keep=28, layers=[1]))  # 8 places in 4 frames


@pytest.mark.table
@pytest.mark.parametrize("amounts", [{"r": 0.2}, {"keep": 40}, {"flops": 0.7, "protect": [3, 50, 51]}], ids=str)
def test_copies_and_compiled_and_exported_models_merge_alike(amounts):
    model, x = sttm.apply(vit(), **amounts), pixels("vit")
    with torch.no_grad():
        expected = model(x)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_equal("copied", copied(x), expected)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), expected)
    torch._dynamo.reset()


@pytest.mark.table
@pytest.mark.parametrize("amounts", [{"r": 0.2, "protect": [3, 9]}, {"keep": 60}], ids=str)
def test_export_with_images_of_any_size(amounts):
    model = sttm.apply(vit(dynamic_img_size=True, depth=3), **amounts)
    height = torch.export.Dim("height", min=8, max=64)
    program = torch.export.export(model, (torch.randn(1, 3, 48, 48),), dynamic_shapes=({2: 4 * height},))
    with torch.no_grad():
        for rows in (44, 64):
            x = torch.randn(1, 3, rows, 48)
            torch.testing.assert_close(program.module()(x), model(x))


def test_protected_places_of_timesformer():
    """Token 1 + 4 p + t is place p in frame t."""
    model = sttm.apply(timesformer(), r=9, protect=[0, 6, 1 + 4 * 20, 4 + 4 * 20, 130], trace=True)
    with torch.no_grad():
        model(pixels("timesformer"))
    for each in sttm.trace(model):
        for at, place in enumerate((1, 20, 32)):
            tube = slice(1 + 4 * place, 5 + 4 * place)
            assert each.index[:, tube].tolist() == [[1 + 4 * at + t for t in range(4)]] * 2
        assert bool((each.size[:, :13] == 1).all())
        assert each.index[:, 1:5].min() >= 13


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "exactly one of r, keep and flops must be given with method 'tome', got none"),
        ({"r": 3, "keep": 9}, TypeError, "exactly one of .*, got r and keep"),
        ({"keep": 3, "flops": 0.5}, TypeError, "exactly one of .*, got keep and flops"),
        (
            {"keep": 30, "schedule": "rising"},
            ValueError,
            "schedule must be 'constant' unless r is an int, got 'rising'",
        ),
        ({"r": 0.1, "schedule": -0.5}, ValueError, "schedule must be 'constant' unless r is an int, got -0.5"),
        ({"r": 0.6}, ValueError, "r as a share must be between 0 and 0.5, .*, got 0.6"),
        ({"r": -0.1}, ValueError, "r as a share must be between 0 and 0.5, .*, got -0.1"),
        ({"r": 8.0}, ValueError, "r as a share must be between 0 and 0.5, .*, got 8.0"),
        ({"r": float("nan")}, ValueError, "r as a share must be between 0 and 0.5, .*, got nan"),
        ({"r": True}, TypeError, "r must be an int, got bool"),
        ({"r": "8"}, TypeError, "r must be an int, got str"),
        ({"keep": 0.5}, TypeError, "keep must be an int, got float"),
        ({"keep": 0}, ValueError, "keep must be at least 1, got 0"),
        ({"keep": 145}, ValueError, "keep must be between 9 and 144, what 4 merging layers can leave, got 145"),
        ({"keep": 8}, ValueError, "keep must be between 9 and 144, what 4 merging layers can leave, got 8"),
        ({"keep": 71, "layers": [2]}, ValueError, "keep must be between 72 and 144, what 1 merging layers"),
        ({"keep": 3, "protect": [1, 2, 3, 4]}, ValueError, "keep must be at least the 4 protected tokens, got 3"),
        ({"flops": 0}, ValueError, "flops must be positive and finite, got 0"),
        ({"flops": "half"}, TypeError, "flops must be a float, got str"),
        ({"flops": 1.2}, ValueError, "flops must be at most 1, .*, got 1.2"),
        ({"flops": 0.1}, ValueError, r"flops must be at least 0\.\d{3}, what 4 merging layers can reach, got 0.1"),
        ({"r": 3, "protect": [-1]}, ValueError, "every entry of protect must be at least 0, got -1"),
        ({"r": 3, "protect": 4}, TypeError, "protect must be a bool mask .*, got int"),
        ({"method": "sttm", "keep": 4}, ValueError, "keep must be None with method 'sttm', .*, got 4"),
        ({"method": "sttm", "protect": [4]}, ValueError, r"protect must be None with method 'sttm', .*, got \[4\]"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(arguments, error, message):
    model, x = vit(), pixels("vit")
    before = model(x)
    with pytest.raises(error, match=message):
        sttm.apply(model, **arguments)
    assert_equal("as it was", model(x), before)
    assert not any("_sttm" in vars(module) for module in model.modules())


def test_protecting_tokens_that_are_not_there_is_refused():
    with pytest.raises(ValueError, match=r"protect must hold tokens in \[0, N\), N = 145, got 145"):
        sttm.apply(vit(), r=3, protect=[145])(pixels("vit"))


def test_a_budget_needs_a_model_that_can_be_counted():
    model = vit()
    model.patch_embed.img_size = None
    with pytest.raises(
        ValueError, match=r"flops must be left out for VisionTransformer, got 0\.5: the size of its input"
    ):
        sttm.apply(model, flops=0.5)
    assert Toward(30, 1) in [layer._sttm.r for layer in sttm.apply(model, keep=30, layers=[1]).blocks]
    assert "r toward 30 tokens" in repr(model)
    assert "r=0.25 of the tokens" in repr(sttm.apply(model, r=0.25))
