"""The video Transformer with STTM inside, and the operations it takes."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sttm_kernels as sttm
from sttm_kernels.nn import GENERATORS, STTM, VideoTransformer
from sttm_kernels.nn.flops import flops
from sttm_kernels.testing import assert_equal, assert_within_budget, make_tokens


def small(**kwargs) -> VideoTransformer:
    torch.manual_seed(0)
    settings = {"num_frames": 4, "image_size": 16, "patch": 4, "dim": 24, "depth": 4, "heads": 3, "num_classes": 5}
    return VideoTransformer(**(settings | kwargs))


def clip(model: VideoTransformer, B: int = 2) -> Tensor:
    return torch.randn(B, *model.clip_shape, generator=torch.Generator().manual_seed(0))


# The model


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_merging_after_chosen_blocks(name):
    model = small(merge={1: {"meta": name}, 3: {"spatial_keep": None, "temporal_keep": 3, "meta": name}})
    x = clip(model)
    out = model.features(x)
    assert out.x.shape == (2, 1 + 3, 24)
    assert_equal("sum of size", out.size.sum(1), torch.tensor([33.0, 33.0]))
    assert out.positions.shape == (2, 4, 3)
    logits = model(x)
    assert_equal("logits", logits, model.head(out.x[:, 0]))
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_without_merging_it_is_a_plain_transformer():
    model, x = small(), clip(small())
    tokens = model.embed(x).flatten(2).mT
    tokens = torch.cat((model.class_token.expand(2, -1, -1), tokens), 1) + model.positions
    for block in model.blocks:
        tokens = block(tokens)
    out = model.features(x)
    assert_equal("x", out.x, model.norm(tokens))
    assert_equal("size", out.size, torch.ones(2, 33))
    assert out.positions is None


def test_an_sttm_that_merges_equal_tokens_changes_nothing_but_rounding():
    """Equal tokens of a group with log(size) in every later attention stand for all their copies exactly."""
    model = small(merge={2: {"spatial_keep": 3, "temporal_keep": None, "meta": "pool"}}).double()
    plain = small().double()
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if not n.startswith("merges")})
    for one in (model, plain):
        one.positions.data.zero_()
    x = clip(model).double()[..., :1, :1].expand(-1, -1, -1, 16, 16)[:, :, :1].expand(-1, -1, 4, -1, -1)
    assert_within_budget("logits", model(x), plain(x), plain(x), 33 * 24)


def test_merge_takes_an_sttm_and_its_state_is_stable():
    model = small(merge={1: STTM(24, num_prefix=1)})
    names = [n for n in model.state_dict() if n.startswith("merges")]
    assert names == ["merges.1.motion.weight"]
    twin = small(merge={1: {}})
    twin.load_state_dict(model.state_dict())
    assert_equal("logits", twin(clip(model)), model(clip(model)))


def test_stem_positions_and_no_class_token_and_no_head():
    class Places(nn.Module):
        def forward(self) -> Tensor:
            return torch.linspace(-1, 1, 32 * 24).view(1, 32, 24)

    stem = nn.Conv3d(3, 24, (2, 4, 4), stride=(2, 4, 4), bias=False)
    model = small(
        stem=stem, position_embedding=Places(), class_token=False, num_classes=None, merge={2: {"temporal_keep": 5}}
    )
    x = clip(model)
    first = next(model.layers(x)).x
    assert_equal("tokens", first, model.blocks[0](stem(x).flatten(2).mT + Places()()))
    out = model.features(x)
    assert out.x.shape == (2, 5, 24)
    mean = (out.x * out.size[..., None]).sum(1) / out.size.sum(1, keepdim=True)
    assert_within_budget("features", model(x), mean.double(), mean, 33)


def test_merging_inside_a_block_sees_its_keys_and_the_plan_leads_to_every_layer():
    class Halves(nn.Module):
        def forward(self, x, grid, size, positions, metric, return_plan):
            assert metric.shape == (2, 3, x.shape[1], 8)
            plan = sttm.match(metric, x.shape[1] // 2)
            out = sttm.merge(x, plan, size, positions)
            return (out, plan) if return_plan else out

        def output_grid(self, grid):
            return 1, 1, grid[0] * grid[1] * grid[2] // 2

    model = small(class_token=False, merge={1: Halves(), 3: Halves()}, merge_place="inside")
    layers = list(model.layers(clip(model), trace=True))
    assert [layer.x.shape[1] for layer in layers] == [16, 16, 8, 8]
    assert layers[-1].grid == (1, 1, 8)
    attended, keys = model.blocks[0].attend(model.embed(clip(model)).flatten(2).mT + model.positions)
    assert_equal("plan", layers[0].plan.index, sttm.match(keys, 16).index)
    merged = sttm.merge(attended, layers[0].plan)
    assert_equal("x", layers[0].x, model.blocks[0].feed_forward(merged.x))
    assert_equal("size", sttm.merge(torch.ones(2, 32, 1), layers[-1].plan).size, layers[-1].size)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_frames": 5}, ValueError, "num_frames must be a multiple of tubelet = 2, got 5"),
        ({"image_size": 18}, ValueError, "image_size must be a multiple of patch = 4, got 18"),
        ({"heads": 5}, ValueError, "dim must be a multiple of heads = 5, got 24"),
        ({"merge": {5: {}}}, ValueError, "merge must name blocks from 1 to depth = 4, got 5"),
        ({"merge": {0: {}}}, ValueError, "merge must name blocks from 1 to depth = 4, got 0"),
        ({"merge": {1: 0.5}}, TypeError, r"merge\[1\] must be an STTM, a module like it or a dict, got float"),
        ({"merge_place": "before"}, ValueError, "merge_place must be one of"),
        ({"merge": {1: STTM(24)}}, ValueError, r"merge\[1\] must have dim = 24 and num_prefix = 1, got 24 and 0"),
        ({"attention": "eager"}, ValueError, "attention must be one of"),
    ],
)
def test_bad_settings(arguments, error, message):
    with pytest.raises(error, match=message):
        small(**arguments)


def test_a_clip_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"clip must have shape .* = \(2, 3, 4, 16, 16\), got \(2, 3, 4, 16, 20\)"):
        small()(torch.ones(2, 3, 4, 16, 20))


# Operations


def test_flops_without_merging_are_those_of_the_formula():
    with torch.device("meta"):
        model = VideoTransformer()
    n, d, depth = 1 + 8 * 14 * 14, 768, 12
    embed = 2 * (n - 1) * d * (3 * 2 * 16 * 16)
    block = 2 * n * d * 3 * d + 2 * 2 * n * n * d + 2 * n * d * d + 2 * 2 * n * d * 4 * d
    assert flops(model, (1, 3, 16, 224, 224)) == embed + depth * block + 2 * d * 400
    assert flops(model, (2, 3, 16, 224, 224)) == 2 * flops(model, (1, 3, 16, 224, 224))


def test_flops_with_merging_count_the_verbs():
    model, plain = small(merge={2: {"spatial_keep": 4, "temporal_keep": 3, "meta": "pool"}}), small()
    n, d, T, frame = 33, 24, 2, 16
    pooling = 2 * T * frame * d, 2 * T * 4 * d
    assigning = 2 * T * frame * 4 * d, 2 * T * 4 * 3 * d
    merging = 2 * T * frame * (d + 3), 2 * T * 4 * (d + 3)

    def block(n: int) -> int:
        return 2 * n * d * 3 * d + 2 * 2 * n * n * d + 2 * n * d * d + 2 * 2 * n * d * 4 * d

    fewer = 2 * (block(n) - block(1 + 3))
    expected = flops(plain, (1, *plain.clip_shape)) - fewer + sum(pooling + assigning + merging)
    assert flops(model, (1, *model.clip_shape)) == expected


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_merging_saves_operations(name):
    shape = (1, 3, 16, 224, 224)
    with torch.device("meta"):
        merged, plain = (VideoTransformer(depth=3, merge=merge) for merge in ({1: {"meta": name}}, None))
    assert flops(merged, shape) < 0.6 * flops(plain, shape)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda q, m: sttm.assign(q, m), 2 * 2 * 20 * 5 * 8),
        (lambda q, m: sttm.merge(q, sttm.MergePlan(torch.zeros(2, 20, dtype=torch.int32), 5)), 2 * 2 * 20 * 8),
        (lambda q, m: sttm.soft_merge(q, q, m), 2 * 2 * 20 * 5 * (8 + 8)),
        (lambda q, m: sttm.match(q, 4), 2 * 2 * 10 * 10 * 8),
        (lambda q, m: sttm.match(q, 4, partition="frames", grid=(5, 2, 2)), 2 * 2 * 12 * 8 * 8),
        (lambda q, m: sttm.assign(q, m).weight.sum().backward(), 5 * 2 * 2 * 20 * 5 * 8),
        (lambda q, m: sttm.assign(q, m.detach()).weight.sum().backward(), 3 * 2 * 2 * 20 * 5 * 8),
        (lambda q, m: sttm.assign(q, m).score.sum().backward(), 2 * 2 * 20 * 5 * 8),
        (lambda q, m: sttm.soft_merge(q, q, m).x.sum().backward(), (1 + 3) * 1600 * 2 + (1 + 2) * 1600 * 2),
    ],
)
def test_flops_of_a_verb(run, expected):
    q, m = make_tokens(2, 20, 8).requires_grad_(), make_tokens(2, 5, 8).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        run(q, m)
    assert counter.get_total_flops() == expected


# Compilation


def check_compiled(model: VideoTransformer, backend: str) -> None:
    """Forward and backward in one graph: the same groups, and values within the error budget of float32."""
    torch._dynamo.reset()
    x = clip(model, 1)
    run = torch.compile(model.features, fullgraph=True, backend=backend)
    results = []
    for call in (model.features, run):
        model.zero_grad()
        out = call(x)
        model.head(out.x[:, 0]).square().sum().backward()
        results.append((out, {n: p.grad for n, p in model.named_parameters()}))
    (eager, eager_grads), (compiled, compiled_grads) = results
    exact_model = copy.deepcopy(model).double()
    exact_model.zero_grad()
    exact = exact_model.features(x.double())
    exact_model.head(exact.x[:, 0]).square().sum().backward()

    assert_equal("size", compiled.size, eager.size)
    assert_equal("size", eager.size.double(), exact.size)
    terms = len(model.blocks) * eager.x.shape[-1]
    assert_within_budget("x", compiled.x, exact.x, eager.x, terms)
    assert_within_budget("positions", compiled.positions, exact.positions, eager.positions, terms)
    for name, parameter in exact_model.named_parameters():
        assert_within_budget(name, compiled_grads[name], parameter.grad, eager_grads[name], terms)


@pytest.mark.unpoisoned
def test_a_deep_model_with_sttm_compiled_and_not():
    merge = {3: {}, 6: {}, 9: {"spatial_keep": None}}
    check_compiled(small(num_frames=8, image_size=32, dim=96, depth=12, merge=merge), "aot_eager")


@pytest.mark.unpoisoned
def test_a_small_model_through_inductor():
    check_compiled(small(depth=2, merge={1: {"second_moment": True}}), "inductor")
