"""Merging in models of timm: nothing changes without merging, and with it they are the plain network."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import plain_models
import pytest
import torch
from plain_models import PlainLayer
from torch import Tensor, nn

import sttm_kernels as sttm
from sttm_kernels.testing import assert_equal

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.unpoisoned  # models initialise their weights in torch.empty

SIZE = {"img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}


def vision(name: str, **changes: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **{**SIZE, **changes})


MODELS = {
    "vit": vision("vit_tiny_patch16_224"),
    "vit qk-norm, average": vision("vit_tiny_patch16_224", qk_norm=True, global_pool="avg", class_token=False),
    "deit distilled": vision("deit_tiny_distilled_patch16_224"),
    "deit3": vision("deit3_small_patch16_224", init_values=0.3),
    "dinov2 registers": vision("vit_small_patch14_reg4_dinov2", init_values=0.3),
    "siglip": vision("vit_base_patch16_siglip_224"),
    "post-norm": vision("vit_base_patch16_rpn_224"),
    "eva02": vision("eva02_tiny_patch14_224", mlp_ratio=2),
    "eva post-norm": vision("eva02_tiny_patch14_224", mlp_ratio=2, use_post_norm=True),
    "rope": vision("vit_small_patch16_rope_224", init_values=0.3),
    "rope mixed": vision("vit_small_patch16_rope_mixed_224", init_values=0.3),
    "dinov3": vision("vit_small_patch16_dinov3", init_values=0.3),
}
models = pytest.mark.parametrize("name", MODELS)


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """In evaluation mode; random in every parameter, for small or zero ones hide mistakes."""
    torch.manual_seed(0)
    model = MODELS[name]().eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def image(dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 24, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def close(name: str, actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")


@models
def test_nothing_changes_without_merging_and_after_remove(name):
    model, x = build(name), image()
    before, keys, classes = model(x), list(model.state_dict()), [type(m) for m in model.modules()]
    assert sttm.apply(model, r=0) is model
    assert_equal("r = 0", model(x), before)
    sttm.apply(sttm.apply(model, r=2), r=4)
    merged = model(x)
    assert not torch.equal(merged, before)
    assert list(model.state_dict()) == keys
    assert_equal("applied once", sttm.apply(build(name), r=4)(x), merged)
    assert_equal("removed", sttm.remove(sttm.remove(model))(x), before)
    assert [type(m) for m in model.modules()] == classes
    assert not any("_sttm" in vars(m) or m._forward_hooks for m in model.modules())


# Images of several sizes

NAFLEX: dict[str, dict[str, Any]] = {
    "several registers": {"reg_tokens": 4},
    "class token": {"class_token": True, "global_pool": "token", "reg_tokens": 0},
    "attention pooling": {"global_pool": "map", "reg_tokens": 0},
    "keys masked": {"use_key_only_attn_mask": True},
    "rope": {"rope_type": "axial"},
    "rope mixed": {"rope_type": "mixed"},
}
naflex = pytest.mark.parametrize("name", NAFLEX)


def naflexvit(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depth": 3, "num_heads": 4, "patch_size": 4, "num_classes": 5}
    model = timm.create_model("naflexvit_base_patch16_gap", **sizes, **NAFLEX[name]).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def of_two_sizes() -> dict[str, Tensor]:
    """An image of 6 x 6 patches and one of 4 x 5, which 16 of padding follow."""
    coordinates = [torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in ((6, 6), (4, 5))]
    patches = torch.randn(2, 36, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    valid = torch.arange(36) < torch.tensor([36, 20])[:, None]
    return {
        "patches": patches,
        "patch_coord": nn.utils.rnn.pad_sequence(coordinates, batch_first=True),
        "patch_valid": valid,
    }


@torch.no_grad()
@naflex
@pytest.mark.parametrize("told", [{"r": 4}, {"r": [0, 15, 3]}, {"r": 0.25}, {"r": 5, "prop_attn": "augment"}], ids=str)
def test_images_of_several_sizes_are_as_if_alone(name, told):
    model, both = naflexvit(name), of_two_sizes()
    before = model(both)
    assert_equal("r = 0", sttm.apply(model, r=0)(both), before)
    sttm.apply(model, **told, trace=True)
    together = model(both)
    assert not torch.equal(together, before)
    sizes = sttm.trace(model)[-1].size
    assert sizes.sum(1).tolist() == [36 + model.num_prefix_tokens, 20 + model.num_prefix_tokens]
    for number, count in enumerate((36, 20)):
        close(
            "alone", together[number], model({key: each[number : number + 1, :count] for key, each in both.items()})[0]
        )
    both["patches"][1, 20:] *= 100
    assert_equal("whatever padding holds", model(both), together)
    assert_equal("removed", sttm.remove(model)(both), before)


@torch.no_grad()
@naflex
def test_an_image_of_one_size_is_the_plain_network(name):
    model, x = naflexvit(name), image(torch.float64)
    embedded = model._forward_embeds(x, patch_coord=None, patch_valid=None, attn_mask=None)
    tables = embedded["rope_embeds"]
    tables = list(tables) if name == "rope mixed" else [tables] * 3
    layers = [plain(*each, model.num_prefix_tokens, False) for each in zip(model.blocks, tables, strict=True)]
    tokens = plain_models.forward(embedded["patches"], layers, [5, 0, 4], model.num_prefix_tokens)
    close("logits", sttm.apply(model, r=[5, 0, 4])(x), model.forward_head(model.norm(tokens)), 1e-7)


# The plain network


def plain(layer: nn.Module, rope: Tensor | None, prefix: int, post_norm: bool) -> PlainLayer:
    attn = layer.attn

    def projection(part: int) -> Callable[[Tensor], Tensor]:
        def project(x: Tensor) -> Tensor:
            if attn.qkv is None:
                y = (attn.q_proj, attn.k_proj, attn.v_proj)[part](x)
            else:
                y = attn.qkv(x)
                if getattr(attn, "q_bias", None) is not None:
                    y = y + torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
                y = y.chunk(3, -1)[part]
            y = y.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
            return (attn.q_norm, attn.k_norm, nn.Identity())[part](y)

        return project

    def scaled(branch: int, y: Tensor) -> Tensor:
        gamma = getattr(layer, f"gamma_{branch}", None)
        ls = getattr(layer, f"ls{branch}", None)
        if isinstance(ls, nn.Module) and hasattr(ls, "gamma"):
            gamma = ls.gamma
        return y if gamma is None else y * gamma

    def rotate(x: Tensor, places: Tensor) -> Tensor:
        sin, cos = rope[..., places, :].chunk(2, -1)  # (B, N, D), or (H, B, N, D) with a table per head
        sin, cos = (t[:, None] if t.dim() == 3 else t.transpose(0, 1) for t in (sin, cos))
        y = x[:, :, prefix:]
        if getattr(attn, "rotate_half", False):
            first, second = y.chunk(2, -1)
            turned = torch.cat((-second, first), -1)
        else:
            turned = torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2)
        return torch.cat((x[:, :, :prefix], y * cos + turned * sin), 2)

    return PlainLayer(
        layer.norm1,
        projection(0),
        projection(1),
        projection(2),
        lambda h: scaled(1, attn.proj(attn.norm(h))),
        layer.norm2,
        lambda h: scaled(2, layer.mlp(h)),
        None if rope is None else rotate,
        post_norm,
    )


def plain_logits(name: str, model: nn.Module, x: Tensor, counts: list[int], protect: Sequence[int] = ()) -> Tensor:
    tokens = model.patch_embed(x)
    tokens = model._pos_embed(tokens)
    rope = None
    if isinstance(tokens, tuple):
        tokens, rope = tokens
    tokens = model.norm_pre(tokens)
    tables = rope if getattr(model, "rope_mixed", False) else [rope] * len(model.blocks)
    prefix = model.num_prefix_tokens
    layers = [
        plain(layer, table, prefix, "post-norm" in name) for layer, table in zip(model.blocks, tables, strict=True)
    ]
    return model.forward_head(model.norm(plain_models.forward(tokens, layers, counts, prefix, protect)))


@pytest.mark.parametrize("r", [3, [0, 6, 4], 1000], ids=str)
@models
def test_merging_model_is_the_plain_network(name, r):
    model, x = build(name, torch.float64), image(torch.float64)
    counts = r if isinstance(r, list) else [r] * 3
    with torch.no_grad():
        expected = plain_logits(name, model, x, counts)
        close("unmerged", plain_logits(name, model, x, [0, 0, 0]), model(x), 1e-7)
        close("logits", sttm.apply(model, r=r)(x), expected, 1e-7)


@pytest.mark.parametrize("counts", [[3, 3, 3], [0, 6, 4], [1000] * 3], ids=str)
@pytest.mark.parametrize("name", ["vit", "siglip", "dinov2 registers", "rope mixed", "dinov3"])
def test_merging_around_protected_tokens_is_the_plain_network(name, counts):
    model, x, protect = build(name, torch.float64), image(torch.float64), [30, 9, 10, 17]
    with torch.no_grad():
        expected = plain_logits(name, model, x, counts, protect)
        sttm.apply(model, r=counts, protect=protect, trace=True)
        close("logits", model(x), expected, 1e-7)
    prefix = model.num_prefix_tokens
    for each in sttm.trace(model):  # they are alone, right behind the prefix
        here = torch.arange(prefix, prefix + 4, dtype=torch.int32).expand(2, -1)
        assert_equal("places", each.index[:, sorted(protect)], here)
        assert bool((each.size[:, prefix : prefix + 4] == 1).all())


@pytest.mark.parametrize("name", ["vit", "dinov2 registers", "deit distilled", "dinov3"])
def test_tokens_at_the_front_are_alone(name):
    model, x = sttm.apply(build(name), r=8, trace=True), image()
    model(x)
    prefix = model.num_prefix_tokens
    assert prefix == {"vit": 1, "dinov2 registers": 5, "deit distilled": 2, "dinov3": 5}[name]
    for each in sttm.trace(model):
        assert bool((each.size[:, :prefix] == 1).all())
        assert_equal("front", each.index[:, :prefix], torch.arange(prefix, dtype=torch.int32).expand(2, -1))
        assert bool((each.index[:, prefix:] >= prefix).all())


# What users do with models


@models
def test_features_and_intermediates_have_all_places(name):
    model, x = build(name), image()
    features, (_, maps) = model.forward_features(x), model.forward_intermediates(x)
    assert_equal("r = 0", sttm.apply(model, r=0).forward_intermediates(x)[1][1], maps[1])
    sttm.apply(model, r=5)
    merged, (merged_final, merged_maps) = model.forward_features(x), model.forward_intermediates(x)
    assert merged.shape == features.shape
    assert_equal("final", merged_final, merged)
    assert [m.shape for m in merged_maps] == [m.shape for m in maps]
    only = model.forward_intermediates(x, indices=[1], intermediates_only=True, stop_early=True)
    assert_equal("stopped early", only[0], merged_maps[1])
    assert_equal("and not after", model.forward_features(x), merged)
    # The map after layer 1 is what the groups of that layer hold, at the places of their tokens.
    sttm.apply(model, r=5, trace=True)
    model(x)
    index = sttm.trace(model)[1].index[:, model.num_prefix_tokens :]
    tokens = merged_maps[1].flatten(2).transpose(1, 2)
    alike = (tokens[:, :, None] == tokens[:, None]).all(-1)
    assert_equal("groups", alike, index[:, :, None] == index[:, None])


def gradients(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    model.zero_grad()
    for output in [model(x) for x in inputs]:  # every forward before the first backward
        output.square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["vit", "rope mixed"])
def test_gradients_and_checkpointing(name):
    inputs = image(), image().flip(0) * 2
    model = sttm.apply(build(name), r=5)
    plain_gradients = gradients(model, *inputs)
    assert all(bool(g.isfinite().all()) for g in plain_gradients)
    model.set_grad_checkpointing()
    for checked, expected in zip(gradients(model, *inputs), plain_gradients, strict=True):
        close("checkpointed", checked, expected, 1e-5)


def test_reentrant_checkpointing_is_refused():
    model = sttm.apply(build("vit"), r=5)
    model.set_grad_checkpointing()
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(True)
    try:
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            gradients(model, image())
    finally:
        timm.layers.set_reentrant_ckpt(before)


@models
def test_autocast_and_half_precision(name):
    model, x = sttm.apply(build(name), r=5), image()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()
    out = model.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


def test_compile_and_export_what_counts_inside_of_fused_attention():
    model, x = sttm.apply(build("vit"), r=5, prop_attn="augment"), image()
    with torch.no_grad():
        expected = model(x)
        close("compiled", torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected, 1e-5)
        close("exported", torch.export.export(model, (x,)).module()(x), expected, 1e-5)
    torch._dynamo.reset()


@models
def test_copies_merge_too_and_on_their_own(name):
    model, x = sttm.apply(build(name), r=5), image()
    expected = model(x)
    for way, copied in (("deepcopy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        assert_equal(way, copied(x), expected)
        before = sttm.remove(copied)(x)
        assert not torch.equal(before, expected)
        assert_equal("the other still merges", model(x), expected)
    other = sttm.apply(MODELS[name]().eval(), r=5)
    other.load_state_dict(model.state_dict())
    assert_equal("state_dict", other(x), expected)


@pytest.mark.parametrize("prop_attn", ["mask", "augment", "flex", "auto"])
@pytest.mark.parametrize("name", ["vit", "rope"])
def test_ways_to_attend_agree(name, prop_attn):
    x = image()
    with torch.no_grad():
        expected = sttm.apply(build(name), r=5, prop_attn="mask")(x)
        close(prop_attn, sttm.apply(build(name), r=5, prop_attn=prop_attn)(x), expected, 1e-5)
        assert not torch.allclose(sttm.apply(build(name), r=5, prop_attn="off")(x), expected)


def test_attention_that_is_not_fused():
    model, x = build("vit"), image()
    for block in model.blocks:
        block.attn.fused_attn = False
    expected = sttm.apply(build("vit"), r=5)(x)
    close("not fused", sttm.apply(model, r=5)(x), expected, 1e-5)
    with pytest.raises(ValueError, match="not fused"):
        sttm.apply(model, r=5, prop_attn="augment")
    assert not any(m._forward_hooks for m in model.modules())


@models
def test_sttm(name):
    model, x = build(name), image()
    before = model(x)
    sttm.apply(model, method="sttm", layers=(0, 1), spatial_keep=9, temporal_keep=4, trace=True)
    assert not torch.equal(model(x), before)
    assert [each.size.shape[1] - model.num_prefix_tokens for each in sttm.trace(model)] == [9, 4, 4]
    assert_equal("removed", sttm.remove(model)(x), before)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("beit_base_patch16_224", "attn.k_norm"),
        ("vit_relpos_small_patch16_224", "any number of tokens"),
        ("vit_srelpos_small_patch16_224", "into its attention: layer 0, a RelPosBlock, fails"),
        ("swin_tiny_patch4_window7_224", "num_prefix_tokens"),
        ("resnet10t", "num_prefix_tokens"),
    ],
)
def test_models_that_are_refused(name, reason):
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2} if name[0] in "bv" else {}
    model = timm.create_model(name, num_classes=2, **sizes)
    with pytest.raises((TypeError, ValueError), match=reason):
        sttm.apply(model, r=1)


def test_masks_and_pruning_are_refused():
    model, x = sttm.apply(build("vit"), r=1), image()
    for mask in (torch.zeros(37, 37), torch.ones(1, 1, 37, 37).tril().log(), torch.full((1, 1, 1, 37), 0.5)):
        with pytest.raises(ValueError, match="attn_mask must"):
            model(x, attn_mask=mask)
    with pytest.raises(RuntimeError, match=r"remove\(model\) before"):
        model.prune_intermediate_layers(1)
