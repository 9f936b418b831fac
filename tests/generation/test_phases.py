"""Prefill is dense, decode is sparse: told apart in every way of calling, and compared with steps by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calls import (
    N_NEW,
    SOME,
    PhaseLog,
    RowPredictor,
    assert_same_output,
    by_hand,
    everything,
    generate,
    left_padded,
    logits,
    random_predictor,
    selection,
    token_ids,
)
from tiny_models import tiny_model
from transformers import DynamicCache, GenerationConfig

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.choosing.predictors import FixedPredictor
from coreinfer_sim.engines.lean.engine import LeanEngine
from coreinfer_sim.generation.reading import read_prompt
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.index.ranking import n_kept
from coreinfer_sim.models.loading import load_model
from coreinfer_sim.models.mlps import find_mlps


def test_keep_ratio_one_equals_the_dense_model(model):
    ids = token_ids(2, 9)
    expected = generate(model, ids)
    assert_same_output(generate(SparseModel(model, everything(model)), ids), expected)
    assert_same_output(
        generate(SparseModel(model, make_predictor("dense", find_mlps(model)), engine="transformers"), ids),
        expected,
        0.0,
    )


def test_prefill_is_dense_and_decode_sparse(model):
    ids, chosen = token_ids(1, 9), selection(model)
    found = generate(SparseModel(model, FixedPredictor(chosen)), ids)
    dense = generate(model, ids)
    assert torch.equal(found.logits[0], dense.logits[0])  # the first new token comes out of prefill
    tokens, steps = by_hand(model, chosen, ids)
    assert torch.equal(found.sequences, tokens)
    assert (logits(found) - steps).abs().max() <= 1e-5
    # the second differs from dense decode only by the sparse MLPs, as the token before it is the same
    assert (found.logits[1] - dense.logits[1]).abs().max() > 1e-2


def test_phases_by_pass(models):
    model = models["llama"]
    with PhaseLog(model) as passes:
        generate(SparseModel(model, random_predictor(model, 0.5), engine="transformers"), token_ids(1, 9), 4)
    assert passes == [(9, 48), (1, 24), (1, 24), (1, 24)]


def test_one_token_prompt(model):
    """A pass over a single position is prefill all the same."""
    ids, chosen = token_ids(1, 1), selection(model)
    with PhaseLog(model) as passes:
        found = generate(SparseModel(model, FixedPredictor(chosen), engine="transformers"), ids)
    d_ff = find_mlps(model)[0].d_ff
    assert passes == [(1, d_ff)] + [(1, n_kept(0.4, d_ff))] * (N_NEW - 1)
    tokens, steps = by_hand(model, chosen, ids)
    assert torch.equal(found.sequences, tokens)
    assert (logits(found) - steps).abs().max() <= 1e-5


@pytest.mark.parametrize("chunk", [1, 4, 9, 20])
def test_chunked_prefill(models, chunk):
    model = models["llama"]
    ids, chosen = token_ids(1, 9), selection(model, 0.5)
    with PhaseLog(model) as passes:
        found = generate(
            SparseModel(model, FixedPredictor(chosen), engine="transformers"),
            ids,
            prefill_chunk_size=chunk,
            past_key_values=DynamicCache(config=model.config),
        )
    prefill = {1: [1] * 9, 4: [4, 4, 1], 9: [9], 20: [9]}[chunk]
    assert passes == [(n, 48) for n in prefill] + [(1, 24)] * (N_NEW - 1)
    tokens, steps = by_hand(model, chosen, ids)
    assert torch.equal(found.sequences, tokens)
    assert (logits(found) - steps).abs().max() <= 1e-4


@pytest.mark.parametrize("key", SOME)
def test_the_second_turn_of_a_conversation_is_prefill_again(models, key):
    model = models[key]
    chosen = selection(model)
    sparse = SparseModel(model, FixedPredictor(chosen), engine="transformers")
    cache, by_hand_cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    first = generate(sparse, token_ids(1, 6), 4, past_key_values=cache)
    tokens, steps = by_hand(model, chosen, token_ids(1, 6), 4, by_hand_cache)
    assert torch.equal(first.sequences, tokens)
    assert cache.get_seq_length() == by_hand_cache.get_seq_length() == 9

    ids = torch.cat([first.sequences, token_ids(1, 5, seed=1)], 1)
    with PhaseLog(model) as passes:
        second = generate(sparse, ids, 4, past_key_values=cache)
    d_ff = find_mlps(model)[0].d_ff
    assert passes == [(6, d_ff)] + [(1, n_kept(0.4, d_ff))] * 3  # the last token of the first turn, and the new five
    tokens, steps = by_hand(model, chosen, ids, 4, by_hand_cache)
    assert torch.equal(second.sequences, tokens)
    assert (logits(second) - steps).abs().max() <= 1e-4


def test_static_cache(models):
    for key in ("llama", "gemma2"):
        model = models[key]
        sparse = SparseModel(model, random_predictor(model))
        expected = generate(sparse, token_ids(1, 9))
        assert_same_output(generate(sparse, token_ids(1, 9), cache_implementation="static"), expected)


def test_some_layers_stay_dense(models):
    model = models["llama"]
    chosen = selection(model, sparse_layers="1:2")
    assert list(chosen.ids) == [1]
    found = generate(SparseModel(model, FixedPredictor(chosen)), token_ids(1, 9))
    tokens, steps = by_hand(model, chosen, token_ids(1, 9))
    assert torch.equal(found.sequences, tokens)
    assert (logits(found) - steps).abs().max() <= 1e-5


def test_input_ids_by_name_and_as_a_plain_tensor(models):
    model = models["llama"]
    sparse = SparseModel(model, random_predictor(model))
    ids = token_ids(2, 5)
    plain = sparse.generate(ids, max_new_tokens=4, do_sample=False)
    assert plain.shape == (2, 9)
    by_name = sparse.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert torch.equal(plain, by_name)
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(plain, sparse.generate(ids, generation_config=config))


def test_bfloat16():
    model = tiny_model("llama").bfloat16()
    ids, chosen = token_ids(1, 6), selection(model)
    found = generate(SparseModel(model, FixedPredictor(chosen)), ids)
    tokens, _ = by_hand(model, chosen, ids)
    assert torch.equal(found.sequences, tokens)


@pytest.fixture
def short_passes(monkeypatch):
    """Let the lean engine read prompts of more than eight tokens in several passes."""
    monkeypatch.setattr(LeanEngine, "pass_tokens", 8)


def passes_read(model, sparse, ids, **options):
    """Positions that each pass of prefill reads."""
    passes, block = [], model.model.layers[0]  # which a decode step of the lean engine does not go through
    with block.register_forward_pre_hook(lambda _, given: passes.append(given[0].shape[1])):
        generate(sparse, ids, 3, **options)
    return passes


@pytest.mark.parametrize(
    ("n_rows", "n_positions", "expected"),
    [(1, 8, [8]), (1, 9, [4, 5]), (1, 23, [7, 8, 8]), (3, 5, [1, 2, 2]), (9, 3, [1, 1, 1])],
)
def test_long_prompts_take_several_passes(models, short_passes, n_rows, n_positions, expected):
    """As few as there can be, of as equal lengths; the tokens of all rows count."""
    model = models["llama"]
    sparse = SparseModel(model, random_predictor(model), engine="lean")
    assert passes_read(model, sparse, token_ids(n_rows, n_positions)) == expected


def test_whose_passes_are_as_they_come(short_passes):
    """Those that the caller has asked for, those of other engines, and where hidden states are wanted."""
    model, ids = tiny_model("llama"), token_ids(1, 20)  # transformers leaves hooks where hidden states were asked for
    lean = SparseModel(model, random_predictor(model), engine="lean")
    assert passes_read(model, lean, ids) == [6, 7, 7]
    assert passes_read(model, lean, ids, prefill_chunk_size=15) == [15, 5]
    other = SparseModel(model, random_predictor(model), engine="transformers")
    assert passes_read(model, other, ids) == [20, 1, 1]
    found = generate(SparseModel(model, random_predictor(model)), ids, 2, output_hidden_states=True)
    assert found.hidden_states[0][-1].shape[1] == 20


def test_a_static_cache_is_filled_in_passes_or_at_once(models, short_passes):
    """Its mask has four dimensions where rows are padded."""
    model = models["llama"]
    for ids, mask in (left_padded(token_ids(1, 20)), left_padded(token_ids(1, 20), token_ids(1, 9, seed=1))):
        options = {"attention_mask": mask, "cache_implementation": "static"}
        found = generate(SparseModel(model, random_predictor(model)), ids, **options)
        expected = generate(SparseModel(model, random_predictor(model), engine="transformers"), ids, **options)
        assert_same_output(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "output_logits": False},
        {"do_sample": True, "num_return_sequences": 3},
        {"prefill": "sparse"},
        {"weights": "int8"},
    ],
    ids=str,
)
@pytest.mark.parametrize("key", ["llama", "qwen2", "qwen3"])
def test_several_passes_give_what_one_gives(models, monkeypatch, key, options):
    """Of rows that are padded by unlike lengths, two of them through whole passes."""
    model, call = models[key], dict(options)
    ids, mask = left_padded(*(token_ids(1, n, seed=n) for n in (2, 23, 14)))
    settings = {name: call.pop(name) for name in ("prefill", "weights") if name in call}
    predictor = RowPredictor(*(selection(model, seed=n) for n in range(3)))
    found = []
    for most in (None, 8, 24):
        monkeypatch.setattr(LeanEngine, "pass_tokens", most)
        torch.manual_seed(0)
        sparse = SparseModel(model, predictor, engine="lean", **settings)
        found.append(generate(sparse, ids, attention_mask=mask, **call))
    for several in found[1:]:
        if "num_beams" in options:
            assert torch.equal(several.sequences, found[0].sequences)
        else:
            assert_same_output(several, found[0])


def test_padding_alone_fills_a_pass_in_sixteen_bits(monkeypatch):
    model = tiny_model("llama").bfloat16()
    ids, mask = left_padded(token_ids(1, 2), token_ids(1, 23, seed=1))
    sparse, found = SparseModel(model, random_predictor(model), engine="lean"), []
    for most in (None, 8):
        monkeypatch.setattr(LeanEngine, "pass_tokens", most)
        found.append(generate(sparse, ids, 2, attention_mask=mask).logits[0])
    assert (found[1] - found[0]).abs().max() <= 0.05 * found[0].abs().max()


def test_a_long_second_turn_in_passes(models, short_passes):
    model = models["llama"]
    chosen = selection(model)
    sparse = SparseModel(model, FixedPredictor(chosen), engine="lean")
    cache, by_hand_cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    first = generate(sparse, token_ids(1, 12), 4, past_key_values=cache)
    by_hand(model, chosen, token_ids(1, 12), 4, by_hand_cache)
    ids = torch.cat([first.sequences, token_ids(1, 17, seed=1)], 1)
    tokens, steps = by_hand(model, chosen, ids, 4, by_hand_cache)
    second = generate(sparse, ids, 4, past_key_values=cache)
    assert torch.equal(second.sequences, tokens)
    assert (logits(second) - steps).abs().max() <= 1e-4


@pytest.mark.parametrize("n_logits", [1, 3, 12, 20])
def test_a_prompt_read_in_passes_for_scores(tiny_checkpoint, monkeypatch, n_logits):
    loaded = load_model(tiny_checkpoint, "float32")
    engine = LeanEngine(loaded.model, loaded.layers, DecodeConfig())
    found = []
    for most in (None, 8):
        monkeypatch.setattr(LeanEngine, "pass_tokens", most)
        found.append(read_prompt(loaded, engine, token_ids(1, 20), 0.4, n_logits))
    whole, several = found
    assert whole.logits.shape == several.logits.shape and len(whole.logits) == n_logits
    assert (whole.logits - several.logits).abs().max() <= 1e-4
    assert several.cache.get_seq_length() == 20
    for one, two in zip(whole.cache.layers, several.cache.layers, strict=True):
        assert torch.allclose(one.keys, two.keys, atol=1e-5) and torch.allclose(one.values, two.values, atol=1e-5)
    for number, every in whole.statistics.items():
        parts = several.statistics[number]
        assert (every.counts == parts.counts).all()
        assert np.allclose(every.energy, parts.energy, atol=1e-5)
        assert np.allclose(every.activation, parts.activation, atol=1e-4)
