"""What `sttm-kernels tune` measured on a device: which implementation `impl="auto"` takes for a shape."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = "STTM_TUNED"
"""The environment variable that names the folder of tables; default: `sttm_kernels` in the user's caches."""
SCHEMA = 1
MARGIN = 0.9
"""Of the time of what `auto` takes without a table: another implementation must take less."""
LARGEST = 1 << 31
"""More than any extent."""
ALIKE = {"float16": "bfloat16"}
"""Dtypes that are as fast as another, which is measured."""


class NobodysHome(OSError):
    """There is no folder for tables."""


class Shape(NamedTuple):
    """Of one item: it then has the same implementation alone and in a batch."""

    tokens: int
    groups: int
    features: int


Table = Mapping[tuple[str, str], Sequence[tuple[Shape, str]]]
"""By verb and dtype: shapes, and what was fastest."""


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """The name of a device in that of a file: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "device"


def path(device: torch.device) -> Path:
    """The file of a device's table, which need not exist."""
    folder, caches = os.environ.get(FOLDER), os.environ.get("XDG_CACHE_HOME")
    try:
        place = Path(folder).expanduser() if folder else Path(caches or "~/.cache").expanduser() / "sttm_kernels"
    except RuntimeError as error:  # of expanduser
        raise NobodysHome(errno.ENOENT, f"{error}: set {FOLDER}") from None
    return place / f"{slug(device_name(device))}.json"


def versions() -> dict[str, str]:
    """What a table holds for: with another version of any of these it is not used."""
    found = {"torch": str(torch.__version__)}
    for package in ("sttm_kernels", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found


def read(device: torch.device) -> tuple[Table | None, str | None]:
    """The table of a device, and why there is none; neither if none was ever measured."""
    try:
        file = path(device)
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, NobodysHome):
        return None, None
    except (OSError, ValueError, RecursionError) as error:
        return None, f"{file} cannot be read: {error}"
    try:
        if found["schema"] != SCHEMA or found["versions"] != versions():
            return None, f"{file} was measured with {found['versions']}, this is {versions()}: run sttm-kernels tune"
        if found["device"] != device_name(device):
            return (
                None,
                f"{file} was measured on {found['device']}, this is {device_name(device)}: run sttm-kernels tune",
            )
        table: dict[tuple[str, str], list[tuple[Shape, str]]] = {}
        for row in found["rows"]:
            shape = Shape(*(int(row[name]) for name in Shape._fields))
            if not all(0 < extent < LARGEST for extent in shape):
                raise ValueError(f"a shape of {row}")
            table.setdefault((str(row["verb"]), str(row["dtype"])), []).append((shape, str(row["impl"])))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        return None, f"{file} is not a table of sttm-kernels tune: {type(error).__name__}: {error}"
    return table, None


@cache
def table(device: torch.device) -> Table | None:
    """The table that rules on a device, read once in a process; a warning says why one that is there does not."""
    found, reason = read(device)
    if reason is not None:
        warnings.warn(f"impl='auto' goes without a table: {reason}", stacklevel=2)
    return found


def rounded(shape: Sequence[int]) -> Shape:
    """Each extent to a power of two: so many choices are remembered, not one for every length."""
    return Shape(*(1 << max(extent - 1, 0).bit_length() for extent in shape))


@cache
def fastest(verb: str, device: torch.device, dtype: torch.dtype, shape: Shape) -> str | None:
    """What was fastest at the nearest shape that was measured; None if the verb was not."""
    name = str(dtype).removeprefix("torch.")
    rows = (table(device) or {}).get((verb, ALIKE.get(name, name)), ())

    def far(row: tuple[Shape, str]) -> float:
        return sum(abs(math.log2(a / b)) for a, b in zip(row[0], shape, strict=True))

    return min(rows, key=far)[1] if rows else None


def writable(device: torch.device) -> Path:
    """The file of a device's table. Raises `OSError` where none can be written."""
    file = path(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=file.parent).close()
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a directory")
    return file


def write(device: torch.device, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> Path:
    """Makes rows of `verb`, `dtype`, `Shape` and `impl` the table of a device, in one step."""
    file, whose = writable(device), {"versions": versions(), "device": device_name(device)}
    text = json.dumps({"schema": SCHEMA, **whose, **about, "rows": list(rows)}, indent=1)
    # Not named after the process: those of containers that share a folder have the same numbers.
    number, beside = tempfile.mkstemp(suffix=".tmp", prefix=f"{file.stem}.", dir=file.parent)
    try:
        with open(number, "w", encoding="utf-8") as temporary:
            temporary.write(text + "\n")
        os.chmod(beside, 0o644)
        os.replace(beside, file)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    forget()
    return file


def remove(device: torch.device) -> bool:
    """Whether there was a table."""
    try:
        path(device).unlink()
    except FileNotFoundError:
        return False
    finally:
        forget()
    return True


def forget() -> None:
    """Tables are read again."""
    table.cache_clear()
    fastest.cache_clear()
