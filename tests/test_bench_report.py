"""`sttm-kernels report`: its tables and pictures, the files they come from; `benchmarks/gpu_check.sh`."""

from __future__ import annotations

import dataclasses
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import least
from benchmarks import model as prediction
from sttm_kernels.bench import compare, models, report, results, workloads
from sttm_kernels.cli import main

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
GPU, CPU = "NVIDIA Test 9000", "Test CPU 12"
PNG = b"\x89PNG\r\n\x1a\n"
LATER = {"run": "second", "time": "2026-01-02T00:00:00+00:00"}


def row(operation="match + merge", impl="triton", p50=100.0, **more):
    """One row of a GPU; without a time if p50 is None."""
    found = {
        "run": "first", "suite": "canonical", "workload": "clip", "operation": operation, "impl": impl,
        "dtype": "bfloat16", "B": 8, "N": 1568, "C": 768, "heads": 12, "D": 64, "r": 784, "K": 784, "bytes": 4_000_000,
        "flops": 8_000_000, "bandwidth": 4e12, "flop_rate": 8e14, "device": GPU, "torch": "2.13.0", "version": "0.1.0",
        "command": "sttm-kernels bench", "time": "2026-01-01T00:00:00+00:00", "check": "passed",
    }  # fmt: skip
    if p50 is not None:
        floor = 1e6 * max(4e6 / 4e12, 8e6 / 8e14)
        found |= {"p20_us": 0.9 * p50, "p50_us": p50, "p80_us": 1.25 * p50, "peak_bytes": 5_000_000}
        found |= {"floor_us": floor, "fraction_of_floor": floor / p50}
    return found | more


def model(impl, p50, **more):
    return row("forward", impl, p50, suite="models", workload="ViT", **more)


def rival(p50=250.0, impl="ToMe eager", **more):
    return row("match + merge", impl, p50, **more)


@pytest.fixture
def tables(tmp_path):
    """The text of RESULTS.md for these rows, without pictures."""

    def text(*rows):
        path = tmp_path / "measured.csv"
        results.append(path, rows)
        return report.markdown(compare.latest(results.read(path)), [], [path.name])

    return text


@pytest.fixture
def written(tmp_path, capsys):
    """Writes rows, reports them and gives the text of RESULTS.md."""

    def run(*rows):
        path = tmp_path / "measured.csv"
        results.append(path, rows)
        code = main(["report", str(path), "--out", str(tmp_path / "out")])
        assert code == 0, capsys.readouterr().err
        return (tmp_path / "out" / "RESULTS.md").read_text(encoding="utf-8")

    return run


