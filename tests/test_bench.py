"""`sttm-kernels bench`: every row is checked before it is timed, and whatever happens, finished rows are kept."""

from __future__ import annotations

import math
import subprocess

import pytest
import torch

from sttm_kernels import functional
from sttm_kernels.bench import operations, results, rivals, runner, scaling, timing
from sttm_kernels.bench.workloads import SCALING, SMOKE, SUITES, Workload
from sttm_kernels.cli import main

CPU = torch.device("cpu")


@pytest.fixture
def bench(tmp_path, capsys, monkeypatch):
    """Runs the command on one smoke workload; returns the exit code, the rows and what was printed."""
    monkeypatch.setattr(timing, "CACHE_BYTES", {"cpu": 1 << 16})
    out = tmp_path / "rows.csv"
    threads = str(torch.get_num_threads())

    def run(*arguments, suite="smoke", workload="smoke match"):
        command = ["bench", "--suite", suite, "--workload", workload, "--device", "cpu", "--seconds", "1e-3"]
        code = main([*command, "--threads", threads, "--out", str(out), *arguments])
        rows = results.read(out) if out.exists() and out.read_text().startswith("schema") else []
        printed = capsys.readouterr()
        return code, rows, printed.out + printed.err

    run.out = out
    return run


def test_every_row_is_checked_timed_and_says_where_it_comes_from(bench):
    code, rows, printed = bench("--no-compile", "--impl", "torch", "reference")
    assert code == 0
    assert {row["check"] for row in rows if row["impl"] == "product alone"} == {"none"}
    assert {row["check"] for row in rows if row["impl"] != "product alone"} == {"passed"}
    assert len({row["run"] for row in rows}) == 1
    both = {row["impl"]: row for row in rows if row["operation"] == "match + merge"}
    assert both.keys() == {"torch", "reference", "ToMe eager"}
    for row in rows:
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert int(row["peak_bytes"]) > 0
        assert float(row["fraction_of_floor"]) == pytest.approx(float(row["floor_us"]) / float(row["p50_us"]), rel=0.01)
        assert row["device"] == timing.device_name(CPU)
        assert (row["torch"], row["schema"]) == (torch.__version__, "1")
    assert f"{len(rows)} rows are in" in printed


@pytest.mark.parametrize("work", SMOKE, ids=lambda work: work.name)
def test_operations_pass_their_checks_in_half_precision_too(work):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = operations.draw(work, CPU, dtype, 0)
        for operation in operations.operations(work, ["torch"], CPU, dtype, compiled=False):
            assert runner.checked(operation, inputs) in ("passed", "none"), (operation.name, operation.impl, dtype)


def test_rivals_under_compile_pass_too(bench):
    code, rows, _ = bench(workload="smoke assign")
    compiled = [row for row in rows if row["impl"] == "dense compiled"]
    assert code == 0
    assert len(compiled) == 4
    assert {row["check"] for row in compiled} == {"passed"}


@pytest.mark.parametrize(
    ("verb", "operation"),
    [("merge", "merge"), ("match", "match"), ("match", "match + merge"), ("unmerge", "unmerge"), ("assign", "assign"),
     ("assign", "assign l2"), ("assign_merge", "assign_merge"), ("soft_merge", "soft_merge")],
)  # fmt: skip
def test_a_wrong_result_has_no_time(monkeypatch, verb, operation):
    """Of the package: one element of what the verb returns is spoilt."""
    work = next(work for work in SMOKE if bool(work.K) == (verb in ("assign", "assign_merge", "soft_merge"))
                and work.unmerge == (verb == "unmerge"))  # fmt: skip
    inputs = operations.draw(work, CPU, torch.float32, 0)
    right = getattr(functional, verb)

    def wrong(*args, **kwargs):
        found = right(*args, **kwargs)
        first = torch.utils._pytree.tree_leaves(found)[0]
        first.view(-1)[0] += 1
        return found

    monkeypatch.setattr(functional, verb, wrong)
    found = operations.operations(work, ["torch"], CPU, torch.float32, compiled=False)
    (spoilt,) = (each for each in found if (each.name, each.impl) == (operation, "torch"))
    assert runner.checked(spoilt, inputs).startswith("failed: ")


@pytest.mark.parametrize("rival", [rivals.tome_match_merge, rivals.index_add_merge, rivals.one_hot_merge,
                                   rivals.scatter_reduce_merge, rivals.tomesd_match_merge_unmerge,
                                   rivals.dense_soft_merge, rivals.dense_assign_merge,
                                   rivals.product_and_row_maximum], ids=lambda rival: rival.__name__)  # fmt: skip
