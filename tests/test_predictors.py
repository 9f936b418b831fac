"""Predictors that route by meaning: one cluster or several, the prompt's own evidence, and prompts akin to none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from coreinfer_sim.architectures import find_mlps, weight_sketch
from coreinfer_sim.errors import ConfigError
from coreinfer_sim.index import Cluster, Match, SemanticIndex
from coreinfer_sim.manifest import CorpusInfo, EncoderInfo, Manifest, ModelInfo, SettingsInfo
from coreinfer_sim.predictors import make_predictor

PROMPTS = ["How do stars form?", "Why does bread rise?", "What do judges decide in court?"]
QUANTILES = {"0": 0.2, "0.01": 0.21, "0.05": 0.25, "0.25": 0.4, "0.5": 0.5, "0.75": 0.6, "1": 0.9}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def index(model, encoder) -> SemanticIndex:
    """Three clusters whose centroids are PROMPTS, with statistics drawn by chance."""
    layers = find_mlps(model)
    d_ff = layers[0].d_ff
    random = np.random.default_rng(0)
    shape = (3, len(layers), d_ff)
    statistics = {
        "counts": random.integers(0, 9, shape).astype(np.int32),
        "energy": random.random(shape, np.float32) ** 4,
        "activation": random.random(shape, np.float32),
    }
    manifest = Manifest(
        format_version=1,
        versions={},
        model=ModelInfo(
            name="tiny",
            revision=None,
            family=layers[0].family.name,
            dtype="float32",
            n_layers=len(layers),
            d_model=layers[0].d_model,
            d_ff=d_ff,
            weight_sketch=weight_sketch(layers),
            tokenizer_sha256="0" * 64,
            activation_site="input of down_proj",
        ),
        encoder=EncoderInfo(encoder.name, encoder.dimension, True, "cosine", encoder.probe()),
        corpus=CorpusInfo("prompts.jsonl", "1" * 64, 27, 300),
        settings=SettingsInfo(3, 0.4, 0.4, 0.5, 0, list(range(len(layers))), 16, 64, 1),
        files={},
    )
    clusters = [Cluster(c, 10 - c, 100 + 50 * c, f"label {c}", [], [], QUANTILES) for c in range(3)]
    return SemanticIndex(manifest, encoder.encode(PROMPTS), clusters, statistics, encoder=encoder)


@pytest.fixture
def predictor(model, index):
    """Make a predictor over the index."""

    def make(mode: str, **options):
        return make_predictor(mode, find_mlps(model), index, **{"keep_ratio": 0.25, **options})

    return make


def same_ids(found, expected) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[layer], expected[layer]) for layer in found)


# One cluster


@pytest.mark.parametrize("score", ["energy", "paper"])
def test_similarity_is_the_indexs_selection_of_the_nearest_cluster(index, predictor, score):
    chosen = predictor("similarity", score=score).select(PROMPTS, None, 3)
    for selection, prompt in zip(chosen, PROMPTS, strict=True):
        (match,) = index.lookup(prompt)
        expected = index.selection(match, 0.25, score)
        assert same_ids(selection.ids, expected.ids)
        assert (selection.mode, selection.cluster, selection.label) == ("similarity", match.cluster, match.label)


def test_prompts_of_one_cluster_share_what_they_keep_but_not_their_similarity(predictor):
    similarity = predictor("similarity")
    one, other = similarity.select([PROMPTS[0], "How do stars form in a nebula?"], None, 2)
    (again,) = similarity.select(["How do stars form"], None, 1)
    assert one.ids is other.ids is again.ids
    assert one.similarity == pytest.approx(1, abs=1e-4)
    assert other.similarity < 0.99


def test_every_selection_of_a_cluster_comes_from_the_index(index, predictor, monkeypatch):
    made = []
    selection = SemanticIndex.selection

    def noting(self, match, *options):
        made.append(match.cluster)
        return selection(self, match, *options)

    monkeypatch.setattr(SemanticIndex, "selection", noting)
    predictor("similarity").select([PROMPTS[1], PROMPTS[0], PROMPTS[1]], None, 3)
    assert made == [1, 0]


# Several clusters


def blended_by_hand(index, matches, score, n):
    """Σ_c max(similarity, 0) · s_c / size_c, the best n, ties by the activation."""
    weights = [max(match.similarity, 0) for match in matches]
    found = {}
    for layer in range(index.manifest.model.n_layers):
        total = ties = 0
        for weight, match in zip(weights, matches, strict=True):
            cluster = index.clusters[match.cluster]
            name, size = ("energy", cluster.n_tokens) if score == "energy" else ("counts", cluster.size)
            total = total + weight * index._statistics[name][match.cluster, layer].astype(np.float64) / size
            ties = ties + weight * index._statistics["activation"][match.cluster, layer] / cluster.n_tokens
        order = sorted(range(len(total)), key=lambda i: (-total[i], -ties[i], i))
        found[layer] = torch.tensor(sorted(order[:n]))
    return found


@pytest.mark.parametrize("score", ["energy", "paper"])
@pytest.mark.parametrize("nearest", [2, 3])
def test_near_clusters_are_blended_by_similarity(model, index, predictor, score, nearest):
    prompt = "Do judges eat bread under the stars?"
    matches = index.lookup(prompt, k=nearest)
    assert all(match.similarity > 0 for match in matches)
    (chosen,) = predictor("similarity", score=score, nearest=nearest).select([prompt], None, 1)
    n = find_mlps(model)[0].d_ff // 4
    assert same_ids(chosen.ids, blended_by_hand(index, matches, score, n))
    assert (chosen.mode, chosen.cluster) == ("similarity", matches[0].cluster)
    assert not same_ids(chosen.ids, index.core_neurons(matches[0].cluster, 0.25, score))


@pytest.mark.parametrize("score", ["energy", "paper"])
def test_one_cluster_blended_is_that_cluster(index, score):
    for match in index.lookup(PROMPTS[0], k=3):
        blended = index._top(*index.mean_statistics([match], score), 0.25, ":")
        assert same_ids(blended, index.core_neurons(match.cluster, 0.25, score))
        assert same_ids(index.blended_selection([match], 0.25, score).ids, blended)


def test_clusters_that_are_all_unlike_the_prompt_count_the_same(index):
    matches = [Match(c, similarity, "") for c, similarity in ((0, -0.1), (1, -0.2))]
    found, _ = index.mean_statistics(matches)
    energy = index._statistics["energy"].astype(np.float64)
    np.testing.assert_allclose(found, (energy[0] / 100 + energy[1] / 150) / 2)
    found, _ = index.mean_statistics([Match(0, 0.2, ""), Match(1, -0.2, "")])
    np.testing.assert_allclose(found, energy[0] / 100)


@pytest.mark.parametrize("nearest", [0, 4])
def test_nearest_is_a_number_of_clusters(predictor, nearest):
    with pytest.raises(ConfigError, match=f"nearest is {nearest}, expected 1 to 3, the number of clusters"):
        predictor("similarity", nearest=nearest)
