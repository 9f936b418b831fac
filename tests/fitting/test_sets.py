"""Which sets are fitted and trained, on what, and in which groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from compensation_cases import COMPENSATION
from tiny_models import N_LAYERS

from coreinfer_sim.base.rows import Row
from coreinfer_sim.base.settings import BuildConfig
from coreinfer_sim.fitting import sets
from coreinfer_sim.fitting.clustered_corpus import ClusteredCorpus
from coreinfer_sim.fitting.sets import (
    FitSets,
    broken_off,
    load_set,
    sets_to_fit,
    train_sets,
    trained_together,
    trainings,
)
from coreinfer_sim.fitting.student import training_bytes
from coreinfer_sim.fitting.training import distil
from coreinfer_sim.index.clustering import Clustering
from coreinfer_sim.index.manifest import compensation_file
from coreinfer_sim.models.loading import load_model
from coreinfer_sim.models.mlps import find_mlps


def clustered_corpus(language_model, texts, n_clusters, settings, folder):
    """Sentences that lie in the clusters in turn."""
    sentences = [Row(str(i), text[:12], text, 9) for i, text in enumerate(texts)]
    n = len(sentences)
    clustering = Clustering(np.zeros((n_clusters, 2), np.float32), np.arange(n) % n_clusters, np.ones(n))
    config = BuildConfig(clusters=n_clusters, compensation=settings)
    return ClusteredCorpus(language_model, sentences, clustering, config, 64, folder)


def fit_all(corpus, settings):
    """Fit the sets of the whole corpus and of all clusters."""
    d_ff = corpus.language_model.layers[0].d_ff
    job = FitSets(settings, {f"{ratio:g}": [int(ratio * d_ff)] * N_LAYERS for ratio in settings.keep_ratios})
    for number in range(len(sets_to_fit(settings, corpus.n_clusters))):
        job.run(corpus, number, lambda _n: None)


def ignored(_n):
    """Take what nobody asks for."""


@pytest.mark.parametrize("distil_tokens", [20, 10**6])
def test_training_reads_the_fits_own_texts_last_or_not_at_all(tiny_checkpoint, tmp_path, monkeypatch, distil_tokens):
    texts = [f"Tell me of {i}. It is {i} and more." for i in range(24)]
    settings = replace(COMPENSATION, keep_ratios=(0.5,), tokens=20, distil_tokens=distil_tokens)
    corpus = clustered_corpus(load_model(tiny_checkpoint), texts, 2, settings, tmp_path)
    fitted, trained = [], []

    def watch(name, place, found):
        """Note the texts that a function of the module is given as its argument at ``place``."""
        function = getattr(sets, name)

        def watched(*args, **more):
            found.append([tuple(text.ids) for text in args[place]])
            return function(*args, **more)

        monkeypatch.setattr(sets, name, watched)

    watch("fit_layers", 1, fitted)
    watch("distil", 2, trained)
    fit_all(corpus, settings)
    for clusters in trainings(2):
        train_sets(corpus, settings, clusters, ignored)
    assert len(fitted) == 3 and len(trained) == 2
    for of_training in trained:
        again = [text in fitted[0] for text in of_training]
        assert not again[0] and again == sorted(again)
        assert sum(again) == (len(fitted[0]) if distil_tokens == 10**6 else 0)


def test_clusters_begin_to_learn_with_what_the_corpus_set_has_learnt(tiny_checkpoint, tmp_path, monkeypatch):
    texts = ["{0}, {0}! 12345 + 67890 = {0}?" if i % 2 else "Tell me of it. It is this and more." for i in range(24)]
    settings = replace(COMPENSATION, keep_ratios=(0.5,))
    corpus = clustered_corpus(
        load_model(tiny_checkpoint), [text.format(i) for i, text in enumerate(texts)], 2, settings, tmp_path
    )
    layers, begun = corpus.language_model.layers, []

    def watched(language_model, families, *args):
        begun.extend(families)
        return distil(language_model, families, *args)

    fit_all(corpus, settings)
    train_sets(corpus, settings, (None,), ignored)
    monkeypatch.setattr(sets, "distil", watched)
    before, after = (
        load_set(folder / compensation_file(0.5, None), layers) for folder in (tmp_path / "fitted", tmp_path)
    )
    fitted = [load_set(tmp_path / "fitted" / compensation_file(0.5, c), layers) for c in range(2)]
    train_sets(corpus, settings, (0, 1), ignored)
    assert len(begun) == 1
    n_apart = 0
    for own, start in zip(fitted, begun[0], strict=True):
        for number, ids in own.ids.items():
            of_all = before.ids[number].tolist()
            common = [(i, of_all.index(n)) for i, n in enumerate(ids.tolist()) if n in of_all]
            n_apart += len(ids) - len(common)
            assert torch.equal(start.ids[number], ids)
            mine, theirs = zip(*common, strict=True)
            was, found, old, new = (each.compensation[number] for each in (own, start, before, after))
            wanted = was.delta.float()
            wanted[:, list(mine)] += (new.delta.float() - old.delta.float())[:, list(theirs)]
            assert not torch.equal(wanted, was.delta.float()) and torch.equal(found.delta, wanted.bfloat16())
            assert torch.equal(found.bias, was.bias.float() + new.bias.float() - old.bias.float())
    assert n_apart > 0


def test_a_single_cluster_has_nobody_to_learn_with():
    assert trainings(1) == [(None,)]
    assert trainings(3) == [(None,), (0, 1, 2)]


def test_sets_that_do_not_fit_together_are_trained_one_after_the_other(models):
    layers = find_mlps(models["llama"])
    small, large = (training_bytes(layers, ratio) for ratio in COMPENSATION.keep_ratios)
    assert 0 < small < large
    for room, groups in ((small + large, [[0.5, 0.7]]), (large, [[0.5], [0.7]]), (1, [[0.5], [0.7]])):
        assert trained_together(layers, COMPENSATION.keep_ratios, room) == groups


def test_trainings_that_were_broken_off_keep_their_groups(tmp_path):
    for name in ("corpus-0.2-0.4", "clusters-0.2", "corpus-0.6-0.7"):
        (tmp_path / f"{name}.safetensors").touch()
    assert broken_off(tmp_path, "corpus", (0.2, 0.4, 0.6)) == [[0.2, 0.4]]  # 0.7 has been trained since
    assert broken_off(tmp_path, "corpus", (0.6, 0.7)) == [[0.6, 0.7]]
    assert broken_off(tmp_path, "clusters", (0.4,)) == [] == broken_off(tmp_path / "none", "corpus", (0.2, 0.4))


def test_a_keep_ratio_whose_sets_are_trained_is_not_trained_again(tiny_checkpoint, tmp_path):
    texts = [f"Tell me of {i}. It is {i} and more." for i in range(24)]
    corpus = clustered_corpus(load_model(tiny_checkpoint), texts, 1, COMPENSATION, tmp_path)
    fit_all(corpus, COMPENSATION)
    trained = [tmp_path / compensation_file(ratio, None) for ratio in COMPENSATION.keep_ratios]
    train_sets(corpus, COMPENSATION, (None,), ignored)
    wanted = [path.read_bytes() for path in trained]
    trained[0].unlink()
    trained[1].write_bytes(b"trained before")
    reported = []
    train_sets(corpus, COMPENSATION, (None,), reported.append)
    assert [path.read_bytes() for path in trained] == [wanted[0], b"trained before"]
    _, read = corpus.texts(None, 3 * COMPENSATION.distil_tokens, from_end=True)
    assert sum(reported) == sum(len(text.ids) for text in read)
