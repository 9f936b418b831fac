"""Tokens that read neurons from the disk: the same texts as from memory, whatever is held."""

from __future__ import annotations

import os
import sys

import pytest
import torch
import transformers
from layouts import PROMPT
from lean_types import TYPES
from tiny_models import model_of, save_tiny_checkpoint, tiny_model, tiny_tokenizer

import coreinfer_sim
from coreinfer_sim.base.decode_settings import DecodeConfig, SelectionConfig
from coreinfer_sim.base.errors import ConfigError, StoreError
from coreinfer_sim.base.settings import Weights
from coreinfer_sim.engines.lean.disk_parts import disk_parts
from coreinfer_sim.engines.lean.disk_reads import FILE
from coreinfer_sim.engines.lean.disk_records import slot_bytes, staged_records
from coreinfer_sim.engines.lean.laid_out import load_laid_out, load_on_disk
from coreinfer_sim.generation.in_process import TextGenerator
from coreinfer_sim.models.weightless import open_weightless

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux' asynchronous reads")
D_FF = 1200
"""More than are read at a time, and no multiple of a tile's 16."""
WEIGHTS = ["stored", "bf16", "int8", "int4"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder of the module's own."""
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path_factory.getbasetemp() / "on-disk"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model"), intermediate_size=D_FF, num_hidden_layers=2)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Its records fill whole blocks of the disk."""
    settings = {"hidden_size": 256, "intermediate_size": D_FF, "num_hidden_layers": 2}
    return save_tiny_checkpoint(tmp_path_factory.mktemp("wide"), **settings)


def on_disk(folder, weights="stored", held=0):
    found = load_on_disk(folder, Weights(weights), lambda _model, parts: (int(held * parts.records), 100))
    assert found is not None
    return found


def generator_of(loaded, weights="stored", ratio=0.4):
    made = TextGenerator(loaded, None, SelectionConfig("all", read_ratio=ratio), DecodeConfig(weights=weights))
    made.take_over()
    return made


def held_outside(loaded):
    """Bytes of the matrices outside the MLPs that stay in memory."""
    head = loaded.model.laid_out_head
    matrices = {name: matrix.n_bytes for name, matrix in loaded.model.laid_out.items()}
    return sum((matrices if head is None else {**matrices, "lm_head": head.n_bytes}).values())


def generated(loaded, *given):
    with generator_of(loaded, *given) as generator:
        return generator.generate(PROMPT, max_new_tokens=24, ignore_eos=True)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_where_a_record_lies_does_not_change_the_text(folder, weights):
    memory = generated(load_laid_out(folder, Weights(weights), by_token=True), weights)
    assert memory.disk_bytes_per_token is None and memory.found_ratio is None
    before = None
    for held in (0, 0.3, 1):
        run = generated(on_disk(folder, weights, held), weights)
        assert (run.token_ids, run.read_ratio) == (memory.token_ids, memory.read_ratio)
        assert run.mlp_bytes_per_token == memory.mlp_bytes_per_token
        assert before is None or run.disk_bytes_per_token < before
        before = run.disk_bytes_per_token
        if held == 0:
            assert run.found_ratio == 0
    assert run.found_ratio > 0.5  # each neuron is read once


@pytest.mark.parametrize("weights", WEIGHTS)
def test_parts_are_known_before_anything_is_laid_out(folder, weights):
    empty = open_weightless(folder, ("llama",))
    parts = disk_parts(empty, Weights(weights), made=False)
    assert parts.making > 0 == disk_parts(empty, Weights(weights), made=True).making
    loaded = on_disk(folder, weights, held=0.5)
    mlps = loaded.model.laid_out_mlps
    (size,) = {mlp.record_bytes for mlp in mlps.values()}
    assert parts.layer == mlps[0].records.nbytes
    assert parts.records == 2 * D_FF * slot_bytes(size)
    assert parts.estimates == sum(mlp.estimate_bytes for mlp in mlps.values())
    assert loaded.model.laid_out_disk.n_bytes <= parts.records / 2 + parts.staged
    assert loaded.position_limit == 100
    assert held_outside(loaded) <= parts.resident < 1.1 * held_outside(loaded) + 4096


@pytest.mark.parametrize("name", ["gemma", "gemma2", "phi3", "cohere"])
def test_types_with_fused_projections_and_changed_logits_read_the_same(tmp_path, name):
    config, settings = TYPES[name]
    tokenizer = tiny_tokenizer()
    further = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    model_of(getattr(transformers, config)(**{**settings, **further})).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    memory = generated(load_laid_out(str(tmp_path), Weights.STORED, by_token=True))
    planned = []
    loaded = load_on_disk(str(tmp_path), Weights.STORED, lambda _model, parts: (planned.append(parts) or 0, 100))
    run = generated(loaded)
    assert (run.token_ids, run.read_ratio) == (memory.token_ids, memory.read_ratio)
    assert run.disk_bytes_per_token > 0 == run.found_ratio
    assert held_outside(loaded) <= planned[0].resident < 1.1 * held_outside(loaded) + 4096


@pytest.mark.parametrize("weights", ["stored", "int4"])
def test_neurons_with_relu_are_chosen_as_in_memory(tmp_path, weights):
    settings = {"hidden_act": "relu", "hidden_size": 64, "intermediate_size": D_FF, "num_hidden_layers": 2}
    folder = save_tiny_checkpoint(tmp_path, **settings)
    memory = generated(load_laid_out(folder, Weights(weights), by_token=True), weights)
    for held in (0, 0.3):
        run = generated(on_disk(folder, weights, held), weights)
        assert (run.token_ids, run.read_ratio) == (memory.token_ids, memory.read_ratio)
        assert run.disk_bytes_per_token > 0


def test_rows_of_a_batch_read_what_any_of_them_chooses(folder):
    ids = torch.tensor([[5, 9, 30, 31], [7, 11, 12, 40]])
    made = []
    for loaded in (load_laid_out(folder, Weights.STORED, by_token=True), on_disk(folder, held=0.2)):
        with generator_of(loaded) as generator:
            sparse = generator.sparse_model()
            made.append(sparse.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False))
            facts = sparse.latest.read
    assert torch.equal(*made)
    assert 0 < facts.n_missed < facts.n_chosen


