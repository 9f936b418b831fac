"""An engine that holds weights in another layout: no weight stays in memory twice, and prefill reads the engine's."""

from __future__ import annotations

import pytest
import torch
from calls import generate, random_predictor, token_ids
from tiny_models import save_tiny_checkpoint, tiny_model

import coreinfer_sim
from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.engines.lean.engine import LeanEngine
from coreinfer_sim.generation.in_process import TextGenerator
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.models.loading import load_model
from coreinfer_sim.models.mlps import find_mlps, linear_parameters


def own_bytes(model):
    """Bytes of a model's parameters as they lie in memory."""
    return sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_packed_weights_take_the_place_of_the_models(family, weights):
    model = tiny_model(family)
    before, ids = own_bytes(model), token_ids(1, 12)
    engine = LeanEngine(model, find_mlps(model), DecodeConfig(weights=weights))
    engine.take_over()
    assert own_bytes(model) < before / 4  # norms, biases and, where the head is not tied, embeddings
    with torch.no_grad():
        prefill = model(input_ids=ids).logits[0].float()
    forced = engine.forced(ids, None, engine.prepare([random_predictor(model, 0.999).select([""], None, 1)[0]])[0])
    assert prefill.shape == forced.shape and not prefill.isnan().any()


def test_prefill_is_that_of_the_packed_weights():
    """As a model whose own weights are the widened ones."""
    model, wide = tiny_model("qwen2"), tiny_model("qwen2")
    engine = LeanEngine(model, find_mlps(model), DecodeConfig(weights="int8"))
    engine.take_over()
    for name, module in wide.named_modules():
        if type(module) is torch.nn.Linear:
            module.weight.data = linear_parameters(model.get_submodule(name))[0]
    if wide.config.tie_word_embeddings:
        wide.get_input_embeddings().weight.data = wide.lm_head.weight.data
    ids = token_ids(1, 40)
    with torch.no_grad():
        one, other = model(input_ids=ids).logits, wide(input_ids=ids).logits
    assert (one - other).abs().max() <= 0.1 * other.abs().max()  # inputs are rounded to 8 bits


def test_opening_lets_go_of_what_it_loaded(tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "model")
    with coreinfer_sim.load(None, folder, mode="dense", weights="int8") as generator:
        assert generator.generate("How do stars form?", max_new_tokens=8).n_new_tokens == 8
        assert own_bytes(generator.language_model.model) < own_bytes(load_model(folder).model) / 3  # embeddings stay


def test_a_model_that_was_handed_in_stays_whole(tmp_path):
    loaded = load_model(save_tiny_checkpoint(tmp_path / "model"))
    before = own_bytes(loaded.model)
    generator = coreinfer_sim.load(None, loaded, mode="dense", weights="int8")
    assert isinstance(generator, TextGenerator)
    assert generator.generate("How do stars form?", max_new_tokens=4).n_new_tokens == 4
    assert own_bytes(loaded.model) == before
    assert len(generate(SparseModel(loaded.model, random_predictor(loaded.model)), token_ids(1, 4), 3).sequences) == 1
