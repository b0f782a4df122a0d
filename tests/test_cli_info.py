"""`sttm-kernels info`, and the command around it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sttm_kernels
from sttm_kernels import dispatch
from sttm_kernels.cli import main


def test_json_has_every_verb_and_implementation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {"versions", "extension", "cpu_extension", "devices", "verbs"}
    assert facts["versions"]["sttm_kernels"] == sttm_kernels.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["python"] == platform.python_version()
    assert "triton" in facts["versions"]
    assert facts["devices"][0]["device"] == "cpu"
    assert len(facts["devices"]) == 1 + torch.cuda.device_count()
    assert set(facts["verbs"]) == set(dispatch.VERBS)
    for verb, by_device in facts["verbs"].items():
        assert "cpu" in by_device
        for device, found in by_device.items():
            assert set(found) == {"auto", *dispatch.IMPLEMENTATIONS}
            assert found["auto"] == dispatch.choose(verb, device, torch.float32)
            for impl in dispatch.IMPLEMENTATIONS:
                assert found[impl] == dispatch.why_not(verb, impl, device)


def test_the_table_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    table = capsys.readouterr().out
    for word in (*dispatch.VERBS, *dispatch.IMPLEMENTATIONS, torch.__version__, sttm_kernels.__version__):
        assert word in table
    reason = dispatch.why_not("merge", "cuda", "cpu")
    assert reason is not None
    assert f"no cuda: {reason}" in " ".join(table.split())


def test_kernels_that_cannot_be_loaded_are_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(verb: str, impl: str, device: str) -> str | None:
        if impl == "cuda":
            raise ImportError("undefined symbol: launch")
        return None

    monkeypatch.setattr(dispatch, "why_not", broken)
    monkeypatch.setattr(dispatch, "choose", lambda *_: broken("merge", "cuda", "cpu"))
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["verbs"]["merge"]["cpu"]
    assert found["cuda"] == "cannot be loaded: ImportError: undefined symbol: launch"
    assert found["auto"] is None
    assert found["torch"] is None
    assert main(["info"]) == 0


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "--no-such-option"], ["info", "extra"]])
def test_a_wrong_command_line_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["info", "--help"], ["demo", "--help"]])
def test_help_and_version_exit_with_0(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert capsys.readouterr().out


def test_it_needs_none_of_the_demo_packages() -> None:
    code = """
import sys
for name in ("av", "PIL", "matplotlib", "tqdm"):
    sys.modules[name] = None
from sttm_kernels.cli import main
assert main(["info"]) == 0
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True, capture_output=True)


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m sttm_kernels info --json | true"
    done = subprocess.run(
        ["bash", "-c", command], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
