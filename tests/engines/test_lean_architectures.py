"""The lean engine on every model type that it decodes: the tokens and logits of transformers' own code, in float32."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from calls import generate, left_padded, logits, selection, token_ids
from lean_types import TYPES, WINDOW, model_named, prefilled, step_of, steps
from tiny_models import N_LAYERS, model_of
from transformers import DynamicCache

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.choosing.predictors import FixedPredictor
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.lean import kv_cache
from coreinfer_sim.engines.lean.architectures import ARCHITECTURES
from coreinfer_sim.engines.lean.engine import LeanEngine
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.models.mlps import find_mlps

N_NEW = 20
DENSE = NeuronSelection("dense")
SHARING = (
    *("llama", "llama-dynamic", "phi3-longrope"),  # angles of one row's length, which differ from row to row
    *("mistral", "gemma3_text", "cohere2"),  # caches that let go, of all layers and of some
    *("olmo2", "gpt_neox", "falcon"),  # sums of norms behind, of parallel parts, keys that are copied
    *("gpt2", "opt", "granite"),  # learned positions; a step by which the stream grows
)
"""Types that between them have all that rows of unlike texts could share by mistake."""


@functools.cache
def model_of_type(name):
    """The model is not changed: its tests share it."""
    return model_named(name)


def test_every_type_is_here():
    assert {name.split("-")[0] for name in TYPES} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", TYPES)
def test_tokens_and_logits_are_those_of_transformers(name):
    """Three prompts in one batch, padded on the left: one of a single token, one longer than all windows."""
    model = model_of_type(name)
    ids, mask = left_padded(token_ids(1, 9), token_ids(1, 1, seed=1), token_ids(1, 20, seed=2))
    predictor = make_predictor("dense", find_mlps(model))
    lean, stock = (
        generate(SparseModel(model, predictor, engine=engine), ids, N_NEW, attention_mask=mask)
        for engine in ("lean", "transformers")
    )
    assert torch.equal(lean.sequences, stock.sequences)
    assert torch.allclose(logits(lean), logits(stock), rtol=1e-4, atol=1e-5 * float(logits(stock).abs().max()))


@pytest.mark.parametrize("name", TYPES)
def test_forced_text_equals_single_steps(name):
    """With half of the neurons; the prompt is longer than the windows."""
    model = model_of_type(name)
    engine, chosen = LeanEngine(model, find_mlps(model), DecodeConfig()), selection(model, 0.5)
    (held,) = engine.prepare([chosen])
    new, cache = token_ids(1, 10, seed=1), prefilled(model)
    found = engine.forced(new, cache, held)
    expected = steps(engine, cache, held, new[0].tolist())
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", SHARING)
def test_calls_that_share_steps_decode_as_each_alone(name):
    """Of unlike lengths; two hold the same neurons, one comes later, one goes earlier."""
    model = model_of_type(name)
    engine = LeanEngine(model, find_mlps(model), DecodeConfig())
    one, other, all_of_them = engine.prepare([selection(model, 0.5), selection(model, 0.3, seed=1), DENSE])
    lengths, held, n = [9, 1, 20, 5], [one, all_of_them, one, other], 9
    texts = [token_ids(1, n, seed=number)[0].tolist() for number in range(4)]
    expected = [steps(engine, prefilled(model, m), h, text) for m, h, text in zip(lengths, held, texts, strict=True)]
    calls = [(prefilled(model, m), h, engine.new_call()) for m, h in zip(lengths, held, strict=True)]
    found = [[], [], [], []]
    for moment in range(n):
        there = [0, 1, 2] if moment < 3 else [0, 1, 2, 3] if moment < 6 else [3, 1, 2]
        tokens = [texts[number][len(found[number])] for number in there]
        outputs = engine.steps([step_of(*calls[number], token) for number, token in zip(there, tokens, strict=True)])
        for number, output in zip(there, outputs, strict=True):
            found[number].append(output.logits[0, 0])
    assert [len(each) for each in found] == [6, 9, 9, 6]
    for own, alone in zip(found, expected, strict=True):
        assert (torch.stack(own) - alone[: len(own)]).abs().max() <= 1e-5 * alone.abs().max()


@pytest.mark.parametrize("name", ["gemma3_text", "mistral"])
def test_a_cache_with_windows_goes_on_in_either_engine(name, monkeypatch):
    """Buffers of layers with a window are made anew, and let go of what no position sees any more."""
    monkeypatch.setattr(kv_cache, "SPARE", 3)
    model, sizes = model_of_type(name), []
    roomy = kv_cache.roomy
    monkeypatch.setattr(
        kv_cache, "roomy", lambda states, *given: sizes.append(states.shape[2]) or roomy(states, *given)
    )
    chosen, ids, found = selection(model), token_ids(1, 15), []
    for engines in (("lean", "transformers", "lean"), ("transformers",) * 3):
        cache, text = DynamicCache(config=model.config), ids
        for engine in engines:
            sparse = SparseModel(model, FixedPredictor(chosen), engine=engine)
            text = generate(sparse, text, 12, past_key_values=cache).sequences
            text = torch.cat([text, token_ids(1, 3, seed=5)], 1)
        found.append((text, cache))
    assert torch.equal(found[0][0], found[1][0])
    for one, two in zip(found[0][1].layers, found[1][1].layers, strict=True):
        assert one.keys.shape == two.keys.shape and one.get_seq_length() == two.get_seq_length()
        assert torch.allclose(one.keys, two.keys, atol=1e-5)
    assert sizes.count(WINDOW - 1) > 2 * N_LAYERS


def test_a_cache_with_another_window_is_refused():
    model = model_of_type("mistral")
    engine = LeanEngine(model, find_mlps(model), DecodeConfig())
    narrow = transformers.MistralConfig(**{**TYPES["mistral"][1], "sliding_window": WINDOW - 2})
    cache, mask = prefilled(model), torch.ones(1, 9, dtype=torch.int64)
    assert engine.refuses_call(cache, mask, {}) is None
    other = DynamicCache(config=narrow)
    for number, layer in enumerate(cache.layers):
        other.update(layer.keys, layer.values, number)
    assert "does not grow" in str(engine.refuses_call(other, mask, {}))


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("llama", {"hidden_act": "tanh"}, "its activation is tanh"),
        ("opt", {"do_layer_norm_before": False}, "its norms follow the sums"),
        ("opt", {"word_embed_proj_dim": 16}, "its embeddings are projected"),
        ("falcon", {"alibi": True}, "ALiBi"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "looks ahead"),
        ("gpt2", {"add_cross_attention": True}, "attends to an encoder"),
    ],
)
def test_settings_that_the_loops_do_not_know_are_refused(name, settings, reason):
    config, own = TYPES[name]
    model = model_of(getattr(transformers, config)(**{**own, **settings}))
    assert reason in str(LeanEngine.refuses(model, DecodeConfig()))
