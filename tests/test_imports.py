"""What importing the package loads, and that imports run downwards only."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sttm_kernels

PACKAGE = Path(sttm_kernels.__file__).parent
HEAVY = (
    "triton",
    "sttm_kernels._C",
    "sttm_kernels._cpu",
    "sttm_kernels.impl.triton",
    "sttm_kernels.impl.cuda",
    "sttm_kernels.impl.cpu",
    "matplotlib",
    "av",
    "tqdm",
    "PIL",
    "timm",
    "transformers",
)
VERBS = """
import torch, sttm_kernels as sttm
for impl in ("reference", "torch", "auto"):
    x, meta = torch.randn(2, 9, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    out = sttm.merge(x, sttm.assign(x, meta, impl=impl), impl=impl)
    plan = sttm.match(x, 3, impl=impl)
    full = sttm.unmerge(sttm.merge(x, plan, impl=impl).x, plan, impl=impl)
    sttm.compose(plan, sttm.match(torch.randn(2, 6, 4), 2, impl=impl), impl=impl)
    soft = sttm.soft_merge(x, x, meta, impl=impl)
    (out.x.sum() + full.sum() + soft.x.sum()).backward()
"""


def python(program: str) -> str:
    """Runs a program in a fresh interpreter; returns what it printed."""
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_heavy():
    before = "import sys, torch; before = set(sys.modules)"
    loaded = python(f"{before}; import sttm_kernels; print(*sorted(set(sys.modules) - before))").split()
    assert "sttm_kernels.ops" in loaded
    assert [name for name in loaded if name in HEAVY or name.startswith("triton.")] == []
    assert "sttm_kernels.impl.eager" not in loaded  # implementations load when they first run


def test_verbs_run_with_triton_and_the_extension_blocked():
    blocked = "\n".join(f"sys.modules[{name!r}] = None" for name in ("triton", "sttm_kernels._C"))
    python(f"import sys\n{blocked}\n{VERBS}\nprint('done')")


@pytest.mark.parametrize("module", ["sttm_kernels.testing", "sttm_kernels.reference"])
def test_public_modules_need_no_test_framework(module):
    python(f"import sys; sys.modules['pytest'] = sys.modules['hypothesis'] = None; import {module}")


ROOMS = {
    "base": (
        "autocast",
        "plan",
        "partition",
        "sequences",
        "validate",
        "console",
        "torch_private",
        "crossover",
        "dispatch",
        "sharding",
        "extension",
    ),
    "reference": ("reference",),
    "impl": ("impl",),
    "ops": ("operator", "ops"),
    "functional": ("packed", "functional"),
    "nn": ("nn",),
    "demo": ("demo",),
    "top": ("testing", "checks", "verify", "integrations", "compat", "export", "bench", "evidence", "__init__"),
    "cli": ("cli", "__main__"),
}
"""From the bottom upwards, what is in them."""


def imports(path: Path) -> list[str]:
    """The modules of this package that a file imports, inside functions too, but not under TYPE_CHECKING."""
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    package = module.rpartition(".")[0] if path.name != "__init__.py" else module.removesuffix(".__init__")
    found = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                below = PACKAGE.parent.joinpath(*base.split("."), alias.name)
                is_module = below.is_dir() or below.with_suffix(".py").exists()
                found.append(f"{base}.{alias.name}" if is_module else base)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return [name for name in found if name.split(".")[0] == "sttm_kernels"]


def room(module: str) -> str:
    _, file, *_ = [*module.split("."), "__init__"]
    return next(name for name, files in ROOMS.items() if file in files)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    here = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    order = list(ROOMS)
    for name in imports(path):
        upwards = order.index(room(name)) > order.index(room(here))
        assert not upwards or name == "sttm_kernels", f"{here} imports {name}, which lies above it"
        if name == "sttm_kernels":
            assert room(here) in ("nn", "top", "cli"), f"{here} imports the package, which lies above it"
        mine, theirs = here.split(".")[1:3], name.split(".")[1:3]
        if mine[:1] == theirs[:1] == ["impl"]:
            assert mine == theirs, f"{here} imports {name}: implementations never import each other"


def test_triton_and_the_extension_are_imported_by_their_implementation_alone():
    for path in PACKAGE.rglob("*.py"):
        tree, inside = ast.parse(path.read_text()), path.relative_to(PACKAGE).parts
        names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        if inside[:2] != ("impl", "triton") and inside[0] != "cli":
            assert not any(name.split(".")[0] == "triton" for name in names), f"{path} imports triton"
        if inside != ("impl", "cuda.py") and inside[0] != "cli":
            assert not any(name == "sttm_kernels._C" for name in names), f"{path} imports the extension"
