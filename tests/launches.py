"""A plugin of pytest: what tests launch under Triton's interpreter must compile, or the run fails.

Every process notes its launches, and the one that answers for the run has them compiled in the end.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from typing import Any

import pytest
import triton

from benchmarks.codegen import launched


class Compiled:
    def __init__(self) -> None:
        self.found: dict[launched.Launch, str] = {}
        self.refused: list[str] = []
        self.noting = contextlib.ExitStack()

    def pytest_sessionstart(self) -> None:
        self.noting.enter_context(launched.noting(self.found, lambda: os.environ.get("PYTEST_CURRENT_TEST", "")))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A process of pytest-xdist hands over what it noted; one that broke has nothing, and fails the run anyway."""
        theirs = pickle.loads(getattr(node, "workeroutput", {}).get("launches", pickle.dumps({})))
        self.found = {**theirs, **self.found}

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.noting.close()
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["launches"] = pickle.dumps(self.found)
            return
        found = sorted(self.found, key=str)
        for one, problem in zip(found, launched.problems(found) if found else (), strict=True):
            if problem is not None:
                self.refused.append(f"{one}\n  launched by {self.found[one]}\n  {problem}")
        if self.refused:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.refused:
            terminalreporter.section("launches that do not compile", red=True)
            for text in self.refused:
                terminalreporter.line(text)
        count, version = len(self.found), triton.__version__
        terminalreporter.line(f"{len(self.refused)} of {count} different launches do not compile, Triton {version}")