def test_a_rival_that_is_wrong_has_no_time(monkeypatch, rival):
    def wrong(*args):
        found = rival(*args)
        values = found if isinstance(found, torch.Tensor) else max(found, key=torch.is_floating_point)
        values.view(-1)[0] += 1
        return found

    monkeypatch.setattr(rivals, rival.__name__, wrong)
    found = []
    for work in SMOKE:
        inputs = operations.draw(work, CPU, torch.float32, 0)
        for operation in operations.operations(work, [], CPU, torch.float32, compiled=False):
            found.append(runner.checked(operation, inputs))
    assert any(check.startswith("failed: AssertionError") for check in found), found


def test_packages_that_find_the_nearest_are_rivals_where_they_are_installed(monkeypatch, tmp_path):
    """By their names; an older version that is given squares too; one that is wrong. On a GPU alone."""
    work = next(work for work in SMOKE if work.K)
    inputs = operations.draw(work, CPU, torch.float32, 0)

    def of(device, name="assign l2"):
        found = operations.operations(work, [], torch.device(device), torch.float32, compiled=False)
        return {each.impl: runner.checked(each, inputs) for each in found if each.name == name}

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        rivals, "NEAREST", {"old": "nearest_old.kernels", "new": "nearest_new.a.b", "gone": "nearest_gone"}
    )
    for module, more, off in (("nearest_old.kernels", ", x_sq", 0), ("nearest_new.a.b", "", 1)):
        path = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True)
        path.write_text(
            f"import torch\ndef euclid_assign_triton(x, centroids{more}, out=None):\n"
            f"    return (torch.cdist(x, centroids).argmin(-1) + {off}) % centroids.shape[1]\n"
        )
    found = of("cuda")
    assert found.keys() == {"old", "new"}
    assert found["old"] == "passed"
    assert found["new"].startswith("failed: AssertionError")
    assert of("cpu") == {}


def test_a_failed_check_is_a_row_and_the_exit_code(bench, monkeypatch):
    monkeypatch.setattr(rivals, "index_add_merge", lambda x, index, num_groups: x[:, :num_groups])
    code, rows, printed = bench("--no-compile")
    assert code == 1
    failed = [row for row in rows if row["check"].startswith("failed: AssertionError: x[0, ")]
    assert {row["impl"] for row in failed} == {"index_add"}
    assert {row["p50_us"] for row in failed} == {""}
    assert "2 failed their check" in printed


