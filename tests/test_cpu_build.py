"""The CPU kernels: when setup.py builds them, and that nothing is shared between the objects of instruction sets."""

import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_cuda_build import build, plan, written

ROOT = Path(__file__).parent.parent
VERBS = sorted(p for p in (ROOT / "csrc" / "cpu").glob("*.cpp") if p.stem not in ("launch", "module", "pool"))

__all__ = ["plan"]


def test_a_compiler_that_is_not_there(plan, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert plan.cpu_decision() == ([], "CXX is no-such-compiler, but there is no such program")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    plan.cpu_decision.cache_clear()
    assert "there is no C++ compiler: CXX is not set, and none of c++, g++, clang++" in plan.cpu_decision()[1]


def test_the_compiler_that_is_asked_for(plan, monkeypatch):
    monkeypatch.setenv("CXX", f"{sys.executable} -X dev")
    assert plan.cpu_decision() == ([sys.executable, "-X", "dev"], None)


def test_not_wanted(plan, monkeypatch):
    monkeypatch.setenv("STTM_BUILD_CPU", "0")
    assert plan.cpu_decision() == ([], "STTM_BUILD_CPU=0")
    monkeypatch.setenv("STTM_BUILD_CPU", "yes")
    with pytest.raises(SystemExit, match="STTM_BUILD_CPU must be auto, 0 or 1, got 'yes'"):
        plan.mode("STTM_BUILD_CPU")


@pytest.mark.parametrize(("machine", "sets"), [("x86_64", ("baseline", "avx2", "avx512")), ("aarch64", ("baseline",))])
def test_the_ninja_file_compiles_every_kernel_for_every_instruction_set(plan, tmp_path, monkeypatch, machine, sets):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    text = plan.cpu_ninja_file(["g++"], tmp_path / "build", tmp_path / "_cpu.so")
    rules = re.findall(r"^build \S+: (\w+) \S+/csrc/cpu/(\S+)$", text, re.MULTILINE)
    assert sorted(rules) == sorted(
        [("once", f"{name}.cpp") for name in ("launch", "pool")]
        + [(name, path.name) for path in VERBS for name in sets]
    )
    assert text.count(f": once {tmp_path}/build/{plan.BINDINGS}\n") == 1


COMPILERS = [
    pytest.param(name, marks=pytest.mark.skipif(shutil.which(name) is None, reason=f"there is no {name} here"))
    for name in ("clang++", "aarch64-linux-gnu-g++")
]


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("source", [*VERBS, ROOT / "csrc" / "cpu" / "launch.cpp"], ids=lambda path: path.stem)
def test_other_compilers_take_the_sources(plan, compiler, source):
    flags = [*plan.CPU_FLAGS, f"-I{ROOT}/csrc/include", "-DSTTM_ISA=baseline", "-fsyntax-only"]
    done = subprocess.run([compiler, *flags, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_build_that_must_succeed_fails_with_one_message(tmp_path):
    done = build(tmp_path, STTM_BUILD_CUDA="0", STTM_BUILD_CPU="1", CXX="/bin/false")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("STTM_BUILD_CPU=1, but the CPU kernels cannot be built: ")


def test_a_build_that_may_fail_leaves_word_why(tmp_path):
    done = build(tmp_path, STTM_BUILD_CUDA="0", STTM_BUILD_CPU="auto", CXX="/bin/false")
    assert done.returncode == 0, done.stderr
    assert "/bin/false failed" in written(tmp_path, "cpu_reason")
    assert written(tmp_path) == "STTM_BUILD_CUDA=0"


@pytest.mark.parametrize("source", VERBS, ids=lambda path: path.stem)
def test_an_instruction_set_defines_nothing_outside_of_its_namespace(plan, tmp_path, source):
    """No weak symbol, which the linker may take from any object: not even where nothing is inlined."""
    compiler = plan.cpu_decision()[0]
    if not compiler or shutil.which("nm") is None:
        pytest.skip("needs a C++ compiler and nm")
    flags = plan.INSTRUCTION_SETS.get(platform.machine(), {}).get("avx2", ())
    made = tmp_path / "made.o"
    command = [*compiler, *plan.CPU_FLAGS, *flags, "-O0", "-DSTTM_ISA=chosen", f"-I{ROOT / 'csrc' / 'include'}"]
    subprocess.run([*command, "-c", str(source), "-o", str(made)], check=True)
    listed = subprocess.run(["nm", "-C", "--defined-only", str(made)], capture_output=True, text=True, check=True)
    symbols = [line.split(maxsplit=2)[1:] for line in listed.stdout.splitlines()]
    assert symbols
    for kind, name in symbols:
        assert kind not in "WVuwv", f"{name} is weak"
        assert kind.islower() or name.startswith("sttm::cpu::chosen::"), f"{name} is outside of its namespace"


def test_build_info():
    if importlib.util.find_spec("sttm_kernels._cpu") is None:
        pytest.skip("the CPU kernels are not built")
    from sttm_kernels.impl import cpu

    info = cpu.build_info()
    assert info["reason"] is None
    assert info["compiler"]
    assert info["isa"] in ("baseline", "avx2", "avx512")


def test_an_extension_of_other_sources_says_so(tmp_path, monkeypatch):
    if importlib.util.find_spec("sttm_kernels._cpu") is None:
        pytest.skip("the CPU kernels are not built")
    from sttm_kernels import dispatch, extension
    from sttm_kernels.impl import cpu

    wanted = extension.signatures(ROOT / "csrc" / "bindings")
    assert {"metric", "sequences"} < set(wanted["match_packed"])
    assert wanted.keys() >= {*dispatch.VERBS, "assign_backward", "merge_backward", "soft_merge_backward"}
    text = (ROOT / "csrc" / "bindings" / "match.cpp").read_text(encoding="utf-8")
    (tmp_path / "match.cpp").write_text(text.replace('py::arg("metric"), ', "", 1), encoding="utf-8")
    monkeypatch.setattr(extension, "BINDINGS", tmp_path)
    for cached in (cpu._extension, cpu._reason):
        monkeypatch.setattr(cpu, cached.__name__, cached.__wrapped__)
    said = r"its match takes \(metric, src, .*\), not \(src, .*\)\. Build it again: python setup\.py build_ext"
    with pytest.raises(extension.StaleExtension, match=said):
        cpu.why_not("match", "cpu")
    assert re.search(said, cpu.build_info()["reason"])
