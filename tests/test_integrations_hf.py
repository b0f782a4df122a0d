"""Merging in models of transformers: nothing changes without merging, and with it they are the plain network."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import plain_models
import pytest
import torch
import torch.nn.functional as F
from plain_models import PlainLayer
from torch import Tensor, nn

import sttm_kernels as sttm
from sttm_kernels.testing import assert_equal

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.unpoisoned  # models initialise their weights in torch.empty

WIDTH = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
CLIP = {**WIDTH, "image_size": 24, "num_frames": 4, "num_labels": 5, "initializer_range": 0.2}


def vit(**changes: Any) -> nn.Module:
    config = {**WIDTH, "image_size": 24, "patch_size": 4, "num_labels": 5, "initializer_range": 0.2, **changes}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**config))


def deit(**changes: Any) -> nn.Module:
    config = {**WIDTH, "image_size": 24, "patch_size": 4, "num_labels": 5, "initializer_range": 0.2, **changes}
    return transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**config))


def videomae(**changes: Any) -> nn.Module:
    config = {**CLIP, "patch_size": 8, "tubelet_size": 2, **changes}
    return transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**config))


def vivit(**changes: Any) -> nn.Module:
    config = {**CLIP, "tubelet_size": [2, 8, 8], **changes}
    return transformers.VivitForVideoClassification(transformers.VivitConfig(**config))


def vjepa2(**changes: Any) -> nn.Module:
    config = {
        "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "mlp_ratio": 2, "patch_size": 8,
        "crop_size": 24, "frames_per_clip": 4, "tubelet_size": 2, "num_labels": 5, "initializer_range": 0.2,
        "pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1, "num_pooler_layers": 1,
        **changes,
    }  # fmt: skip
    return transformers.VJEPA2ForVideoClassification(transformers.VJEPA2Config(**config))


def timesformer(**changes: Any) -> nn.Module:
    config = {**CLIP, "patch_size": 8, **changes}
    return transformers.TimesformerForVideoClassification(transformers.TimesformerConfig(**config))


def timesformer_joint() -> nn.Module:
    return timesformer(attention_type="joint_space_time")


IMAGE = {**WIDTH, "image_size": 24, "patch_size": 4}


def clip_vision(**changes: Any) -> nn.Module:
    config = transformers.CLIPVisionConfig(**{**IMAGE, "projection_dim": 24, **changes})
    return transformers.CLIPVisionModelWithProjection(config)


def siglip(**changes: Any) -> nn.Module:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**{**IMAGE, **changes}))


DINO = {**IMAGE, "mlp_ratio": 2, "num_labels": 5, "initializer_range": 0.2, "layerscale_value": 0.7}


def dinov2(**changes: Any) -> nn.Module:
    return transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**{**DINO, **changes}))


def dinov2_registers(**changes: Any) -> nn.Module:
    config = transformers.Dinov2WithRegistersConfig(**{**DINO, "num_register_tokens": 3, **changes})
    return transformers.Dinov2WithRegistersForImageClassification(config)


def dinov3(**changes: Any) -> nn.Module:
    config = {**DINO, "num_register_tokens": 3, "use_gated_mlp": True, "pos_embed_rescale": None, **changes}
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**config))


def internvl(**changes: Any) -> nn.Module:
    config = {**IMAGE, "use_qk_norm": True, "norm_type": "rms_norm", "initializer_range": 0.2, **changes}
    return transformers.InternVLVisionModel(transformers.InternVLVisionConfig(**config))


IMAGES = [vit, deit, clip_vision, siglip, dinov2, dinov2_registers, dinov3, internvl]
CLIPS = [videomae, vivit, vjepa2, timesformer, timesformer_joint]
FAMILIES = IMAGES + CLIPS
PREFIX = {deit: 2, videomae: 0, vjepa2: 0, siglip: 0, dinov2_registers: 4, dinov3: 4}
"""Of families whose tokens do not begin with one class token."""
families = pytest.mark.parametrize("family", FAMILIES)


def build(family: Callable[..., nn.Module], dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """In evaluation mode; random in every parameter, for zeros and ones hide mistakes."""
    torch.manual_seed(0)
    model = family(**changes).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or not (parameter.is_meta or parameter.any()):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pixels(family: Callable[..., nn.Module], batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (batch, 3, 24, 24) if family in IMAGES else (batch, 4, 3, 24, 24)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def logits(model: nn.Module, clip: Tensor) -> Tensor:
    return used(model(clip))


def used(out: Any) -> Tensor:
    """What a model is used for: of one without a head all its tokens, and what is pooled from them."""
    if "pooler_output" in out:
        return torch.cat((out.last_hidden_state, out.pooler_output[:, None]), 1)
    return out[next(name for name in ("logits", "image_embeds", "last_hidden_state") if name in out)]


def body_of(model: nn.Module) -> nn.Module:
    """What takes pixels and has no head."""
    return model if model.config.model_type == "dinov3_vit" else model.base_model


def with_hidden_states(model: nn.Module, clip: Tensor) -> Any:
    body = body_of(model)
    body.config.output_hidden_states = True  # as an argument, InternVL of transformers 4 does not take it
    try:
        return body(clip)
    finally:
        body.config.output_hidden_states = False


def parts_of(model: nn.Module) -> nn.Module:
    """The body, or what it is but a shell of in transformers 4."""
    body = body_of(model)
    return getattr(body, "vision_model", body)


def layers_of(model: nn.Module) -> nn.ModuleList:
    base = parts_of(model)
    if model.config.model_type == "dinov3_vit" and hasattr(base, "model"):
        base = base.model
    for name in ("layers", "layer"):
        for module in (base, getattr(base, "encoder", None)):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(type(model))


def close(name: str, actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")


# Nothing merged


@families
def test_nothing_changes_without_merging_and_after_remove(family):
    model, clip = build(family), pixels(family)
    before, keys, classes = logits(model, clip), list(model.state_dict()), [type(m) for m in model.modules()]
    assert sttm.apply(model, r=0) is model
    assert_equal("r = 0", logits(model, clip), before)
    sttm.apply(sttm.apply(model, r=2), r=3)
    merged = logits(model, clip)
    assert not torch.equal(merged, before)
    assert list(model.state_dict()) == keys
    assert_equal("applied once", logits(sttm.apply(build(family), r=3), clip), merged)
    assert sttm.remove(model) is model
    assert_equal("removed", logits(sttm.remove(model), clip), before)
    assert [type(m) for m in model.modules()] == classes
    assert not any("_sttm" in vars(m) or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("family", [deit, clip_vision, dinov2, dinov3, internvl, videomae])
def test_dropout_falls_where_it_fell(family):
    dropouts = {
        "hidden_dropout_prob": 0.3,
        "attention_dropout": 0.2,
        "projection_dropout": 0.2,
        "drop_path_rate": 0.4,
        "pos_embed_rescale": 2.0,
    }
    model, clip = build(family, **dropouts).train(), pixels(family)

    def seeded() -> Tensor:
        torch.manual_seed(5)
        return logits(model, clip)

    before = seeded()
    assert not torch.equal(logits(model, clip), before)
    sttm.apply(model, r=0)
    assert_equal("r = 0", seeded(), before)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_models_own_attention_runs_until_something_is_merged(implementation):
    model, clip = build(videomae), pixels(videomae)
    model.set_attn_implementation(implementation)
    before = logits(model, clip)
    sttm.apply(model, r=4, layers=[2])
    assert model.config._attn_implementation == implementation
    features = with_hidden_states(model, clip).hidden_states
    assert_equal("before merging", features[2], with_hidden_states(model, clip).hidden_states[2])
    assert_equal("removed", logits(sttm.remove(model), clip), before)


# The plain network


def heads(linear: Callable[[Tensor], Tensor], number: int) -> Callable[[Tensor], Tensor]:
    return lambda x: linear(x).unflatten(-1, (number, -1)).transpose(1, 2)


def part(module: nn.Module, *names: str) -> Any:
    return next(getattr(module, name) for name in names if hasattr(module, name))


def plain(layer: nn.Module, tables: tuple[Tensor, Tensor] | None = None) -> PlainLayer:
    """All but TimeSformer, of either major version of transformers; tables are cos and sin of rotary positions."""
    outer = part(layer, "attention", "self_attn")
    inner = getattr(outer, "attention", outer)
    number = part(inner, "num_attention_heads", "num_heads")
    old_videomae = hasattr(inner, "q_bias")

    def projection(short: str, name: str) -> Callable[[Tensor], Tensor]:
        linear = part(inner, name, f"{short}_proj")
        bias = getattr(inner, f"{short}_bias", None) if old_videomae else linear.bias
        norm = getattr(inner, f"{short}_norm", nn.Identity())
        return heads(lambda x: norm(F.linear(x, linear.weight, bias)), number)

    def scaled(branch: int, linear: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        scale = getattr(getattr(layer, f"layer_scale{branch}", None), "lambda1", getattr(layer, f"lambda_{branch}", 1))
        return lambda x: scale * linear(x)

    out = (
        outer.output.dense
        if hasattr(outer, "output")
        else part(inner, "o_proj", "out_proj", "projection_layer", "proj")
    )
    norm1 = part(layer, "layernorm_before", "norm1", "layer_norm1")
    norm2 = part(layer, "layernorm_after", "norm2", "layer_norm2")
    mlp = layer.mlp if hasattr(layer, "mlp") else lambda x: layer.output.dense(layer.intermediate(x))
    rotate = None
    if hasattr(inner, "apply_rotary_embeddings"):
        grid = inner.grid_size

        def rotate(x: Tensor, places: Tensor) -> Tensor:
            t, y, x_ = places // grid**2, places // grid % grid, places % grid
            return inner.apply_rotary_embeddings(x, tuple(p[:, None].double() for p in (t, y, x_)))

    elif tables is not None:

        def rotate(x: Tensor, places: Tensor) -> Tensor:
            cos, sin = (table[places][:, None] for table in tables)
            first, grid = x.split((x.shape[2] - places.shape[1], places.shape[1]), 2)
            a, b = grid.chunk(2, -1)
            return torch.cat((first, grid * cos + torch.cat((-b, a), -1) * sin), 2)

    parts = (projection("q", "query"), projection("k", "key"), projection("v", "value"))
    return PlainLayer(norm1, *parts, scaled(1, out), norm2, scaled(2, mlp), rotate)


def plain_timesformer(layer: nn.Module) -> PlainLayer:
    inner = layer.attention.attention
    parts = [heads(lambda x, i=i: inner.qkv(x).chunk(3, -1)[i], inner.num_heads) for i in range(3)]
    mlp = lambda x: layer.output.dense(F.gelu(layer.intermediate.dense(x)))  # noqa: E731
    return PlainLayer(layer.layernorm_before, *parts, layer.attention.output.dense, layer.layernorm_after, mlp)


def first_hidden(model: nn.Module, clip: Tensor) -> Tensor:
    base = parts_of(model)
    embed = base.embeddings if hasattr(base, "embeddings") else base.encoder.embeddings
    tokens = embed(clip, None) if model.config.model_type == "videomae" else embed(clip)
    tokens = tokens[0] if isinstance(tokens, tuple) else tokens
    return base.pre_layrnorm(tokens) if hasattr(base, "pre_layrnorm") else tokens


def plain_layers(model: nn.Module, clip: Tensor) -> list[PlainLayer]:
    if model.config.model_type == "timesformer":
        return [plain_timesformer(layer) for layer in layers_of(model)]
    tables = model.rope_embeddings(clip) if hasattr(model, "rope_embeddings") else None
    return [plain(layer, tables) for layer in layers_of(model)]


def head(model: nn.Module, tokens: Tensor) -> Tensor:
    base, kind = parts_of(model), model.config.model_type
    if kind == "clip_vision_model":
        return model.visual_projection(base.post_layernorm(tokens[:, 0]))
    norm = next((getattr(base, name) for name in ("layernorm", "norm", "post_layernorm") if hasattr(base, name)), None)
    norm = base.encoder.layernorm if kind == "vjepa2" else norm
    tokens = tokens if norm is None else norm(tokens)
    if kind == "internvl_vision":
        return tokens
    if kind in ("siglip_vision_model", "dinov3_vit"):
        pooled = base.head(tokens) if hasattr(base, "head") else tokens[:, 0]
        return torch.cat((tokens, pooled[:, None]), 1)
    if kind == "deit":
        return (model.cls_classifier(tokens[:, 0]) + model.distillation_classifier(tokens[:, 1])) / 2
    if kind == "videomae":
        return model.classifier(model.fc_norm(tokens.mean(1)))
    if kind == "vjepa2":
        return model.classifier(model.pooler(tokens))
    if kind.startswith("dinov2"):
        first = 1 + getattr(model.config, "num_register_tokens", 0)
        return model.classifier(torch.cat((tokens[:, 0], tokens[:, first:].mean(1)), 1))
    return model.classifier(tokens[:, 0])


@pytest.mark.parametrize("protect", [(), (11, 5, 4)], ids=["", "protected"])
@pytest.mark.parametrize("r", [1, 5, [0, 6, 3], [7], 1000], ids=str)
@pytest.mark.parametrize("family", [each for each in FAMILIES if each is not timesformer])
def test_merging_model_is_the_plain_network(family, r, protect):
    model, clip = build(family, torch.float64), pixels(family, dtype=torch.float64)
    counts = (r + [0, 0])[:3] if isinstance(r, list) else [r] * 3
    with torch.no_grad():
        tokens = plain_models.forward(
            first_hidden(model, clip), plain_layers(model, clip), counts, PREFIX.get(family, 1), protect
        )
        expected = head(model, tokens)
        sttm.apply(model, r=r, protect=protect)
        close("logits", logits(model, clip), expected)


def plain_divided(layer: nn.Module, x: Tensor, size: Tensor, frames: int, r: int) -> tuple[Tensor, Tensor, list]:
    """TimeSformer's divided layer on x `(1 + P * T, C)` and size `(P)`, tube by tube and frame by frame."""
    first, tubes = x[:1], x[1:].unflatten(0, (-1, frames))
    temporal, spatial = plain_timesformer(layer), plain_timesformer(layer)
    inner = layer.temporal_attention.attention
    temporal.q, temporal.k, temporal.v = (
        heads(lambda x, i=i: inner.qkv(x).chunk(3, -1)[i], inner.num_heads) for i in range(3)
    )
    h = layer.temporal_layernorm(tubes)
    h = plain_models.attention(temporal.q(h), temporal.k(h), temporal.v(h), torch.ones(h.shape[:2]))
    tubes = tubes + layer.temporal_dense(layer.temporal_attention.output.dense(h))

    classes, out, metric = [], torch.empty_like(tubes), []
    counts = torch.cat((torch.ones(1), size))
    for t in range(frames):
        h = layer.layernorm_before(torch.cat((first, tubes[:, t])))[None]
        keys = spatial.k(h)
        attended = spatial.out(plain_models.attention(spatial.q(h), keys, spatial.v(h), counts[None]))[0]
        classes.append(attended[0])
        out[:, t] = tubes[:, t] + attended[1:]
        metric.append(keys.mean(1)[0, 1:])
    first = first + torch.stack(classes).mean(0)
    groups = plain_models.match(torch.cat(metric, -1), r, 0)
    tubes, size = plain_models.merge(out, size, groups)
    x = torch.cat((first, tubes.flatten(0, 1)))
    return x + spatial.mlp(spatial.norm2(x)), size, groups