def cells(text, *starts):
    """The cells of the only line of a table that begins with these."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    (found,) = [line for line in lines if tuple(line[: len(starts)]) == starts]
    return found


def test_a_rival_is_compared_with_the_best_of_ours(tables):
    text = tables(row(impl="cuda", p50=80.0), row(impl="triton", p50=100.0), rival(200.0))
    # 4 MB at 4 TB/s take 1 us of 80; 200 / 80 = 2.5
    expected = "match + merge | cuda | 80.0 | 72.0-100 | 1.25 % | - | - | - | 5.00 |  |  | passed"
    assert cells(text, "match + merge", "cuda") == expected.split(" | ")
    assert cells(text, "match + merge", "ToMe eager")[-3:] == ["200.00 x", "2.50 x", "passed"]
    assert "Slower than a rival" not in text


def test_a_faster_rival_is_said_plainly(tables):
    text = tables(row(impl="cuda", p50=100.0), rival(83.0, "ToMe compiled"))
    assert "- clip, B=8, r=784, bfloat16: match + merge **slower than ToMe compiled: 0.83 x**" in text
    assert cells(text, "match + merge", "ToMe compiled")[-2] == "**slower than ToMe compiled: 0.83 x**"


def test_why_a_rival_is_faster_is_said_where_it_is_known(tables):
    assert "Why:" not in tables(row("match", "cuda", 50.0), row("match", "dense compiled", 40.0))
    text = tables(row("soft_merge", "cuda", 100.0), row("soft_merge", "dense compiled", 83.0))
    assert "Why:\n\n- soft_merge: forward," in text


def test_a_yardstick_is_no_rival(tables):
    text = tables(row("match", "cuda", 100.0), row("match", "product alone", 50.0, check="none"))
    assert "Slower than a rival" not in text
    assert cells(text, "match", "product alone")[-1] == "none"


@pytest.mark.parametrize("reason", ["failed: index 3 is wrong", "out of memory: 40 GiB", "left out: a | bar"])
def test_what_has_no_time_is_shown_with_its_reason(reason, tables):
    text = tables(row(impl="cuda", p50=None, check=reason), row(impl="triton", p50=100.0), rival(300.0))
    found = cells(text, "match + merge", "cuda")
    assert found[2:5] == ["-", "-", "-"]
    assert " | ".join(found).endswith(reason.replace("|", "\\|"))
    assert cells(text, "match + merge", "ToMe eager")[-2] == "3.00 x"


def test_only_the_latest_run_of_a_measurement_counts(tables):
    text = tables(
        row(impl="cuda", p50=50.0, **LATER), rival(200.0, **LATER), row(impl="cuda", p50=400.0), rival(399.0),
        row("merge", "cuda", 7.0),
    )  # fmt: skip
    assert cells(text, "match + merge", "cuda")[2] == "50.0"
    assert cells(text, "match + merge", "ToMe eager")[-2] == "4.00 x"
    assert cells(text, "merge", "cuda")[2] == "7.00"  # the later run did not measure it


def test_of_one_run_the_last_row_of_an_implementation_counts(tables):
    text = tables(row(impl="cuda", p50=50.0), row(impl="cuda", p50=60.0))
    assert cells(text, "match + merge", "cuda")[2] == "60.0"


@pytest.mark.parametrize(
    "other", [LATER, {"device": CPU, "threads": 2},
              {"dtype": "float32"}, {"N": 99}, {"B": 4}, {"workload": "another"}]
)  # fmt: skip
def test_rows_of_another_run_device_dtype_or_shape_are_not_compared(other, tables):
    text = tables(row(impl="cuda", p50=100.0), rival(50.0, **other))
    assert "slower than" not in text
    assert cells(text, "match + merge", "ToMe eager")[-2] == "-"


def test_variants_of_one_workload_keep_apart(tables):
    other = {"r": 392, "K": 1176}
    text = tables(row(impl="cuda", p50=100.0, **other), rival(150.0, **other), row(impl="triton", p50=60.0, **LATER))
    assert cells(text, "match + merge", "ToMe eager")[-2] == "1.50 x"
    assert "r=392, K=1176, bfloat16** (run 1)" in text
    assert "r=784, K=784, bfloat16** (run 2)" in text


def test_models_pair_with_the_model_without_merging(tables):
    plain = {"r": 0, "flops": 400e9, "tokens": "197 197", "peak_bytes": 300e6}
    text = tables(
        model("unmerged", 10_000.0, **plain),
        model("merged", 6250.0, r=8, flops=200e9, tokens="197 101 5", peak_bytes=250e6),
        model("merged", 12_500.0, r=1, flops=390e9, tokens="197 195"),
        model("unmerged compiled", 5000.0, **plain),
        model("merged compiled", 2500.0, r=8, flops=200e9, tokens="197 101 5"),
    )
    # 10 / 6.25 = 1.6 of the 400 / 200 = 2 that the operations promise
    expected = "197 → 5 | 400 → 200 | 10.0 → 6.25 | 1.60 x | 0.80 | 300 → 250 | 1 | passed"
    assert cells(text, "ViT", "merged", "bfloat16", "8", "8")[5:] == expected.split(" | ")
    assert cells(text, "ViT", "merged", "bfloat16", "8", "1")[8:10] == ["**slower than unmerged: 0.80 x**", "0.78"]
    assert cells(text, "ViT", "merged compiled")[8:10] == ["2.00 x", "1.00"]
    assert "- ViT, B=8, r=1, bfloat16: **slower than unmerged: 0.80 x**" in text


def test_models_of_two_runs_do_not_pair(tables):
    text = tables(model("unmerged", 10_000.0, r=0), model("merged", 5000.0, r=8, tokens="9 3", **LATER))
    found = cells(text, "ViT", "merged")
    assert found[8] == "-"
    assert found[-1] == "not measured"


def test_a_model_that_does_not_fit_is_shown(tables):
    text = tables(
        model("unmerged", None, r=0, check="out of memory: 90 GiB"), model("merged", 5000.0, r=8, tokens="9 3")
    )
    found = cells(text, "ViT", "merged")
    assert found[7:10] == ["- → 5.00", "-", "-"]
    assert found[-1] == "out of memory: 90 GiB"


def scaled(axis, size, p50, **more):
    return row("match", "cuda", p50) | {"suite": "scaling", "workload": "global", "axis": axis, axis: size, **more}


@pytest.mark.parametrize(
    ("power", "word"), [(0.5, "less than linearly"), (1, "linearly"), (1.5, "more than linearly"), (2, "quadratically"),
                        (3, "more than quadratically")]
)  # fmt: skip
def test_exponents_are_fitted(power, word, tables):
    text = tables(*(scaled("N", 2**i, 5.0 * 2 ** (i * power)) for i in range(8)))
    found = cells(text, "N", "global", "match", "cuda")
    assert found[4:9] == ["bfloat16", "1-128", f"5.00-{found[6].partition('-')[2]}", f"{power:.2f}", word]


def test_of_scaling_what_is_lacking_is_shown(tables):
    text = tables(
        scaled("N", 64, 5.0), scaled("N", 128, 9.0), scaled("N", 256, None, check="out of memory: x"),
        scaled("B", 2, None, check="failed: y"),
    )  # fmt: skip
    expected = ["-", "too few points above the constant cost", "1", "256: out of memory: x"]
    assert cells(text, "N", "global")[-4:] == expected
    assert cells(text, "B", "global")[5:7] == ["-", "---"]
    assert cells(text, "B", "global")[-1] == "2: failed: y"


def test_points_of_two_runs_make_no_curve(tables):
    text = tables(*(scaled("N", 2**i, 4.0**i) for i in range(6)), scaled("N", 64, 1.0, **LATER))
    assert cells(text, "N", "global")[5] == "64-64"


def test_rivals_are_compared_at_each_size_of_scaling(tables):
    text = tables(
        scaled("N", 64, 10.0), scaled("N", 128, 20.0), scaled("N", 64, 5.0, impl="x"), scaled("N", 128, 80.0, impl="x")
    )
    assert "- global, N=64, bfloat16: match **slower than x: 0.50 x**" in text
    assert "N=128" not in text


def test_sections(tables):
    cpu = row(impl="torch", device=CPU, threads=2, dtype="float32", cuda="13.0")
    text = tables(cpu)
    before, after = text.split("## CPU")
    assert before.count("Not yet measured.") == 1
    assert "benchmarks/gpu_check.sh" in before
    assert f"### {CPU}" in after
    assert cells(text, "1")[2:4] == ["2", "float32"]
    text = tables(row())
    assert "Not yet measured" not in text
    assert text.index(f"### {GPU}") < text.index("## CPU") < text.index(f"### {CPU}")
    assert text.index("Generated by `sttm-kernels report`") < text.index("## GPU")


def test_the_smoke_suite_is_no_measurement(tables):
    assert "###" not in tables(row(suite="smoke"), rival(5.0, suite="smoke"))


def everything():
    yield from (row("match + merge", impl, p50) for impl, p50 in (("cuda", 80.0), ("triton", 90.0), ("torch", 400.0)))
    yield from (rival(500.0), rival(70.0, "ToMe compiled"), row("unmerge", "cuda", 20.0, flops=0))
    yield from (row("merge forward + backward", "cuda", 50.0), row("merge forward + backward", "index_add", 90.0))
    yield from (scaled(axis, 2**i, 3.0 * 2.0**i) for axis in ("N", "B", "K") for i in range(5))
    yield model("unmerged", 10_000.0, r=0, flops=400e9, tokens="197 197")
    yield from (model("merged", 9000.0 / r, r=r, flops=400e9 / r, tokens=f"197 {197 - 40 * r}") for r in (1, 2, 3))


def pictures(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "plots").glob("*.png"))}


def test_pictures(written, tmp_path):
    text = written(
        *everything(), row(impl="torch", device=CPU, threads=2, dtype="float32"), rival(device=CPU, threads=2)
    )
    found = pictures(tmp_path / "out")
    names = ("memory", "roofline", "scaling", "speed-up", "speed-up-backward", "throughput")
    expected = {f"nvidia-test-9000-bfloat16-{name}.png" for name in names}
    assert {name for name in found if name.startswith("nvidia")} == expected
    expected = {f"test-cpu-12-float32-{name}.png" for name in ("memory", "roofline")}
    assert {name for name in found if "float32" in name} == expected
    for name, content in found.items():
        assert f"](plots/{name})" in text
        width, height = struct.unpack(">II", content[16:24])
        assert content[:8] == PNG
        assert width == 1200
        assert height > 150
        assert len(content) > 8000


@pytest.mark.parametrize(
    "one", [row(p50=None, check="failed: x"), rival(), model("unmerged", 5.0), scaled("N", 64, None)]
)
def test_there_may_be_little_to_draw(one, written, tmp_path):
    written(one)
    assert set(pictures(tmp_path / "out")) <= {
        f"nvidia-test-9000-bfloat16-{name}.png" for name in ("memory", "speed-up")
    }


def test_the_same_files_give_the_same_bytes(written, tmp_path):
    text = written(*everything())
    first = pictures(tmp_path / "out")
    again = tmp_path / "again"
    assert main(["report", *[str(tmp_path / "measured.csv")] * 2, "--out", str(again)]) == 0
    assert (again / "RESULTS.md").read_text(encoding="utf-8") == text
    assert pictures(again) == first


def test_by_default_all_results_of_the_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report"]) == 2
    assert "no results" in capsys.readouterr().err
    results.append(Path("benchmarks/results/a.csv"), [row(impl="cuda")])
    results.append(Path("benchmarks/results/b.csv"), [rival()])
    Path("benchmarks/results/evidence.csv").write_text("setting,contender\n")  # of another command
    assert main(["report"]) == 0
    text = Path("benchmarks/RESULTS.md").read_text(encoding="utf-8")
    assert "from a.csv, b.csv;" in text
    assert "2.50 x" in text


def launch(**more):
    """A launch of one item that nothing bounds."""
    counted = {
        "impl": "cuda", "workload": "clip", "r": 0, "K": 0, "items": 1, "part": "merge", "kernel": "merge",
        "blocks": prediction.H100.multiprocessors, "threads": 1024, "registers": 32, "shared": 0, "instructions": 0,
        "mma": 0, "distinct": 0, "moved": 0,
    }  # fmt: skip
    return prediction.Launch(**counted | more)


@pytest.mark.parametrize(
    ("counted", "items", "takes"),
    [
        ({"distinct": 3e9, "moved": 3e9}, 2, (2000.0, "memory")),
        ({"moved": 11e9}, 1, (2000.0, "L2")),
        ({"mma": 798e9 / (2 * 16 * 8 * 16)}, 1, (1000.0, "products")),
        ({"instructions": 132 * 4 * 1.755e6}, 1, (1000.0, "instructions")),
        ({"instructions": 132 * 4 * 1.755e6, "threads": 64}, 1, (12000.0, "instructions")),  # two warps of 24
        ({"instructions": 4 * 1.755e6, "blocks": 1}, 132, (1000.0, "instructions")),
        ({"instructions": 4 * 1.755e6, "blocks": 1}, 133, (2000.0, "instructions")),  # one block more
    ],
)
def test_a_launch_takes_the_longest_of_what_bounds_it(counted, items, takes):
    time, limit = launch(**counted).microseconds(items)
    assert (pytest.approx(time), limit) == takes


@pytest.mark.parametrize(
    ("counted", "blocks"),
    [
        ({}, 2),  # 64 warps
        ({"threads": 32}, 32),
        ({"threads": 128, "registers": 200}, 2),  # 65,536 registers
        ({"threads": 128, "shared": 50 << 10}, 4),  # 228 KiB
        ({"threads": 128, "shared": 300 << 10}, 1),
    ],
)
def test_how_many_blocks_a_multiprocessor_holds(counted, blocks):
    assert launch(**counted).resident(prediction.H100) == blocks


def traced(run, *shapes):
    """Bytes and operations of the launches of a rival on bfloat16 of these shapes: eager, and compiled."""
    with FakeTensorMode():
        tensors = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
        found = least.trace(lambda: run(*tensors))
        return found.eager(), found.compiled()


@pytest.mark.unpoisoned
def test_what_a_rival_moves_at_least():
    """By hand: what is fused, what stands alone, views, what is gathered, copied along an axis or changed in place."""

    def weights(x, m):
        scaled = (x * 2).exp()  # one launch if compiled
        return (scaled @ m.T).softmax(-1).relu()

    x, product = 2 * 8 * 4, 2 * 8 * 16
    flops = 2 * 8 * 4 * 16
    eager, compiled = traced(weights, (8, 4), (16, 4))
    between = (2 * product, 0)
    assert eager == [(2 * x, 0), (2 * x, 0), (x + 2 * 16 * 4 + product, flops), between, between]
    assert compiled == [(2 * x, 0), (x + 2 * 16 * 4 + product, flops), between]

    assert traced(lambda x: x.view(4, 8).T[::2].detach(), (8, 4)) == ([], [])
    both = traced(lambda x: (x[::2] + x[1::2], x[:, :1].expand(8, 4) + 1), (8, 4))
    assert both == ([(x + x // 2, 0), (x // 4 + x, 0)], [(x + x // 2 + x, 0)])

    index = torch.int64.itemsize * 3
    eager, compiled = traced(lambda x: x.gather(0, torch.zeros(3, 1, dtype=torch.int64).expand(3, 4)), (8, 4))
    assert eager == [(index, 0), (index + 2 * 2 * 3 * 4, 0)]
    assert compiled == [(2 * 2 * 3 * 4, 0)]  # the index stays inside

    def spread(x, y):
        return x.clone().scatter_(0, torch.zeros(3, 4, dtype=torch.int64), y[:3]) + 1

    eager, compiled = traced(spread, (8, 4), (5, 4))
    few = 2 * 3 * 4
    assert eager == [(2 * x, 0), (4 * few, 0), (4 * few + 2 * few, 0), (2 * x, 0)]
    assert compiled == [(2 * x + few, 0), (2 * x, 0)]


@pytest.mark.unpoisoned
def test_predictions_are_those_of_the_counts():
    """The page is what the command writes; twice the counts of a part are seen in all that it is a part of."""
    launches = prediction.read(prediction.COUNTED)
    assert prediction.markdown(launches) == (ROOT / "benchmarks" / "PREDICTED.md").read_text(encoding="utf-8")
    (work,) = (one for one in workloads.CANONICAL if (one.name, one.r) == ("VideoMAE-L 16x224", 784))
    of = [one for one in launches if (one.workload, one.r) == (work.name, work.r)]
    more = [
        dataclasses.replace(one, distinct=2 * one.distinct) if (one.impl, one.part) == ("cuda", "merge") else one
        for one in of
    ]
    both = zip(prediction.rows(more, work), prediction.rows(of, work), strict=True)
    slower = [a[0] for a, b in both if a[1] == "cuda" and a != b]
    assert slower == ["merge", "merge forward + backward", "match + merge", f"match + merge{workloads.BACKWARD}"]


@pytest.mark.unpoisoned
@pytest.mark.parametrize(("faster", "share", "ahead"), [(1, "**not met**", "**not shown**"), (1e-8, "met", "met")])
def test_goals_are_met_or_not(faster, share, ahead):
    """A launch as slow as can be, and one of no time but the gap."""
    (work,) = (one for one in workloads.CANONICAL if (one.name, one.K) == ("STTM spatial", 98))
    slow = {"distinct": int(faster * 1e12), "workload": work.name, "K": work.K}
    of = [launch(part=part, **slow) for part in ("merge", "soft_merge")]
    goals = {(name, impl): goal for name, impl, *_, goal in prediction.rows(of, work) if goal}
    assert goals == {
        ("merge", "cuda"): f"90 %: {share}",
        ("soft_merge", "cuda"): f"ahead of dense compiled: {ahead}",
    }


def test_no_table_of_crossovers_ships_as_triton_is_nowhere_clearly_ahead():
    found = prediction.crossovers(prediction.read(prediction.COUNTED))
    assert {verb for verb, *_ in found} == {"match", "assign", "assign_merge", "soft_merge", "merge", "unmerge"}
    assert len(found) > 20
    assert min(map(max, found.values())) >= prediction.CLEAR
    of = [launch(impl=impl, part="match", workload="crossover C=64", r=784, distinct=int(time * 1e9))
          for impl, time in (("cuda", 10), ("triton", 5))]  # fmt: skip
    assert prediction.crossovers(of)["match", 0, 64] == pytest.approx([0.5, 0.5], rel=0.01)


def without_a_folder_to_write_to(path):
    results.append(path, [row()])
    path.with_name("out").write_text("a file")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: None, "No such file"),
        (Path.mkdir, "directory"),
        (lambda path: path.write_text(""), "not a file of results"),
        (lambda path: path.write_text("family,device\nViT,CPU\n"), "not a file of results"),
        (lambda path: path.write_text("schema,run\n1,first\n"), "in.csv"),
        (lambda path: path.write_bytes(b"schema\xff\xfe\x00"), "in.csv"),
        (lambda path: results.append(path, []), "no rows"),
        (lambda path: results.append(path, [row(schema="x")]), "in.csv"),
        (lambda path: results.append(path, [row(schema=results.SCHEMA + 1)]), "schema 2"),
        (without_a_folder_to_write_to, "--out"),
    ],
)
def test_input_that_cannot_be_used(spoil, said, tmp_path, capsys):
    spoil(tmp_path / "in.csv")
    assert main(["report", str(tmp_path / "in.csv"), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("sttm-kernels: error: ")
    assert err.count("\n") == 1
    assert said in err
    assert not (tmp_path / "out" / "RESULTS.md").exists()


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch, capsys):
    results.append(tmp_path / "in.csv", [row()])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(tmp_path / "in.csv"), "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'sttm_kernels[bench]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Files of results


def test_what_is_appended_is_read(tmp_path):
    path = tmp_path / "deep" / "er.csv"
    results.append(path, [row(impl="cuda", check='says "no", twice')])
    results.append(path, [row(impl="torch")])
    found = results.read(path)
    assert [one["impl"] for one in found] == ["cuda", "torch"]
    assert found[0]["check"] == 'says "no", twice'
    assert found[0]["schema"] == str(results.SCHEMA)
    assert tuple(found[0]) == results.COLUMNS


def test_a_file_of_another_version_keeps_all(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("schema,run,colour,impl,time\n1,old,blue,cuda,2026-01-01T00:00:00+00:00\n")
    results.append(path, [row(impl="torch", run="new")])
    lines = path.read_text().splitlines()
    header = lines[0].split(",")
    assert header[:5] == ["schema", "run", "colour", "impl", "time"]
    assert sorted(header[5:]) == sorted(set(results.COLUMNS) - set(header[:5]))
    assert lines[1].startswith("1,old,blue,cuda,2026-01-01T00:00:00+00:00,")
    assert lines[2].startswith("1,new,,torch,2026-01-01T")
    assert [one["run"] for one in results.read(path)] == ["old", "new"]
    assert [path] == list(tmp_path.iterdir())


def test_a_row_that_was_cut_off_is_dropped_alone(tmp_path):
    path = tmp_path / "cut.csv"
    results.append(path, [row(impl="cuda"), row(impl="triton")])
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"triton") + 9])
    results.append(path, [row(impl="torch")])
    assert [one["impl"] for one in results.read(path)] == ["cuda", "torch"]


# benchmarks/gpu_check.sh

SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"


def gpu_check(*arguments, **environment):
    return subprocess.run(
        [SCRIPT, *map(str, arguments)],
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ((), {}, "finds no NVIDIA GPU"),
        (("verify", "nonsense"), {"STTM_GPU_CHECK_DEVICE": "cpu"}, "no step nonsense"),
        ((), {"STTM_GPU_CHECK_DEVICE": "tpu"}, "must be cuda or cpu"),
        ((), {"STTM_GPU_CHECK_LIMIT": "ten"}, "number of seconds"),
    ],
)
def test_the_script_refuses(arguments, environment, said, tmp_path):
    done = gpu_check(tmp_path / "out", *arguments, **environment)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_script_goes_on_and_does_nothing_twice(tmp_path):
    """With an interpreter that fails in one step and notes every call."""
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\ncase "$*" in *verify*) exit 3 ;; *scaling*) exec sleep 9 ;; esac\n'
    )
    python.chmod(0o755)
    environment = {"PYTHON": str(python), "STTM_GPU_CHECK_DEVICE": "cpu", "STTM_GPU_CHECK_LIMIT": "1"}
    quick = [f"quick_{text}" for text in ("VideoMAE", "window", "latents", "STTM")]
    others = ["scaling_clips", "memcheck", "report"]
    first = gpu_check(out, "verify", "quick", *others, **environment)
    assert first.returncode == 1
    assert "says nothing about a GPU" in first.stdout
    table = {line.split()[0]: line.split(None, 1)[1] for line in (out / "summary.txt").read_text().splitlines()}
    assert list(table) == ["step", "verify", *quick, *others]
    assert "FAILED with 3, see verify.log" in table["verify"]
    assert table["quick_STTM"].startswith("passed")
    assert "over 1 seconds" in table["scaling_clips"]
    assert table["memcheck"].startswith("skipped: there is no GPU")
    assert table["report"].startswith("skipped: there are no results")
    assert sorted(path.stem for path in out.glob("*.done")) == sorted(quick)

    calls = tmp_path / "calls"
    assert f"bench --suite quick --workload window --device cpu --out {out}/quick.csv" in calls.read_text()
    calls.write_text("")
    second = gpu_check(out, "quick", **environment)
    assert second.returncode == 0
    assert "passed earlier" in second.stdout
    assert calls.read_text() == ""


def test_the_script_measures_every_workload():
    refusal = gpu_check("out", "nonsense", STTM_GPU_CHECK_DEVICE="cuda").stderr
    steps = [step.split("_", 1) for step in refusal.split() if "_" in step]
    names = {suite: {work.name for work in workloads.SUITES[suite]} for suite in ("canonical", "scaling")}
    for suite, known in (*names.items(), ("models", set(models.FAMILIES))):
        texts = [text for of, text in steps if of == suite]
        found = {text: {name for name in known if text in name} for text in texts}
        assert all(found.values())
        assert set().union(*found.values()) == known
