"""GGUF files of several model types keep their codes: what is laid out is what transformers reads."""

from __future__ import annotations

import pytest
import torch
from calls import token_ids
from gguf_blocks import blocks_of
from gguf_models import GGUF_TYPES, WIDE, write_gguf

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.base.settings import Weights
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.lean.engine import LeanEngine
from coreinfer_sim.engines.lean.laid_out import load_laid_out
from coreinfer_sim.models.gguf_names import TYPES
from coreinfer_sim.models.loading import load_model


def dense_logits(loaded, ids):
    engine = LeanEngine(loaded.model, loaded.layers, DecodeConfig())
    return engine.forced(ids, None, engine.prepare([NeuronSelection("dense")])[0])


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_what_is_laid_out_is_what_transformers_reads(name, cache, tmp_path):
    path, ids = str(write_gguf(tmp_path / "model.gguf", name)), token_ids(1, 12)
    loaded, wide = load_laid_out(path, Weights.STORED), load_model(path, "float32")
    assert loaded is not None and loaded.model.config.model_type == name and not loaded.notes
    found = dict(loaded.model.laid_out)
    assert {each.kind for each in found.values()} == {"Q8_0"}
    for place, value in wide.model.named_parameters():
        module, _, leaf = place.rpartition(".")
        if leaf == "weight" and module in found:
            assert torch.equal(found.pop(module).widened().T, value)
        elif "embed" not in place:  # biases and norms
            kept = loaded.model.get_parameter(place)
            assert torch.equal(kept, value.to(kept.dtype))
    assert not found or {*found} == {"lm_head"} and loaded.model.config.tie_word_embeddings
    with torch.no_grad():
        expected = wide.model(input_ids=ids).logits[0]
    assert (dense_logits(loaded, ids) - expected).abs().max() <= 0.1 * expected.abs().max()  # inputs are rounded


@pytest.mark.parametrize("name", ["gemma2", "phi3"])
def test_tokens_choose_among_codes(name, cache, tmp_path):
    path, ids = str(write_gguf(tmp_path / "model.gguf", name)), token_ids(1, 12)
    loaded = load_laid_out(path, Weights.STORED, by_token=True)
    assert {each.kind for each in loaded.model.laid_out_mlps.values()} == {"Q8_0 high"}
    wide = load_model(path, "float32")
    with torch.no_grad():
        expected = wide.model(input_ids=ids).logits[0]
    assert (dense_logits(loaded, ids) - expected).abs().max() <= 0.1 * expected.abs().max()


def test_types_whose_codes_the_loops_do_not_read_are_widened_with_a_note(cache, tmp_path):
    """The values of Q2_K have minima for each 16 weights; those of Q3_K are codes of a Q6_K."""
    kinds = {"Q3_K": "", "Q2_K": "in Q2_K are widened to bfloat16"}
    for kind, note in kinds.items():

        def random(name, values, kind):
            return blocks_of(kind.name, *values.shape, seed=len(name))

        path = str(write_gguf(tmp_path / f"{kind}.gguf", "llama", kind, random, **WIDE))
        loaded, wide = load_laid_out(path, Weights.STORED), load_model(path, "float32")
        assert [note in line for line in loaded.notes] == [True] * bool(note)
        for module, matrix in loaded.model.laid_out.items():
            value = wide.model.get_submodule(module).weight
            assert matrix.kind == ("Q6_K" if kind == "Q3_K" else "bfloat16")
            assert torch.equal(matrix.widened().T, value if kind == "Q3_K" else value.bfloat16().float())


def test_every_known_type_is_tried():
    assert {*TYPES} - {*GGUF_TYPES} == {"mistral", "qwen2"}  # as llama and qwen3, and with biases
