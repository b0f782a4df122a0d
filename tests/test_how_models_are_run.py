"""Ways in which people run models, by family: merging is the plain network in every one, or refused with the reason."""

from __future__ import annotations

import copy
import io
import os
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import plain_models
import pytest
import torch
import torch.distributed as dist
from processes import together
from torch import Tensor, nn
from torch.multiprocessing import ProcessExitedException
from torch.utils.checkpoint import checkpoint

import sttm_kernels as sttm
from sttm_kernels.integrations import merging
from sttm_kernels.testing import assert_equal

pytest.importorskip("timm")
pytest.importorskip("transformers")
import test_integrations_hf as hf
import test_integrations_packed as pk
import test_integrations_timm as tm

pytestmark = pytest.mark.unpoisoned  # models initialise their weights in torch.empty

R, DEPTH = 3, 3
Way = Callable[["Family"], None]


@dataclass(frozen=True)
class Family:
    """A small model, what it sees, and the same network written plainly.

    `linear` is the projection that keys come from; `plainly(model, pixels)` merges R tokens in every layer of a model
    without merging; `inputs(pixels)` are the arguments of a model, and what `used` takes from its result is looked at.
    Tokens merge in pieces of `unit`, or in rows of `packed` tokens each; the plain network may take every item `alone`.
    """

    name: str
    build: Callable[..., nn.Module]
    pixels: Tensor
    layers: Callable[[nn.Module], Any]
    linear: str
    plainly: Callable[[nn.Module, Tensor], Tensor]
    inputs: Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]] = lambda pixels: ((pixels,), {})
    used: Callable[[Any], Tensor] = lambda out: out if isinstance(out, Tensor) else hf.used(out)
    unit: int | None = None
    packed: int | None = None
    alone: bool = False

    def outputs(self, model: Callable[..., Any], pixels: Tensor | None = None) -> Tensor:
        args, kwargs = self.inputs(self.pixels if pixels is None else pixels)
        return self.used(model(*args, **kwargs))

    def merging(self, **arguments: Any) -> nn.Module:
        return sttm.apply(self.build(), **({"r": R} | arguments))

    def expected(self) -> Tensor:
        return self.plainly(self.build(), self.pixels)

    def check(self, model: nn.Module, expected: Tensor | None = None, tolerance: float = 1e-7) -> None:
        with torch.no_grad():
            tm.close(self.name, self.outputs(model), self.expected() if expected is None else expected, tolerance)

    def check_gradients(self, model: nn.Module, tolerance: float = 1e-7, alike: bool = False) -> None:
        """Outputs and gradients, of every parameter that has some in the plain network.

        Of several processes each is given a part of the batch, and gradients are means over them, unless they are to
        be `alike`.
        """
        plain = self.build()
        expected = self.plainly(plain, self.pixels)
        expected.square().sum().backward()
        parts, here = 1, 0
        if not alike and dist.is_initialized():
            parts, here = dist.get_world_size(), dist.get_rank()
        out = self.outputs(model, self.pixels.chunk(parts)[here])
        tm.close("outputs", out.double(), expected.chunk(parts)[here], tolerance)
        (parts * out.square().sum()).backward()
        found = {plain_name(name): full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        for name, parameter in plain.named_parameters():
            if parameter.grad is not None:
                tm.close(name, found[name], parameter.grad, tolerance)


def other_linear_layers(family: Family) -> None:
    """Skips where the plain model does not take them: transformers 4's VideoMAE reads the weights of its own."""
    if family.name == "videomae" and any(name.endswith("q_bias") for name, _ in family.build().named_parameters()):
        pytest.skip("this version of the model takes no other linear layers")


def outputs(model: nn.Module, pixels: Tensor) -> Tensor:
    out = model(pixels)
    return out if isinstance(out, Tensor) else hf.used(out)


def plain_name(name: str) -> str:
    for wrapper in ("_checkpoint_wrapped_module.", "module.", "_orig_mod."):
        name = name.replace(wrapper, "")
    return name


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def of_timm(name: str) -> Family:
    def plainly(model: nn.Module, pixels: Tensor) -> Tensor:
        return tm.plain_logits(name, model, pixels, [R] * DEPTH)

    return Family(
        f"timm {name}",
        lambda dtype=torch.float64: tm.build(name, dtype),
        tm.image(torch.float64),
        lambda model: model.blocks,
        "attn.qkv",
        plainly,
    )


def of_hf(family: Callable[..., nn.Module]) -> Family:
    def plainly(model: nn.Module, pixels: Tensor) -> Tensor:
        tokens = hf.first_hidden(model, pixels)
        if family is hf.timesformer:
            return hf.head(model, torch.stack([divided(model, x) for x in tokens]))
        layers = hf.plain_layers(model, pixels)
        return hf.head(model, plain_models.forward(tokens, layers, [R] * DEPTH, hf.PREFIX.get(family, 1)))

    def divided(model: nn.Module, x: Tensor) -> Tensor:
        size, where = torch.ones(9, dtype=x.dtype), list(range(9))
        for layer in hf.layers_of(model):
            x, size, groups = hf.plain_divided(layer, x, size, 4, R)
            where = [next(k for k, group in enumerate(groups) if g in group) for g in where]
        return torch.cat((x[:1], x[1:].unflatten(0, (-1, 4))[where].flatten(0, 1)))

    layer = hf.layers_of(family())[0]
    linear = next(name for name, _ in layer.named_modules() if name.split(".")[-1] in ("key", "k_proj", "qkv"))
    return Family(
        family.__name__,
        lambda dtype=torch.float64: hf.build(family, dtype),
        hf.pixels(family, dtype=torch.float64),
        hf.layers_of,
        "attention.attention.qkv" if family is hf.timesformer else linear,
        plainly,
        unit=4 if family is hf.timesformer else None,
        alone=family is hf.timesformer,
    )


# Models of images of several sizes: what has only zeros is padding

SIZES = {36: (6, 6), 24: (4, 6)}
"""The rows and columns of an image, by how many patches it has."""


def ragged(patches: int) -> Tensor:
    """Patches of an image of each size."""
    pixels = torch.randn(2, max(SIZES), patches, generator=torch.Generator().manual_seed(1)).double()
    pixels[1, min(SIZES) :] = 0
    return pixels


def each_alone(pixels: Tensor) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """The patches `(1, N, C)` of each image, and its size."""
    for image in pixels:
        real = image[(image != 0).any(1)]
        yield real[None], SIZES[len(real)]


def naflexvit() -> Family:
    def inputs(pixels: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        valid = (pixels != 0).any(2)
        coordinates = torch.cartesian_prod(torch.arange(6), torch.arange(6))[: pixels.shape[1]]
        return (pixels, coordinates * valid[..., None], valid), {}

    def plainly(model: nn.Module, pixels: Tensor) -> Tensor:
        heads = []
        for image, _ in each_alone(pixels):
            tokens = model._forward_embeds(*inputs(image)[0], attn_mask=None)["patches"]
            layers = [tm.plain(block, None, model.num_prefix_tokens, False) for block in model.blocks]
            tokens = plain_models.forward(tokens, layers, [R] * DEPTH, model.num_prefix_tokens)
            heads.append(model.forward_head(model.norm(tokens)))
        return torch.cat(heads)

    def build(dtype: torch.dtype = torch.float64) -> nn.Module:
        return tm.naflexvit("several registers", dtype)

    return Family(
        "timm naflexvit", build, ragged(48), lambda model: model.blocks, "attn.qkv", plainly, inputs, alone=True
    )


def siglip2() -> Family:
    def family() -> nn.Module:
        config = hf.transformers.Siglip2VisionConfig(**hf.WIDTH, patch_size=4, num_patches=36)
        return hf.transformers.Siglip2VisionModel(config)

    def inputs(pixels: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shapes = torch.tensor([size for _, size in each_alone(pixels)])
        mask = (pixels != 0).any(2).long()
        return (), {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}

    def plainly(model: nn.Module, pixels: Tensor) -> Tensor:
        pooled, parts = [], hf.parts_of(model)
        layers = [hf.plain(layer) for layer in hf.layers_of(model)]
        for image, size in each_alone(pixels):
            tokens = plain_models.forward(parts.embeddings(image, torch.tensor([size])), layers, [R] * DEPTH, 0)
            pooled.append(parts.head(parts.post_layernorm(tokens)))
        return torch.cat(pooled)

    def build(dtype: torch.dtype = torch.float64) -> nn.Module:
        return hf.build(family, dtype)

    return Family(
        "siglip2",
        build,
        ragged(48),
        hf.layers_of,
        "self_attn.k_proj",
        plainly,
        inputs,
        lambda out: out.pooler_output,
        alone=True,
    )


# Vision models of video-language models, and these as a whole


def of_packed(name: str, tower: Callable[..., nn.Module], **changes: Any) -> Family:
    """Clips of one frame of 4 x 8 patches, which are two windows."""

    def inputs(pixels: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (pixels.flatten(0, 1), torch.tensor([[1, 4, 8]] * len(pixels))), {}

    def plainly(model: nn.Module, pixels: Tensor) -> Tensor:
        return torch.cat(pk.expected(model, [R] * DEPTH, *inputs(pixels)[0]), 1)

    return Family(
        name,
        lambda dtype=torch.float64: tower(dtype, depth=DEPTH, **changes),
        pk.patches(torch.tensor([[2, 4, 8]])).unflatten(0, (2, -1)),
        lambda model: model.blocks,
        "attn.qkv",
        plainly,
        inputs,
        lambda out: torch.cat(pk.used(out), 1),
        packed=16 if tower is pk.qwen2_5 else 32,
    )


def of_whole(kind: str) -> Family:
    """A video-language model with an image or a clip of one frame before its text, and its next words."""
    name, words = ("pixel_values", 9) if kind == "InternVL" else ("pixel_values_videos", 10)
    token = 90 if kind == "InternVL" else 91

    def tower(model: nn.Module) -> nn.Module:
        return model.model.vision_tower

    def inputs(pixels: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {
            "input_ids": torch.tensor([[3, *[token] * words, 4]] * len(pixels)),
            name: pixels,
        }

    def plainly(model: nn.Module, pixels: Tensor) -> Tensor:
        images, layers = pixels.flatten(0, -4), hf.layers_of(tower(model))
        tokens = plain_models.forward(
            hf.first_hidden(tower(model), images),
            hf.plain_layers(tower(model), images),
            [R] * DEPTH,
            1 if kind == "InternVL" else 0,
        )
        own = layers[-1].forward

        def instead(*args: Any, **kwargs: Any) -> Any:
            return (tokens,) if isinstance(own(*args, **kwargs), tuple) else tokens

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers[-1], "forward", instead)
            args, kwargs = inputs(pixels)
            return model(**kwargs).logits

    def build(dtype: torch.dtype = torch.float64) -> nn.Module:
        model = hf.build(partial(pk.with_tower, kind), dtype)
        model.config.text_config.use_cache = False  # a cache cannot be exported
        return model

    image = hf.pixels(hf.vit, dtype=torch.float64)
    return Family(
        {"InternVL": "internvl", "LlavaOnevision": "llava_onevision"}[kind],
        build,
        image if kind == "InternVL" else image[:, None],
        lambda model: hf.layers_of(tower(model)),
        "attention.k_proj" if kind == "InternVL" else "self_attn.k_proj",
        plainly,
        inputs,
    )


FAMILIES = {
    each.name: each
    for each in (
        *map(of_timm, ("vit", "dinov3")),
        naflexvit(),
        *map(of_hf, (hf.vit, hf.clip_vision, hf.dinov3, hf.videomae, hf.vivit, hf.vjepa2, hf.timesformer)),
        siglip2(),
        of_packed("qwen2_5_vl", pk.qwen2_5, fullatt_block_indexes=[1]),
        of_packed("qwen3_vl", pk.qwen3, deepstack_visual_indexes=[1]),
        of_whole("LlavaOnevision"),
        of_whole("InternVL"),
    )
}
WAYS: dict[str, Way] = {}
REFUSED: dict[str, tuple[type[Exception], str]] = {}
"""By name of a way: the error it ends in."""
TOGETHER: set[str] = set()
"""Ways that take two processes."""
CELLS: list[tuple[str, str]] = []
"""Way and family."""


def way(
    name: str,
    refused: tuple[type[Exception], str] | None = None,
    families: Sequence[str] = tuple(FAMILIES),
    together: bool = False,
) -> Callable[[Way], Way]:
    def register(how: Way) -> Way:
        WAYS[name] = how
        if refused is not None:
            REFUSED[name] = refused
        if together:
            TOGETHER.add(name)
        CELLS.extend((name, family) for family in families)
        return how

    return register


def run_cell(name: str, family: str) -> None:
    WAYS[name](FAMILIES[family])


NAFLEX = ("timm naflexvit", "siglip2")
QWEN = ("qwen2_5_vl", "qwen3_vl")


def all_but(*families: str) -> tuple[str, ...]:
    """Those whose plain models can be run so."""
    return tuple(name for name in FAMILIES if name not in families)


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """For what refuses to be applied after sharding; what is right is shown in two."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Hooks


@way("hooks that replace tensors")
def _(family):
    model = family.merging()
    for layer in family.layers(model):
        layer.register_forward_pre_hook(lambda module, args: (args[0].clone(), *args[1:]))
        layer.register_forward_hook(
            lambda module, args, out: (out[0] * 1, *out[1:]) if isinstance(out, tuple) else out * 1
        )
    family.check_gradients(model)


@way("hooks that cast")
def _(family):
    model = family.merging()
    for layer in family.layers(model):
        layer.register_forward_pre_hook(lambda module, args: (args[0].float().double(), *args[1:]))
    family.check(model, tolerance=1e-4)


@way("backward hooks")
def _(family):
    def hooked(model: nn.Module) -> list[tuple[int, str]]:
        seen: list[tuple[int, str]] = []
        for number, layer in enumerate(family.layers(model)):
            layer.register_full_backward_pre_hook(lambda *_, number=number: seen.append((number, "before")))
            layer.register_full_backward_hook(lambda *_, number=number: seen.append((number, "after")))
        return seen

    model, plain = family.merging(), family.build()
    seen, expected = hooked(model), hooked(plain)
    family.check_gradients(model)
    family.outputs(plain).sum().backward()
    assert seen == expected
    assert len(seen) >= 2 * (DEPTH - 1)


@way("accelerate's hooks, after")
def _(family):
    model = family.merging()
    for layer in family.layers(model):
        put_forward_aside(layer)
    family.check(model)


@way("accelerate's hooks, before", (ValueError, "apply or remove, and then do it again"))
def _(family):
    model = family.build()
    for layer in family.layers(model):
        put_forward_aside(layer)
    sttm.apply(model, r=R)


def put_forward_aside(module: nn.Module) -> None:
    """As accelerate does: a forward of the instance moves tensors to the module's device, then calls the old one."""
    old = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return old(*(each.clone() if isinstance(each, Tensor) else each for each in args), **kwargs)

    module.forward = forward


# Sharding and checkpointing


def sharded(model: nn.Module, family: Family, **policy: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in family.layers(model):
        fully_shard(layer, mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)


@way("FSDP2", together=True)
def _(family):
    family.check_gradients(sharded(family.merging(), family))


@way("FSDP2, mixed precision", together=True)
def _(family):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.float32)
    family.check_gradients(sharded(family.merging(), family, mp_policy=policy), 1e-3)


@way("FSDP2 of checkpointed layers", together=True)
def _(family):
    model = family.merging()
    checkpointed(model, family)
    family.check_gradients(sharded(model, family))


@way("FSDP2, meta device", together=True)
def _(family):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    with torch.device("meta"):
        model = sharded(family.merging(), family)
    source = family.build()
    model.to_empty(device="cpu")
    set_model_state_dict(model, source.state_dict(), options=StateDictOptions(full_state_dict=True))
    for name, buffer in source.named_buffers():
        model.get_buffer(name).copy_(buffer)
    family.check_gradients(model)


def sharded_steps(family: str, folder: str, steps: int, kill: bool) -> None:
    """Goes on with training where a checkpoint was written, writes one, and is killed."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    this = FAMILIES[family]
    model = sharded(this.merging(), this)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    weights, moments = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": moments}
    if Path(folder, ".metadata").exists():
        dcp.load(saved, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    for _ in range(steps):
        step(model, optimizer, this.outputs(model, this.pixels.chunk(2)[dist.get_rank()]).square().mean())
    if kill:
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
        os.kill(os.getpid(), signal.SIGKILL)
    trained = plainly_trained(this, 4, lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9))
    for name, parameter in model.named_parameters():
        tm.close(name, full(parameter), trained.get_parameter(name), 1e-6)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def plainly_trained(family: Family, steps: int, optimizer: Callable[..., torch.optim.Optimizer]) -> nn.Module:
    """The plain network after so many steps down the mean square of its outputs."""
    model = family.build()
    chosen = optimizer(model.parameters())
    for _ in range(steps):
        step(model, chosen, family.plainly(model, family.pixels).square().mean())
    return model


@way("FSDP2, killed and resumed")
def _(family):
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            together(sharded_steps, family.name, folder, 2, True)
        together(sharded_steps, family.name, folder, 2, False)


HEADS_APART = ("vit", "clip_vision", "vivit")
"""Families whose plain models can have their heads in several processes."""


@way("tensor parallel", families=HEADS_APART, together=True)
def _(family):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))

    def parallel(model: nn.Module) -> nn.Module:
        for layer in family.layers(model):
            attention = getattr(layer, "attention", None) or layer.self_attn
            out = "o_proj" if hasattr(attention, "o_proj") else "out_proj"
            plan = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ColwiseParallel()) | {out: RowwiseParallel()}
            parallelize_module(attention, mesh, plan)
        return model

    with torch.no_grad():
        tm.close("plain", family.outputs(parallel(family.build())), family.outputs(family.build()))
    model = parallel(family.merging())
    family.check_gradients(model, alike=True)
    with pytest.raises(ValueError, match="apply first, and then shard it"):
        sttm.apply(model, r=R)


@way("FSDP2, before", (ValueError, "apply first, and then shard it"))
def _(family):
    sttm.apply(sharded(family.build(), family), r=R)


@way("FSDP2, removed after", (RuntimeError, "removed before what came after it"))
def _(family):
    sttm.remove(sharded(family.merging(), family))


class Around(nn.Module):
    """Something else that runs a layer: `call(layer, x, ...)`."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.call = layer, call

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.module, x, *args, **kwargs)


def put_around(model: nn.Module, family: Family, call: Callable[..., Any]) -> None:
    layers = family.layers(model)
    for number, layer in enumerate(layers):
        layers[number] = Around(layer, call)


@way("wrapped in modules that copy")
def _(family):
    model = family.merging()
    put_around(model, family, lambda layer, x, *args, **kwargs: layer(x.clone(), *args, **kwargs))
    for layer in family.layers(model):
        layer.register_full_backward_hook(lambda *_: None)
    family.check_gradients(model)


@way("wrapped in modules that copy into a buffer")
def _(family):
    """What is in a buffer is another tensor in the next call."""
    model, buffers = family.merging(), dict[nn.Module, Tensor]()

    def call(layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return layer(buffers.setdefault(layer, torch.empty_like(x)).copy_(x), *args, **kwargs)

    put_around(model, family, call)
    with torch.no_grad():
        family.outputs(model, 2 * family.pixels.flip(0))
    family.check(model)


@way("layers in several processes", (RuntimeError, "the hidden states that layer 1 got are not those"))
def _(family):
    """A pipeline sends what a layer returns, without what travels with it."""

    def send(layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = layer(x, *args, **kwargs)
        return (out[0].clone(), *out[1:]) if isinstance(out, tuple) else out.clone()

    model = family.merging()
    put_around(model, family, send)
    family.outputs(model)


@way("DDP", together=True)
def _(family):
    family.check_gradients(nn.parallel.DistributedDataParallel(family.merging(), find_unused_parameters=True))


def checkpointed(model: nn.Module, family: Family) -> list[int]:
    """Wraps every layer; how often a layer ran is in the list."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers, runs = family.layers(model), []
    for number, layer in enumerate(layers):
        norm = next(module for module in layer.modules() if type(module).__name__.endswith("Norm"))
        norm.register_forward_hook(lambda *_: runs.append(1))
        layers[number] = checkpoint_wrapper(layer)
    return runs


@way("checkpoint_wrapper")
def _(family):
    model = family.merging()
    runs = checkpointed(model, family)
    family.check_gradients(model)
    assert len(runs) == 2 * DEPTH


@way("checkpoint_wrapper, before")
def _(family):
    model = family.build()
    runs = checkpointed(model, family)
    sttm.apply(model, r=R)
    assert not runs
    family.check_gradients(model)
    assert len(runs) == 2 * DEPTH


@way("the library's checkpointing")
def _(family):
    model = family.merging().train()
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    family.check_gradients(model)


@way("reentrant checkpointing", (RuntimeError, "use_reentrant=False, got use_reentrant=True"))
def _(family):
    def again(layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(lambda x: layer(x, *args, **kwargs), x, use_reentrant=True)

    model = family.merging()
    put_around(model, family, again)
    family.outputs(model, family.pixels.clone().requires_grad_())


def with_attention_checkpointed(model: nn.Module, family: Family) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for layer in family.layers(model):
        name = next(name for name in ("attn", "attention", "self_attn") if hasattr(layer, name))
        setattr(layer, name, checkpoint_wrapper(getattr(layer, name)))
    return model


@way("attention checkpointed")
def _(family):
    family.check_gradients(with_attention_checkpointed(family.merging(), family))


@way("attention checkpointed, before")
def _(family):
    family.check_gradients(sttm.apply(with_attention_checkpointed(family.build(), family), r=R))


@way("save_on_cpu")
def _(family):
    with torch.autograd.graph.save_on_cpu():
        family.check_gradients(family.merging())


@way("save_on_cpu around checkpoint_wrapper", (RuntimeError, "such as save_on_cpu, must be inside"))
def _(family):
    model = family.merging()
    checkpointed(model, family)
    with torch.autograd.graph.save_on_cpu():
        family.check_gradients(model)


@way("applied again before checkpointed layers' backward", (RuntimeError, "nor between a forward and the backward"))
def _(family):
    model = family.merging()
    checkpointed(model, family)
    out = family.outputs(model)
    sttm.apply(model, r=R, prop_attn="off")
    out.sum().backward()


# LoRA


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        generator = torch.Generator().manual_seed(3)
        for name, shape in (("a", (4, base.in_features)), ("b", (base.out_features, 4))):
            values = 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(values.to(base.weight.dtype)))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.a.T @ self.b.T

    def merged(self) -> nn.Linear:
        with torch.no_grad():
            self.base_layer.weight += self.b @ self.a
        return self.base_layer


def change_keys(model: nn.Module, family: Family, change: Callable[[Any], nn.Module]) -> nn.Module:
    other_linear_layers(family)
    for layer in family.layers(model):
        parent, _, name = family.linear.rpartition(".")
        parent = layer.get_submodule(parent)
        setattr(parent, name, change(getattr(parent, name)))
    return model


def with_lora(family: Family) -> Tensor:
    model = change_keys(change_keys(family.build(), family, LoRA), family, LoRA.merged)
    return family.plainly(model, family.pixels)


@way("LoRA, before")
def _(family):
    family.check(sttm.apply(change_keys(family.build(), family, LoRA), r=R), with_lora(family))


@way("LoRA, after")
def _(family):
    family.check(change_keys(family.merging(), family, LoRA), with_lora(family))


@way("LoRA before, merged after")
def _(family):
    model = sttm.apply(change_keys(family.build(), family, LoRA), r=R)
    family.check(change_keys(model, family, LoRA.merged), with_lora(family))


@way("LoRA after, merged")
def _(family):
    model = change_keys(family.merging(), family, LoRA)
    family.check(change_keys(model, family, LoRA.merged), with_lora(family))


# Quantised


class Stored(nn.Module):
    """A linear layer whose weight is kept in uint8, as bitsandbytes keeps it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        low, high = base.weight.detach().aminmax()
        whole = ((base.weight.detach() - low) / (high - low) * 255).round()
        self.weight = nn.Parameter(whole.to(torch.uint8), False)
        self.low, self.step, self.bias = float(low), float(high - low) / 255, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step + self.low, self.bias)


def stored(model: nn.Module, family: Family) -> nn.Module:
    other_linear_layers(family)
    for layer in family.layers(model):
        for module in list(layer.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, Stored(child))
    return model


@way("quantised to 8 bits, before and after")
def _(family):
    with torch.no_grad():
        expected = family.outputs(stored(family.merging(), family))
        before = sttm.apply(stored(family.build(), family), r=R)
        assert_equal("before", family.outputs(before), expected)


def int8(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


@way("dynamic int8, before and after", families=all_but("siglip2"))
def _(family):
    other_linear_layers(family)
    pixels = family.pixels.float()
    with torch.no_grad():
        expected = family.outputs(int8(sttm.apply(family.build(torch.float32), r=R)), pixels)
        before = sttm.apply(int8(family.build(torch.float32)), r=R)
        assert_equal("before", family.outputs(before, pixels), expected)


# Automatic mixed precision, training loops of others


def groups_of(traced: Sequence[sttm.integrations.LayerTrace], family: Family) -> Iterator[plain_models.Groups]:
    """The groups that each layer made of each clip's tokens, in the order in which the plain network asks for them."""
    indices, unit = [each.index for each in traced], family.unit
    if family.packed is not None:
        rows = [index.view(-1, family.packed) for index in indices]
        indices = [row - row.amin(1, keepdim=True) for row in rows]
    if unit is not None:  # of pieces of so many tokens, behind one
        indices = [(index[:, 1::unit].long() - 1) // unit for index in indices]
    before = [torch.arange(indices[0].shape[1]).expand_as(indices[0]), *indices[:-1]]
    layers = []
    for was, now in zip(before, indices, strict=True):
        layers.append([])
        for one, other in zip(was.tolist(), now.tolist(), strict=True):
            went = {token: group for token, group in zip(one, other, strict=True) if group >= 0}
            groups: plain_models.Groups = [[] for _ in range(max(other) + 1)]
            for token in sorted(went):
                groups[went[token]].append(token)
            layers[-1].append(groups)
    for layer in zip(*layers, strict=True) if family.alone else layers:
        yield from layer


@way("autocast")
def _(family):
    """In bfloat16 others may merge among near-equal pairs: with the groups that were, and they near the best."""
    cast = family.merging(trace=True).float()
    plain = family.build()
    with torch.no_grad():
        unmerged = family.outputs(plain)
        with torch.autocast("cpu", torch.bfloat16):
            error = (family.outputs(family.build().float(), family.pixels.float()) - unmerged).norm() / unmerged.norm()
            actual = family.outputs(cast, family.pixels.float())
    made = groups_of(sttm.trace(cast), family)
    best = plain_models.match

    def chosen(keys: Tensor, r: int, prefix: int, protect: Sequence[int] = ()) -> plain_models.Groups:
        groups = next(made)
        similar = nn.functional.cosine_similarity(keys[:, None], keys[None], -1)
        total = [
            sum(float(similar[n, m]) for group in each for n in group for m in group if n % 2 == 0 and m % 2 == 1)
            for each in (groups, best(keys, r, prefix, protect))
        ]
        assert total[0] > total[1] - 0.05 * r
        # What a group is placed at is its token of odd place, as the plain network has it in front.
        return [sorted(group, key=lambda n: n % 2 == 0) for group in groups]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(plain_models, "match", chosen)
        expected = family.plainly(plain, family.pixels)
    assert next(made, None) is None
    assert (actual - expected).norm() / expected.norm() < 3 * error


@way("transformers' Trainer")
def _(family):
    """With the library's checkpointing, where it is its."""

    class Trainer(hf.transformers.Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
            return family.outputs(model, inputs["pixels"]).square().mean()

    model = family.merging()
    with tempfile.TemporaryDirectory() as folder:
        arguments = hf.transformers.TrainingArguments(
            folder, max_steps=2, per_device_train_batch_size=2, optim="sgd", learning_rate=0.01, max_grad_norm=0,
            lr_scheduler_type="constant", gradient_checkpointing=hasattr(model, "gradient_checkpointing_enable"),
            gradient_checkpointing_kwargs={"use_reentrant": False}, use_cpu=True, remove_unused_columns=False,
            save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=[{"pixels": clip} for clip in family.pixels]).train()
    trained = plainly_trained(family, 2, lambda parameters: torch.optim.SGD(parameters, 0.01))
    for name, parameter in trained.named_parameters():
        tm.close(name, model.get_parameter(name).detach(), parameter.detach(), 1e-7)


# Threads, devices, copies


@way("threads")
def _(family):
    model = family.merging(trace=True)
    generator = torch.Generator().manual_seed(5)
    many = [torch.randn(family.pixels.shape, generator=generator, dtype=torch.float64) for _ in range(4)]
    with torch.no_grad():
        expected = [family.outputs(model, pixels) for pixels in many]
    wrong: list[str] = []

    def serve(first: int) -> None:
        with torch.no_grad():
            for at in range(first, first + 12):
                out = family.outputs(model, many[at % 4])
                if not torch.equal(out, expected[at % 4]):
                    wrong.append(f"output {at}")

    threads = [threading.Thread(target=serve, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@way("meta device")
def _(family):
    with torch.device("meta"):
        model = sttm.apply(family.build(), r=R)
    assert all(parameter.is_meta for parameter in model.parameters())
    source = family.build()
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    for name, buffer in source.named_buffers():  # those that are not in the state_dict
        model.get_buffer(name).copy_(buffer)
    family.check(model)


@way("EMA")
def _(family):
    model = family.merging()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    family.check(averaged)


@way("per-sample gradients", families=all_but(*NAFLEX))
def _(family):
    model, plain = family.merging(), family.build()
    family.plainly(plain, family.pixels).square().sum().backward()

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(model, parameters, args, kwargs)

        return family.outputs(call, x[None]).square().sum()

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, family.pixels)
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            tm.close(name, found[name].sum(0), parameter.grad, 1e-7)


@way("a forward that fails, and another")
def _(family):
    model = family.merging()
    hook = list(family.layers(model)[1].children())[-1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        family.outputs(model)
    hook.remove()
    family.check(model)


@way("a model inside of a hook of another")
def _(family):
    model, other, seen = family.merging(), family.merging(), []
    for module in family.layers(model)[1].children():
        module.register_forward_pre_hook(lambda *_: seen.append(family.outputs(other)))
    family.check(model)
    for out in seen:
        tm.close("inside", out, family.expected(), 1e-7)


# Applied again, layers taken out


@way("applied again, and refused")
def _(family):
    model = family.merging()
    for arguments in ({"keep": 0}, {"flops": 1e-4}, {"r": R, "layers": [0, 0]}):
        with pytest.raises(ValueError, match=r"keep|flops|layers"):
            sttm.apply(model, **arguments)
        family.check(model)
    sttm.remove(model)
    assert not any(isinstance(module, merging.Swapped) for module in model.modules())


@way("the last layer taken out", (RuntimeError, "layer 1 left tokens merged"))
def _(family):
    model = family.merging()
    del family.layers(model)[DEPTH - 1]
    family.outputs(model)


@way("the last layer taken out, of what is inside of the model", (RuntimeError, "layer 1 left tokens merged"))
def _(family):
    model = family.merging()
    del family.layers(model)[DEPTH - 1]
    inner = model.forward_features if hasattr(model, "forward_features") else hf.body_of(model)
    args, kwargs = family.inputs(family.pixels)
    inner(*args, **kwargs)


@way("the last layer taken out, compiled", (RuntimeError, "layer 1 left tokens merged"), ("timm vit",))
def _(family):
    model = family.merging()
    del family.layers(model)[DEPTH - 1]
    family.outputs(torch.compile(model, backend="eager"))


@way("the last layer skipped", (RuntimeError, "layer 1 left tokens merged"))
def _(family):
    model = family.merging()
    family.layers(model)[DEPTH - 1] = Around(nn.Identity(), lambda layer, x, *args, **kwargs: x)
    family.outputs(model)


@way("the last layer taken out, then applied again", families=all_but("llava_onevision"))
def _(family):
    model, other = family.build(), family.merging()
    for each in (model, other):
        del family.layers(each)[DEPTH - 1]
    with torch.no_grad():
        expected = family.outputs(sttm.apply(model, r=R))
        assert_equal("again", family.outputs(sttm.apply(other, r=R)), expected)


@way("one layer at two depths", (ValueError, "layer 1 is the same module as layer 0"))
def _(family):
    model = family.build()
    layers = family.layers(model)
    layers[1] = layers[0]
    sttm.apply(model, r=R)


# Compiled and exported


@way("traced", (RuntimeError, "needs torch.export or torch.compile in place of torch.jit.trace"))
def _(family):
    args, kwargs = family.inputs(family.pixels)
    given = {"example_kwarg_inputs": kwargs} if kwargs else {"example_inputs": args}
    torch.jit.trace(family.merging().requires_grad_(False), **given, strict=False)


@way("hooks that drop arguments", (RuntimeError, "must pass on the argument sttm"))
def _(family):
    model = family.merging()
    for layer in family.layers(model):
        layer.register_forward_pre_hook(lambda module, args, kwargs: (args, {}), with_kwargs=True)
    family.outputs(model)


COMPILED = ("timm vit", "videomae")  # which takes time


WITH_BREAKS = (NAFLEX[0], *QWEN)
"""Families of which the plain models read sizes from tensors."""


@way("torch.compile", families=all_but(*WITH_BREAKS))
def _(family):
    model = family.merging()
    family.outputs(model)  # in which transformers puts hooks into some models
    try:
        family.check_gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    finally:
        torch._dynamo.reset()


@way("torch.compile, with graph breaks", families=WITH_BREAKS)
def _(family):
    try:
        family.check_gradients(torch.compile(family.merging(), backend="aot_eager"))
    finally:
        torch._dynamo.reset()


@way("torch.export", families=all_but(*WITH_BREAKS))
def _(family):
    with torch.no_grad():
        exported = torch.export.export(family.merging(), *family.inputs(family.pixels))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    family.check(torch.export.load(file).module())


@way("compiled, applied again, removed", families=COMPILED[:1])
def _(family):
    model = family.merging()
    compiled = torch.compile(model, backend="eager")
    try:
        family.check(compiled)
        sttm.apply(model, r=R + 2)
        with torch.no_grad():
            tm.close("again", family.outputs(compiled), family.outputs(family.merging(r=R + 2)))
            sttm.remove(model)
            tm.close("removed", family.outputs(compiled), family.outputs(family.build()))
    finally:
        torch._dynamo.reset()


@way("every layer compiled in place", families=COMPILED)
def _(family):
    model = family.merging(trace=True)
    for layer in family.layers(model):
        layer.compile(fullgraph=True, backend="aot_eager")
    family.check(model)
    assert [each.merged for each in sttm.trace(model)] == [R] * DEPTH
    torch._dynamo.reset()


@way("compiled layers, after", families=COMPILED)
def _(family):
    model = family.merging()
    layers = family.layers(model)
    for number, layer in enumerate(layers):
        layers[number] = torch.compile(layer, fullgraph=True, backend="aot_eager")
    family.check(model)
    torch._dynamo.reset()


@way("compiled layers, before", (ValueError, "is compiled: apply first"))
def _(family):
    model = family.build()
    layers = family.layers(model)
    for number, layer in enumerate(layers):
        layers[number] = torch.compile(layer)
    sttm.apply(model, r=R)


@way("inside of a model of one's own", (TypeError, "inside of it, model.encoder.0 is one: apply to that"))
def _(family):
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(family.build())

    sttm.apply(Mine(), r=R)


@way("r as an attribute", (AttributeError, "give it to sttm.apply"))
def _(family):
    family.merging().r = 8


# Ways of some families


def timm_vit(**changes: Any) -> nn.Module:
    return tm.timm.create_model(
        "vit_tiny_patch16_224", **{**tm.SIZE, "img_size": 64, "patch_size": 8, **changes}
    ).eval()


def blocks_of(model: nn.Module, image: Tensor, height: int, width: int, **options: Any) -> None:
    """Groups of a layer merged in windows of 4 x 4 stay in the windows of the image's grid, and fill them."""
    sttm.apply(model, r=8, layers=[0], window=(1, 4, 4), trace=True)
    model(image, **options)
    index = (
        sttm.trace(model)[0]
        .index[0, 1:]
        .reshape(height // 4, 4, width // 4, 4)
        .transpose(1, 2)
        .flatten(2)
        .flatten(0, 1)
    )
    groups = [set(window.tolist()) for window in index]
    assert sum(map(len, groups)) == len(set().union(*groups)) == height * width - 8


@pytest.mark.parametrize("size", [(64, 64), (32, 128), (128, 32), (32, 32)])
def test_the_grid_is_that_of_the_input(size):
    image = torch.randn(1, 3, *size)
    grid = size[0] // 8, size[1] // 8
    blocks_of(timm_vit(dynamic_img_size=True), image, *grid)
    blocks_of(timm_vit(dynamic_img_size=True, pre_norm=True), image, *grid)
    blocks_of(hf.vit(image_size=64, patch_size=8).eval(), image, *grid, interpolate_pos_encoding=True)


@pytest.mark.parametrize("shape", [(8, 24, 24), (4, 16, 40), (1, 24, 24)])
def test_clips_of_other_shapes_merge_in_their_own_grid(shape):
    model, clip = hf.build(hf.vjepa2), torch.randn(1, shape[0], 3, *shape[1:])
    sttm.apply(model, method="sttm", layers=(0, 2), spatial_keep=2, temporal_keep=2, trace=True)
    model(clip)
    frames, tokens = max(shape[0] // 2, 1), shape[1] * shape[2] // 64
    index = sttm.trace(model)[0].index[0].reshape(frames, tokens)
    assert [set(frame.tolist()) <= {2 * t, 2 * t + 1} for t, frame in enumerate(index)] == [True] * frames


def test_a_grid_that_is_not_known_is_refused():
    model = timm_vit(patch_drop_rate=0.5).train()
    with pytest.raises((RuntimeError, ValueError), match="grid"):
        sttm.apply(model, method="sttm")(torch.randn(1, 3, 64, 64))
    model = hf.videomae()
    mask = torch.zeros(1, 18, dtype=torch.bool)
    mask[:, ::3] = True
    sttm.apply(model, r=2, layers=[0], window=(1, 3, 3))
    with pytest.raises(RuntimeError, match="grid of the tokens of layer 0 is not known"):
        model.base_model(torch.randn(1, 4, 3, 24, 24), bool_masked_pos=mask)


def test_a_token_that_the_head_reads_is_left_alone():
    model, clip = hf.build(hf.videomae, use_mean_pooling=False), hf.pixels(hf.videomae)
    sttm.apply(model, r=8, trace=True)
    model(clip)
    assert all(
        bool((each.index == 0).sum(1).eq(1).all()) and bool(each.size[:, 0].eq(1).all()) for each in sttm.trace(model)
    )
    with pytest.raises(ValueError, match="reads the first token"):
        sttm.apply(model, method="sttm")


@pytest.mark.parametrize("r", [(8, 1), (8, 0), (0, 2, 0)])
def test_foreign_notation_is_refused(r):
    with pytest.raises(TypeError, match="schedule=inflection"):
        sttm.apply(hf.vit(), r=r)


def test_what_cannot_merge_is_said():
    model = sttm.apply(hf.build(hf.vit), r=500, trace=True)
    model(hf.pixels(hf.vit))
    assert [(each.r, each.merged) for each in sttm.trace(model)] == [(500, 18), (500, 9), (500, 4)]
    assert "r=500, merged=18" in repr(sttm.trace(model))
    assert "merges r=500" in repr(model)


def test_checkpointing_and_exports_do_not_disturb_the_trace():
    model, image = sttm.apply(tm.build("vit"), r=3, trace=True), tm.image()
    model.set_grad_checkpointing()
    out = model(image)
    before = sttm.trace(model)
    out.sum().backward()
    assert sttm.trace(model) == before
    with torch.no_grad():
        torch.export.export(model.eval(), (image,))
    assert sttm.trace(model) == before


def test_intermediates_with_checkpointing():
    model, image = sttm.apply(tm.build("vit"), r=3), tm.image()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model.forward_intermediates(image, intermediates_only=True)[1].square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    model.set_grad_checkpointing()
    for actual, wanted in zip(gradients(), expected, strict=True):
        tm.close("gradient", actual, wanted, 1e-5)


@pytest.mark.parametrize("family", [hf.vit, hf.vjepa2])
def test_attention_weights_are_those_of_layers_before_the_first_merge(family):
    model, clip = hf.build(family), hf.pixels(family)
    model.set_attn_implementation("eager")
    before = model(clip, output_attentions=True).attentions
    after = sttm.apply(model, r=3, layers=[1]).base_model(clip, output_attentions=True).attentions
    assert_equal("layer 0", after[0], before[0])
    assert_equal("layer 1", after[1], before[1])
    assert all(each is None for each in after[2:])


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_hooks_of_users_see_nothing_of_the_check(family):
    model, seen = family.build(), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append(1))
        module.register_forward_pre_hook(lambda *_: seen.append(1))
    sttm.apply(model, r=R)
    assert not seen
    family.outputs(model)
    assert seen


def test_a_model_inside_of_another_of_timm_is_named():
    net = tm.timm.create_model("vit_tiny_patch16_224", features_only=True, **{**tm.SIZE, "num_classes": 0}).eval()
    with pytest.raises(TypeError, match=r"inside of it, model\.model is one"):
        sttm.apply(net, r=R)
    shapes = [each.shape for each in net(tm.image())]
    sttm.apply(net.model, r=R)
    assert [each.shape for each in net(tm.image())] == shapes


def test_the_state_follows_its_tokens_to_another_device():
    step = merging.find_layers(sttm.apply(tm.build("vit"), r=1))[1]._sttm
    state = merging.State(
        size=torch.ones(2, 5), index=torch.zeros(2, 5, dtype=torch.int32), first_grid=(1, 1, 5), applied=step.applied
    )
    moved = state.of(torch.empty(2, 5, 8, device="meta"), step)
    assert moved.size.is_meta
    assert moved.index.is_meta
    assert moved.first_grid == (1, 1, 5)
    with pytest.raises(RuntimeError, match=r"layer 1 got must be the \(2, 5\) tokens"):
        state.of(torch.empty(1, 5, 8), step)


@pytest.mark.parametrize(
    "arguments",
    [{"r": 3, "layers": [0], "window": (1, 3, 3)}, {"method": "sttm", "layers": (0, None), "spatial_keep": 4}],
    ids=str,
)
def test_intermediates_of_models_that_know_their_grid(arguments):
    model, x = tm.build("vit"), tm.image()
    shapes = [each.shape for each in model.forward_intermediates(x, intermediates_only=True)]
    sttm.apply(model, **arguments)
    final, maps = model.forward_intermediates(x)
    assert [each.shape for each in maps] == shapes
    assert_equal("features", final, model.forward_features(x))


def test_attention_that_is_not_fused_any_more_takes_counts():
    model, x = sttm.apply(tm.build("vit", torch.float64), r=R, prop_attn="augment"), tm.image(torch.float64)
    expected = model(x)
    for block in model.blocks:
        block.attn.fused_attn = False
    tm.close("not fused", model(x), expected)


def test_features_traced_symbolically_are_refused():
    with pytest.raises(RuntimeError, match=r"hooks in place of torch\.fx\.symbolic_trace"):
        torch.fx.symbolic_trace(sttm.apply(tm.build("vit"), r=R))


def test_divided_attention_takes_no_clips():
    model, clip = hf.build(hf.timesformer), hf.pixels(hf.timesformer)[:0]
    assert hf.logits(sttm.apply(model, r=R), clip).shape == (0, 5)


# What method "sttm" adds


STAGES = {"method": "sttm", "layers": (0, 1), "spatial_keep": 4, "temporal_keep": 3}


def trained(family: Callable[..., nn.Module] = hf.videomae, dtype: torch.dtype = torch.float32) -> nn.Module:
    """With motion weights that are not zero."""
    model = sttm.apply(hf.build(family, dtype), **STAGES)
    with torch.no_grad():
        for layer in hf.layers_of(model)[:2]:
            layer.sttm.motion.weight += 0.1
    return model


def test_motion_weights_survive_another_apply():
    model, clip = trained(), hf.pixels(hf.videomae)
    expected = hf.logits(model, clip)
    assert_equal("again", hf.logits(sttm.apply(model, trace=True, **STAGES), clip), expected)
    for lost in ({"r": 1}, {**STAGES, "layers": (0, 2)}, {**STAGES, "second_moment": True}):
        with pytest.raises(ValueError, match=r"remove\(model\) first"):
            sttm.apply(model, **lost)
        assert_equal("as it was", hf.logits(model, clip), expected)
    sttm.apply(sttm.remove(model), r=1)


def test_another_apply_keeps_the_parameters_that_an_optimizer_has():
    model = trained()
    hf.layers_of(model)[1].sttm.requires_grad_(False)
    before = dict(model.named_parameters())
    for arguments in ({"trace": True}, {"prop_attn": "off"}, {}):
        sttm.apply(model, **arguments, **STAGES)
        now = dict(model.named_parameters())
        assert list(now) == list(before)
        assert all(now[name] is parameter for name, parameter in before.items())
        assert not hf.layers_of(model)[1].sttm.motion.weight.requires_grad


def test_motion_weights_come_back(tmp_path):
    model, clip = trained(), hf.pixels(hf.videomae)
    expected = hf.logits(model, clip)
    other = sttm.apply(hf.videomae().eval(), **STAGES)
    other.load_state_dict(model.state_dict())
    assert_equal("load_state_dict", hf.logits(other, clip), expected)

    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "saved.pt")
    for source in (tmp_path, tmp_path / "model.safetensors", tmp_path / "saved.pt", model.state_dict()):
        loaded = hf.transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path).eval()
        sttm.apply(loaded, **STAGES)
        assert not torch.equal(hf.logits(loaded, clip), expected)
        assert_equal(str(source)[-20:], hf.logits(sttm.restore(loaded, source), clip), expected)
    with pytest.raises(ValueError, match=r"at layers \[0, 2\]"):
        sttm.restore(sttm.apply(hf.videomae(), **{**STAGES, "layers": (0, 2)}), tmp_path)
    with pytest.raises(RuntimeError, match="method='sttm'"):
        sttm.restore(sttm.apply(hf.videomae(), r=1), tmp_path)


@pytest.mark.parametrize("meta", ["topk", "learned"])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_learned_meta_tokens_are_trained_saved_and_restored(meta, library, tmp_path):
    if library == "timm":
        build, x, stages = lambda: tm.build("vit"), tm.image(), {**STAGES, "meta": meta}
    else:
        build, x, stages = lambda: hf.build(hf.videomae), hf.pixels(hf.videomae), {**STAGES, "meta": meta}
    model = sttm.apply(build(), **stages)
    added = {name: p for name, p in model.named_parameters() if "_meta." in name}
    assert len(added) == 4
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(3):
        losses.append(outputs(model, x).square().mean())
        step(model, optimizer, losses[-1])
    assert losses[-1] < losses[0]
    assert not any(torch.equal(before[name], parameter) for name, parameter in added.items())
    with torch.no_grad():
        expected = outputs(model, x)
        assert_equal("again", outputs(sttm.apply(model, trace=True, **stages), x), expected)
        with pytest.raises(ValueError, match=r"layer \d, of method 'sttm', .* remove\(model\) first"):
            sttm.apply(model, r=1)

        torch.save(model.state_dict(), tmp_path / "saved.pt")
        other = sttm.apply(build(), **stages)
        other.load_state_dict(torch.load(tmp_path / "saved.pt"))
        assert_equal("load_state_dict", outputs(other, x), expected)
        plain = build()
        plain.load_state_dict(sttm.remove(copy.deepcopy(model)).state_dict())
        sttm.apply(plain, **stages)
        assert not torch.equal(outputs(plain, x), expected)
        assert_equal("restore", outputs(sttm.restore(plain, tmp_path / "saved.pt"), x), expected)
        assert outputs(int8(model), x).isfinite().all()
        for dtype in (torch.bfloat16, torch.float64):
            assert outputs(model.to(dtype), x.to(dtype)).dtype == dtype


def test_motion_weights_have_the_dtype_of_the_model():
    model = trained(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert hf.logits(model, hf.pixels(hf.videomae, dtype=torch.bfloat16)).isfinite().all()


def test_a_model_with_motion_weights_can_be_quantised():
    clip = hf.pixels(hf.vivit)
    with torch.no_grad():
        out = hf.logits(int8(trained(hf.vivit)), clip)
        expected = hf.logits(trained(hf.vivit), clip)
    assert float((out - expected).norm()) < 0.2 * float(expected.norm())


def test_motion_weights_on_the_meta_device_start_at_zero():
    with torch.device("meta"):
        model = sttm.apply(hf.videomae(), **STAGES)
    merger = hf.layers_of(model)[0].sttm.to_empty(device="cpu")
    merger.motion.reset_parameters()
    assert not merger.motion.weight.any()


def test_what_was_made_under_inference_mode_can_be_trained():
    model, clip = hf.build(hf.videomae), hf.pixels(hf.videomae)
    with torch.inference_mode():
        sttm.apply(model, **STAGES)
        inferred = hf.logits(model, clip)
    out = hf.logits(model, clip)
    assert_equal("inference_mode", inferred, out)
    out.sum().backward()
    assert hf.layers_of(model)[0].sttm.motion.weight.grad.any()


# All of them


def table() -> list[str]:
    """The rows of docs/models/ways.md."""
    rows = [["way", *FAMILIES, "error"], ["---"] * (2 + len(FAMILIES))]
    for name in WAYS:
        here, error = ("refused", f"`{REFUSED[name][1]}`") if name in REFUSED else ("right", "")
        rows.append([name, *(here if (name, family) in CELLS else "" for family in FAMILIES), error])
    return [" ".join(("| " + " | ".join(row) + " |").split()) for row in rows]


def test_the_page_shows_this_table():
    page = (Path(__file__).parents[1] / "docs/models/ways.md").read_text(encoding="utf-8")
    lines = [" ".join(line.split()) for line in page.splitlines() if line.startswith("|")]
    shown = [re.sub(r"-{3,}", "---", line) for line in lines]
    assert shown == table()


@pytest.mark.table
@pytest.mark.parametrize(("name", "family"), CELLS)
def test_the_plain_network_or_refused(name, family, request):
    if name in TOGETHER:
        together(run_cell, name, family)
    elif name in REFUSED:
        request.getfixturevalue("one_process")
        error, message = REFUSED[name]
        with pytest.raises(error, match=message):
            run_cell(name, family)
    else:
        run_cell(name, family)