def test_dense_decode_passes_all_records_through_memory(wide):
    texts = []
    for loaded in (load_laid_out(wide, Weights.STORED, by_token=True), on_disk(wide)):
        with generator_of(loaded) as generator:
            run = generator.generate(PROMPT, mode="dense", max_new_tokens=6, ignore_eos=True)
            texts.append(run.text)
            score = generator.score(PROMPT, " Stars form in clouds.")
            assert len(score) > 3
    assert texts[0] == texts[1]
    assert run.disk_bytes_per_token == sum(mlp.records.nbytes for mlp in loaded.model.laid_out_mlps.values())


def test_what_is_held_follows_what_tokens_choose(folder):
    loaded = on_disk(folder, held=0.5)
    disk = loaded.model.laid_out_disk
    with generator_of(loaded, "stored", 0.3) as generator:
        first = generator.generate(PROMPT, max_new_tokens=12, ignore_eos=True)
        again = generator.generate(PROMPT, max_new_tokens=12, ignore_eos=True)
    assert again.token_ids == first.token_ids
    assert again.found_ratio > first.found_ratio > 0
    assert again.found_ratio > 0.55  # more than a fixed half would hold
    assert 0 < disk.quota < D_FF and disk.n_bytes < 2 * D_FF * slot_bytes(loaded.model.laid_out_mlps[0].record_bytes)


def test_reads_that_fail_end_in_one_sentence(folder, tmp_path):
    with generator_of(on_disk(folder, held=0.5)) as generator:
        text = generator.generate(PROMPT, max_new_tokens=4, ignore_eos=True).text
        handle = int(generator.language_model.model.laid_out_disk.layers[0].words[FILE])
        kept = os.dup(handle)
        with (tmp_path / "short").open("w+b") as short:
            os.dup2(short.fileno(), handle)
            with pytest.raises(StoreError, match="reads of .* have failed; delete"):
                generator.generate(PROMPT, max_new_tokens=4, ignore_eos=True)
        os.dup2(kept, handle)
        os.close(kept)
        assert generator.generate(PROMPT, max_new_tokens=4, ignore_eos=True).text == text


def test_what_cannot_be_read_so(folder, tmp_path, monkeypatch):
    opt = tmp_path / "opt"
    tiny_model("opt").save_pretrained(opt)
    tiny_tokenizer().save_pretrained(opt)
    assert load_on_disk(str(opt), Weights.STORED, lambda *_: (0, 1)) is None
    with pytest.raises(ConfigError, match="no local checkpoint folder of a model whose tokens"):
        coreinfer_sim.load(None, str(opt), mode="all", read_ratio=0.5, memory_budget=1 << 40)
    monkeypatch.setattr("platform.machine", lambda: "mips")
    with pytest.raises(ConfigError, match="on Linux alone, on x86-64 or ARM, but this is linux on mips"):
        on_disk(folder)


def test_room_for_reads():
    assert slot_bytes(9216) == 9216 and slot_bytes(9280) == 9728 + 512
    assert staged_records(48) == 48 and staged_records(1200) == 512 and staged_records(8960) == 2986