def test_out_of_memory_is_a_row_and_the_run_goes_on(bench, monkeypatch):
    def exhausted(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(rivals, "one_hot_merge", exhausted)
    code, rows, _ = bench("--no-compile")
    assert code == 0
    short = [row for row in rows if row["check"].startswith("out of memory: ")]
    assert {(row["operation"], row["impl"]) for row in short} == {
        ("merge", "one-hot bmm"), ("merge forward + backward", "one-hot bmm"),
    }  # fmt: skip
    assert rows[-1]["check"] == "passed"


def test_an_error_of_a_compiler_is_a_row_and_the_run_goes_on(bench, monkeypatch):
    class CompilationError(Exception):
        """As Triton's: of no class that PyTorch's errors have."""

    def refused(*args):
        raise CompilationError("at 3:7")

    monkeypatch.setattr(rivals, "one_hot_merge", refused)
    _, rows, _ = bench("--no-compile")
    checks = {row["check"] for row in rows if row["impl"] == "one-hot bmm"}
    assert checks == {"failed: CompilationError: at 3:7"}
    assert rows[-1]["check"] == "passed"


def test_a_matrix_that_does_not_fit_is_not_tried_on_a_cpu(bench, monkeypatch):
    answers = iter([math.inf])  # for the inputs
    monkeypatch.setattr(timing, "available_bytes", lambda: next(answers, 1000.0))
    code, rows, _ = bench("--no-compile")
    checks = {row["impl"]: row["check"] for row in rows if row["operation"] == "match + merge"}
    assert (code, checks["torch"]) == (0, "passed")
    assert checks["ToMe eager"] == "out of memory: it writes 0.0 GB in between"


def test_inputs_that_do_not_fit_are_a_row(bench, monkeypatch):
    monkeypatch.setattr(timing, "available_bytes", lambda: 1000.0)
    code, rows, _ = bench("--no-compile")
    assert code == 0
    assert [row["operation"] for row in rows] == ["inputs"]
    assert rows[0]["check"].startswith("out of memory: MemoryError: ")


def test_what_would_take_too_long_is_left_out():
    works = [Workload("grow", 1, N, 8, r=N // 2, only=("match",), axis="N") for N in (64, 4096)]
    settings = runner.Settings("scaling", CPU, torch.float32, ["torch"], 1e-3, 1e-9, False)
    rows = [row for rows in runner.measure(works, settings, timing.Ceilings(1e9, 1e9)) for row in rows]
    first, last = (next(row for row in rows if row["N"] == N and row["impl"] == "torch") for N in (64, 4096))
    assert first["check"] == "passed"
    assert last["check"].startswith("left out: one call would take some ")
    assert "p50_us" not in last


def test_an_interrupted_run_keeps_its_rows(bench, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(rivals, "tome_match_merge", interrupted)
    code, rows, printed = bench("--no-compile")
    assert code == 130
    assert {row["operation"] for row in rows} == {"match", "merge", "merge forward + backward"}
    assert f"interrupted: {len(rows)} rows are in" in printed


def test_rows_of_two_runs_stand_one_after_the_other(bench):
    bench("--no-compile", workload="smoke window")
    _, rows, _ = bench("--no-compile", workload="smoke window")
    assert len({row["run"] for row in rows}) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "fastest"), "invalid choice: 'fastest'"),
        (("--device", "cuda:7"), "--device cuda:7 cannot be used"),
        (("--device", "mps:0:1"), "--device mps:0:1 cannot be used"),
        (("--workload", "nothing"), "--workload must be part of a name in smoke, got 'nothing'"),
        (("--impl", "triton"), "--impl triton cannot run on cpu: "),
        (("--impl", "numpy"), "invalid choice: 'numpy'"),
        (("--threads", "0"), "--threads must be at least 1, got 0"),
        (("--seconds", "-1"), "must be positive, got -1"),
        (("--dtype", "float64"), "invalid choice: 'float64'"),
    ],
)
def test_input_that_cannot_be_used_is_one_message(bench, arguments, message):
    code, rows, printed = bench(*arguments)
    assert (code, rows) == (2, [])
    assert message in printed
    assert "Traceback" not in printed


def test_a_file_of_something_else_is_left_alone(bench):
    bench.out.write_text("name,price\napple,1")
    code, _, printed = bench()
    assert code == 2
    assert "--out cannot be written: " in printed
    assert bench.out.read_text() == "name,price\napple,1"


def test_the_commit_is_that_of_the_checkout():
    commit = subprocess.run(["git", "-C", str(runner.Path(runner.__file__).parent), "rev-parse", "--short", "HEAD"],
                            capture_output=True, text=True)  # fmt: skip
    if commit.returncode:
        pytest.skip("not a checkout")
    assert runner.commit().startswith(commit.stdout.strip()[:7])


# Scaling


def test_the_exponent_is_that_of_the_points_above_the_constant_part():
    sizes = [2.0**i for i in range(4, 16)]
    assert scaling.fitted_exponent(sizes, [1e-3 * s**2 for s in sizes]) == pytest.approx(2)
    constant = scaling.fitted_exponent(sizes, [50 + 0.1 * s for s in sizes])
    assert constant == pytest.approx(1, abs=0.08)
    assert scaling.fitted_exponent(sizes, [7.0] * len(sizes)) is None
    assert scaling.fitted_exponent([], []) is None


def test_the_work_of_windowed_matching_and_of_merging_is_linear():
    windowed = [work for work in SCALING if work.name == "windowed"]
    assert (windowed[0].N, windowed[-1].N) == (256, 1 << 20)
    sizes = [float(work.N) for work in windowed]
    found = [operations.operations(work, ["torch"], CPU, torch.float32, compiled=False) for work in windowed]
    for name in ("match", "merge", "match + merge"):
        for cost in ("flops", "bytes_moved"):
            costs = [float(next(getattr(each, cost) for each in some if each.name == name)) for some in found]
            assert scaling.fitted_exponent(sizes, costs) == pytest.approx(1, abs=0.01)


def test_scaling_prints_the_exponents(bench, monkeypatch):
    works = [Workload("grow", 1, N, 8, r=N // 2, only=("merge",), axis="N") for N in (64, 128)]
    monkeypatch.setitem(SUITES, "scaling", works)
    code, rows, printed = bench("--no-compile", suite="scaling", workload="grow")
    assert code == 0
    assert {row["axis"] for row in rows} == {"N"}
    assert "exponent" in printed
