"""Vision models of packed tokens: the plain network, token by token. And `apply` on whole video-language models."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import plain_models
import pytest
import torch
from torch import Tensor, nn

import sttm_kernels as sttm
from sttm_kernels.testing import assert_equal

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.unpoisoned  # models initialise their weights in torch.empty

WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 24, "patch_size": 4}
TEXT = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
ROTARY = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}
IDS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
GRIDS = torch.tensor([[2, 4, 6], [1, 8, 4], [1, 2, 2]])  # of several frames, of several windows, of neither


def random(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.dim() == 1 else 0.15))
            if parameter.dim() == 1:
                parameter.add_(1)
    return model.eval().to(dtype)


def qwen2_5(dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as library

    torch.manual_seed(0)
    vision = {**WIDTH, "depth": 4, "window_size": 16, "fullatt_block_indexes": [1, 3], "attn_implementation": "sdpa"}
    config = library.Qwen2_5_VLVisionConfig(**{**vision, **changes})
    return random(library.Qwen2_5_VisionTransformerPretrainedModel._from_config(config), dtype)


def qwen3(dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    from transformers.models.qwen3_vl import modeling_qwen3_vl as library

    torch.manual_seed(0)
    vision = {**WIDTH, "depth": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]}
    config = library.Qwen3VLVisionConfig(**{**vision, **changes}, attn_implementation="sdpa")
    return random(library.Qwen3VLVisionModel._from_config(config), dtype)


TOWERS = [qwen2_5, qwen3]
towers = pytest.mark.parametrize("family", TOWERS)


def patches(grids: Tensor = GRIDS, dtype: torch.dtype = torch.float64) -> Tensor:
    count = int(grids.prod(1).sum())
    return torch.randn(count, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1)).to(dtype)


def outputs(tower: nn.Module, grids: Tensor = GRIDS, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """What the language model gets: the merger's tokens, and of Qwen3-VL DeepStack's."""
    return used(tower(patches(grids, dtype), grids))


def used(out: Any) -> list[Tensor]:
    """Of either major version of transformers."""
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, tuple):
        return [out[0], *out[1]]
    return [out.pooler_output, *getattr(out, "deepstack_features", ())]


def calls_of(tower: nn.Module, rows: Tensor, grids: Tensor) -> list[dict[str, Any]]:
    """The arguments of every block, and the first hidden states, of the model without merging."""
    found: list[dict[str, Any]] = []

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append({**kwargs, "x": args[0]})

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in tower.blocks]
    tower(rows, grids)
    for hook in hooks:
        hook.remove()
    return found


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In float32, as the library does."""
    y = x.float()
    a, b = y.chunk(2, -1)
    return (y * cos.float() + torch.cat((-b, a), -1) * sin.float()).to(x.dtype)


def plain(tower: nn.Module, counts: list[int], rows: Tensor, grids: Tensor) -> list[Tensor]:
    """All tokens `(T, C)` behind every block, of which counts[l] of each piece merge, one after another."""
    calls = calls_of(tower, rows, grids)
    x = calls[0]["x"]
    finest = max((call["cu_seqlens"] for call in calls), key=len)
    piece = [int((finest[1:] <= n).sum()) for n in range(len(x))]
    place = list(range(len(x)))
    size, where, behind = torch.ones(len(x), dtype=x.dtype), list(range(len(x))), []
    for block, call, r in zip(tower.blocks, calls, counts, strict=True):
        heads = block.attn.num_heads
        q, k, v = (each.unflatten(1, (heads, -1)) for each in block.attn.qkv(block.norm1(x)).chunk(3, 1))
        metric = k.mean(1)
        cos, sin = (table[place][:, None] for table in call["position_embeddings"])
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        segment = torch.bucketize(torch.tensor(place), call["cu_seqlens"][1:], right=True)
        weight = torch.einsum("nhd,mhd->hnm", q, k * k.shape[-1] ** -0.5).exp() * size
        weight = weight * (segment[:, None] == segment)
        out = (weight / weight.sum(-1, keepdim=True) @ v.transpose(0, 1)).transpose(0, 1)
        x = x + block.attn.proj(out.flatten(1))
        if r:
            new, sizes, places, pieces, went = [], [], [], [], {}
            for number in sorted(set(piece)):
                own = [n for n in range(len(x)) if piece[n] == number]
                groups = plain_models.match(metric[own], r, 0) if len(own) > 1 else [[0]]
                merged, counted = plain_models.merge(x[own], size[own], groups)
                for group in groups:
                    went |= {own[n]: len(places) for n in group}
                    places.append(place[own[group[0]]])
                    pieces.append(number)
                new.append(merged)
                sizes.append(counted)
            x, size, place, piece = torch.cat(new), torch.cat(sizes), places, pieces
            where = [went[n] for n in where]
        x = x + block.mlp(block.norm2(x))
        behind.append(x[where])
    return behind


