"""The verbs on DTensors, in two processes that talk by gloo: the results and gradients that one process gets."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import sttm_kernels as sttm

RANKS = 2
B, N, K, C, D = 3, 12, 4, 6, 5


def inputs():
    make = torch.Generator().manual_seed(0)
    shapes = {"x": (B, N, C), "q": (B, 2, N, D), "meta": (B, K, D), "fill": (B, K, C), "positions": (B, N, 3)}
    given = {name: torch.randn(shape, generator=make) for name, shape in shapes.items()}
    return {**given, "size": 1 + torch.rand(B, N, generator=make)}


def match(x, q, size, positions, **_):
    plan = sttm.match(q, 5, num_prefix=1)
    out = sttm.merge(x, plan, size, positions)
    return out.x, out.size, out.positions, sttm.unmerge(out.x, plan)


def protected(x, q, **_):
    plan = sttm.match(q, 3, num_prefix=1, protect=[2, 7, 8])
    return sttm.merge(x, plan).x, plan.score.nan_to_num(neginf=0.0), sttm.unmerge(x[:, :9], plan)


def frames(x, q, **_):
    first = sttm.match(q, 3, partition="frames", grid=(2, 2, 3), window=(2, 1, 3))
    second = sttm.match(sttm.merge(q.mean(1), first).x, 2)
    return sttm.merge(x, sttm.compose(first, second), reduce="sum").x


def bounded(x, q, size, **_):
    plan = sttm.match(q, range(B), num_prefix=1, mask=size > 1.2, threshold=-0.5)
    out = sttm.merge(x, plan, size)
    return out.x, out.size


def assign(x, q, meta, size, fill, **_):
    plan = sttm.assign(q, meta, "l2", 2.0)
    return sttm.merge(x, plan, size, reduce="mean", fill=fill).x, plan.score, plan.lse, plan.weight


def assign_merge(x, q, meta, positions, **_):
    out, plan = sttm.assign_merge(x, q, meta, weight="uniform", positions=positions)
    return out.x, out.positions, plan.score


def carried(x, q, meta, fill, **_):
    out, _ = sttm.assign_merge(x, q.detach(), meta.detach(), fill=fill)
    soft = sttm.soft_merge(x, q.detach(), meta.detach(), temperature=0.3)
    return out.x, soft.x, soft.size


def soft_merge(x, q, meta, size, **_):
    out = sttm.soft_merge(x, q, meta, temperature=0.3, normalize="tokens", size=size)
    return out.x, out.size


PROGRAMS = [match, protected, frames, bounded, assign, assign_merge, carried, soft_merge]
SHARDINGS = {
    "batch": lambda name, t: Shard(0),
    "channels": lambda name, t: Shard(t.dim() - 1) if name in ("x", "fill") else Replicate(),
    "tokens": lambda name, t: Shard(t.dim() - 2) if name in ("x", "q") else Replicate(),
    "nothing": lambda name, t: Replicate(),
}


def differentiated(program, given):
    found = program(**given)
    found = found if isinstance(found, tuple) else (found,)
    loss = sum((t * t).sum() for t in found if t.requires_grad)
    grads = torch.autograd.grad(loss, list(given.values()), allow_unused=True)
    return [*found, *grads]


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def on_rank(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    for program in PROGRAMS:
        expected = differentiated(program, {name: t.requires_grad_() for name, t in inputs().items()})
        for sharding, place in SHARDINGS.items():
            given = {name: distribute_tensor(t, mesh, [place(name, t)]) for name, t in inputs().items()}
            found = differentiated(program, {name: t.requires_grad_() for name, t in given.items()})
            for number, (was, now) in enumerate(zip(expected, found, strict=True)):
                name = f"{program.__name__} with {sharding} sharded, result {number}"
                assert (was is None) == (now is None), name
                if was is not None:
                    torch.testing.assert_close(whole(now), was, msg=lambda text, name=name: f"{name}: {text}")
            if sharding == "batch" or (sharding == "channels" and program is carried):
                assert found[0].placements == given["x"].placements
    x = distribute_tensor(inputs()["x"], mesh, [Shard(0)])
    plan = sttm.match(x, 3)
    with pytest.raises(TypeError, match="size must be a DTensor as the other tensors are, got Tensor"):
        sttm.merge(x, plan, inputs()["size"])
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_every_verb_on_dtensors(tmp_path):
    mp.spawn(on_rank, (tmp_path / "store",), nprocs=RANKS)
