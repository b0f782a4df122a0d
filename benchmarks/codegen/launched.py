"""What was launched under Triton's interpreter, given to Triton's compiler.

The interpreter runs a kernel as Python, which reads an absent argument only where a loop or a branch gets there; the
compiler visits everything. `noting` notes every different launch while it runs; `problems` compiles them as far as
Triton's own intermediate representation, in a process that is not interpreting.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.codegen.recording import Specialization, specialization
from sttm_kernels.impl.triton.config import MAX_INT32, Config
from sttm_kernels.impl.triton.launch import launching_instead

ROOT = Path(__file__).resolve().parents[2]
FORMS_PER_PROCESS = 100
"""So many are worth another process."""


class Launch(NamedTuple):
    """All that the compiler knows of a launch.

    Attributes:
        module, kernel: names.
        args: of a tensor the dtype; of an integer 1, 16 or 2^31, which are compiled as it is; others as they are.
        constexprs: with the block sizes, sorted.
        options: warps and stages.
    """

    module: str
    kernel: str
    args: tuple[Any, ...]
    constexprs: tuple[tuple[str, Any], ...]
    options: tuple[int, int]


def _seen_as(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return arg.dtype
    if type(arg) is int and arg != 1:
        return 16 if -MAX_INT32 - 1 <= arg <= MAX_INT32 else MAX_INT32 + 1
    return arg


@contextlib.contextmanager
def noting(found: dict[Launch, str], where: Callable[[], str]) -> Iterator[None]:
    """Within it launches run as ever, and the first of each kind is in `found` with what `where()` says."""

    def note(kernel: Any, grid: Any, args: Any, config: Config, constexprs: dict[str, Any]) -> None:
        constants = {**config.blocks, **constexprs}
        one = Launch(
            kernel.fn.__module__, kernel.__name__, tuple(map(_seen_as, args)), tuple(sorted(constants.items())),
            (config.num_warps, config.num_stages),
        )  # fmt: skip
        if one not in found:
            found[one] = where()
        kernel[grid](*args, **config.blocks, **constexprs, **config.options)

    with launching_instead(note):
        yield


def form(one: Launch) -> Specialization:
    """How a launch is compiled."""
    kernel = getattr(importlib.import_module(one.module), one.kernel)
    args = tuple(torch.empty(0, dtype=arg, device="meta") if isinstance(arg, torch.dtype) else arg for arg in one.args)
    return specialization(one.kernel, kernel, args, Config(*one.options, {}), dict(one.constexprs))


def problem(one: Launch) -> str | None:
    """Why the front end refuses a launch; None if it does not."""
    from benchmarks.codegen import table

    try:
        table.front_end(90, form(one))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[-400:]}"
    return None


def problems(launches: Sequence[Launch]) -> list[str | None]:
    """`problem` of each, asked of another process."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "launches"), Path(folder, "problems")
        asked.write_bytes(pickle.dumps(list(launches)))
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "benchmarks.codegen.launched", str(asked), str(answered)]
        subprocess.run(command, env=environment, check=True)
        return pickle.loads(answered.read_bytes())


def main(asked: str, answered: str) -> None:
    launches = pickle.loads(Path(asked).read_bytes())
    jobs = min(os.cpu_count() or 1, 1 + len(launches) // FORMS_PER_PROCESS)
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        Path(answered).write_bytes(pickle.dumps(pool.map(problem, launches, chunksize=8)))


if __name__ == "__main__":
    main(*sys.argv[1:])