@pytest.mark.parametrize("r", [1, 3, 1000])
def test_divided_attention_is_the_plain_network(r):
    model, clip = build(timesformer, torch.float64), pixels(timesformer, dtype=torch.float64)
    with torch.no_grad():
        expected = []
        for x in first_hidden(model, clip):
            size, where = torch.ones(9, dtype=torch.float64), list(range(9))
            for layer in layers_of(model):
                x, size, groups = plain_divided(layer, x, size, 4, r)
                where = [next(k for k, group in enumerate(groups) if g in group) for g in where]
            tubes = x[1:].unflatten(0, (-1, 4))[where]
            expected.append(model.base_model.layernorm(torch.cat((x[:1], tubes.flatten(0, 1)))))
        sttm.apply(model, r=r, trace=True)
        close("hidden", body_of(model)(clip).last_hidden_state, torch.stack(expected))
    last = sttm.trace(model)[-1]
    assert last.size.shape[1] == 1 + 4 * len(size)
    assert bool((last.size.sum(1) == 1 + 9 * 4).all())


# What users do with models


@families
def test_shapes_of_outputs_stay_and_hidden_states_shrink(family):
    model, clip = build(family), pixels(family)
    before = with_hidden_states(model, clip)
    after = with_hidden_states(sttm.apply(model, r=2), clip)
    assert after.last_hidden_state.shape == before.last_hidden_state.shape
    lengths = [h.shape[1] for h in after.hidden_states]
    full, step = before.hidden_states[0].shape[1], 8 if family is timesformer else 2
    assert lengths == [full, full - step, full - 2 * step, full]


