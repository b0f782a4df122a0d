"""What the examples share: a clip as VideoMAE wants it, and a VideoMAE."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from sttm_kernels.demo import shapes, video

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
SMALL = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}


def arguments(description: str, r: int | list[int] = 65) -> argparse.ArgumentParser:
    """The options that all examples take; several r where the default is a list."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="of the Hugging Face hub, or a folder; default: a small one of random weights")
    several = "+" if isinstance(r, list) else None
    text = "tokens to merge away in each layer (default: %(default)s)"
    parser.add_argument("--r", type=int, nargs=several, default=r, help=text)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def videomae(name: str | None, device: str) -> VideoMAEForVideoClassification:
    """In evaluation mode. A name is, for instance, MCG-NJU/videomae-base-finetuned-kinetics."""
    if name is None:
        torch.manual_seed(0)
        model = VideoMAEForVideoClassification(VideoMAEConfig(**SMALL, num_labels=10))
    else:
        model = VideoMAEForVideoClassification.from_pretrained(name)
    return model.to(device).eval()


def clip(model: VideoMAEForVideoClassification, path: str | None = None) -> Tensor:
    """`(1, T, 3, S, S)`: the frames of a video, or of moving shapes, as many and as large as the model takes."""
    count, size = model.config.num_frames, model.config.image_size
    if path is None:
        frames = shapes.render(count).frames
    else:
        frames = video.read(path, 16, frames=count).frames
    frames = frames.permute(0, 3, 1, 2).float() / 255
    frames = F.interpolate(frames, size=(size, size), mode="bilinear", antialias=True)
    frames = (frames - MEAN[:, None, None]) / STD[:, None, None]
    return frames[None].to(model.device)
