"""Stability mode: the neurons are those of the prompt itself, read while it is prefilled."""

from __future__ import annotations

import pytest
import torch
from calls import (
    N_NEW,
    SOME,
    assert_rows_equal,
    assert_same_ids,
    by_hand,
    generate,
    left_padded,
    logits,
    prompt_core,
    stability,
    token_ids,
)
from tiny_models import N_LAYERS
from transformers import DynamicCache

from coreinfer_sim.choosing.statistics import activation_statistics
from coreinfer_sim.engines.lean.engine import LeanEngine
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.index.ranking import n_kept, top_ids
from coreinfer_sim.models.mlps import find_mlps
from coreinfer_sim.models.taps import recorded_activations


@pytest.mark.parametrize("score", ["energy", "paper"])
def test_stability_keeps_the_prompts_own_core_neurons(model, score):
    ids = token_ids(1, 9)
    sparse = SparseModel(model, stability(model, score=score))
    found = generate(sparse, ids)
    (chosen,) = sparse.latest.selections
    assert_same_ids(chosen.ids, prompt_core(model, ids, score))
    assert sorted(chosen.ids) == list(range(N_LAYERS))
    tokens, steps = by_hand(model, chosen, ids)
    assert torch.equal(found.sequences, tokens)
    assert (logits(found) - steps).abs().max() <= 1e-5


def stability_alone(model, rows, score="energy", **options):
    outputs, selections = [], []
    for row in rows:
        sparse = SparseModel(model, stability(model, score=score))
        outputs.append(generate(sparse, row, **options))
        selections += sparse.latest.selections
    return outputs, selections


def test_stability_by_row_equals_single_rows(model):
    rows = [token_ids(1, n, seed=n) for n in (3, 8, 5)]
    ids, mask = left_padded(*rows)
    sparse = SparseModel(model, stability(model))
    batch = generate(sparse, ids, attention_mask=mask)
    singles, selections = stability_alone(model, rows)
    for found, expected in zip(sparse.latest.selections, selections, strict=True):
        assert_same_ids(found.ids, expected.ids)
    assert_rows_equal(batch, singles)


@pytest.mark.parametrize("score", ["energy", "paper"])
@pytest.mark.parametrize("key", SOME)
def test_stability_by_row_with_beams(models, key, score):
    model = models[key]
    rows = [token_ids(1, n, seed=n) for n in (3, 8, 5)]
    ids, mask = left_padded(*rows)
    sparse = SparseModel(model, stability(model, score=score))
    batch = generate(sparse, ids, attention_mask=mask, num_beams=3)
    singles, selections = stability_alone(model, rows, score, num_beams=3)
    _, without_beams = stability_alone(model, rows, score)
    for found, expected, greedy in zip(sparse.latest.selections, selections, without_beams, strict=True):
        assert_same_ids(found.ids, expected.ids)
        assert_same_ids(found.ids, greedy.ids)  # beams count a prompt's tokens once
    new = torch.cat([single.sequences[:, -N_NEW:] for single in singles])
    assert torch.equal(batch.sequences[:, -N_NEW:], new)


@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_stability_in_chunked_prefill(models, chunk):
    model = models["llama"]
    rows = [token_ids(1, n, seed=n) for n in (2, 8, 5)]
    ids, mask = left_padded(*rows)  # with a chunk of 3, the first row's first chunk is padding alone
    sparse = SparseModel(model, stability(model))
    cache = DynamicCache(config=model.config)
    batch = generate(sparse, ids, attention_mask=mask, prefill_chunk_size=chunk, past_key_values=cache)
    singles, selections = stability_alone(model, rows)
    for found, expected in zip(sparse.latest.selections, selections, strict=True):
        assert_same_ids(found.ids, expected.ids)
    assert_rows_equal(batch, singles)