@families
def test_trace_is_what_was_merged(family):
    model, clip = build(family), pixels(family)
    with pytest.raises(RuntimeError, match="trace=True"):
        sttm.trace(sttm.apply(model, r=2))
    sttm.apply(model, r=2, layers=[1, -1], trace=True)
    with pytest.raises(RuntimeError, match="forward"):
        sttm.trace(model)
    output = with_hidden_states(model, clip)
    full = output.hidden_states[0].shape[1]
    traced = sttm.trace(model)
    assert [each.layer for each in traced] == [1, 2]
    for each in traced:
        assert each.index.shape == (2, full)
        counted = torch.zeros_like(each.size).scatter_add(1, each.index.long(), torch.ones(2, full))
        assert_equal("size", each.size, counted)
    assert output.hidden_states[2].shape[1] == traced[0].size.shape[1]
    # Tokens of one group leave the model alike, and those of different groups do not.
    last = output.last_hidden_state
    alike = (last[:, :, None] == last[:, None]).all(-1)
    assert_equal("groups", alike, traced[-1].index[:, :, None] == traced[-1].index[:, None])


def gradients(model: nn.Module, *clips: Tensor) -> list[Tensor]:
    model.zero_grad()
    outputs = [logits(model, clip) for clip in clips]  # every forward before the first backward
    for output in outputs:
        output.square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", [videomae, vjepa2, timesformer, clip_vision, dinov3])
