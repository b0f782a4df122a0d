"""The pages agree with the tree: links lead somewhere, and quoted lines of the reference are in it."""

import re
from pathlib import Path

import pytest

import sttm_kernels
import sttm_kernels.nn

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_quoted_lines_are_in_the_reference() -> None:
    rows = re.findall(r"^\|.*\| `(.+)` +\|$", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.MULTILINE)
    lines = {line.strip() for line in (ROOT / "sttm_kernels/reference.py").read_text(encoding="utf-8").splitlines()}
    assert len(rows) > 20
    assert [row for row in rows if row not in lines] == []


def test_promises_name_tests_that_are_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", (ROOT / "docs/promises.md").read_text(encoding="utf-8"))
    assert len(named) > 15
    assert [f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / file).read_text()] == []


@pytest.mark.parametrize("page", ["index.md"])
def test_the_code_of_a_page_runs(page: Path) -> None:
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert len(blocks) > 2
    exec("\n".join(blocks), {})


def test_every_public_name_is_on_a_page_of_the_reference() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/reference").glob("*.md"))
    named = {line.rpartition(".")[2] for line in re.findall(r"^::: (.+)$", pages, re.MULTILINE)}
    assert (set(sttm_kernels.__all__) | set(sttm_kernels.nn.__all__) - {"GENERATORS"}) - named == set()