def expected(tower: nn.Module, counts: list[int], rows: Tensor | None = None, grids: Tensor = GRIDS) -> list[Tensor]:
    behind = plain(tower, counts, patches() if rows is None else rows, grids)
    taps = getattr(tower, "deepstack_visual_indexes", [])
    lists = getattr(tower, "deepstack_merger_list", [])
    found = tower.merger(behind[-1])
    if hasattr(tower, "window_size"):  # the merger's tokens come back from the order of windows
        has_own = hasattr(tower, "get_window_index")  # in transformers 4
        indices = tower.get_window_index(grids) if has_own else window_index(tower, grids)
        found = found[indices[0].argsort()]
    return [found, *(each(behind[layer]) for layer, each in zip(taps, lists, strict=True))]


def window_index(tower: nn.Module, grids: Tensor) -> Any:
    from transformers.vision_utils import get_vision_window_index

    return get_vision_window_index(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)


def close(actual: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(actual) == len(wanted)
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@torch.no_grad()
@towers
@pytest.mark.parametrize("r", [3, [0, 2, 0, 1], 1000], ids=str)
def test_a_merging_tower_is_the_plain_network(family, r):
    tower = family()
    counts = r if isinstance(r, list) else [r] * 4
    wanted = expected(tower, counts)
    sttm.apply(tower, r=r, trace=True)
    close(outputs(tower), wanted)
    sizes = sttm.trace(tower)[-1].size
    assert sizes.sum() == len(patches())
    assert sizes.shape[1] < len(patches())


@torch.no_grad()
@towers
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_nothing_changes_without_merging_and_after_remove(family, implementation):
    tower = family(torch.float32)
    tower.config._attn_implementation = implementation
    before, classes = outputs(tower, dtype=torch.float32), [type(module) for module in tower.modules()]
    sttm.apply(tower, r=0)
    for one, other in zip(outputs(tower, dtype=torch.float32), before, strict=True):
        assert_equal("r = 0", one, other)
    sttm.apply(tower, r=2)
    assert not torch.equal(outputs(tower, dtype=torch.float32)[0], before[0])
    sttm.remove(tower)
    assert_equal("removed", outputs(tower, dtype=torch.float32)[0], before[0])
    assert [type(module) for module in tower.modules()] == classes


@torch.no_grad()
@towers
def test_every_image_is_as_if_alone(family):
    tower = sttm.apply(family(), r=0.25)
    together = outputs(tower)[0].split((GRIDS.prod(1) // 4).tolist())
    rows = patches().split(GRIDS.prod(1).tolist())
    for grid, row, own in zip(GRIDS, rows, together, strict=True):
        alone = tower(row, grid[None])
        alone = alone if isinstance(alone, Tensor) else alone[0] if isinstance(alone, tuple) else alone.pooler_output
        torch.testing.assert_close(own, alone)


@torch.no_grad()
@towers
def test_keep_is_of_every_piece(family):
    tower = sttm.apply(family(), keep=3, trace=True)
    outputs(tower)
    pieces = 7 if family is qwen2_5 else 4
    index = sttm.trace(tower)[-1].index
    assert index.unique().numel() == sttm.trace(tower)[-1].size.shape[1] == 3 * pieces


@torch.no_grad()
@towers
def test_copies_merge_alike(family):
    tower = sttm.apply(family(), r=2)
    wanted = outputs(tower)
    for copied in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        for one, other in zip(outputs(copied), wanted, strict=True):
            assert_equal("copied", one, other)


@towers
def test_what_a_tower_cannot_do_is_refused(family):
    tower = family()
    for told, reason in (({"method": "sttm"}, "method"), ({"r": 2, "layers": [0], "window": (1, 2, 2)}, "window")):
        with pytest.raises(ValueError, match=f"{reason} must be left out"):
            sttm.apply(tower, **told)
    with pytest.raises(ValueError, match="protect must be left out"):
        sttm.apply(tower, r=2, protect=[3])
    tables = calls_of(tower, patches(), GRIDS)[0]["position_embeddings"]
    block = sttm.apply(tower, r=2).blocks[0]
    with pytest.raises(RuntimeError, match="layers must be called by the vision model"):
        block(torch.randn(84, 32).double(), cu_seqlens=torch.tensor([0, 84]), position_embeddings=tables)


@torch.no_grad()
def test_a_tap_that_does_not_get_what_the_layer_returned_is_refused(monkeypatch):
    tower = sttm.apply(qwen3(), r=2)
    tap = type(tower.deepstack_merger_list[0])
    own = tap.__call__
    monkeypatch.setattr(tap, "__call__", lambda self, x: own(self, x + 1))
    with pytest.raises(RuntimeError, match="layer 0 left must get what it returned"):
        outputs(tower)


def video_language(family: Any) -> nn.Module:
    if not hasattr(transformers, "Qwen3VLForConditionalGeneration") or int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("configs of transformers 5")
    torch.manual_seed(0)
    text = {**TEXT, "num_key_value_heads": 2, "rope_parameters": ROTARY, "bos_token_id": 0, "eos_token_id": 1}
    text |= {"pad_token_id": 2, "head_dim": 12}
    kind = "Qwen2_5_VL" if family is qwen2_5 else "Qwen3VL"
    vision = family().config.to_dict()
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **IDS)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()


@torch.no_grad()
@towers
def test_apply_finds_the_tower_of_a_video_language_model(family):
    model = video_language(family)
    grid = torch.tensor([[1, 4, 8]])
    input_ids = torch.tensor([[3, 92, *[90] * 8, 93, 4, 5]])
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == 90).int(),
        "pixel_values": patches(grid, torch.float32),
        "image_grid_thw": grid,
    }
    told = {"max_new_tokens": 4, "do_sample": False}
    before, answer = model(**inputs).logits, model.generate(**inputs, **told)
    assert sttm.apply(model, r=0) is model
    assert_equal("r = 0", model(**inputs).logits, before)
    assert_equal("answer", model.generate(**inputs, **told), answer)
    sttm.apply(model, r=3, trace=True)
    assert model.generate(**inputs, **told).shape == answer.shape
    assert not torch.equal(model(**inputs).logits, before)
    assert sttm.trace(model)[-1].size.shape[1] < 32
    assert_equal("removed", sttm.remove(model)(**inputs).logits, before)


