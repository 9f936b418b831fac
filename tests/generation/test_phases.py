"""Prefill is dense, decode is sparse: told apart in every way of calling, and compared with steps by hand."""

from __future__ import annotations

import pytest
import torch
from calls import (
    N_NEW,
    SOME,
    PhaseLog,
    assert_same_output,
    by_hand,
    everything,
    generate,
    logits,
    random_predictor,
    selection,
    token_ids,
)
from tiny_models import tiny_model
from transformers import DynamicCache, GenerationConfig

from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.choosing.predictors import FixedPredictor
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.index.ranking import n_kept
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
