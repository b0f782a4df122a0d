"""Lays the package out as the `kernels` package of Hugging Face loads it: python scripts/hub.py FOLDER.

One variant, build/torch-universal, of Python alone: the Triton kernels and plain PyTorch, on any device, with PyTorch
as the only dependency, without the commands. Imports are made relative, and the name, which its operators have in
`torch.ops` and in programs of `torch.export`, ends in a hash of what is in it: so a process may hold several versions
beside an installation. `kernels.get_local_kernel(FOLDER)` is then the package. Nothing is uploaded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("__main__.py", "cli", "bench", "demo", "evidence", "console.py", "verify.py", "checks.py")
NAME, VERSION, LICENSE = "sttm-kernels", 1, "BSD-3-Clause"
"""VERSION counts what was laid out with another interface; it is not that of the package."""


def lay_out(folder: Path) -> Path:
    """Writes build.toml and the variant into `folder`; returns the folder of the variant."""
    variant = folder / "build" / "torch-universal"
    compiled = ("__pycache__", "*.so", "_build.json", "include")
    shutil.copytree(ROOT / "sttm_kernels", variant, ignore=shutil.ignore_patterns(*compiled, *COMMANDS))
    hashed = hashlib.sha256()
    for path in sorted(variant.rglob("*.py")):
        up = "." * len(path.relative_to(variant).parts)
        text = re.sub(
            r"^( *from )sttm_kernels\.?(?=[\w.]* import )", rf"\1{up}", path.read_text("utf-8"), flags=re.MULTILINE
        )
        path.write_text(text, encoding="utf-8")
        hashed.update(text.encode())
    shutil.copy(ROOT / "LICENSE", folder)
    about = {
        "id": f"{NAME}_{hashed.hexdigest()[:12]}".replace("-", "_"),
        "name": NAME,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (variant / "metadata.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    general = {
        "edition": 5,
        "name": NAME,
        "version": VERSION,
        "license": LICENSE,
        "backends": ["cpu", "cuda", "rocm", "xpu"],
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in general.items()]
    (folder / "build.toml").write_text("\n".join(["[general]", *lines, "", "[torch-noarch]", ""]), encoding="utf-8")
    return variant


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where it goes; must hold no build/torch-universal yet")
    print(lay_out(parser.parse_args().folder))
