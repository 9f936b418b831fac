"""Predictors that route by meaning: one cluster or several, the prompt's own evidence, and prompts akin to none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, tiny_model

from coreinfer_sim import predictors
from coreinfer_sim.activations import recorded_activations
from coreinfer_sim.architectures import find_mlps, weight_sketch
from coreinfer_sim.core_neurons import SentenceStatistics, sentence_statistics
from coreinfer_sim.errors import ConfigError, GenerationError
from coreinfer_sim.index import Cluster, Match, SemanticIndex
from coreinfer_sim.manifest import CorpusInfo, EncoderInfo, Manifest, ModelInfo, SettingsInfo
from coreinfer_sim.predictors import make_predictor, prior_weight
from coreinfer_sim.runtime import SparseModel
from coreinfer_sim.selection import NeuronSelection

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


# Cluster and prompt


def statistics_of(model, ids, alpha=0.4):
    """By layer, the statistics of one row's tokens, from one dense pass."""
    found = {}
    layers = find_mlps(model)

    def add(number, z):
        found[number] = sentence_statistics(z, np.array([0, len(z)]), alpha)

    with recorded_activations(layers, add) as tap, torch.no_grad():
        tap.set_mask(torch.ones_like(ids))
        model(input_ids=ids, use_cache=False)
    return found


def token_ids(n_positions, seed=0):
    return torch.randint(4, VOCABULARY, (1, n_positions), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("n_tokens", "confidence", "weight"),
    [(0, 1, 1), (64, 1, 1 / 2), (64, 0, 1 / 4), (192, 1, 1 / 4), (16, 0.5, 0.8 * 0.75)],
)
def test_the_weight_of_the_prior(n_tokens, confidence, weight):
    assert prior_weight(n_tokens, confidence) == pytest.approx(weight)


@pytest.mark.parametrize("score", ["energy", "paper"])
@pytest.mark.parametrize("nearest", [1, 2])
def test_hybrid_adds_prior_and_evidence(model, index, predictor, score, nearest):
    ids, prompt = token_ids(9), PROMPTS[1]
    hybrid = predictor("hybrid", score=score, nearest=nearest)
    sparse = SparseModel(model, hybrid)
    sparse.generate(ids, prompts=[prompt], max_new_tokens=3, do_sample=False)
    (chosen,) = sparse.selections
    matches = index.lookup(prompt, k=nearest)
    name, weight = ("energy" if score == "energy" else "counts"), 64 / (64 + 9) * (1 + matches[0].confidence) / 2
    prior, _ = index.mean_statistics(matches, score)
    for layer, own in statistics_of(model, ids).items():
        evidence = getattr(own, name)[0] / getattr(own, name)[0].sum()
        total = weight * prior[layer] / prior[layer].sum() + (1 - weight) * evidence
        n = len(total) // 4
        assert set(chosen.ids[layer].tolist()) == set(np.argsort(-total, kind="stable")[:n].tolist())
    assert (chosen.mode, chosen.cluster, chosen.confidence) == ("hybrid", 1, matches[0].confidence)


def test_hybrid_lies_between_cluster_and_prompt(model, index, monkeypatch):
    """With all weight on one side it is similarity or stability."""
    ids, layers = token_ids(40), find_mlps(model)
    statistics = statistics_of(model, ids)

    def chosen(mode, **options):
        made = make_predictor(mode, layers, index, keep_ratio=0.25, **options)
        return made.select(PROMPTS[:1], statistics, 1)[0].ids

    similarity, stability = chosen("similarity"), chosen("stability")
    assert not same_ids(chosen("hybrid"), similarity) and not same_ids(chosen("hybrid"), stability)
    monkeypatch.setattr(predictors, "prior_weight", lambda n_tokens, confidence: 1.0)
    assert same_ids(chosen("hybrid"), similarity)
    monkeypatch.setattr(predictors, "prior_weight", lambda n_tokens, confidence: 0.0)
    assert same_ids(chosen("hybrid"), stability)


def test_hybrid_by_row_equals_single_rows(model, predictor):
    rows = [token_ids(n, seed=n) for n in (3, 8, 5)]
    ids = torch.cat([torch.nn.functional.pad(row, (8 - row.shape[1], 0)) for row in rows])
    mask = (torch.arange(8) >= torch.tensor([[8 - row.shape[1]] for row in rows])).long()
    sparse = SparseModel(model, predictor("hybrid"))
    options = {"max_new_tokens": 6, "do_sample": False}
    batch = sparse.generate(ids, attention_mask=mask, prompts=PROMPTS, **options)
    together = sparse.selections
    for number, row in enumerate(rows):
        alone = sparse.generate(row, prompts=[PROMPTS[number]], **options)
        assert alone[0, -6:].tolist() == batch[number, -6:].tolist()
        assert same_ids(sparse.selections[0].ids, together[number].ids)


def test_a_silent_layer_leaves_the_prior_alone(index, predictor, model):
    """A layer of a ReLU model may be all zeros over a short prompt."""
    layers = find_mlps(model)
    zeros = np.zeros((1, layers[0].d_ff), np.float32)
    silent = {n: SentenceStatistics(zeros.astype(np.int32), zeros, zeros) for n in range(len(layers))}
    (chosen,) = predictor("hybrid").select(PROMPTS[:1], silent, 1)
    assert same_ids(chosen.ids, index.core_neurons(0, 0.25))


def test_hybrid_reads_the_prompt(predictor):
    hybrid = predictor("hybrid")
    assert hybrid.alpha == 0.4 and hybrid.needs_text
    assert hybrid.select(PROMPTS, None, 3) is None
    with pytest.raises(GenerationError, match="hybrid mode read no prompt tokens"):
        hybrid.select(PROMPTS, {}, 3)
    with pytest.raises(GenerationError, match="hybrid mode was given no prompt text"):
        hybrid.select(None, {}, 3)


def test_hybrid_of_some_layers(predictor, model):
    statistics = statistics_of(model, token_ids(5))
    (chosen,) = predictor("hybrid", sparse_layers="1:").select(PROMPTS[:1], statistics, 1)
    assert list(chosen.ids) == [1, 2]
    chosen.check(find_mlps(model))


# Confidence


@pytest.mark.parametrize(
    ("similarity", "confidence"),
    [(0.1, 0), (0.2, 0), (0.205, 0.005), (0.25, 0.05), (0.325, 0.15), (0.5, 0.5), (0.9, 1), (0.95, 1)],
)
def test_confidence_is_the_share_of_members_farther_away(index, similarity, confidence):
    assert index.clusters[0].confidence(similarity) == pytest.approx(confidence)
    match = Match(0, similarity, "", index.clusters[0].confidence(similarity))
    assert match.confident == (confidence >= 0.05)


def test_a_member_that_is_alone_is_familiar_with_itself(index):
    alone = replace(index.clusters[0], similarity_quantiles=dict.fromkeys(QUANTILES, 0.9))
    assert alone.confidence(0.89996) == alone.confidence(0.90004) == 1
    assert alone.confidence(0.899) == 0


def test_matches_and_selections_tell_whether_the_prompt_is_familiar(index):
    (near,), (far,) = index.lookup([PROMPTS[0], "zzz qqq 0x3f"])
    assert near.confident and near.confidence == 1
    assert not far.confident and far.confidence < 0.05
    assert index.selection(near).confident and not index.selection(far).confident
    assert not index.blended_selection([far, near]).confident
    assert NeuronSelection("dense").confident is None
