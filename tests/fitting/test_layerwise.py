"""Fitted sets beat plain ones, and what they are fitted to is the sparse stream."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compensation_cases import divergence, language_model_of, some_texts
from tiny_models import BY_KEY, N_LAYERS, STRUCTURES, tiny_model
from transformers import OPTForCausalLM

from coreinfer_sim.base.settings import Ranking
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.modules import installed
from coreinfer_sim.fitting.layerwise import Fit, fit_layers, moments
from coreinfer_sim.fitting.least_squares import RIDGE
from coreinfer_sim.fitting.streams import advance, decoder_blocks, make_batches
from coreinfer_sim.models.mlps import find_mlps


@pytest.mark.parametrize("ranking", list(Ranking))
def test_fitted_sets_beat_plain_ones_in_every_family(model, ranking):
    language_model = language_model_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    texts = some_texts(40)
    n = language_model.layers[0].d_ff // 2
    fitted = fit_layers(language_model, texts, [n] * N_LAYERS, Fit(ranking=ranking, ridge=RIDGE))
    assert all(len(ids) == n and (ids.diff() > 0).all() for ids in fitted.ids.values())
    plain = replace(fitted, compensation=None)
    bar = 0.95 if language_model.layers[0].post_norm else 0.8  # a norm follows, which sees no squared errors
    assert divergence(model, texts, fitted) < bar * divergence(model, texts, plain)
    assert all((before[name] == value).all() for name, value in model.state_dict().items())


@pytest.mark.parametrize("key", STRUCTURES)
def test_a_ridge_chosen_on_held_texts_serves_unseen_ones_no_worse(key, models):
    model = models[key]
    language_model, texts, unseen = language_model_of(model), some_texts(40), some_texts(20, seed=1)
    n = [language_model.layers[0].d_ff // 2] * N_LAYERS
    chosen, least = (
        divergence(model, unseen, fit_layers(language_model, texts, n, Fit(ridge=r))) for r in (None, RIDGE)
    )
    assert chosen < 1.02 * least


@pytest.mark.parametrize("key", STRUCTURES)
def test_narrow_passes_give_the_moments_of_wide_ones(key, models):
    language_model = language_model_of(models[key])
    layers, blocks, fit = language_model.layers, decoder_blocks(language_model), Fit()
    first, second = layers[:2]
    kept = torch.arange(1, second.d_ff, 3)
    with torch.inference_mode():
        batches = list(make_batches(language_model, blocks, some_texts(40), fit.prompt_weight))
        for batch in batches:
            batch.dense_out = batch.calls[first.number](blocks[0], batch.dense)
        with installed(layers, NeuronSelection("test", {first.number: torch.arange(0, first.d_ff, 2)})):
            advance(first, blocks[0], batches)
        wide, _ = moments(second, blocks[1], batches, fit)
        narrow, _ = moments(second, blocks[1], batches, fit, kept)
    expected = wide.of(kept)
    assert narrow.n_tokens == expected.n_tokens
    for name in ("gram", "cross", "features", "targets"):
        torch.testing.assert_close(getattr(narrow, name), getattr(expected, name), rtol=1e-4, atol=1e-3)


def test_ranking_by_energy_needs_no_products_of_all_neurons(models):
    language_model, texts = language_model_of(models["llama"]), some_texts(100)
    n = [language_model.layers[0].d_ff // 2] * N_LAYERS
    fit, taken = Fit(Ranking.ENERGY), []
    short = fit_layers(language_model, texts, n, fit)
    long = fit_layers(language_model, texts, n, fit, keep=lambda number, _sums: taken.append(number))
    assert taken == list(range(N_LAYERS))
    for number, ids in long.ids.items():
        assert (short.ids[number] == ids).all()
        torch.testing.assert_close(
            short.compensation[number].delta, long.compensation[number].delta, rtol=1e-2, atol=1e-3
        )


def test_dense_layers_stay_dense(models):
    language_model = language_model_of(models["llama"])
    d_ff = language_model.layers[0].d_ff
    fitted = fit_layers(language_model, some_texts(), [d_ff, d_ff // 3, d_ff], Fit())
    assert set(fitted.ids) == set(fitted.compensation) == {1}


def test_taking_back_earlier_errors_helps(models):
    model = models["llama"]
    language_model, texts = language_model_of(model), some_texts(60)
    n = [language_model.layers[0].d_ff // 3] * N_LAYERS
    with_carry, without = (fit_layers(language_model, texts, n, Fit(carry=carry)) for carry in (1.0, 0.0))
    assert divergence(model, texts, with_carry) < divergence(model, texts, without)


def test_a_norm_behind_the_residual_sum_is_a_norm_behind_the_mlp():
    config = BY_KEY["opt"].config()
    config.do_layer_norm_before = False
    torch.manual_seed(0)
    model = OPTForCausalLM(config).eval()
    language_model, texts = language_model_of(model), some_texts(40)
    assert all(layer.post_norm for layer in language_model.layers)
    assert not any(layer.post_norm for layer in find_mlps(tiny_model("opt")))
    n = [language_model.layers[0].d_ff // 2] * N_LAYERS
    fitted = fit_layers(language_model, texts, n, Fit(ridge=RIDGE))
    assert divergence(model, texts, fitted) < 0.95 * divergence(model, texts, replace(fitted, compensation=None))
