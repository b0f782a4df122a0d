"""`sttm-kernels tune`, and how `impl="auto"` goes by its table."""

from __future__ import annotations

import json
import os
import threading
import warnings
from pathlib import Path

import pytest
import torch

import sttm_kernels as sttm
from sttm_kernels import crossover, dispatch
from sttm_kernels.bench import tune
from sttm_kernels.bench.workloads import Workload
from sttm_kernels.cli import main
from sttm_kernels.crossover import Shape

CPU = torch.device("cpu")
if dispatch.interpreting() or dispatch.on_host():
    pytest.skip("what runs there is not tuned", allow_module_level=True)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(crossover.FOLDER, str(tmp_path / "tuned"))
    crossover.forget()
    yield tmp_path / "tuned"
    crossover.forget()


def row(verb, impl, tokens=64, groups=8, features=16, dtype="float32"):
    return {"verb": verb, "dtype": dtype, "tokens": tokens, "groups": groups, "features": features, "impl": impl}


def rule(*rows):
    crossover.write(CPU, rows, {})


@pytest.fixture
def taken(monkeypatch):
    """Which implementation ran each operator, by name."""
    found, kernel = [], dispatch.kernel

    def recording(name, impl, device, dtype):
        found.append((name, dispatch.choose(name, device, dtype) if impl == "auto" else impl))
        return kernel(name, impl, device, dtype)

    monkeypatch.setattr(dispatch, "kernel", recording)
    return found


