"""Refreshing a selection from the generated text: dense statistics, an exact cache, and a model that is put back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_runtime import (
    SOME,
    CallAt,
    Snapshot,
    assert_same_ids,
    generate,
    logits,
    prompt_core,
    selection,
    stability,
    token_ids,
)
from tiny_index import PROMPTS, tiny_index
from tiny_models import tiny_model
from transformers import DynamicCache, StoppingCriteriaList

import coreinfer_sim.generation.sparse_model as runtime
from coreinfer_sim.base.errors import ConfigError, GenerationError
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.choosing.predictors import FixedPredictor
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.choosing.statistics import SentenceStatistics
from coreinfer_sim.engines.compact import installed
from coreinfer_sim.generation.refresh import Refresh, drifted, lost_energy, parse_refresh
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.models.mlps import find_mlps

N_NEW, EVERY = 12, 4


@torch.no_grad()
def by_hand(model, ids, n_new, every, cache):
    """Dense prefill, then token by token, with the core neurons of all tokens so far at every ``every``-th."""
    layers = find_mlps(model)
    steps = [model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]]
    chosen = NeuronSelection("test", prompt_core(model, ids, "energy"))
    for n in range(1, n_new):
        token = steps[-1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
        if n % every == 0:
            chosen = NeuronSelection("test", prompt_core(model, ids, "energy"))
        with installed(layers, chosen):
            steps.append(model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1])
    steps = torch.stack(steps, 1)
    return torch.cat([ids, steps[:, -1].argmax(-1, keepdim=True)], 1), steps, chosen


def refreshed(model, refresh, **options):
    return SparseModel(model, stability(model, **options), refresh=refresh)


def test_the_set_is_that_of_prompt_and_text_read_densely(model):
    ids = token_ids(1, 6)
    before = Snapshot(model)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    sparse = refreshed(model, f"every:{EVERY}")
    found = generate(sparse, ids, N_NEW, past_key_values=caches[0])
    tokens, steps, chosen = by_hand(model, ids, N_NEW, EVERY, caches[1])
    assert torch.equal(found.sequences, tokens)
    assert (logits(found) - steps).abs().max() <= 1e-4
    assert_same_ids(sparse.selections[0].ids, chosen.ids)
    assert sparse.n_refreshes == (N_NEW - 1) // EVERY == 2
    assert_same_ids(chosen.ids, prompt_core(model, tokens[:, : 6 + 2 * EVERY], "energy"))
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):  # nothing was added, nothing made dense
        torch.testing.assert_close(one.keys, other.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.values, other.values, atol=1e-4, rtol=1e-4)
    before.check()


def test_without_a_refresh_in_time_nothing_changes(models):
    model = models["llama"]
    plain, none = SparseModel(model, stability(model), engine="transformers"), refreshed(model, "every:64")
    one, other = (generate(sparse, token_ids(1, 6), N_NEW) for sparse in (plain, none))
    assert torch.equal(logits(one), logits(other)) and none.n_refreshes == 0
    generate(refreshed(model, "every:1"), token_ids(1, 6), 1)  # nothing is decoded


@pytest.mark.parametrize("key", SOME)
def test_some_layers(models, key):
    model = models[key]
    sparse = refreshed(model, "every:3", sparse_layers="1:")
    tokens = generate(sparse, token_ids(1, 6), 8).sequences
    core = prompt_core(model, tokens[:, :12], "energy")
    assert_same_ids(sparse.selections[0].ids, {1: core[1], 2: core[2]})


def test_static_cache(models):
    for key in ("llama", "gemma2"):
        sparse = refreshed(models[key], "every:3")
        dynamic, static = (generate(sparse, token_ids(1, 6), 9, **o) for o in ({}, {"cache_implementation": "static"}))
        assert torch.equal(dynamic.sequences, static.sequences) and sparse.n_refreshes == 2


def test_counts_start_anew_in_every_call(models):
    sparse = refreshed(models["llama"], "every:3")
    one, other = (generate(sparse, token_ids(1, 6), 9) for _ in range(2))
    assert torch.equal(one.sequences, other.sequences) and sparse.n_refreshes == 2


def test_hybrid_refreshes_the_evidence(models, encoder):
    model = models["llama"]
    layers = find_mlps(model)
    hybrid = make_predictor("hybrid", layers, tiny_index(layers, encoder), keep_ratio=0.25)
    sparse = SparseModel(model, hybrid, refresh="every:5")
    options = {"prompts": PROMPTS[:1], "do_sample": False}
    tokens = sparse.generate(token_ids(1, 6), max_new_tokens=8, **options)
    (found,) = sparse.selections
    sparse.refresh = None
    sparse.generate(tokens[:, :11], max_new_tokens=1, **options)
    assert_same_ids(found.ids, sparse.selections[0].ids)
    assert found.mode == "hybrid" and found.cluster == 0


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_the_model_is_restored_when_a_refresh_fails(models, error):
    model = models["llama"]
    before = Snapshot(model)
    sparse = refreshed(model, "every:3")
    select, calls = sparse.predictor.select, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 3:  # before prefill, after it, and then
            raise error
        return select(*arguments)

    sparse.predictor.select = failing
    with pytest.raises(error):
        generate(sparse, token_ids(1, 6), 9)
    before.check()
    assert len(generate(sparse, token_ids(1, 6), 9).logits) == 9


def test_the_model_is_restored_after_a_refresh_and_an_exception(models):
    model = models["llama"]
    before = Snapshot(model)

    def fail():
        raise ZeroDivisionError

    criteria = StoppingCriteriaList([CallAt(12, fail)])
    with pytest.raises(ZeroDivisionError):
        generate(refreshed(model, "every:3"), token_ids(1, 6), 9, stopping_criteria=criteria)
    before.check()


# Drift


def statistics(*energies):
    return {
        layer: SentenceStatistics(np.zeros((1, 4), np.int32), np.array([energy], np.float32), np.zeros((1, 4)))
        for layer, energy in enumerate(energies)
    }


def test_lost_energy_and_drift_by_hand():
    newest = statistics([4, 3, 2, 1], [1, 1, 1, 7])
    one = NeuronSelection("test", {0: torch.tensor([0, 1]), 1: torch.tensor([0, 1])})
    assert lost_energy(one, newest) == pytest.approx((0.3 + 0.8) / 2)
    other = NeuronSelection("test", {0: torch.tensor([0, 1]), 1: torch.tensor([0, 3])})
    assert lost_energy(other, newest) == pytest.approx((0.3 + 0.2) / 2)
    assert lost_energy(NeuronSelection("dense"), newest) == 0
    assert drifted(one, other, newest) and not drifted(other, one, newest) and not drifted(one, one, newest)
    nearly = statistics([4, 3, 2, 1], [1, 1.2, 1, 1.3])  # less is lost, but not by a tenth
    assert lost_energy(other, nearly) < lost_energy(one, nearly) and not drifted(one, other, nearly)


def test_drift_takes_a_new_set_only_if_it_loses_clearly_less(models, monkeypatch):
    model = models["llama"]
    asked = []

    def noting(old, new, newest):
        asked.append((old, new, sum(float(s.energy.sum()) for s in newest.values())))
        return len(asked) == 2

    monkeypatch.setattr(runtime, "drifted", noting)
    sparse = refreshed(model, "drift")
    sparse.refresh = Refresh(3, on_drift=True)
    generate(sparse, token_ids(1, 6), 11)
    assert sparse.n_refreshes == 1 and len(asked) == 3
    assert asked[0][0] is asked[1][0] and asked[2][0] is asked[1][1] is sparse.selections[0]
    assert [n for *_, n in asked] == pytest.approx([3 * len(find_mlps(model))] * 3, rel=1e-3)  # of the newest alone


# Refusals


@pytest.mark.parametrize(("text", "expected"), [("every:64", Refresh(64)), ("drift", Refresh(32, on_drift=True))])
def test_what_may_be_asked_for(models, text, expected):
    assert parse_refresh(text, stability(models["llama"])) == expected


@pytest.mark.parametrize("text", ["", "every", "every:", "every:0", "every:-3", "every:x", "always", "drift:3"])
def test_what_cannot_be_read_is_refused(models, text):
    with pytest.raises(ConfigError, match=f"refresh is '{text}', expected 'drift' or 'every:N'"):
        refreshed(models["llama"], text)


@pytest.mark.parametrize("mode", ["random", "dense", "similarity"])
def test_modes_that_do_not_read_the_text_are_refused(models, mode):
    predictor = FixedPredictor(NeuronSelection(mode, selection(models["llama"]).ids))
    with pytest.raises(ConfigError, match=f"mode {mode}, whose neurons do not come from the text, .*stability or hyb"):
        SparseModel(models["llama"], predictor, refresh="drift")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams is 2, expected 1"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences is 2, expected 1"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1]])}, "a padded row"),
        ({"input_ids": token_ids(2, 4)}, "rows is 2, expected 1"),
    ],
)
def test_calls_that_are_not_one_text_are_refused(options, message):
    model = tiny_model("llama")
    before = Snapshot(model)
    with pytest.raises(GenerationError, match=f"refresh .*{message}"):
        refreshed(model, "every:2").generate(**{"input_ids": token_ids(1, 4), "max_new_tokens": 3, **options})
    before.check()
