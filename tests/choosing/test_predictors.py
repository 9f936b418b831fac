"""Predictors without an index."""

from __future__ import annotations

import pytest
from calls import assert_same_ids, selection
from tiny_models import N_LAYERS

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.models.mlps import find_mlps


def test_random_selection_is_reproducible(models):
    model = models["llama"]
    once, again, other = (selection(model, 0.5, seed=seed) for seed in (1, 1, 2))
    assert once.mode == "random"
    assert_same_ids(once.ids, again.ids)
    assert any(once.ids[n].tolist() != other.ids[n].tolist() for n in range(N_LAYERS))
    for ids in once.ids.values():
        assert len(ids) == 24
        assert (ids.diff() > 0).all()
    assert once.ids[0].tolist() != once.ids[1].tolist()


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("random", {}, "give a keep ratio"),
        ("stability", {}, "give a keep ratio"),
        ("random", {"keep_ratio": 0.0}, "keep ratio is 0.0"),
        ("stability", {"keep_ratio": 1.5}, "keep ratio is 1.5"),
        ("random", {"keep_ratio": 0.5, "sparse_layers": "3:"}, "names none of the model's 3 layers"),
        ("similarity", {"keep_ratio": 0.5}, "needs an index"),
        ("hybrid", {"keep_ratio": 0.5}, "needs an index"),
        ("global", {"keep_ratio": 0.5}, "needs an index"),
    ],
)
def test_refused_settings(models, mode, options, message):
    with pytest.raises(ConfigError, match=message):
        make_predictor(mode, find_mlps(models["llama"]), **options)