def every_verb(impl="auto", N=64, K=8, C=16, B=2, dtype=torch.float32):
    x = torch.randn(B, N, C, dtype=dtype, requires_grad=True)
    meta = torch.randn(B, K, C, dtype=dtype, requires_grad=True)
    plan = sttm.match(x.detach(), N - K if N - K <= N // 2 else N // 2, impl=impl)
    merged = sttm.merge(x, plan, impl=impl)
    full = sttm.unmerge(merged.x, plan, impl=impl)
    both, _ = sttm.assign_merge(x, x, meta, impl=impl)
    weight = sttm.assign(x, meta, impl=impl).weight
    soft = sttm.soft_merge(x, x, meta, impl=impl)
    (full.sum() + both.x.sum() + weight.sum() + soft.x.sum()).backward()


def test_every_verb_goes_by_the_table_forward_and_backward(taken):
    rule(*(row(verb, "torch") for verb in dispatch.VERBS))
    every_verb()
    names = {
        "match",
        "merge",
        "unmerge",
        "assign",
        "assign_merge",
        "soft_merge",
        "assign_backward",
        "soft_merge_backward",
    }
    assert names | {"merge_backward"} == {name for name, _ in taken}
    assert {impl for _, impl in taken} == {"torch"}


def test_an_implementation_that_is_named_is_taken(taken):
    rule(*(row(verb, "reference") for verb in dispatch.VERBS))
    every_verb("torch")
    assert {impl for _, impl in taken} == {"torch"}


@pytest.mark.parametrize(
    ("shape", "impl"),
    [((64, 8, 16), "torch"), ((100, 8, 16), "torch"), ((1000, 8, 16), "reference"), ((64, 9, 2000), "reference")],
)
def test_the_nearest_shape_decides(shape, impl):
    rule(row("assign", "torch"), row("assign", "reference", tokens=2048), row("assign", "reference", features=1024))
    assert dispatch.choose("assign", CPU, torch.float32, crossover.rounded(shape)) == impl


def test_a_batch_decides_nothing(taken):
    rule(row("match", "torch"), row("match", "reference", tokens=1024))
    for B in (1, 9, 200):
        sttm.match(torch.randn(B, 64, 16), 8)
    assert taken == [("match", "torch")] * 3


def test_what_was_not_measured_is_as_without_a_table():
    rule(row("assign", "torch", dtype="bfloat16"))
    usual = dispatch.choose("assign", CPU, torch.float32)
    here = Shape(64, 8, 16)
    assert dispatch.choose("assign", CPU, torch.float32, here) == usual
    assert dispatch.choose("merge", CPU, torch.bfloat16, here) == dispatch.choose("merge", CPU, torch.bfloat16)
    assert dispatch.choose("assign", CPU, torch.bfloat16, here) == "torch"
    assert dispatch.choose("assign", CPU, torch.float16, here) == "torch"  # as fast as bfloat16


def test_what_cannot_run_is_not_taken():
    rule(row("assign", "triton"), row("merge", "no such thing"))
    for verb in ("assign", "merge"):
        assert dispatch.choose(verb, CPU, torch.float32, Shape(64, 8, 16)) == dispatch.choose(verb, CPU, torch.float32)


def test_a_compiled_function_goes_by_the_table(taken):
    rule(row("merge", "torch"))
    x, plan = torch.randn(2, 64, 16), sttm.match(torch.randn(2, 64, 16), 8, impl="reference")
    torch.compile(lambda x: sttm.merge(x, plan).x, backend="aot_eager")(x)
    assert taken[-1] == ("merge", "torch")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "not a table"),
        ('{"schema": 1}', "not a table"),
        ('{"schema": 0, "versions": {}}', "was measured with"),
        ('{"schema": 1, "versions": {"torch": "1.0"}, "rows": []}', "was measured with"),
        ("[" * 100_000, "cannot be read"),
        ({"tokens": 0}, "not a table"),
        ({"tokens": 1e400}, "not a table"),
        ({"groups": 10**400}, "not a table"),
        ({"features": None}, "not a table"),
        (None, "was measured on another"),
    ],
)
def test_a_table_that_cannot_rule_is_said_once(text, said, folder, capsys):
    if not isinstance(text, str):
        whose = {"device": "another" if text is None else crossover.device_name(CPU), "versions": crossover.versions()}
        text = json.dumps({"schema": 1, **whose, "rows": [row("match", "torch") | (text or {})]})
    folder.mkdir()
    crossover.path(CPU).write_text(text)
    x = torch.randn(1, 8, 4)
    with pytest.warns(UserWarning, match=f"without a table: .*{said}"):
        sttm.match(x, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sttm.match(x, 2)
    assert main(["info"]) == 0
    assert said in " ".join(capsys.readouterr().out.split())


def test_the_command_measures_and_removes(folder, capsys, monkeypatch):
    small = [
        Workload("m", 1, 16, 8, r=8, unmerge=True, only=tune.MATCHING),
        Workload("a", 1, 16, 8, K=4, only=tune.ASSIGNING),
    ]
    monkeypatch.setattr(tune, "workloads", lambda device: small)
    assert main(["tune", "--device", "cpu", "--seconds", "0.001"]) == 0
    file = crossover.path(CPU)
    found = json.loads(file.read_text())
    assert {(r["verb"], r["dtype"]) for r in found["rows"]} == {
        (verb, dtype) for verb in (*tune.MATCHING, *tune.ASSIGNING) for dtype in ("float32", "bfloat16")
    }
    for r in found["rows"]:
        assert r["us"][r["impl"]] <= min(r["us"].values()) / crossover.MARGIN
    assert [r["groups"] for r in found["rows"][:4]] == [8, 8, 8, 4]
    assert crossover.table(CPU)
    assert main(["info", "--json"]) == 0
    shown = capsys.readouterr().out
    tuned = json.loads(shown[shown.index("{\n") :])["devices"][0]["tuned"]
    assert tuned == {"rules": True, "file": str(file), "reason": None}
    assert list(folder.iterdir()) == [file]  # nothing half written
    assert main(["tune", "--device", "cpu", "--reset"]) == 0
    assert not file.exists()
    assert crossover.table(CPU) is None
    assert main(["tune", "--device", "cpu", "--reset"]) == 0
    assert "there is no" in capsys.readouterr().out


def test_an_implementation_that_fails_is_left_out(monkeypatch):
    def failing(name, impl, device, dtype, kernel=dispatch.kernel):
        if impl == "cpu":
            raise RuntimeError("no")
        return kernel(name, impl, device, dtype)

    monkeypatch.setattr(dispatch, "kernel", failing)
    works = [Workload("m", 1, 16, 8, r=8, only=("match",))]
    (found,) = tune.measure(works, CPU, torch.float32, 0.001)
    assert list(found["us"]) == ["torch"]
    assert found["impl"] == "torch"


@pytest.mark.parametrize("arguments", [["--seconds", "0"], ["--device", "tpu"], ["--dtype", "float64"]])
def test_bad_arguments(arguments, capsys):
    assert main(["tune", *arguments]) == 2
    assert "error:" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(crossover.FOLDER, str(tmp_path / "file"))
    monkeypatch.setattr(tune, "workloads", lambda device: pytest.fail("measures for nothing"))
    assert main(["tune", "--device", "cpu"]) == 2
    assert "error:" in capsys.readouterr().err


def test_nobodys_home(monkeypatch, capsys):
    for name in (crossover.FOLDER, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody(path):
        raise RuntimeError("could not determine home directory")

    monkeypatch.setattr(Path, "expanduser", nobody)
    assert crossover.read(CPU) == (None, None)
    for arguments in ([], ["--reset"]):
        assert main(["tune", "--device", "cpu", *arguments]) == 2
        assert f"set {crossover.FOLDER}" in capsys.readouterr().err
    assert main(["info"]) == 0


def test_several_write_at_once_and_one_that_fails(folder, monkeypatch):
    started, again = threading.Barrier(4), os.replace

    def waiting(*names):
        started.wait(60)
        again(*names)

    monkeypatch.setattr(os, "replace", waiting)
    threads = [threading.Thread(target=rule, args=(row("match", "torch"),) * (n + 1)) for n in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert crossover.read(CPU)[0]
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        rule(row("match", "reference"))
    assert list(folder.iterdir()) == [crossover.path(CPU)]
    assert {impl for _, impl in crossover.read(CPU)[0]["match", "float32"]} == {"torch"}