def test_gradients_and_checkpointing(family):
    clips = pixels(family), pixels(family).flip(0) * 2
    model = sttm.apply(build(family), r=4)
    plain = gradients(model, *clips)
    assert len(plain) > 20
    assert all(bool(g.isfinite().all()) for g in plain)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for checked, expected in zip(gradients(model, *clips), plain, strict=True):
        close("checkpointed", checked, expected, 1e-6)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RuntimeError, match="got use_reentrant=True"):
        logits(model, clips[0])


@pytest.mark.parametrize("family", [videomae, *IMAGES])
def test_gradients_are_those_of_the_plain_network(family):
    norms = {"use_qk_norm": False, "norm_type": "layer_norm"}  # InternVL's own compute in float32
    model, clip = build(family, torch.float64, **norms), pixels(family, dtype=torch.float64)
    prefix = PREFIX.get(family, 1)
    tokens = plain_models.forward(first_hidden(model, clip), plain_layers(model, clip), [3] * 3, prefix)
    head(model, tokens).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    logits(sttm.apply(model, r=3), clip).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            close(name, parameter.grad, expected[name])


@families
def test_autocast(family):
    model, clip = sttm.apply(build(family), r=3), pixels(family)

    def pooled() -> Tensor:
        out = logits(model, clip)
        return out.mean(1) if out.dim() == 3 else out  # of two near-equal pairs of tokens another may merge

    expected = pooled()
    with torch.autocast("cpu", torch.bfloat16):
        actual = pooled()
    assert actual.isfinite().all()
    assert not torch.equal(actual.float(), expected)
    bound = 0.25 * float(expected.abs().max())
    close("autocast", actual.float(), expected, bound)


