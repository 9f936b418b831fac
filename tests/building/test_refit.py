"""Output rows that a build refits for the neurons that tokens leave out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from builds import CONFIG
from index_folder import raw_manifest, rewrite
from mixtures import saved
from tiny_models import tiny_mixtral

import coreinfer_sim
from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.base.errors import ConfigError, IndexFormatError
from coreinfer_sim.base.settings import BuildConfig, Profile
from coreinfer_sim.building import promise
from coreinfer_sim.building.folder import check_output
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.engines.calibration import calibrate
from coreinfer_sim.engines.registry import choose_engines
from coreinfer_sim.evaluation.tune import by_token_and_dense, choose_profiles
from coreinfer_sim.fitting import refit
from coreinfer_sim.fitting.clustered_corpus import CalibrationText
from coreinfer_sim.fitting.refit import refit_rows
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import REFIT_FILE
from coreinfer_sim.models.loading import load_model
from coreinfer_sim.models.mlps import linear_parameters

REFIT = replace(CONFIG, refit=0.4)


def promising(patch):
    """Measure on few texts, and let every profile lose whatever a read ratio of 0.4 costs."""
    most = dict.fromkeys((Profile.BALANCED, Profile.FAST), 90.0)
    named = {
        "_FEWEST_TEXTS": 30,
        "_SHORTEST": 4,
        "by_token_and_dense": partial(by_token_and_dense, read_ratios=(0.4,)),
        "choose_profiles": partial(choose_profiles, max_increases=most),
    }
    for name, value in named.items():
        patch.setattr(promise, name, value)


@pytest.fixture(scope="module")
def refitted(build, tmp_path_factory):
    """An index with refitted rows, and what it promises."""
    with pytest.MonkeyPatch.context() as patch:
        promising(patch)
        folder = tmp_path_factory.mktemp("refitted") / "index"
        build(folder, REFIT)
    return folder


def test_rows_give_more_of_what_all_neurons_give(tiny_checkpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path))
    loaded = load_model(tiny_checkpoint)
    engine = choose_engines(loaded.model, loaded.layers, DecodeConfig())[0][0]
    with pytest.raises(ConfigError, match="not calibrated"):
        engine.values_by_token([], 0.4, {0}, print)
    calibrate(engine, loaded.tokenizer)
    g = torch.Generator().manual_seed(0)
    texts = [CalibrationText(torch.randint(5, 90, (60,), generator=g).tolist(), 30) for _ in range(60)]
    reported: list[int] = []
    monkeypatch.setattr(refit, "_MOMENTS_BYTES", 1)  # a layer a pass
    changes = refit_rows(engine, loaded.layers, texts, 0.4, reported.append)
    assert sorted(changes) == list(range(len(loaded.layers))) and sum(reported) == 60 * len(loaded.layers)
    left: dict[int, list[list[float]]] = {number: [] for number in changes}

    def take(number, values, outputs):
        weight, _ = linear_parameters(loaded.layers[number].output)
        delta, bias = changes[number].delta, changes[number].bias
        before, after = outputs - values @ weight.T, outputs - values @ (weight + delta).T - bias
        left[number].append([float(each.square().sum()) for each in (before, after)])

    engine.values_by_token([(torch.tensor(text.ids), 8) for text in texts], 0.4, changes, take)
    for errors in left.values():
        before, after = np.array(errors).sum(0)
        assert after < before


def test_decode_reads_them_at_their_read_ratio_alone(refitted, encoder, tiny_checkpoint):
    index = SemanticIndex.load(refitted, encoder)
    assert (refitted / REFIT_FILE).is_file() and index.manifest.refit.read_ratio == 0.4
    assert index.refit(0.5) is None
    for mode, ratio, weights, reads in (
        ("all", 0.4, "stored", True),
        ("similarity", 0.4, "stored", True),
        ("all", 0.5, "stored", False),
        ("all", 0.4, "int8", False),
    ):
        with coreinfer_sim.load(
            index, tiny_checkpoint, mode=mode, read_ratio=ratio, weights=weights, fallback="none"
        ) as generator:
            run = generator.generate("What do stars tell us?", max_new_tokens=4, ignore_eos=True)
            chosen = generator.sparse_model().predictor.select(["What do stars tell us?"], None, 1)
            (held,) = generator.engines[0].prepare(chosen)
        assert run.read_ratio < 0.7
        assert (held.n_bytes > 0) is reads and all(mlp.refitted is not None for mlp in held.layers.values())


def test_an_index_with_them_may_be_replaced_as_any_other(refitted):
    check_output(refitted, force=True)


def test_models_whose_tokens_cannot_choose_are_refused_before_any_work(build, tmp_path):
    checkpoint = saved(tmp_path / "mixtral", tiny_mixtral())
    with pytest.raises(ConfigError, match=r"build\.refit was asked for, but decode reads all neurons of"):
        build(tmp_path / "index", REFIT, checkpoint)
    assert not (tmp_path / "index").exists()


def test_a_held_set_leaves_rows_as_they_are(refitted, encoder, tiny_checkpoint):
    layers = load_model(tiny_checkpoint).layers
    predictor = make_predictor("global", layers, SemanticIndex.load(refitted, encoder), keep_ratio=0.5, read_ratio=0.4)
    (chosen,) = predictor.select(["What do stars tell us?"], None, 1)
    assert chosen.ids and chosen.refit is None


def test_what_is_promised_was_measured_with_them(refitted, build, tmp_path, monkeypatch):
    promising(monkeypatch)
    build(tmp_path / "index")
    with_rows, without = (SemanticIndex.load(each).manifest.profile for each in (refitted, tmp_path / "index"))
    assert with_rows.read_ratio == without.read_ratio == 0.4 and with_rows.ratio != without.ratio


def test_indexes_without_them_and_damaged_ones(refitted, encoder, tmp_path):
    raw = raw_manifest(refitted)
    kept = (refitted / REFIT_FILE).read_bytes()
    (refitted / REFIT_FILE).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(IndexFormatError, match=REFIT_FILE):
        dict(SemanticIndex.load(refitted, encoder).refit(0.4).changes)
    (refitted / REFIT_FILE).unlink()
    without = {name: value for name, value in raw.items() if name != "refit"}
    without["files"] = {name: value for name, value in raw["files"].items() if name != REFIT_FILE}
    rewrite(refitted, without)
    assert SemanticIndex.load(refitted, encoder).refit(0.4) is None
    (refitted / REFIT_FILE).write_bytes(kept)
    rewrite(refitted, raw)
    rewrite(refitted, {**raw, "refit": {**raw["refit"], "read_ratio": 1.5}})
    with pytest.raises(IndexFormatError, match="refit has an impossible value"):
        SemanticIndex.load(refitted, encoder)
    rewrite(refitted, raw)


@pytest.mark.parametrize("value", [0, 1, 1.5])
def test_the_read_ratio_is_checked(value):
    with pytest.raises(ConfigError, match="refit"):
        BuildConfig(refit=value)
