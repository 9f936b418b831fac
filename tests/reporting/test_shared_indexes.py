"""What is uploaded of an index: its page, its files without the places of the machine that built it, and the way back."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from index_folder import clusters, manifest, save
from markdown_it import MarkdownIt

from coreinfer_sim.base.errors import ConfigError, HubError, IndexFormatError
from coreinfer_sim.index.checks import read_manifest
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import ProfileInfo
from coreinfer_sim.index.names import DEMO_FOLDER
from coreinfer_sim.index.prompt_map import PromptMap
from coreinfer_sim.reporting.card import card, without_places
from coreinfer_sim.reporting.sharing import install, prepare, pull, push

HOSTILE = "a | b</td><script>alert(1)</script> [x](javascript:alert(2)) `c` *d* \x1b[31m"
PROFILE = ProfileInfo(
    1.0, False, 0.03, 1.012, 1.001, 1.024, 50_000_000, 12, 0.4, "stored", "Q4_1", 70_000_000, 100_000_000
)


@pytest.fixture
def index(tmp_path):
    """Make an index of three topics on disk."""

    def make(label: str = "stars, planets", **sections) -> SemanticIndex:
        named = [replace(each, label=label) for each in clusters()]
        return SemanticIndex.load(save(tmp_path / "index", of_clusters=named, **sections))

    return make


def of_model(**fields):
    return replace(manifest().model, **fields)


def test_the_page_says_what_the_manifest_says(index):
    page = card(index(profiles={"balanced": PROFILE}), "ada/chats", "apache-2.0", ["coreinfer-sim pull ada/chats"])
    data = ModelCard(page).data
    assert (data.license, data.library_name, data.base_model) == ("apache-2.0", "coreinfer_sim", "some-model")
    shown = MarkdownIt("commonmark").enable("table").render(ModelCard(page).text)
    for text in ("<h1>chats</h1>", "3 topics over 27 prompts", "coreinfer-sim pull ada/chats", "stars, planets"):
        assert text in shown
    row = ["balanced", "40% of the neurons", "+1.2%", "+0.1% to +2.4%", "70", "30%"]
    assert "".join(f"<td>{each}</td>\n" for each in row) in shown
    assert "licence of the index: apache-2.0" in shown and "no weights." in shown
    assert "Nothing was measured" not in page and "![" not in page


def test_labels_of_a_stranger_are_text(index):
    shown = MarkdownIt("commonmark").enable("table").render(ModelCard(card(index(HOSTILE), "ada/chats")).text)
    assert "<script" not in shown and "<a " not in shown and "<em>" not in shown and "\x1b" not in shown
    assert "a | b&lt;/td&gt;&lt;script&gt;alert(1)" in shown


def test_places_of_the_machine_are_left_out(index, tmp_path):
    secret = "/home/ada/secret"
    loaded = index(
        model=of_model(name=f"{secret}/tiny-llama", path=f"{secret}/tiny-llama", relative_path="../tiny-llama"),
        corpus=replace(manifest().corpus, source=f"{secret}/chats.jsonl"),
    )
    out = tmp_path / "out"
    out.mkdir()
    names = prepare(loaded, "ada/chats", out)
    assert names == sorted(["README.md", "centroids.faiss", "clusters.jsonl", "manifest.json", "neurons.safetensors"])
    assert not any(b"secret" in (out / name).read_bytes() for name in names)
    shared = read_manifest(out)
    assert (shared.model.name, shared.model.path, shared.corpus.source) == ("./tiny-llama", None, "chats.jsonl")
    page = (out / "README.md").read_text()
    assert "base_model" not in page and r"| model | ./tiny\-llama" in page
    assert without_places(shared) == shared


def test_a_hubs_id_stays(index):
    assert without_places(index(model=of_model(name="org/model")).manifest).model.name == "org/model"


def test_what_was_prepared_can_be_installed(index, tmp_path):
    found = PromptMap(
        np.zeros((3, 2), np.float32), np.arange(3, dtype=np.int32), np.eye(4, dtype=np.float16)[:3], ["a", "b", "c"]
    )
    loaded = SemanticIndex.load(save(tmp_path / "mapped", prompt_map=found))
    out = tmp_path / "out"
    out.mkdir()
    assert "map.png" in prepare(loaded, "ada/chats", out)
    assert (out / "map.png").read_bytes().startswith(b"\x89PNG") and "![" in (out / "README.md").read_text()
    place = tmp_path / "indexes" / "chats"
    install(out, place)
    assert {path.name for path in place.iterdir()} == {*loaded.manifest.files, "manifest.json"}
    vectors = np.eye(4, dtype=np.float32)
    assert SemanticIndex.load(place).lookup_embeddings(vectors) == loaded.lookup_embeddings(vectors)


def test_the_ready_made_index_has_a_page():
    page = card(SemanticIndex.load(DEMO_FOLDER), "ada/demo", "apache-2.0", has_picture=True)
    assert r"./smollm2\-135m\-instruct\-q4\_1.gguf" in page and "corpus.jsonl" in page


def test_a_damaged_index_is_neither_uploaded_nor_installed(index, tmp_path):
    loaded = index()
    path = loaded.folder / "neurons.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    out = tmp_path / "out"
    out.mkdir()
    for call in (lambda: prepare(loaded, "ada/chats", out), lambda: install(loaded.folder, tmp_path / "new")):
        with pytest.raises(IndexFormatError, match="checksum"):
            call()
    assert not (tmp_path / "new").exists() and list(out.iterdir()) == []


def test_a_hub_that_is_out_of_reach_and_a_name_that_is_none(index, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    loaded = index()
    for call in (lambda name: push(loaded, name), pull):
        with pytest.raises(HubError, match=re.escape("ada/chats is not to be had, as the hub does not answer (HF_HUB")):
            call("ada/chats")
        with pytest.raises(ConfigError, match="'chats' is no repository, expected USER/NAME"):
            call("chats")
    (tmp_path / "coreinfer_sim" / "indexes" / "chats").mkdir(parents=True)
    with pytest.raises(ConfigError, match="chats is there already, expected a new name"):
        pull("ada/chats")


def test_nothing_is_written_beside_an_index(index):
    loaded = index()
    before = sorted(Path(loaded.folder).iterdir())
    card(loaded, "ada/chats")
    assert sorted(Path(loaded.folder).iterdir()) == before
