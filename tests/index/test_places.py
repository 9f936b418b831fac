"""An index is used from anywhere, and finds its model where the build found it, or near by where both were moved."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from index_folder import manifest, raw_manifest, save

from coreinfer_sim.base.errors import MissingEncoderError, MissingModelError
from coreinfer_sim.generation.opening import model_name
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.places import places_of

NAMES = ["model", "a b", "ü%20#[1]", "-x", "x\ny", "model.gguf"]


def make_model(path: Path) -> Path:
    """Make what looks like a model from outside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gguf":
        path.write_bytes(b"GGUF")
    else:
        path.mkdir()
        (path / "config.json").write_text("{}")
    return path


def built(folder: Path, name: str, recorded: bool = True) -> SemanticIndex:
    """Save an index of a model, as a build in this working directory does; earlier releases recorded only the name."""
    info = replace(manifest().model, name=name, **(places_of(name, folder) if recorded else {}))
    return SemanticIndex.load(save(folder, model=info))


def same(found: str, model: Path) -> bool:
    return Path(found).resolve() == model.resolve()


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "only named"])
def test_a_relative_name_is_found_from_anywhere(tmp_path, monkeypatch, elsewhere, name, recorded):
    home = tmp_path / "home"
    model = make_model(home / "models" / name)
    monkeypatch.chdir(home)
    index = built(home / "indexes" / name, f"models/{name}", recorded)
    assert model_name(index, None) == f"models/{name}"
    monkeypatch.chdir(elsewhere)
    assert same(model_name(index, None), model) and model_name(index, "other") == "other"
    monkeypatch.chdir("/")
    assert same(model_name(SemanticIndex.load(home / "indexes" / name), None), model)


@pytest.mark.parametrize("name", ["model", "model.gguf"])
@pytest.mark.parametrize("absolute", [True, False])
def test_index_and_model_may_be_moved_together(tmp_path, monkeypatch, elsewhere, name, absolute):
    home = tmp_path / "home"
    model = make_model(home / "models" / name)
    monkeypatch.chdir(home)
    built(home / "indexes" / "index", str(model) if absolute else f"models/{name}")
    monkeypatch.chdir(elsewhere)
    shutil.move(home, tmp_path / "moved")
    index = SemanticIndex.load(tmp_path / "moved" / "indexes" / "index")
    assert same(model_name(index, None), tmp_path / "moved" / "models" / name)
    beside = tmp_path / "flat" / "index"
    shutil.copytree(tmp_path / "moved" / "indexes" / "index", beside)
    shutil.move(tmp_path / "moved" / "models" / name, tmp_path / "flat" / name)
    shutil.rmtree(tmp_path / "moved")
    assert same(model_name(SemanticIndex.load(beside), None), tmp_path / "flat" / name)


def test_an_index_alone_finds_its_model_where_the_build_did(tmp_path, monkeypatch, elsewhere):
    model = make_model(tmp_path / "home" / "model")
    monkeypatch.chdir(tmp_path / "home")
    built(tmp_path / "home" / "index", "model")
    index = SemanticIndex.load(shutil.move(tmp_path / "home" / "index", tmp_path / "elsewhere" / "index"))
    monkeypatch.chdir("/")
    assert same(model_name(index, None), model)


@pytest.mark.parametrize("name", ["models/model.gguf", "./model", "/nowhere/model"])
def test_a_model_that_is_nowhere_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    index = built(tmp_path / "index", name, recorded=False)
    with pytest.raises(
        MissingModelError, match=rf"index names the model {name}, which is neither .*; put it there, name its"
    ):
        model_name(index, None)


def test_a_name_of_the_hub_stays_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some-model").mkdir()  # no model
    for name in ("some-model", "some/model"):
        assert model_name(built(tmp_path / name / "index", name), None) == name
        assert "path" not in raw_manifest(tmp_path / name / "index")["model"]


def test_places_do_not_change_what_an_index_is(tmp_path, monkeypatch):
    make_model(tmp_path / "model.gguf")
    monkeypatch.chdir(tmp_path)
    named, recorded = (built(tmp_path / str(each), "model.gguf", each) for each in (False, True))
    assert named.manifest.identity() == recorded.manifest.identity() == named.manifest.checksum()
    assert recorded.manifest.checksum() != named.manifest.checksum()
    assert raw_manifest(tmp_path / "True")["model"]["relative_path"] == os.path.join("..", "model.gguf")
    assert json.dumps(raw_manifest(tmp_path / "False")["model"]) == json.dumps(
        {name: value for name, value in asdict(named.manifest.model).items() if value is not None or name == "revision"}
    )


def test_an_encoder_that_is_nowhere_is_named(tmp_path):
    info = replace(manifest().encoder, name="./encoder", path=str(tmp_path / "encoder"), relative_path="../encoder")
    index = SemanticIndex.load(save(tmp_path / "index", encoder=info))
    with pytest.raises(MissingEncoderError, match="index names the sentence encoder ./encoder, which is neither"):
        index.lookup("stars")