@pytest.mark.parametrize("n_beams", [1, 3])
@pytest.mark.parametrize("score", ["energy", "paper"])
def test_stability_of_prompts_that_take_several_passes(models, monkeypatch, score, n_beams):
    model = models["llama"]
    rows = [token_ids(1, n, seed=n) for n in (2, 21, 14)]
    ids, mask = left_padded(*rows)
    monkeypatch.setattr(LeanEngine, "pass_tokens", 12 * n_beams)  # the first row's first passes are padding alone
    sparse = SparseModel(model, stability(model, score=score), engine="lean")
    generate(sparse, ids, attention_mask=mask, num_beams=n_beams)
    for found, row in zip(sparse.latest.selections, rows, strict=True):
        assert_same_ids(found.ids, prompt_core(model, row, score))


def test_stability_in_a_second_turn_reads_what_is_new(models):
    model = models["llama"]
    sparse = SparseModel(model, stability(model))
    cache = DynamicCache(config=model.config)
    first = generate(sparse, token_ids(1, 6), 4, past_key_values=cache)
    ids = torch.cat([first.sequences, token_ids(1, 5, seed=1)], 1)
    generate(sparse, ids, 4, past_key_values=cache)
    (chosen,) = sparse.latest.selections

    cache = DynamicCache(config=model.config)
    generate(sparse, token_ids(1, 6), 4, past_key_values=cache)
    statistics, layers = {}, find_mlps(model)
    with recorded_activations(layers, lambda n, z: statistics.__setitem__(n, z)) as tap, torch.no_grad():
        tap.set_mask(torch.ones(1, 6))
        model(input_ids=ids[:, 9:], past_key_values=cache)
    for number, z in statistics.items():
        every = activation_statistics(z, [0, 6], 0.4)
        expected = top_ids(every.energy[0], every.activation[0], n_kept(0.4, z.shape[1]))
        assert chosen.ids[number].tolist() == expected.tolist()


def test_stability_does_not_read_what_it_generates(models):
    """The selection is final after prefill, whatever is decoded after it."""
    model = models["llama"]
    kept = []
    for n_new in (2, 9):
        sparse = SparseModel(model, stability(model))
        generate(sparse, token_ids(1, 6), n_new)
        kept.append(sparse.latest.selections[0].ids)
    assert_same_ids(*kept)


@pytest.mark.parametrize("key", SOME)
def test_stability_of_some_layers(models, key):
    """Layers that stay dense decode through the modules that were read during prefill; they are read no more."""
    model = models[key]
    rows = [token_ids(1, n, seed=n) for n in (3, 8)]
    ids, mask = left_padded(*rows)
    sparse = SparseModel(model, stability(model, sparse_layers="1:"))
    batch = generate(sparse, ids, attention_mask=mask)
    for number, (row, chosen) in enumerate(zip(rows, sparse.latest.selections, strict=True)):
        core = prompt_core(model, row, "energy")
        assert_same_ids(chosen.ids, {1: core[1], 2: core[2]})
        tokens, steps = by_hand(model, chosen, row)
        for found, place in ((batch, number), (generate(sparse, row), 0)):
            assert found.sequences[place, -N_NEW:].tolist() == tokens[0, -N_NEW:].tolist()
            assert (logits(found)[place] - steps[0]).abs().max() <= 1e-4


def test_stability_with_one_new_token(models):
    model = models["llama"]
    sparse = SparseModel(model, stability(model))
    generate(sparse, token_ids(1, 9), 1)
    (chosen,) = sparse.latest.selections
    assert_same_ids(chosen.ids, prompt_core(model, token_ids(1, 9), "energy"))


def test_stability_ranks_by_what_it_is_told(models):
    model = models["llama"]
    ids = token_ids(1, 9)
    chosen = {score: prompt_core(model, ids, score, 0.3) for score in ("energy", "paper")}
    assert any(chosen["energy"][n].tolist() != chosen["paper"][n].tolist() for n in range(N_LAYERS))
    for score, expected in chosen.items():
        sparse = SparseModel(model, stability(model, keep_ratio=0.3, score=score))
        generate(sparse, ids)
        assert_same_ids(sparse.latest.selections[0].ids, expected)
