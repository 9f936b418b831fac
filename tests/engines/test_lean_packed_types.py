"""Packed weights, and weights by neuron, of model types that are not laid out as Llama is."""

from __future__ import annotations

import pytest
import torch
from calls import selection, token_ids
from lean_types import model_named, prefilled, steps
from tiny_models import tiny_tokenizer

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import Weights
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.lean.engine import LeanEngine
from coreinfer_sim.engines.lean.laid_out import load_laid_out
from coreinfer_sim.models.mlps import find_mlps

PACKED = ["gemma", "gemma2", "phi3", "gpt_neox", "falcon", "opt", "starcoder2", "gpt2"]
"""Scaled and tied embeddings, soft caps, fused projections, biases, learned positions, transposed weights."""


def engine_of(model, weights="int8"):
    return LeanEngine(model, find_mlps(model), DecodeConfig(weights=weights))


def dense_logits(engine, ids):
    return engine.forced(ids, None, engine.prepare([NeuronSelection("dense")])[0])


@pytest.mark.parametrize("name", PACKED)
def test_steps_texts_and_prefill_read_the_same_packed_weights(name):
    model, ids = model_named(name), token_ids(1, 12)
    wide = dense_logits(engine_of(model, "stored"), ids)
    engine, cache = engine_of(model), prefilled(model)
    (held,) = engine.prepare([selection(model, 0.5)])
    found = engine.forced(ids, cache, held)
    expected = steps(engine, cache, held, ids[0].tolist())
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    packed = dense_logits(engine, ids)
    assert 0 < (packed - wide).abs().max() <= 0.1 * wide.abs().max()
    engine.take_over()
    with torch.no_grad():
        prefill = model(input_ids=ids).logits[0]
    assert (prefill - packed).abs().max() <= 1e-3 * packed.abs().max()


@pytest.mark.parametrize("name", PACKED)
def test_what_a_checkpoint_is_laid_out_as(name, cache, tmp_path):
    """A layout on the disk gives what weights give that are rounded in memory."""
    model, ids = model_named(name), token_ids(1, 12)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    made = [load_laid_out(str(tmp_path / "model"), Weights.INT8) for _ in range(2)]
    if name == "gpt2":  # loaded, and rounded in memory
        assert made == [None, None]
        return
    expected = dense_logits(engine_of(model), ids)
    for each in made:
        assert each is not None and torch.equal(dense_logits(engine_of(each.model), ids), expected)


@pytest.mark.parametrize("weights", ["stored", "int8"])
@pytest.mark.parametrize("name", ["phi3", "gemma2"])
def test_tokens_read_neurons(name, weights, cache, tmp_path):
    """All neurons by the records of a layout give what whole matrices give; the model's own code reads them too."""
    model, ids = model_named(name), token_ids(1, 12)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    made = load_laid_out(str(tmp_path / "model"), Weights(weights), by_token=True)
    assert made is not None
    engine = engine_of(made.model, weights)
    found, expected = dense_logits(engine, ids), dense_logits(engine_of(model, weights), ids)
    tolerance = 1e-5 if weights == "stored" else 0.1  # output rows are rounded along another dimension
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    engine.take_over()
    with torch.no_grad():
        prefill = made.model(input_ids=ids).logits[0]
    assert (prefill - found).abs().max() <= (1e-5 if weights == "stored" else 0.05) * found.abs().max()
    engine.calibrate(lambda: [token_ids(1, 100, seed=50 + n)[0] for n in range(6)])
    part = engine.forced(ids, None, engine.prepare([NeuronSelection("all", {}, read_ratio=0.5)])[0])
    assert (part - found).abs().max() / found.abs().max() > 1e-4


def test_plain_mlps_are_not_read_by_token():
    engine = engine_of(model_named("opt"))
    with pytest.raises(ConfigError, match="its MLPs have no gates"):
        engine.prepare([NeuronSelection("all", {}, read_ratio=0.5)])
