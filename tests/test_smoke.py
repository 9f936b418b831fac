"""The quick look that every Python and every system gets: all modules import, and a corpus becomes a text."""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys

import coreinfer_sim_cli
from click.testing import CliRunner
from coreinfer_sim_cli.main import main

import coreinfer_sim

PACKAGES = (coreinfer_sim, coreinfer_sim_cli)
OF_EXTRAS = ("altair", "datasets", "fastapi", "lm_eval", "pyarrow", "uvicorn", "vl_convert", "xllamacpp")


def succeeded(*arguments: object) -> str:
    """Run a command that must succeed and return what it printed."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_module_imports():
    failed = []
    for package in PACKAGES:
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=failed.append):
            try:
                importlib.import_module(module.name)
            except Exception as error:
                failed.append(f"{module.name}: {error!r}")
    assert failed == []


def test_a_corpus_becomes_a_text_without_the_extras(tmp_path, tiny_checkpoint, monkeypatch):
    for name in OF_EXTRAS:
        monkeypatch.setitem(sys.modules, name, None)  # so that importing it fails
    corpus, index = tmp_path / "corpus.jsonl", tmp_path / "index"
    rows = [
        {"prompt": f"What do {noun} tell us?"} for noun in ("stars", "planets", "comets", "bread", "soup", "cheese")
    ]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    succeeded("build-index", corpus, "--model", tiny_checkpoint, "--out", index, "--clusters", 2, "--workers", 1)
    assert json.loads(succeeded("info", index, "--json"))
    assert json.loads(succeeded("lookup", index, "Why do stars shine?", "--json"))
    text = succeeded(
        "generate", "Why do stars shine?", "--index", index, "--model", tiny_checkpoint, "--mode", "similarity",
        "--keep-ratio", 0.5, "--max-new-tokens", 4,
    )  # fmt: skip
    assert text.strip()
