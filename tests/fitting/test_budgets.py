"""Layers are measured and share the neurons out within the bytes."""

from __future__ import annotations

import numpy as np
import pytest
from compensation_cases import divergence, language_model_of, some_texts
from tiny_models import N_LAYERS

from coreinfer_sim.base.settings import Ranking
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.fitting.budgets import PROBE, layer_costs, neurons_of, share_out
from coreinfer_sim.fitting.layerwise import Fit, fit_each_alone
from coreinfer_sim.models.mlps import compact_bytes, find_mlps, n_within


@pytest.mark.parametrize("ranking", list(Ranking))
def test_costs_are_the_divergence_of_a_layer_alone(models, ranking):
    language_model, fit = language_model_of(models["llama"]), Fit(ranking)
    fitted_on, measured_on = some_texts(20), some_texts(5, seed=1)
    costs = layer_costs(language_model, fitted_on, measured_on, fit)
    d_ff = language_model.layers[0].d_ff
    assert costs.shape == (N_LAYERS, d_ff) and (costs >= 0).all() and (np.diff(costs) <= 1e-6).all()
    for layer, ids, repair, _left in fit_each_alone(language_model, fitted_on, PROBE, fit):
        alone = NeuronSelection("test", {layer.number: ids}, compensation={layer.number: repair})
        expected = divergence(models["llama"], measured_on, alone)
        assert costs[layer.number, n_within(layer, PROBE) - 1] == pytest.approx(expected, rel=1e-3)


def test_budgets_follow_the_costs():
    falling = np.linspace(1, 0, 64)
    shares = share_out(np.stack([falling, 10 * falling**2, 0 * falling]), 0.4, 1 / 16)
    assert shares.mean() == pytest.approx(0.4)
    assert shares[1] > shares[0] > shares[2] == 1 / 16
    assert share_out(np.ones((3, 64)), 0.4, 1 / 16).mean() == pytest.approx(0.4)


def test_bytes_stay_within_the_keep_ratio(model):
    layers = find_mlps(model)
    dense = sum(layer.n_bytes for layer in layers)
    kept = neurons_of(layers, range(N_LAYERS), 0.6, None)
    used = sum(compact_bytes(layer, n, compensated=True) for layer, n in zip(layers, kept, strict=True))
    assert 0.5 * dense < used <= 0.6 * dense
    assert n_within(layers[0], 1e-9) == 1
