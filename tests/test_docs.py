"""What the documents name is there."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

import coreinfer_sim

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")])
MADE = {"indexes/demo"}
"""What commands make; it is not part of the sources."""
FOLDERS = "coreinfer_sim|cli|figures|tests|docs|demo|data_scripts|indexes"
PATH = re.compile(rf"(?<![\w./~-])(?:{FOLDERS})/[\w./-]*\w")
FUNCTION = re.compile(r"`([\w/]+\.py):([\w.]+)`")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def defined(path: Path) -> set[str]:
    """Return the functions and classes of a file, methods as ``Class.method``."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, FUNCTIONS)}
        if isinstance(node, (ast.ClassDef, *FUNCTIONS)):
            names.add(node.name)
    return names


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_that_is_named_exists(document):
    text = document.read_text(encoding="utf-8")
    missing = {name for name in PATH.findall(text) if name not in MADE and not (ROOT / name).exists()}
    missing |= {name for name in LINK.findall(text) if not (document.parent / name).exists()}
    assert missing == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_function_that_is_named_exists(document):
    missing = []
    for file, name in FUNCTION.findall(document.read_text(encoding="utf-8")):
        path = next((base / file for base in (ROOT, ROOT / "coreinfer_sim") if (base / file).exists()), None)
        if path is None or name not in defined(path):
            missing.append(f"{file}:{name}")
    assert missing == []


def test_the_public_names_are_those_of_the_document():
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert sorted(listed) == coreinfer_sim.__all__


@pytest.mark.parametrize("notebook", sorted(ROOT.glob("docs/notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_kept_without_what_they_print(notebook):
    """Figures come of committed results; the site runs each notebook and shows what it printed there."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert f"notebooks/{notebook.stem}\n" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
