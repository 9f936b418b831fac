"""Weights that are laid out once: in the user's cache folder, whole or not at all, or in memory."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layouts import PROMPT, Said, folders, text_of
from tiny_models import save_tiny_checkpoint, tiny_model, tiny_tokenizer

import coreinfer_sim
from coreinfer_sim.base.errors import IndexMismatchError
from coreinfer_sim.engines.lean import laid_out
from coreinfer_sim.models.fingerprint import weight_sketch
from coreinfer_sim.models.layout_file import kept_layouts
from coreinfer_sim.models.loading import load_model


@pytest.mark.parametrize("weights", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
def test_later_starts_map_what_the_first_one_has_laid_out(weights, tied, cache, tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "model", tie_word_embeddings=tied)
    first, second = Said(), Said()
    text = text_of(folder, first, weights=weights)
    assert ["once" in line for line in first.lines] == [True]
    (place,) = folders(cache)
    before = {path.name: path.stat().st_mtime_ns for path in place.iterdir()}
    assert text_of(folder, second, weights=weights) == text
    assert not second.lines and {path.name: path.stat().st_mtime_ns for path in place.iterdir()} == before
    # the same as of weights that are packed in memory
    loaded = load_model(folder, "stored")
    with coreinfer_sim.load(None, loaded, mode="dense", weights=weights) as generator:
        generator.take_over()
        assert generator.generate(PROMPT, max_new_tokens=12, ignore_eos=True).text == text


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_all_parts_of_a_family_come_from_the_layout(family, cache, tmp_path):
    """Biases, norms of heads and whatever else it has."""
    tiny_model(family).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    made = [laid_out.load_laid_out(str(tmp_path / "model"), laid_out.Weights.INT8) for _ in range(2)]
    packed = tiny_model(family)
    assert weight_sketch(made[1].layers) == weight_sketch(load_model(str(tmp_path / "model")).layers)
    for each in made:
        assert not any(parameter.is_meta for parameter in each.model.parameters())
        for name, parameter in each.model.named_parameters():
            if "norm" in name or "bias" in name:
                assert torch.equal(parameter, packed.get_parameter(name).to(parameter.dtype))


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_a_gguf_file_is_never_widened_and_its_tokenizer_is_kept(kind, cache, quantised_file):
    path, said = quantised_file(kind), Said()
    text = text_of(path, said)
    (place,) = folders(cache)
    assert {"config.json", "tokenizer.json"} <= {each.name for each in place.iterdir()}
    assert text_of(path, said) == text and len(said.lines) == 1
    with coreinfer_sim.load(None, load_model(str(path), "stored"), mode="dense") as generator:
        generator.take_over()
        assert generator.generate(PROMPT, max_new_tokens=12, ignore_eos=True).text == text
    if kind == "q8_0":  # what is rounded to the same type again stays
        assert text_of(path, weights="int8") == text


def test_contents_name_a_layout(checkpoint, cache, tmp_path):
    text = text_of(checkpoint, weights="int8")
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert text_of(tmp_path / "copy", weights="int8") == text
    assert len(folders(cache)) == 1
    save_tiny_checkpoint(tmp_path / "copy", num_hidden_layers=2)
    text_of(tmp_path / "copy", weights="int8")
    assert len(folders(cache)) == 2
    text_of(checkpoint, weights="int4")
    assert len(folders(cache)) == 3
    kept = {(Path(layout.source).name, layout.weights) for _, layout in kept_layouts() if layout is not None}
    assert kept == {("model", "int8"), ("copy", "int8"), ("model", "int4")}


def test_plain_weights_stay_where_they_lie(checkpoint, cache):
    text_of(checkpoint)
    text_of(checkpoint, engine="transformers")
    assert not cache.exists()


@pytest.mark.parametrize(
    "damage",
    ["cut", "changed", "no manifest", "half a manifest", "another version", "empty"],
)
def test_a_damaged_layout_is_made_anew(damage, checkpoint, cache):
    text = text_of(checkpoint, weights="int8")
    (place,) = folders(cache)
    weights, manifest = place / "weights.bin", place / "layout.json"
    if damage == "cut":
        os.truncate(weights, weights.stat().st_size - 100)
    elif damage == "changed":
        with weights.open("r+b") as file:
            file.seek(5000)
            file.write(b"\xff" * 64)
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        manifest.write_bytes(manifest.read_bytes()[:200])
    elif damage == "another version":
        manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 9'))
    else:
        weights.write_bytes(b"")
    said = Said()
    assert text_of(checkpoint, said, weights="int8") == text
    assert "damaged" in said.lines[0] and "laid out anew" in said.lines[0] and len(said.lines) == 2
    again = Said()
    assert text_of(checkpoint, again, weights="int8") == text and not again.lines


def test_a_layout_that_was_only_touched_is_read_and_used(checkpoint, cache):
    text = text_of(checkpoint, weights="int8")
    (place,) = folders(cache)
    written = (place / "weights.bin").stat().st_mtime_ns
    os.utime(place / "weights.bin", ns=(0, 0))
    said = Said()
    assert text_of(checkpoint, said, weights="int8") == text and not said.lines
    assert (place / "weights.bin").stat().st_mtime_ns == written  # the next start does not read it again


@pytest.mark.parametrize("what", ["no folder", "full disk"])
def test_without_room_weights_are_laid_out_in_memory(what, checkpoint, cache, monkeypatch):
    if what == "no folder":
        cache.parent.write_text("a file where a folder should be")
    else:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(laid_out.LayoutWriter, "add", full)
    said = Said()
    text = text_of(checkpoint, said, weights="int8")
    (line,) = said.lines
    assert "in memory" in line and "COREINFER_SIM_CACHE" in line
    assert not cache.exists() or not folders(cache)
    monkeypatch.undo()
    assert text_of(checkpoint, weights="int8") == text


def test_what_a_killed_process_left_goes(checkpoint, cache):
    left = cache / ".abc-int8-1.part"
    left.mkdir(parents=True)
    (left / "weights.bin").write_bytes(b"x")
    text_of(checkpoint, weights="int8")
    assert not left.exists()


def test_two_processes_that_start_at_once_make_one(checkpoint, cache):
    code = (
        "import sys, coreinfer_sim\n"
        "with coreinfer_sim.load(None, sys.argv[1], mode='dense', weights='int8') as g:\n"
        f"    print(g.generate({PROMPT!r}, max_new_tokens=4).n_new_tokens)\n"
    )
    command = [sys.executable, "-c", code, str(checkpoint)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in processes] == ["4", "4"]
    assert len(folders(cache)) == 1


def test_an_index_takes_a_laid_out_model_for_its_own(wide_index, wide_checkpoint, cache):
    for weights in ("int8", "int4"):
        with coreinfer_sim.load(wide_index, wide_checkpoint, weights=weights) as generator:
            assert generator.generate(PROMPT, max_new_tokens=4).n_new_tokens == 4


def test_the_index_of_another_model_is_still_refused(wide_index, tmp_path, cache):
    other = save_tiny_checkpoint(tmp_path / "other", intermediate_size=192, initializer_range=0.1)
    with pytest.raises(IndexMismatchError):
        coreinfer_sim.load(wide_index, other, weights="int4")
