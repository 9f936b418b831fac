"""Indexes by name: `list`, `show`, `check`, `rm`, which one is taken where none is named, and from where."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from commands import ONE_PROCESS, call, parsed, refused, succeeded

from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.names import DEMO_FOLDER
from coreinfer_sim.index.storage import write_manifest


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """The user's data folder, and a working directory with nothing in it."""
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "COREINFER_SIM_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "XDG_DATA_HOME" / "coreinfer_sim" / "indexes"


@pytest.fixture
def install(home, index):
    """Install a copy of the index under a name."""
    return lambda name: shutil.copytree(index, home / name)


def test_the_ready_made_index_is_there_from_the_beginning(home):
    (row,) = parsed("list")["indexes"]
    assert (row["name"], row["default"], row["n_clusters"]) == ("demo", True, 10)
    assert row["folder"] == str(DEMO_FOLDER) and row["model"] == "smollm2-135m-instruct-q4_1.gguf"
    assert parsed("info")["model"].get("path") is None  # no other machine has a place of the one that built it
    assert parsed("info") == parsed("show", "demo") == {**parsed("show", DEMO_FOLDER), "index": "demo"}
    shutil.copytree(DEMO_FOLDER, home / "demo")  # away from the sources, beside which the model may lie
    refused(call("generate", "stars"), "demo names the model models/smollm2-135m", "fetch it by 'coreinfer-sim demo'")


def test_names_are_listed_found_and_taken_where_there_is_one(install, index):
    folder = install("mine")
    rows = {row["name"]: row for row in parsed("list")["indexes"]}
    assert [name for name, row in rows.items() if row["default"]] == ["mine"] and len(rows) == 2
    assert rows["mine"]["folder"] == str(folder) and rows["mine"]["n_prompts"] == 45
    assert rows["mine"]["bytes"] == sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".json")
    text = succeeded("list")
    assert text.stdout.splitlines()[1].startswith("* mine     3 clusters        45 prompts  ")
    assert str(folder.parent) in text.stderr
    assert {**parsed("show", "mine"), "index": ""} == {**parsed("info", index), "index": ""}
    assert parsed("show")["index"] == parsed("check")["index"] == "mine"


def test_generate_takes_the_only_index_and_finds_its_model_from_anywhere(install, index, tiny_checkpoint):
    install("mine")
    given = "generate", "stars", "--max-new-tokens", 2
    texts = [parsed(*given, *more)["text"] for more in ([], ["--index", "mine"], ["--index", index])]
    assert len(set(texts)) == 1
    refused(call(*given, "--model", tiny_checkpoint, "--mode", "similarity"), "needs an index")


def test_index_and_model_move_together(install, home, tiny_checkpoint, tmp_path, monkeypatch):
    folder = install("mine")
    models = shutil.copytree(tiny_checkpoint, tmp_path / "models" / Path(tiny_checkpoint).name).parent
    manifest = folder / "manifest.json"
    assert tiny_checkpoint in manifest.read_text(encoding="utf-8")
    loaded = SemanticIndex.load("mine").manifest
    gone = "/nowhere/" + Path(tiny_checkpoint).name
    write_manifest(folder, replace(loaded, model=replace(loaded.model, name=gone, path=gone, relative_path=None)))
    refused(call("generate", "stars"), "mine names the model /nowhere/", "name its folder in COREINFER_SIM_MODELS")
    monkeypatch.setenv("COREINFER_SIM_MODELS", f"/nowhere:{models}")
    assert succeeded("generate", "stars", "--max-new-tokens", 2).stdout.startswith("> stars\n")


def test_which_of_several(install):
    for name in ("one", "two"):
        install(name)
    for command in (["show"], ["generate", "stars"], ["tune", "demo.jsonl"]):
        (Path.cwd() / "demo.jsonl").touch()
        refused(call(*command), r"there are 2 \(one, two\)", "'coreinfer-sim config set index one'")
    succeeded("config", "set", "index", "two")
    assert parsed("show")["index"] == "two"
    assert [row["name"] for row in parsed("list")["indexes"] if row["default"]] == ["two"]
    refused(call("config", "set", "index", "three"), "no index 'three'.*expected one of demo, one, two")


def test_the_variable_stands_above_the_file(install, monkeypatch):
    for name in ("one", "two"):
        install(name)
    succeeded("config", "set", "index", "two")
    monkeypatch.setenv("COREINFER_SIM_INDEX", "one")
    assert parsed("show")["index"] == "one"


def test_a_path_wins_over_a_name(install, index):
    install("mine")
    (Path.cwd() / "mine").mkdir()
    assert parsed("show", "mine")["index"] == "mine"  # this folder is no index
    refused(call("show", "./mine"), "has no manifest.json")
    shutil.copytree(index, Path.cwd() / "mine", dirs_exist_ok=True)
    (Path.cwd() / "mine" / "manifest.json").write_text("{}")
    refused(call("show", "mine"), "manifest.json")


def test_a_name_that_nobody_has(home):
    refused(
        call("show", "mine"), "there is no index 'mine', neither a folder in .* nor a name in", "coreinfer-sim list"
    )


@pytest.mark.parametrize("name", ["..", "../mine", "mine/..", "", "~"])
def test_rm_deletes_the_users_own_alone(install, name):
    folder = install("mine")
    refused(call("rm", name, "--yes"), f"there is no index '{name}'", "your own: mine")
    assert folder.is_dir() and DEMO_FOLDER.is_dir()


def test_rm_leaves_the_ready_made_index(home):
    refused(call("rm", "demo", "--yes"), "the index 'demo' comes with the package")
    assert DEMO_FOLDER.is_dir()


def test_rm(install):
    folder = install("mine")
    assert call("rm", "mine", stdin="n\n").exit_code == 1 and folder.is_dir()
    succeeded("rm", "mine", "--yes")
    assert not folder.exists() and [row["name"] for row in parsed("list")["indexes"]] == ["demo"]


def test_a_damaged_one_is_listed_as_such(install):
    (install("mine") / "manifest.json").write_text("{}")
    row = parsed("list")["indexes"][1]
    assert row["name"] == "mine" and "manifest.json" in row["error"]
    assert "manifest.json" in succeeded("list").stdout


def test_a_corpus_folder_of_the_same_name_is_not_in_the_way(home, corpus, tiny_checkpoint):
    (Path.cwd() / "rows").mkdir()
    shutil.copy(corpus, Path.cwd() / "rows")
    succeeded("build-index", "rows", "--model", tiny_checkpoint, "--clusters", 2, *ONE_PROCESS, "--quiet")
    assert (home / "rows" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("out", "where"), [([], "prompts"), (["--out", "mine"], "mine"), (["--out", "./mine"], None)], ids=str
)
def test_a_build_writes_under_a_name(home, corpus, tiny_checkpoint, out, where):
    done = succeeded("build-index", corpus, "--model", tiny_checkpoint, "--clusters", 2, *ONE_PROCESS, *out)
    folder = Path.cwd() / "mine" if where is None else home / where
    assert (folder / "manifest.json").is_file()
    assert done.stdout.startswith(f"{where or 'mine'}: 2 clusters over ")
    assert (f"The index is called {where}, and goes to {folder}." in done.stderr) is (where is not None)
