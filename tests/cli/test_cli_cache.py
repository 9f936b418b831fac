"""`coreinfer-sim cache`: what is kept for later starts, and clearing it."""

from __future__ import annotations

import pytest
from commands import call, parsed, refused, succeeded

import coreinfer_sim


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path))
    return tmp_path


def test_it_lists_and_clears(cache, tiny_checkpoint):
    assert parsed("cache")["entries"] == []
    for weights in ("int8", "int4"):
        coreinfer_sim.load(None, tiny_checkpoint, mode="dense", weights=weights).close()
    store = cache / "stores" / "abc.neurons"
    store.parent.mkdir()
    store.write_bytes(bytes(100))
    entries = parsed("cache")["entries"]
    assert sorted(each["what"] for each in entries) == [
        f"int4 weights of {tiny_checkpoint}",
        f"int8 weights of {tiny_checkpoint}",
        "neurons of a model under a memory budget",
    ]
    assert all(each["n_bytes"] > 0 for each in entries)
    lines = succeeded("cache").stdout.splitlines()
    assert len(lines) == 4 and lines[-1].startswith("3 items, ") and str(cache) in lines[-1]
    assert "3 items" in succeeded("cache", "--clear").stdout
    assert parsed("cache")["entries"] == [] and not store.exists()


def test_a_program_goes_on_after_its_layout_was_cleared(cache, tiny_checkpoint):
    with coreinfer_sim.load(None, tiny_checkpoint, mode="dense", weights="int8") as generator:
        text = generator.generate("How do stars form?", max_new_tokens=8).text
        succeeded("cache", "--clear")
        assert generator.generate("How do stars form?", max_new_tokens=8).text == text


def test_a_damaged_layout_is_listed(cache, tiny_checkpoint):
    coreinfer_sim.load(None, tiny_checkpoint, mode="dense", weights="int8").close()
    (manifest,) = cache.glob("layouts/*/layout.json")
    manifest.write_text("{")
    assert [each["what"] for each in parsed("cache")["entries"]] == ["damaged weights"]


def test_thresholds_of_a_read_ratio_are_listed_and_cleared(cache, tiny_checkpoint):
    coreinfer_sim.load(None, tiny_checkpoint, weights="int8", read_ratio=0.3).close()
    assert sorted(each["what"] for each in parsed("cache")["entries"]) == [
        f"int8 by token weights of {tiny_checkpoint}",
        "what tokens need of a model's neurons, for a read ratio",
    ]
    succeeded("cache", "--clear")
    assert parsed("cache")["entries"] == [] and not list((cache / "thresholds").iterdir())


def test_a_file_in_its_place_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path / "file"))
    refused(call("cache"), f"{tmp_path}/file is a file, expected the cache folder")


def test_clearing_forgets_which_files_it_has_read(cache, tiny_checkpoint):
    coreinfer_sim.load(None, tiny_checkpoint, mode="dense", weights="int8").close()
    assert list((cache / "layouts" / "sources").iterdir())
    succeeded("cache", "--clear")
    assert not (cache / "layouts" / "sources").exists()


def test_what_cannot_be_deleted_is_named(cache, tiny_checkpoint, monkeypatch):
    """A read-only disk cannot be made here, where the root user may write anything."""
    coreinfer_sim.load(None, tiny_checkpoint, mode="dense", weights="int8").close()
    (folder,) = cache.glob("layouts/*-int8-*")

    def refuse(_):
        raise OSError(30, "Read-only file system", "weights.bin")

    monkeypatch.setattr("shutil.rmtree", refuse)
    refused(call("cache", "--clear"), "Read-only file system", str(folder))