IMAGE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
IMAGE |= {"image_size": 24, "patch_size": 4}


def with_tower(kind: str, **changes: Any) -> nn.Module:
    vision = transformers.InternVLVisionConfig if kind == "InternVL" else transformers.SiglipVisionConfig
    text = transformers.Qwen2Config(**TEXT, num_key_value_heads=2)
    given = {"vision_config": vision(**IMAGE), "text_config": text, "image_token_id": 90, "video_token_id": 91}
    if kind == "LlavaOnevision":
        given = {**given, "image_token_index": 90, "video_token_index": 91, "vision_feature_select_strategy": "full"}
        del given["image_token_id"], given["video_token_id"]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**given, **changes})
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["LlavaOnevision", "InternVL"])
def test_apply_finds_the_tower_that_is_called_by_name(kind):
    model = with_tower(kind)
    tower = model.vision_tower if hasattr(model, "vision_tower") else model.model.vision_tower
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))

    def features() -> Tensor:
        if kind == "InternVL":
            out = model.get_image_features(pixel_values=images)
        else:
            out = model.get_video_features(images[None], vision_feature_layer=-1, vision_feature_select_strategy="full")
        out = getattr(out, "pooler_output", out)
        return out if isinstance(out, Tensor) else torch.cat(list(out))

    token, count = (90, 18) if kind == "InternVL" else (91, 19)
    input_ids = torch.tensor([[3, *[token] * count, 4, 5]])
    told = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "max_new_tokens": 4}
    told |= {"do_sample": False, "eos_token_id": 1, "pad_token_id": 2}
    told |= {"pixel_values": images} if kind == "InternVL" else {"pixel_values_videos": images[None]}

    before, answer = features(), model.generate(**told)
    sttm.apply(tower, r=4)
    wanted = features()
    sttm.remove(tower)
    assert_equal("r = 0", (sttm.apply(model, r=0), features())[1], before)
    assert_equal("answer", model.generate(**told), answer)
    sttm.apply(model, r=4, trace=True)
    assert model.generate(**told).shape == answer.shape
    assert_equal("as its tower", features(), wanted)
    assert not torch.equal(wanted, before)
    assert sttm.trace(model)[-1].size.shape[1] == (37 if kind == "InternVL" else 36) - 12
    assert_equal("removed", (sttm.remove(model), features())[1], before)
    with pytest.raises(ValueError, match=r"vision_feature_layer=-1, .* has -2"):
        sttm.apply(with_tower(kind, vision_feature_layer=-2), r=4)
