"""What commands need: an error meant for people, a device, optional packages, a progress bar."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch


class InputError(Exception):
    """Something the person can put right: one message on stderr, exit code 2, no traceback."""


def device_of(name: str) -> torch.device:
    """The device that `--device` names; "auto" is the first GPU, or the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu or cuda, got {name}")
    return device


def extra(module: str, package: str, command: str = "demo", name: str = "demo") -> ModuleType:
    """Imports a module that only one command needs; `name` is the extra of this package that brings it.

    Raises:
        InputError: it cannot be imported; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        reason = why_not_imported(error)
        raise InputError(f"the {command} needs {package} ({reason}): pip install 'sttm_kernels[{name}]'") from None


def why_not_imported(error: BaseException) -> str:
    """What began an error of an import; timm and transformers import torchvision, which has to go with PyTorch."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).splitlines()[0]
    if "torchvision" not in text or isinstance(error, ModuleNotFoundError):
        return text
    return f"{text}: the torchvision that is installed was built for another PyTorch than {torch.__version__}"


def progress(items: Iterable[Any], total: int, title: str, unit: str = "frame") -> Any:
    """The same items, with a bar on a terminal if there is more than a second of work."""
    tqdm = extra("tqdm", "tqdm").tqdm
    return tqdm(items, total=total, desc=title, unit=unit, delay=1, leave=False, disable=None)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch on so many CPU threads. On frames, threads that wait for each other cost more than they give, on a busy
    machine many times more: there one is best."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
