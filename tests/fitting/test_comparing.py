"""What decodes for a cluster is what serves its held-out texts best."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from compensation_cases import divergence
from tiny_models import N_LAYERS

from coreinfer_sim.base.rows import Row
from coreinfer_sim.base.settings import BuildConfig
from coreinfer_sim.fitting.clustered_corpus import ClusteredCorpus
from coreinfer_sim.fitting.comparing import Kind, choose_kinds, compare_sets, plain_set
from coreinfer_sim.fitting.layerwise import Fit, fit_layers
from coreinfer_sim.fitting.sets import save_set
from coreinfer_sim.index.clustering import Clustering
from coreinfer_sim.index.manifest import compensation_file
from coreinfer_sim.models.loading import load_model


def test_the_better_set_is_found_on_held_out_texts(tiny_checkpoint, tmp_path):
    language_model = load_model(tiny_checkpoint)
    layers = language_model.layers
    sentences = [Row(str(i), f"Tell me of {i}.", f"Tell me of {i}. It is {i} and more.", 9) for i in range(48)]
    clustering = Clustering(np.zeros((2, 2), np.float32), np.arange(48) % 2, np.ones(48))
    config = BuildConfig(clusters=2)
    n = [layers[0].d_ff // 2] * N_LAYERS
    corpus = ClusteredCorpus(language_model, sentences, clustering, config, 64, tmp_path)
    _, texts = corpus.texts(None, 10**6)
    good = fit_layers(language_model, texts, n, Fit())
    bad = replace(good, compensation={k: replace(c, delta=5 + 0 * c.delta) for k, c in good.compensation.items()})
    for cluster, selection in ((None, good), (0, bad), (1, good)):
        save_set(tmp_path / compensation_file(0.5, cluster), selection)
    energy = np.tile(np.random.default_rng(0).permutation(layers[0].d_ff), (N_LAYERS, 1))
    reported = []

    def plain(ratio, cluster):
        assert ratio == 0.5
        return plain_set((energy, 0 * energy), range(N_LAYERS), n, layers[0].d_model)

    found = compare_sets(corpus, (0.5,), plain, reported.append)["0.5"]
    means = {c: {kind: np.mean(values) for kind, values in each.items()} for c, each in found.items()}
    assert means["0"]["corpus"] < means["0"]["plain"] < means["0"]["own"]
    assert found["1"]["corpus"] == found["1"]["own"] and len(found["1"]["own"]) == 3
    assert choose_kinds(found, 2) == {None: Kind.OWN, 0: Kind.CORPUS, 1: Kind.OWN}
    assert sum(reported) == corpus.held_out.sum() == 6
    short = [replace(each, text="a") if i % 2 else each for i, each in enumerate(sentences)]
    compared = compare_sets(replace(corpus, sentences=short), (0.5,), plain, reported.append)
    assert compared == {"0.5": {"0": found["0"]}}  # one token leaves nothing to decode
    held = [corpus.text(i) for i in np.flatnonzero(corpus.held_out & (clustering.assignment == 0))]
    for name, selection in (("corpus", good), ("plain", replace(plain(0.5, 0), compensation=None))):
        assert means["0"][name] == pytest.approx(by_text(language_model.model, held, selection), rel=1e-2)


def test_what_decodes_is_what_served_the_held_out_texts_best():
    own, corpus, plain = Kind.OWN, Kind.CORPUS, Kind.PLAIN

    def kinds(found, n_clusters):
        named = {str(c): {kind: list(values) for kind, values in each.items()} for c, each in found.items()}
        chosen = choose_kinds(json.loads(json.dumps(named)), n_clusters)
        return [chosen[c] for c in (None, *range(n_clusters))]

    level, worse = {own: (1, 2), corpus: (1, 2), plain: (2, 3)}, {own: (3, 4), corpus: (1, 3), plain: (2, 4)}
    assert kinds({0: level, 1: worse}, 3) == [own, own, corpus, own]  # the last has no texts
    harmed = {own: (2.0, 2.2, 2.1), corpus: (3, 3, 3), plain: (1.0, 1.3, 1.2)}
    assert kinds({0: harmed, 1: {**harmed, corpus: (1.5, 1.6, 1.7)}}, 2) == [plain, plain, plain]
    assert kinds({0: harmed, 1: {**harmed, corpus: (0.1, 0.2, 0.1)}}, 2) == [
        own,
        own,
        corpus,
    ]  # all texts decide together
    assert kinds({0: {**harmed, plain: (0.0, 5.0, 0.9)}}, 2) == [own, own, own]  # within the noise
    assert kinds({0: {own: (9,), corpus: (9,), plain: (1,)}}, 2) == [own, own, own]  # one text says nothing
    alone = {corpus: (2.0, 2.1), plain: (1.0, 1.1)}
    assert kinds({0: alone}, 1) == [plain, corpus]
    assert kinds({0: {**alone, plain: (2.0, 2.2)}}, 1) == kinds({}, 1) == [own, corpus]


def test_a_plain_set_is_the_neurons_of_highest_energy():
    energy, activation = np.random.default_rng(0).integers(0, 1000, (2, 2, 12))
    chosen = plain_set((energy, activation), [1, 2], [12, 5, 12], 6)
    assert list(chosen.ids) == [1] and set(chosen.ids[1].tolist()) == set(np.argsort(-energy[0])[:5].tolist())
    assert chosen.compensation[1].delta is None and not chosen.compensation[1].bias.any()


def by_text(model, texts, selection):
    """The mean over texts of each one's divergence a token."""
    return sum(divergence(model, [text], selection) for text in texts) / len(texts)
