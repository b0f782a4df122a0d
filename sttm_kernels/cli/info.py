"""`sttm-kernels info`: versions, devices, and which implementation can run which verb here."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import textwrap
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import sttm_kernels
from sttm_kernels import crossover, dispatch

HELP = "Show versions, devices, and what can run here, or why not."
OPTIONAL = ("triton", "av", "pillow", "tqdm", "timm", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if arguments.json else _table(facts))
    return 0


def collect() -> dict[str, Any]:
    """What `info --json` prints.

    Returns:
        "versions": package to version, None if it is not installed, and "cuda" as PyTorch was built for it;
        "extension": "reason", why there are no CUDA kernels, or None; then also "nvcc", "architectures" and "host";
        "cpu_extension": "reason", why there are no CPU kernels, or None; then also "compiler" and "isa";
        "devices": a list of dicts with "device", "name" and "tuned", for GPUs also "capability" and "memory_bytes";
        "tuned" says whether a table of `sttm-kernels tune` rules, which "file" it is or would be, and "reason", why one
        that is there does not;
        "verbs": for every verb and device type ("cpu", "cuda" if there is one) "auto", the implementation that is
        taken for float32 (None if the choice fails), and for every implementation None if it can run, or the reason
        why it cannot.
    """
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "versions": {
            "sttm_kernels": sttm_kernels.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{package: _version(package) for package in OPTIONAL},
        },
        "extension": _extension("cuda"),
        "cpu_extension": _extension("cpu"),
        "devices": _devices(),
        "verbs": {verb: {kind: _implementations(verb, kind) for kind in kinds} for verb in dispatch.VERBS},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _extension(impl: str) -> dict[str, Any]:
    try:
        return importlib.import_module(f"sttm_kernels.impl.{impl}").build_info()
    except Exception as error:
        return {"reason": f"cannot be loaded: {type(error).__name__}: {error}"}


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "tuned": _tuned(torch.device("cpu")),
        }
    ]
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "device": f"cuda:{i}",
                "name": about.name,
                "capability": f"{about.major}.{about.minor}",
                "memory_bytes": about.total_memory,
                "tuned": _tuned(torch.device("cuda", i)),
            }
        )
    return devices


def _tuned(device: torch.device) -> dict[str, Any]:
    table, reason = crossover.read(device)
    try:
        file = str(crossover.path(device))
    except crossover.NobodysHome as error:
        file = f"none, {error.strerror}"
    return {"rules": table is not None, "file": file, "reason": reason}


def _implementations(verb: str, kind: str) -> dict[str, str | None]:
    reasons = {impl: _why_not(verb, impl, kind) for impl in dispatch.IMPLEMENTATIONS}
    return {"auto": _auto(verb, kind), **reasons}


def _auto(verb: str, kind: str) -> str | None:
    try:
        return dispatch.choose(verb, kind, torch.float32)
    except Exception:
        return None


def _why_not(verb: str, impl: str, kind: str) -> str | None:
    """As `dispatch.why_not`, of kernels that cannot even be loaded too: to report that is this command's job."""
    try:
        return dispatch.why_not(verb, impl, kind)
    except Exception as error:
        return f"cannot be loaded: {type(error).__name__}: {error}"


def _table(facts: dict[str, Any]) -> str:
    lines = ["versions"]
    lines += [f"  {package:<14}{found or 'not installed'}" for package, found in facts["versions"].items()]
    built = facts["extension"]
    lines += ["", "CUDA kernels"]
    if built["reason"] is None:
        by_nvcc = f"nvcc {built['nvcc']}, compute capabilities {', '.join(built['architectures'])}"
        lines.append(f"  {'compiled for the CPU' if built['host'] else by_nvcc}")
    else:
        lines += textwrap.wrap(built["reason"], 100, initial_indent="  ", subsequent_indent="  ")
    built = facts["cpu_extension"]
    about = built["reason"] or f"{built['isa']}, compiler {built['compiler']}"
    lines += ["", "CPU kernels", *textwrap.wrap(about, 100, initial_indent="  ", subsequent_indent="  ")]
    lines += ["", "devices"]
    for device in facts["devices"]:
        more = f", compute capability {device['capability']}" if "capability" in device else ""
        more += f", {device['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in device else ""
        lines.append(f"  {device['device']:<14}{device['name']}{more}")
        tuned = device["tuned"]
        if tuned["rules"] or tuned["reason"]:
            about = f"impl='auto' goes by {tuned['file']}" if tuned["rules"] else f"no table: {tuned['reason']}"
            lines += textwrap.wrap(about, 100, initial_indent=" " * 16, subsequent_indent=" " * 16)

    kinds = next(iter(facts["verbs"].values()))
    for kind in kinds:
        lines += ["", f"verbs on {kind}, float32 (* what impl='auto' takes)"]
        lines.append("  " + "".join(f"{name:<14}" for name in ("", *dispatch.IMPLEMENTATIONS)).rstrip())
        reasons: dict[str, list[str]] = {}
        for verb, by_kind in facts["verbs"].items():
            cells = []
            for impl in dispatch.IMPLEMENTATIONS:
                reason = by_kind[kind][impl]
                cells.append("no" if reason else "yes *" if by_kind[kind]["auto"] == impl else "yes")
                if reason:
                    reasons.setdefault(f"{impl}: {reason}", []).append(verb)
            lines.append("  " + "".join(f"{cell:<14}" for cell in (verb, *cells)).rstrip())
        for reason, verbs in reasons.items():
            which = "" if len(verbs) == len(dispatch.VERBS) else f" ({', '.join(verbs)})"
            lines += textwrap.wrap(f"no {reason}{which}", 100, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)
