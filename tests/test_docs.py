"""The pages agree with the tree: links lead somewhere, and quoted lines of the reference are in it."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import sttm_kernels
import sttm_kernels.nn

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
MODEL_PAGES = [
    str(page.relative_to(ROOT)) for page in sorted(ROOT.glob("docs/models/*.md")) if "```python" in page.read_text()
]


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


def code_of(page: str) -> str:
    return "\n".join(
        re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    )


def names_of_readme() -> dict[str, Any]:
    x, keys = torch.randn(2, 1569, 768), torch.randn(2, 3, 1569, 16)
    input_ids = torch.tensor([[1, *[9] * 1568, 2]])
    return {
        "k": keys[:, 0], "keys": keys, "x": x, "size": torch.ones(2, 1569), "mask": torch.ones(2, 1569).bool(),
        "meta": torch.randn(2, 49, 768), "positions": torch.randn(2, 1569, 3), "tokens": torch.randn(1568, 8),
        "grid": [(8, 14, 14)], "input_ids": input_ids, "token_id": 9, "sttm_kernels": sttm_kernels,
        **names_of_deployment(),
    }  # fmt: skip


def names_of_deployment() -> dict[str, Any]:
    timm = pytest.importorskip("timm")
    small = {"img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **small).eval()
    return {"torch": torch, "model": model, "clip": torch.randn(2, 3, 24, 24)}


def names_of_models() -> dict[str, Any]:
    """A VideoMAE of 16 frames in 224 x 224, narrow, and a folder in which it is saved as `method="sttm"` leaves it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(hidden_size=8, num_hidden_layers=8, num_attention_heads=1, intermediate_size=8)
    model = transformers.VideoMAEForVideoClassification(config).eval()
    sttm_kernels.apply(model, method="sttm", layers=(3, 7)).save_pretrained("saved")
    sttm_kernels.remove(model)
    names = {"model": model, "clip": torch.randn(1, 16, 3, 224, 224), "folder": "saved"}
    return names | {"VideoMAEForVideoClassification": transformers.VideoMAEForVideoClassification}


NAMES = {
    "README.md": names_of_readme,
    "docs/deployment.md": names_of_deployment,
    "docs/index.md": dict,
    "docs/models/README.md": names_of_models,
}
"""Of pages, what their code takes to be there. Other pages load models by name."""


@pytest.mark.unpoisoned
@pytest.mark.parametrize("page", NAMES)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = code_of(page)
    assert code
    if "to_onnx" in code and importlib.util.find_spec("onnxscript") is None:
        code = re.sub(r".*to_onnx.*", "", code)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(code, NAMES[page]())


@pytest.mark.table
@pytest.mark.unpoisoned
@pytest.mark.parametrize("page", [page for page in MODEL_PAGES if page not in NAMES])
def test_the_code_of_a_family_runs(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of the size that their classes have where nothing is said, without parameters: nothing is downloaded."""
    names: dict[str, Any] = {name: pytest.importorskip(name) for name in ("timm", "transformers")}
    code, create = code_of(page), names["timm"].create_model

    def built(cls: Any, name: str) -> torch.nn.Module:
        with torch.device("meta"):
            return cls(cls.config_class())

    monkeypatch.setattr(names["transformers"].PreTrainedModel, "from_pretrained", classmethod(built))
    monkeypatch.setattr(names["timm"], "create_model", lambda name, pretrained: create(name))
    for name in re.findall(r"(\w+)\.from_pretrained", code):
        if not hasattr(names["transformers"], name):
            pytest.skip(f"this transformers has no {name}")
        names[name] = getattr(names["transformers"], name)
    exec(code, names)
    assert "r=" in repr(names["model"])


def test_every_page_with_code_is_run() -> None:
    pages = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {page for page in pages if code_of(page)} == {*NAMES, *MODEL_PAGES}


def test_every_public_name_is_on_a_page_of_the_reference() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/reference").glob("*.md"))
    named = {line.rpartition(".")[2] for line in re.findall(r"^::: (.+)$", pages, re.MULTILINE)}
    assert (set(sttm_kernels.__all__) | set(sttm_kernels.nn.__all__) - {"GENERATORS"}) - named == set()
