"""Predictors without an index."""

from __future__ import annotations

import pytest
from calls import assert_same_ids, selection
from tiny_index import tiny_index
from tiny_models import N_LAYERS

from coreinfer_sim.base.decode_settings import SelectionConfig
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import Mode
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.choosing.predictors import ReadingPredictor
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
        ("random", {"read_ratio": 0.0}, "read ratio is 0.0, expected a number above 0 and at most 1"),
        ("all", {"read_ratio": 1.1}, "read ratio is 1.1"),
        ("all", {"read_ratio": float("nan")}, "read ratio is nan"),
        ("random", {"read_ratio": 1.0}, "give a keep ratio"),
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


@pytest.mark.parametrize("mode", ["random", "stability", "all"])
def test_without_a_keep_ratio_tokens_read_of_all_neurons(models, mode):
    layers = find_mlps(models["llama"])
    predictor = make_predictor(mode, layers, read_ratio=0.3)
    assert isinstance(predictor, ReadingPredictor) and predictor.mode == mode
    assert predictor.alpha == make_predictor(mode, layers, keep_ratio=1.0).alpha
    if mode != "stability":
        for chosen in predictor.select(None, None, 2):
            assert (chosen.mode, chosen.read_ratio, chosen.keep_ratio(layers)) == (mode, 0.3, 1.0)
    else:
        assert predictor.select(None, None, 2) is None  # the prompt's activations come first
    (held,) = make_predictor("random", layers, read_ratio=0.3, keep_ratio=0.5).select(None, None, 1)
    assert (held.read_ratio, held.keep_ratio(layers)) == (0.3, 0.5)


def test_a_ratio_of_1_is_none(models):
    layers = find_mlps(models["llama"])
    for mode in ("all", "dense", "random"):
        predictor = make_predictor(mode, layers, keep_ratio=0.5, read_ratio=1.0)
        assert not isinstance(predictor, ReadingPredictor)
        assert predictor.select(None, None, 1)[0].read_ratio == 1.0
    (dense,) = make_predictor("dense", layers, read_ratio=0.3).select(None, None, 1)
    assert dense.read_ratio == 1.0


def test_familiar_prompts_read_by_token_and_others_densely(models, encoder):
    layers = find_mlps(models["llama"])
    index = tiny_index(layers, encoder)
    texts = ["What do stars tell us about space?", "zzz qqq 0x3f"]
    for mode, modes in (("similarity", ["similarity", "dense"]), ("global", ["global", "global"])):
        rows = make_predictor(mode, layers, index, read_ratio=0.3).select(texts, None, 2)
        assert [row.mode for row in rows] == modes
        assert [row.read_ratio for row in rows] == [1.0 if row.mode == "dense" else 0.3 for row in rows]
        assert all(not row.ids for row in rows)  # all neurons are held
    rows = make_predictor("similarity", layers, index, read_ratio=0.3, fallback="global").select(texts, None, 2)
    assert [(row.mode, row.read_ratio) for row in rows] == [("similarity", 0.3), ("global", 0.3)]
    (held, _) = make_predictor("similarity", layers, index, read_ratio=0.2, keep_ratio=0.5).select(texts, None, 2)
    assert held.read_ratio == 0.2 and held.keep_ratio(layers) == pytest.approx(0.5, abs=0.02)


def test_what_no_mode_means_depends_on_whether_there_is_an_index():
    by_token = SelectionConfig(read_ratio=0.3)
    assert by_token.by_token and by_token.resolved(False).mode is Mode.ALL
    for plain in (SelectionConfig(), SelectionConfig(read_ratio=1.0)):
        assert plain.resolved(False).mode is Mode.DENSE
    for config in (by_token, SelectionConfig()):
        assert config.resolved(True).mode is config.named_mode is Mode.SIMILARITY
    assert (
        SelectionConfig(keep_ratio=0.5).resolved(False).mode is Mode.SIMILARITY
    )  # which is refused, as it needs an index
    assert SelectionConfig("random", read_ratio=0.3).resolved(False).mode is Mode.RANDOM
    assert not SelectionConfig(read_ratio=1.0).by_token and not SelectionConfig().by_token