@families
def test_half_precision_models(family):
    model = sttm.apply(build(family, torch.bfloat16), r=3)
    out = logits(model, pixels(family, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


SHORT = {"num_hidden_layers": 2}  # tracing takes time


@pytest.mark.table
@pytest.mark.parametrize("family", [timesformer, siglip])
def test_compile_fullgraph(family):
    model, clip = sttm.apply(build(family, **SHORT), r=3), pixels(family)
    with torch.no_grad():
        expected = logits(model, clip)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        close("compiled", logits(compiled, clip), expected, 1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("family", [timesformer, siglip])
def test_export(family):
    model, clip = sttm.apply(build(family, **SHORT), r=3), pixels(family)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, clip: Tensor) -> Tensor:
            return logits(self.model, clip)

    with torch.no_grad():
        exported = torch.export.export(Logits(), (clip,))
        close("exported", exported.module()(clip), logits(model, clip), 1e-6)
        file = io.BytesIO()
        torch.export.save(exported, file)
        file.seek(0)
        close("loaded", torch.export.load(file).module()(clip), logits(model, clip), 1e-6)


@pytest.mark.parametrize("family", [videomae, vit])
def test_a_model_of_a_single_layer(family):
    model, clip = build(family, num_hidden_layers=1), pixels(family)
    before = logits(model, clip)
    sttm.apply(model, r=3, trace=True)
    logits(model, clip)
    (layer,) = sttm.trace(model)
    assert layer.size.gt(1).any()
    assert_equal("removed", logits(sttm.remove(model), clip), before)


@families
@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
def test_copies_merge_too_and_on_their_own(family, way):
    model, clip = sttm.apply(build(family), r=3, trace=True), pixels(family)
    expected = logits(model, clip)
    if way == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert_equal(way, logits(copied, clip), expected)
    sttm.remove(model)
    assert_equal("the copy still merges", logits(copied, clip), expected)
    assert_equal("and stops", logits(sttm.remove(copied), clip), logits(model, clip))


@families
def test_state_dict_and_save_pretrained_are_those_of_the_model(family, tmp_path):
    model, clip = build(family), pixels(family)
    before, state = logits(model, clip), model.state_dict()
    sttm.apply(model, r=3)
    model.save_pretrained(tmp_path)
    loaded = type(sttm.remove(model)).from_pretrained(tmp_path).eval()
    assert_equal("loaded", logits(loaded, clip), before)
    other = sttm.apply(family().eval(), r=3)
    other.load_state_dict(state)
    assert_equal("state", logits(sttm.remove(other), clip), before)


def test_models_that_share_a_config_do_not_disturb_each_other():
    config = transformers.ViTConfig(**WIDTH, image_size=24, patch_size=4)
    one, other = transformers.ViTModel(config).eval(), transformers.ViTModel(config).eval()
    other.load_state_dict(one.state_dict())
    image = pixels(vit)
    before = one(image).last_hidden_state
    sttm.apply(other, r=5)
    assert_equal("untouched", one(image).last_hidden_state, before)
    assert not torch.equal(other(image).last_hidden_state, before)


def test_output_hidden_states_before_apply_does_not_stop_merging():
    model, clip = build(videomae), pixels(videomae)
    before = with_hidden_states(model, clip).last_hidden_state
    sttm.apply(model, r=3)
    assert not torch.equal(with_hidden_states(model, clip).last_hidden_state, before)
    assert_equal("removed", sttm.remove(model).base_model(clip).last_hidden_state, before)


# The arguments


@pytest.mark.parametrize(
    ("arguments", "lengths"),
    [
        ({"r": 2, "schedule": "falling"}, [14, 12, 12]),
        ({"r": 3, "schedule": "rising"}, [18, 15, 9]),
        ({"r": 3, "schedule": 0.0}, [15, 12, 9]),
        ({"r": [0, 4]}, [18, 14, 14]),
        ({"r": 2, "layers": [0, 2]}, [16, 16, 14]),
        ({"r": [2, 1], "layers": [-1, 0]}, [17, 17, 15]),
        ({"r": 5, "layers": [1], "window": (1, 3, 3)}, [18, 13, 13]),
    ],
    ids=str,
)
def test_schedule_and_layers(arguments, lengths):
    model, clip = sttm.apply(build(videomae), trace=True, **arguments), pixels(videomae)
    logits(model, clip)
    got = {each.layer: each.size.shape[1] for each in sttm.trace(model)}
    assert [got.get(layer, 18) for layer in range(3)] == lengths


def test_window_confines_groups():
    model, clip = sttm.apply(build(videomae), r=8, layers=[0], window=(1, 3, 3), trace=True), pixels(videomae)
    logits(model, clip)
    index = sttm.trace(model)[0].index
    assert not bool((index[:, :9, None] == index[:, None, 9:]).any())


@pytest.mark.parametrize("prop_attn", ["mask", "augment", "flex", "auto"])
@pytest.mark.parametrize("family", [videomae, timesformer])
def test_ways_to_attend_agree(family, prop_attn):
    clip = pixels(family)
    with torch.no_grad():
        expected = logits(sttm.apply(build(family), r=3, prop_attn="mask"), clip)
        close(prop_attn, logits(sttm.apply(build(family), r=3, prop_attn=prop_attn), clip), expected, 1e-5)
        assert not torch.allclose(logits(sttm.apply(build(family), r=3, prop_attn="off"), clip), expected)


@pytest.mark.parametrize("family", [*IMAGES, videomae, vivit, vjepa2])
def test_sttm(family):
    model, clip = build(family), pixels(family)
    before = logits(model, clip)
    sttm.apply(model, method="sttm", layers=(0, 1), spatial_keep=4, temporal_keep=3, trace=True)
    merged = logits(model, clip)
    assert not torch.equal(merged, before)
    prefix = PREFIX.get(family, 1)
    frames = 1 if family in IMAGES else 2
    sizes = [each.size for each in sttm.trace(model)]
    assert [size.shape[1] - prefix for size in sizes] == [frames * 4, 3, 3]
    assert all(bool((size.sum(1) == sizes[0].sum(1)).all()) for size in sizes)
    merged.sum().backward()
    added = [name for name in model.state_dict() if "sttm" in name]
    assert len(added) == 2
    for name in added:
        parameter = model.get_parameter(name)
        assert not parameter.any()
        assert parameter.grad.any()
    copied = pickle.loads(pickle.dumps(model))
    assert_equal("pickle", logits(copied, clip), merged)
    assert_equal("removed", logits(sttm.remove(model), clip), before)
    assert not any("sttm" in name for name in model.state_dict())


def test_sttm_without_counts_leaves_out_empty_groups():
    model, clip = build(videomae), pixels(videomae)
    clip = clip[:, :, :, :1, :1].expand(-1, -1, -1, 24, 24)  # all patches alike: some groups stay empty
    with torch.no_grad():
        for parameter in model.base_model.embeddings.parameters():
            parameter.zero_()
        model.base_model.embeddings.position_embeddings.zero_()
    keep = {"layers": (0, None), "spatial_keep": 4, "meta": "kmeans", "trace": True}
    one = logits(sttm.apply(model, method="sttm", prop_attn="off", **keep), clip)
    assert bool((sttm.trace(model)[0].size == 0).any())
    close("all tokens are alike", one, logits(sttm.remove(model), clip), 1e-4)


@pytest.mark.parametrize(
    ("family", "arguments", "error", "message"),
    [
        (vit, {"r": None}, TypeError, "exactly one of r, keep and flops must be given"),
        (vit, {"r": -1}, ValueError, "r must be at least 0"),
        (vit, {"r": [1, 1, 1, 1]}, ValueError, "r must have at most one entry per merging layer, 3, got 4"),
        (vit, {"r": [1], "schedule": "rising"}, ValueError, "schedule must be 'constant'"),
        (vit, {"r": 1, "schedule": "up"}, ValueError, "schedule must be one of"),
        (vit, {"r": 1, "schedule": 2.0}, ValueError, "schedule must be between"),
        (vit, {"r": 1, "method": "dct"}, ValueError, "method must be one of"),
        (vit, {"r": 1, "prop_attn": "eager"}, ValueError, "prop_attn must be one of"),
        (vit, {"r": 1, "layers": [3]}, ValueError, "layers must be below the depth of 3, got 3"),
        (vit, {"r": 1, "layers": [2, -1]}, ValueError, "layers must be different"),
        (vit, {"r": 1, "window": (1, 3, 3)}, ValueError, "window must be None unless a single layer merges"),
        (vit, {"r": 1, "spatial_keep": 0.5}, TypeError, "spatial_keep must be left out"),
        (vit, {"r": 1, "method": "sttm"}, ValueError, "r must be None with method 'sttm'"),
        (vit, {"method": "sttm", "layers": (2, 1)}, ValueError, "spatial layer before the temporal"),
        (vit, {"method": "sttm", "layers": (2,)}, ValueError, "layers must be"),
        (timesformer, {"method": "sttm"}, ValueError, "same tokens in every frame"),
        (timesformer, {"r": 1, "layers": [0], "window": (1, 3, 3)}, ValueError, "same tokens in every frame"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_bad_arguments(family, arguments, error, message):
    model, clip = build(family), pixels(family)
    before = logits(model, clip)
    with pytest.raises(error, match=message):
        sttm.apply(model, **arguments)
    assert_equal("unchanged", logits(model, clip), before)
    assert not any("_sttm" in vars(m) or m._forward_hooks for m in model.modules())


def test_models_that_are_refused():
    config = transformers.VideoMAEConfig(**WIDTH, image_size=24, patch_size=8, num_frames=4, decoder_hidden_size=16,
                                         decoder_num_attention_heads=2, decoder_num_hidden_layers=1)  # fmt: skip
    with pytest.raises(ValueError, match="VideoMAEForPreTraining"):
        sttm.apply(transformers.VideoMAEForPreTraining(config), r=1)
    swin = transformers.SwinModel(transformers.SwinConfig(embed_dim=8, depths=[1], num_heads=[2], image_size=32))
    with pytest.raises(ValueError, match="swin"):
        sttm.apply(swin, r=1)
    with pytest.raises(TypeError, match="must not be compiled"):
        sttm.apply(torch.compile(build(vit)), r=1)
    with pytest.raises(TypeError, match="Linear"):
        sttm.apply(nn.Linear(2, 2), r=1)
    with pytest.raises(TypeError, match="model must be a torch"):
        sttm.apply("vit", r=1)


def test_layers_that_fail_the_check_are_refused():
    class Other(type(layers_of(vit())[1])):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs) * 1.5

    model = build(vit)
    layers_of(model)[1].__class__ = Other
    with pytest.raises(ValueError, match="layer 1, a Other, without merging does not give"):
        sttm.apply(model, r=1)
    assert type(layers_of(model)[0]).__name__ == "ViTLayer"
    assert "_sttm" not in vars(layers_of(model)[0])

    model = build(vit)
    layers_of(model)[1].forward = lambda x, *args: x
    with pytest.raises(ValueError, match="forward of their own"):
        sttm.apply(model, r=1)


def test_attention_with_a_bias_of_its_own_is_refused():
    inner = layers_of(siglip())[1].self_attn

    class Biased(type(inner)):
        def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
            return super().forward(hidden_states, hidden_states.new_ones(1, 1, 1, 1), **kwargs)

    model = build(siglip)
    for layer in layers_of(model):
        layer.self_attn.__class__ = Biased
    with pytest.raises(ValueError, match="attention must add no bias of its own"):
        sttm.apply(model, r=1)


def test_counts_that_attention_ignores_are_refused(monkeypatch):
    from sttm_kernels.integrations import huggingface

    monkeypatch.setattr(
        huggingface, "proportional_attention", lambda q, k, v, *_: F.scaled_dot_product_attention(q, k, v)
    )
    with pytest.raises(ValueError, match="takes no heed"):
        sttm.apply(build(vit), r=1)


@pytest.mark.parametrize("family", [vit, deit, dinov2, vivit])
@pytest.mark.parametrize(("implementation", "prop_attn"), [("eager", "auto"), ("sdpa", "auto"), ("sdpa", "off")])
def test_padding_counts_for_nothing(family, implementation, prop_attn):
    model, clip = build(family), pixels(family)
    if "attention_mask" not in inspect.signature(model.base_model.forward).parameters:
        pytest.skip("this version of the model takes no attention_mask")
    model.set_attn_implementation(implementation)
    tokens = body_of(model)(clip).last_hidden_state.shape[1]
    mask = torch.ones(2, tokens, dtype=torch.long)
    padding = 12 if family in IMAGES else 9  # the two lowest rows of patches; the second half of the clip
    mask[1, -padding:] = 0

    def classes(clip: Tensor) -> Tensor:
        return body_of(model)(clip, attention_mask=mask).last_hidden_state[:, 0]

    sttm.apply(model, r=7, prop_attn=prop_attn, trace=True)
    before = classes(clip)
    assert sttm.trace(model)[0].size.sum(1).tolist() == [tokens, tokens - padding]
    changed = clip.clone()
    part = changed[1, :, -8:] if family in IMAGES else changed[1, -2:]
    part.copy_(part.flip(-1) + 3 * part.flip(-2))
    assert_equal("padding", classes(changed), before)
    changed[1, ..., :4, :4] += 3
    assert not torch.equal(classes(changed), before)


AMOUNTS: list[dict[str, Any]] = [{"r": 4}, {"r": [0, 1000, 2]}, {"r": 0.25}, {"keep": 15}, {"r": 3, "protect": (2, 9)}]


@pytest.mark.parametrize("told", AMOUNTS, ids=str)
@pytest.mark.parametrize("family", [vit, deit, dinov2, vivit])
def test_an_item_with_padding_is_as_if_alone(family, told):
    """Its layers give every real token what they give without the padding, whatever that holds."""
    model = build(family, torch.float64)
    if "attention_mask" not in inspect.signature(model.base_model.forward).parameters:
        pytest.skip("this version of the model takes no attention_mask")
    layers = layers_of(sttm.apply(model, **told))
    x = torch.randn(2, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lengths = (24, 17)
    mask = (torch.arange(24) < torch.tensor(lengths)[:, None])[:, None, None].expand(-1, -1, 24, -1)

    def through(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in layers:
            tokens = layer(tokens, **({} if mask is None else {"attention_mask": mask}))
            tokens = tokens[0] if isinstance(tokens, tuple) else tokens
        return tokens

    with torch.no_grad():
        together = through(x, mask)
        for number, length in enumerate(lengths):
            close("alone", together[number, :length], through(x[number : number + 1, :length])[0])
        x[1, 17:] *= 1e3
        assert_equal("whatever padding holds", through(x, mask), together)


def test_padding_has_no_place_of_its_own():
    from sttm_kernels.integrations.merging import _places

    keys = torch.randn(2, 11, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(11) < torch.tensor([11, 8])[:, None]
    places = [_places(sttm.match(keys, 3, 1, mask=mask), None, 1), _places(sttm.match(keys[1:, :8], 3, 1), None, 1)]
    assert_equal("as if alone", places[0][1, :4], places[1][0])


def test_padding_takes_no_part_in_sttm():
    model, clip = build(vivit), pixels(vivit)
    if "attention_mask" not in inspect.signature(model.base_model.forward).parameters:
        pytest.skip("this version of the model takes no attention_mask")
    mask = torch.ones(2, 19, dtype=torch.long)
    padding = torch.tensor([7, 8, 9, 16, 17, 18])  # the lowest row of both frames
    mask[1, padding] = 0
    sttm.apply(model, method="sttm", layers=(0, 1), spatial_keep=4, temporal_keep=3, trace=True)
    before = body_of(model)(clip, attention_mask=mask).last_hidden_state
    spatial, temporal = sttm.trace(model)[0], sttm.trace(model)[1]
    assert (spatial.index[1, padding] == -1).all()
    assert spatial.size.sum(1).tolist() == temporal.size.sum(1).tolist() == [19, 13]
    assert (spatial.size > 0).all()  # the rows that are real are cut up
    clip[1, ..., -8:, :] += 3
    assert_equal("whatever padding holds", body_of(model)(clip, attention_mask=mask).last_hidden_state, before)


def test_an_image_of_another_size_is_as_if_alone():
    """SigLIP 2 takes images of several sizes, the smaller ones padded."""
    config = transformers.Siglip2VisionConfig(**WIDTH, patch_size=4, num_patches=36)
    torch.manual_seed(0)
    model = transformers.Siglip2VisionModel(config).eval().double()
    patches, mask = torch.randn(2, 36, 48, dtype=torch.float64), torch.ones(2, 36, dtype=torch.long)
    shapes = torch.tensor([[6, 6], [4, 6]])
    mask[1, 24:] = 0

    def both() -> Any:
        return model(patches, pixel_attention_mask=mask, spatial_shapes=shapes)

    with torch.no_grad():
        before = both()
        layers = [plain(layer) for layer in layers_of(model)]
        tokens = parts_of(model).embeddings(patches[1:, :24], shapes[1:])
        tokens = parts_of(model).post_layernorm(plain_models.forward(tokens, layers, [15, 8, 0], 0))
        assert_equal("r = 0", (sttm.apply(model, r=0), both())[1].pooler_output, before.pooler_output)
        sttm.apply(model, r=[15, 8], trace=True)  # of the smaller one 12 and 6 can merge
        together = both()
        assert sttm.trace(model)[-1].size.sum(1).tolist() == [36, 24]
        assert (sttm.trace(model)[-1].index[1] == -1).tolist() == [False] * 24 + [True] * 12
        assert not torch.equal(together.pooler_output, before.pooler_output)
        alone = model(patches[1:, :24], pixel_attention_mask=mask[1:, :24], spatial_shapes=shapes[1:])
    close("tokens", together.last_hidden_state[1, :24], alone.last_hidden_state[0])
    close("the plain network", alone.last_hidden_state, tokens)
    close("pooled", together.pooler_output[1], alone.pooler_output[0])
    with pytest.raises(ValueError, match="its grid is not known"):
        sttm.apply(model, method="sttm")


@pytest.mark.parametrize("kind", ["Dinov2", "DINOv3ViT"])
def test_a_backbone_gives_its_last_map(kind):
    backbone = getattr(transformers, f"{kind}Backbone", None)
    if backbone is None:
        pytest.skip(f"this version of transformers has no {kind}Backbone")
    config = {**DINO, "num_register_tokens": 3, "pos_embed_rescale": None, "out_features": ["stage3"]}
    model = build(lambda: backbone(getattr(transformers, f"{kind}Config")(**config)), torch.float64)
    image, prefix = pixels(vit, dtype=torch.float64), 1 if kind == "Dinov2" else 4
    with torch.no_grad():
        tokens = plain_models.forward(first_hidden(model, image), plain_layers(model, image), [4] * 3, prefix)
        norm = model.layernorm if kind == "Dinov2" else model.norm
        sttm.apply(model, r=4)
        close("map", model(image).feature_maps[0], norm(tokens)[:, prefix:].mT.unflatten(2, (6, 6)))
    sttm.remove(model).out_features = ["stage2", "stage3"]
    with pytest.raises(ValueError, match=r"must have out_features=\['stage3'\]"):
        sttm.apply(model, r=4)


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_the_vision_model_inside_of_a_larger_one_is_named(kind):
    text = {**WIDTH, "vocab_size": 99, "projection_dim": 24, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config={**IMAGE, "projection_dim": 24})
    model, image = getattr(transformers, f"{kind}Model")(config).eval(), pixels(vit)
    before = model.vision_model(image).last_hidden_state
    with pytest.raises(
        ValueError, match=r"got \w+Model of .*; inside of it, model\.vision_model is one: apply to that"
    ):
        sttm.apply(model, r=2)
    sttm.apply(model.vision_model, r=2, trace=True)
    model.get_image_features(image)
    tokens = sttm.trace(model)[-1].size.shape[1]
    assert tokens == (37 if kind == "CLIP" else 36) - 6
    assert_equal("removed", sttm.remove(model).vision_model(image).last_hidden_state, before)


def image_features(model: nn.Module, image: Tensor) -> Tensor:
    out = model.get_image_features(pixel_values=image)
    out = getattr(out, "pooler_output", out)
    return out if isinstance(out, Tensor) else torch.stack(list(out))


TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}


def test_llava_without_the_layer_it_does_not_read():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**IMAGE), text_config=transformers.LlamaConfig(**TEXT)
    )
    model, image = transformers.LlavaModel(config).eval(), pixels(vit)
    before, tower = image_features(model, image), model.vision_tower
    del getattr(tower, "vision_model", tower).encoder.layers[-1]
    tower.config.num_hidden_layers -= 1
    model.config.vision_feature_layer = -1
    assert_equal("without it", image_features(model, image), before)
    sttm.apply(tower, r=3, trace=True)
    after = image_features(model, image)
    assert after.shape == before.shape
    assert not torch.equal(after, before)
    assert [each.size.shape[1] for each in sttm.trace(tower)] == [34, 31]


def test_internvl_gives_its_language_model_as_many_tokens():
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**IMAGE), text_config=transformers.LlamaConfig(**TEXT)
    )
    model, image = transformers.InternVLModel(config).eval(), pixels(vit)
    before = image_features(model, image)
    sttm.apply(model.vision_tower, r=3)
    after = image_features(model, image)
    assert after.shape == before.shape
    assert not torch.equal(after, before)


def test_masks_that_are_no_padding_are_refused():
    layer = layers_of(sttm.apply(build(vit), r=1))[0]
    name = "attention_mask" if "attention_mask" in layer._sttm.names else "head_mask"
    with pytest.raises(ValueError, match=f"{name} must be"):
        layer(torch.randn(1, 37, 32), torch.ones(1, 1, 37, 37).tril().log())


def test_replicas_of_data_parallel_are_refused():
    replica = layers_of(sttm.apply(build(vit), r=1))[0]._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replica(torch.randn(1, 37, 32))


def test_hidden_states_that_lost_their_counts_are_refused():
    class Scaled(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self.layer(x * 1.5, *args, **kwargs)

    model, clip = sttm.apply(build(videomae), r=1), pixels(videomae)
    layers_of(model)[1] = Scaled(layers_of(model)[1])
    with pytest.raises(RuntimeError, match="layer 1 got are not those that layer 0 returned"):
        logits(model, clip)
