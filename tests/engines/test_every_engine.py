"""One suite over all engines: what each must give, whichever way it lays held neurons out."""

from __future__ import annotations

import pytest
import torch
from calls import generate, logits, selection, token_ids
from tiny_models import tiny_model
from transformers import DynamicCache

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.choosing.predictors import FixedPredictor
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.modules import installed
from coreinfer_sim.engines.registry import choose_engines
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.models.mlps import dense_bytes, find_mlps

ENGINES = ["lean", "transformers", "compiled"]
N_NEW = 6


@pytest.fixture(scope="module", params=ENGINES)
def engine(request):
    """Each engine in turn, on a tiny Llama in float32."""
    model = tiny_model("llama")
    (made,), refused = choose_engines(model, find_mlps(model), DecodeConfig(engine=request.param))
    assert refused is None
    yield made
    made.close()


def sparse_model(engine, chosen):
    return SparseModel(engine.model, FixedPredictor(chosen), config=engine.config, engines=[engine])


@torch.no_grad()
def steps_by_hand(model, chosen, ids, new):
    """Dense prefill, then the tokens ``new`` one by one with compact MLPs; logits [n_new, vocabulary]."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    found = []
    with installed(find_mlps(model), chosen):
        for token in new:
            output = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            found.append(output.logits[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize("keep_ratio", [0.4, 1.0])
def test_decode_equals_compact_mlps_by_hand(engine, keep_ratio):
    ids, chosen = token_ids(1, 9), selection(engine.model, keep_ratio)
    found = generate(sparse_model(engine, chosen), ids, N_NEW)
    new = found.sequences[0, 9:].tolist()
    expected = steps_by_hand(engine.model, chosen, ids, new[:-1])
    assert (logits(found)[0, 1:] - expected).abs().max() < 1e-4
    assert expected.argmax(-1).tolist() == new[1:]


@pytest.mark.parametrize("keep_ratio", [0.4, 1.0])
def test_forced_text_equals_single_steps(engine, keep_ratio):
    ids, chosen = token_ids(1, 9), selection(engine.model, keep_ratio)
    found = generate(sparse_model(engine, chosen), ids, N_NEW)
    new = found.sequences[:, 9:]
    (held,) = engine.prepare([chosen])
    cache = DynamicCache(config=engine.model.config)
    with torch.no_grad():
        engine.model(input_ids=ids, past_key_values=cache, use_cache=True)
    before = cache.layers[0].keys.clone()
    forced = engine.forced(new[:, :-1], cache, held)
    assert forced.shape == (N_NEW - 1, engine.model.config.vocab_size) and forced.dtype is torch.float32
    assert (forced - logits(found)[0, 1:]).abs().max() < 1e-4
    assert cache.get_seq_length() == 9 and torch.equal(cache.layers[0].keys, before)


def test_forced_text_without_a_prompt(engine):
    ids, chosen = token_ids(1, 8), selection(engine.model)
    (held,) = engine.prepare([chosen])
    with torch.no_grad(), installed(find_mlps(engine.model), chosen):
        expected = engine.model(input_ids=ids).logits[0]
    assert (engine.forced(ids, None, held) - expected).abs().max() < 1e-4


def test_bytes_are_counted_while_decode_runs(engine):
    chosen, layers = selection(engine.model, 0.5), find_mlps(engine.model)
    sparse = sparse_model(engine, chosen)
    generate(sparse, token_ids(1, 9), N_NEW)
    read = sparse.latest.read
    assert read.n_steps == N_NEW - 1  # the first token is prefill's
    assert read.mlp_per_step == dense_bytes(layers) // 2
    assert read.per_step - read.mlp_per_step == engine.other_bytes()
    assert engine.read().n_steps == 0  # the next call counts anew
    (held,) = engine.prepare([chosen])
    engine.forced(token_ids(1, 5), None, held)
    assert (engine.read().n_steps, engine.read().mlp_per_step) == (5, dense_bytes(layers) // 2)
    assert torch.equal(engine.neurons_read()[0][1], chosen.ids[1])
    engine.release()


def test_dense_layers_are_counted_once(engine):
    layers = find_mlps(engine.model)
    dense, half = NeuronSelection("dense"), selection(engine.model, 0.5)
    held = engine.prepare([dense, half])
    assert engine.mlp_bytes(held[:1]) == dense_bytes(layers)
    assert engine.mlp_bytes(held) == dense_bytes(layers) + held[1].n_bytes


def test_sparse_prefill_reads_prompts_with_the_held_neurons(engine):
    ids, chosen = token_ids(1, 9), selection(engine.model)
    (held,) = engine.prepare([chosen])
    with torch.no_grad():
        dense = engine.model(input_ids=ids).logits
        with engine.mounted([([0], held)]):
            sparse = engine.model(input_ids=ids).logits
        with installed(find_mlps(engine.model), chosen):
            expected = engine.model(input_ids=ids).logits
        assert (sparse - expected).abs().max() < 1e-4
        assert torch.equal(engine.model(input_ids=ids).logits, dense)


def test_plans_are_what_is_held(engine):
    layers = find_mlps(engine.model)
    neuron_bytes = dense_bytes(layers) / (len(layers) * layers[0].d_ff)
    (held,) = engine.prepare([selection(engine.model, 0.5)])
    plan = engine.plan(neuron_bytes, [layers[0].d_ff // 2] * len(layers), engine.config)
    assert plan.read == held.n_bytes
    assert plan.held == held.n_bytes * (2 if engine.name == "compiled" else 1)
