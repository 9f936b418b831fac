"""Histograms of what tokens need, which a build leaves in its index."""

from __future__ import annotations

import shutil
from functools import partial

import numpy as np
import pytest
from index_folder import raw_manifest, rewrite

import coreinfer_sim
from coreinfer_sim.building import promise
from coreinfer_sim.building.histograms import n_tokens_measured
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.engines.lean.thresholds import N_BINS
from coreinfer_sim.evaluation.tune import by_token_and_dense
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import HISTOGRAMS_FILE
from coreinfer_sim.models.loading import load_model


@pytest.fixture(scope="module", autouse=True)
def measuring():
    """Sixty prompts are enough to measure on; what is promised matters little."""
    with pytest.MonkeyPatch.context() as patch:
        few = partial(by_token_and_dense, read_ratios=(0.5,))
        for name, value in {"_FEWEST_TEXTS": 30, "_SHORTEST": 4, "by_token_and_dense": few}.items():
            patch.setattr(promise, name, value)
        yield


@pytest.fixture(scope="module")
def measured(measuring, build, tmp_path_factory):
    """An index with histograms."""
    folder = tmp_path_factory.mktemp("measured") / "index"
    build(folder)
    return folder


def test_an_index_holds_histograms_of_every_layout(measured, encoder):
    found = SemanticIndex.load(measured, encoder).histograms
    assert sorted(found) == ["Q4_1 high v2", "Q8_0 high v2", "bfloat16 v2", "float32 v2"]
    sums = [counts.sum(1) for counts in found.values()]
    assert all(counts.shape[1] == N_BINS for counts in found.values())
    assert all(np.array_equal(each, sums[0]) for each in sums) and sums[0].min() > 0


def test_few_tokens_are_measured_of_a_large_corpus():
    assert [n_tokens_measured(n) for n in (10, 5_000, 200_000, 10**7)] == [10, 2_000, 10_000, 16_000]


@pytest.mark.parametrize("weights", ["stored", "int8"])
def test_decode_takes_its_thresholds_from_the_index(weights, measured, tiny_checkpoint, encoder, tmp_path, monkeypatch):
    """Without them, as in indexes of earlier releases, a bundled text is measured as before."""
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path / "cache"))
    older = tmp_path / "older"
    shutil.copytree(measured, older)
    (older / HISTOGRAMS_FILE).unlink()
    raw = raw_manifest(older)
    del raw["histograms"], raw["files"][HISTOGRAMS_FILE]
    rewrite(older, raw)
    for folder, is_measured in ((measured, False), (older, True)):
        index = SemanticIndex.load(folder, encoder)
        with coreinfer_sim.load(index, tiny_checkpoint, mode="all", weights=weights, read_ratio=0.3) as generator:
            found = generator.generate("What do stars tell us?", max_new_tokens=8)
        assert 0.1 < found.read_ratio < 0.5
        assert (tmp_path / "cache" / "thresholds").is_dir() is is_measured


def test_a_wrapped_model_takes_them_too(measured, tiny_checkpoint, encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path / "cache"))
    loaded = load_model(tiny_checkpoint)
    predictor = make_predictor("all", loaded.layers, SemanticIndex.load(measured, encoder), read_ratio=0.3)
    SparseModel(loaded.model, predictor, loaded.tokenizer)
    assert not (tmp_path / "cache" / "thresholds").exists()


def test_what_was_measured_is_not_measured_again(measured, build, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("coreinfer_sim.building.build.write_index", killed)
        build(tmp_path / "index")
    monkeypatch.setattr("coreinfer_sim.building.histograms.choose_engines", killed)
    build(tmp_path / "index")
    assert (tmp_path / "index" / HISTOGRAMS_FILE).read_bytes() == (measured / HISTOGRAMS_FILE).read_bytes()


def test_a_small_corpus_leaves_none(build, tmp_path, monkeypatch):
    monkeypatch.setattr(promise, "_FEWEST_TEXTS", 200)
    build(tmp_path / "index")
    assert not (tmp_path / "index" / HISTOGRAMS_FILE).exists()


def test_an_index_with_histograms_may_be_replaced(measured, build, tmp_path, monkeypatch):
    monkeypatch.setattr(promise, "_FEWEST_TEXTS", 200)
    folder = tmp_path / "index"
    shutil.copytree(measured, folder)
    build(folder, force=True)
    assert not (folder / HISTOGRAMS_FILE).exists()
