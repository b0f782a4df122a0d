"""The parameters that method "sttm" adds to a model, in what was saved of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

ADDED = re.compile(r"(\d+)\.(?:_\w+\.)*sttm\.(.+)")
"""The end of a name: the number of the layer, wrappers, and the name in its STTM. What is before may have other names
in a file than in the model, which transformers renames."""


def added(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """By number of the layer and name in its STTM; from a folder of `save_pretrained`, a file or a state_dict."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in source.items() if isinstance(source, Mapping) else _saved(Path(source)):
        match = ADDED.search(name)
        if match is not None:
            found.setdefault(int(match[1]), {})[match[2]] = value
    return found


def _saved(path: Path) -> Iterable[tuple[str, Tensor]]:
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"source must be a folder with *.safetensors or pytorch_model*.bin, got {path}")
    for file in files:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, "pt") as stored:
                yield from ((name, stored.get_tensor(name)) for name in stored.keys() if ADDED.search(name))  # noqa: SIM118
        else:
            yield from torch.load(file, map_location="cpu", weights_only=True).items()
