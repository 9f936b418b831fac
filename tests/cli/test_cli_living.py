"""Indexes that grow: the commands of docs/living.md run as they stand there."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import call, parsed, refused, setting, succeeded, write_rows

from coreinfer_sim.index.checks import read_manifest
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import SUMS_FILE
from coreinfer_sim.index.storage import write_manifest

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "living.md"


def commands_of(document: Path) -> list[list[str]]:
    lines = document.read_text(encoding="utf-8").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("    coreinfer-sim ")]


@pytest.fixture
def home(corpus, tiny_checkpoint, tmp_path, monkeypatch):
    """A folder with the model and the corpora that the document names, and a data folder of its own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for command in ("BUILD_INDEX", "EXTEND", "RECLUSTER"):
        monkeypatch.setenv(f"COREINFER_SIM_{command}_WORKERS", "1")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_checkpoint, tmp_path / "my-model")
    shutil.copy(corpus, tmp_path / "prompts.jsonl")
    write_rows(tmp_path / "march.jsonl", [{"prompt": f"Why do stars shine, case {n}?"} for n in range(9)])
    return tmp_path


def test_the_commands_of_the_document_do_what_it_says(home):
    said = {}
    for command in commands_of(DOCUMENT):
        if command[0] == "serve":
            continue  # which ends by a signal
        said[" ".join(command)] = succeeded(*command)
    indexes = {name: SemanticIndex.load(name) for name in ("first", "both", "march", "merged", "coarse", "fine")}
    assert {name: len(index) for name, index in indexes.items()} == {
        "first": 3, "both": 3, "march": 3, "merged": 3, "coarse": 2, "fine": 5,
    }  # fmt: skip
    for name in ("counts", "energy", "activation"):
        one, other = (getattr(indexes[each].sums(), name) for each in ("both", "merged"))
        np.testing.assert_array_equal(one, other)
    assert indexes["both"].manifest.corpus.n_sentences == 54
    shown = said["diff first both"].stdout
    assert "corpora: prompts.jsonl → prompts.jsonl, march.jsonl" in shown and "3 topics, " in shown
    assert parsed("diff", "both", "coarse")["topics"][0]["size"] >= 18


def test_the_document_names_every_command_of_this_kind():
    assert {command[0] for command in commands_of(DOCUMENT)} >= {"extend", "merge", "recluster", "diff"}


def test_an_index_of_an_earlier_release_is_refused_by_every_command(home, index):
    earlier = home / "earlier"
    shutil.copytree(index, earlier)
    (earlier / SUMS_FILE).unlink()
    manifest = read_manifest(earlier)
    files = {name: each for name, each in manifest.files.items() if name != SUMS_FILE}
    write_manifest(earlier, replace(manifest, sums=None, files=files))
    for arguments in (
        ["extend", earlier, "march.jsonl", "-o", "out"],
        ["merge", earlier, earlier, "-o", "out"],
        ["recluster", earlier, "--clusters", 2, "-o", "out"],
    ):
        run = call(*arguments)
        says = "count twice" if arguments[0] == "merge" else "earlier holds no exact sums, .* build it anew"
        refused(run, says)
    refused(call("extend", "demo", "march.jsonl"), "comes with the package and stays as it is; say where")
    assert not (home / "data").exists() or list((home / "data").rglob("manifest.json")) == []


def test_more_clusters_and_a_place_that_is_taken_are_refused(index, home):
    refused(
        call("recluster", index, "--clusters", 9, "-o", "out"),
        "9 clusters were asked for, .* has 3, .*texts can split, .*give its corpus too",
    )
    refused(call("recluster", index, "--clusters", 2, "-o", home / "my-model"), "exists already and is no index")
    refused(
        call("build-index", "march.jsonl", "--model", "my-model", "--clusters", 2, *setting("build.centroids", index)),
        "clusters is 2 and centroids is .*; give one of them",
    )
    refused(call("extend", index, "nowhere.jsonl", "-o", "out"), "there is no file or folder 'nowhere.jsonl'")
