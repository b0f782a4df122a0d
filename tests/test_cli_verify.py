"""`sttm-kernels verify`: it passes here, and says so of every fault that is planted."""

from __future__ import annotations

import json

import pytest
import torch

from sttm_kernels import dispatch, verify
from sttm_kernels.cli import main

SMALL = ["--impl", "torch", "--device", "cpu", "--shapes", "2x9x4x8x5"]


def rows(capsys):
    return json.loads(capsys.readouterr().out)["rows"]


@pytest.mark.unpoisoned
def test_every_verb_passes(capsys):
    assert main(["verify", "--json", *SMALL, "1x1x1x3x1"]) == 0
    found = rows(capsys)
    assert {row["verdict"] for row in found} == {"pass"}
    assert {row["verb"] for row in found} == set(dispatch.VERBS)
    assert {row["check"] for row in found if row["verb"] == "merge"} == {
        "float32", "bfloat16", "float16", "float64", "same bits", "not finite", "gradcheck", "compile",
    }  # fmt: skip
    for row in found:
        assert row["cases"] > 0
        assert row["ratio"] is None or 0 <= row["ratio"] <= 1


@pytest.mark.parametrize("verb", dispatch.VERBS)
def test_a_planted_fault_is_reported(verb, capsys, monkeypatch):
    monkeypatch.setenv("STTM_VERIFY_PLANT", verb)
    kernel = dispatch.kernel
    assert main(["verify", "--quick", "--verb", verb, *SMALL]) == 1
    assert dispatch.kernel is kernel
    out = capsys.readouterr().out
    assert "FAIL" in out
    if verb not in ("assign", "match", "assign_merge", "compose"):
        assert "[1, " in out  # the coordinate of the element
        assert "must be" in out
    assert "2x9x4x8x5" in out


def test_what_cannot_run_is_skipped_and_says_why(capsys):
    assert main(["verify", "--device", "cpu", "--impl", "triton", "--verb", "merge", "--json"]) == 0
    (row,) = rows(capsys)
    assert (row["verdict"], row["message"]) == ("skipped", dispatch.why_not("merge", "triton", "cpu"))


def test_the_seed_changes_the_inputs(capsys):
    errors = []
    for seed in ("0", "1", "1"):
        assert main(["verify", "--json", "--quick", "--verb", "soft_merge", "--seed", seed, *SMALL]) == 0
        errors.append(rows(capsys)[0]["error"])
    assert errors[0] != errors[1]
    assert errors[1] == errors[2]


def test_out_of_memory_skips_the_row(capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(verify, "check_unmerge", full)
    assert main(["verify", "--json", "--quick", "--verb", "unmerge", *SMALL]) == 0
    first, *rest = rows(capsys)
    assert (first["verdict"], "out of memory" in first["message"]) == ("skipped", True)
    assert rest[-1]["verdict"] == "pass"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "1x2x3"], "--shapes must be BxNxKxDxC"),
        (["--shapes", "1x2x3x4x0"], "--shapes must be BxNxKxDxC"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--device", "meta"], "--device must be cpu or cuda, got meta"),
        (["--device", "toaster"], "--device toaster cannot be used"),
        (["--verb", "mrege"], "invalid choice: 'mrege'"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert main(["verify", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_plant_must_be_a_verb(capsys, monkeypatch):
    monkeypatch.setenv("STTM_VERIFY_PLANT", "sort")
    assert main(["verify", "--quick"]) == 2
    assert "STTM_VERIFY_PLANT must be one of" in capsys.readouterr().err
