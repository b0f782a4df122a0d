"""What the site needs beside the pages: those at the root of the repository, and no links to what is not on it."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
AT_ROOT = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
PICTURES = ("benchmarks/results/evidence.png",)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?![a-z]+:|#)([^)#]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages at the root, whose links lead from there, and pictures."""
    for name in AT_ROOT:
        files.append(File.generated(config, name, content=(ROOT / name).read_text().replace("](docs/", "](")))
    for name in PICTURES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """A link to a file of the repository that is no page becomes its text."""

    def kept(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), found[2]))
        if target.removeprefix("../") in AT_ROOT:
            depth = page.file.src_uri.count("/")
            return f"[{found[1]}]({'../' * depth}{posixpath.basename(target)}{found[3] or ''})"
        return found[0] if files.get_file_from_path(target) else found[1]

    for name in PICTURES:
        markdown = markdown.replace(f"](../{name})", f"]({name})")
    return LINK.sub(kept, markdown)
