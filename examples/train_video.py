"""Trains VideoMAE while it merges tokens, on one device or many, and goes on where it was stopped.

torchrun --nproc-per-node 2 examples/train_video.py [FOLDER] --steps 20 --checkpoint checkpoints

FOLDER holds one folder of videos per class; without it, clips of a square that moves along rows or along columns.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from clips import SMALL, arguments, clip, videomae
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

import sttm_kernels as sttm


def moving_square(generator: torch.Generator, frames: int, size: int) -> tuple[Tensor, int]:
    """`(1, T, 3, size, size)` and 0 for a square that moves along rows, 1 along columns, in noise."""
    side, label = size // 4, int(torch.randint(2, (), generator=generator))
    along, across = torch.randint(size - side, (2,), generator=generator).tolist()
    pixels = 0.5 * torch.randn(1, frames, 3, size, size, generator=generator)
    for t in range(frames):
        moved = (along + t * size // frames) % (size - side)
        y, x = (across, moved) if label == 0 else (moved, across)
        pixels[0, t, :, y : y + side, x : x + side] += 2
    return pixels, label


def draw(model: nn.Module, videos: list[tuple[Path, int]], batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """A batch that depends on the seed alone, so that a resumed run sees what an unbroken one sees."""
    generator, config = torch.Generator().manual_seed(seed), model.config
    if videos:
        chosen = [videos[i] for i in torch.randint(len(videos), (batch,), generator=generator).tolist()]
        drawn = [(clip(model, str(path)), label) for path, label in chosen]
    else:
        drawn = [moving_square(generator, config.num_frames, config.image_size) for _ in range(batch)]
    return torch.cat([frames for frames, _ in drawn]), torch.tensor([label for _, label in drawn])


def spread(model: nn.Module, how: str, device: str) -> nn.Module:
    """Over the processes that torchrun started. Merging comes first: it changes the layers that are spread."""
    if how == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if device == "cuda" else None)
    for layer in model.videomae.encoder.layer:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def state(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, object]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "step": torch.tensor(step)}


def latest(folder: Path | None) -> Path | None:
    """The last checkpoint that was written to its end."""
    return max((path.parent for path in folder.glob("step-*/.metadata")), default=None) if folder else None


def main(argv: list[str] | None = None) -> list[float]:
    """Returns the loss of every step."""
    parser = arguments(__doc__.splitlines()[0], r=4)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4, help="clips per process and step (default: %(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="folder to save in, and to resume from")
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--parallel", choices=("fsdp", "ddp"), default="fsdp")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations instead of keeping them")
    options = parser.parse_args(argv)

    together, device = "RANK" in os.environ, options.device.partition(":")[0]
    if together:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    classes = sorted(path for path in options.folder.iterdir() if path.is_dir()) if options.folder else []
    videos = [(path, label) for label, folder in enumerate(classes) for path in sorted(folder.iterdir())]
    if options.model:
        plain = videomae(options.model, device)
    else:
        torch.manual_seed(0)
        config = VideoMAEConfig(**SMALL, image_size=64, num_frames=8, num_labels=len(classes) or 2)
        plain = VideoMAEForVideoClassification(config).to(device)
    sttm.apply(plain.train(), r=options.r)
    if options.checkpointing:
        plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = spread(plain, options.parallel, device) if together else plain
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    first, losses = 0, []
    if (resumed := latest(options.checkpoint)) is not None:
        saved = state(model, optimizer, 0)
        dcp.load(saved, checkpoint_id=resumed, no_dist=not together)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        first = int(saved["step"])
    for step in range(first, options.steps):
        frames, labels = draw(plain, videos, options.batch, seed=step * ranks + rank)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(frames.to(device), labels=labels.to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / ranks
        if together:
            dist.all_reduce(mean)
        losses.append(mean.item())
        if rank == 0:
            print(f"step {step}: loss {losses[-1]:.4f}", flush=True)
        if options.checkpoint and ((step + 1) % options.save_every == 0 or step + 1 == options.steps):
            folder = options.checkpoint / f"step-{step + 1:06}"
            dcp.save(state(model, optimizer, step + 1), checkpoint_id=folder, no_dist=not together)
    if together:
        dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
