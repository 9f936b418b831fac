"""Predictors that route by meaning: the nearest cluster, the prompt's own evidence, and prompts akin to none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_index import PROMPTS, tiny_index
from tiny_models import VOCABULARY, tiny_model

from coreinfer_sim.base.errors import GenerationError
from coreinfer_sim.choosing import prompt_reader, routing
from coreinfer_sim.choosing.index_sets import IndexSets
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.choosing.routing import prior_weight
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.choosing.statistics import ActivationStatistics, activation_statistics
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.mlps import find_mlps
from coreinfer_sim.models.taps import recorded_activations


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def index(model, encoder) -> SemanticIndex:
    """Three clusters whose centroids are PROMPTS, with statistics drawn by chance."""
    return tiny_index(find_mlps(model), encoder)


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
        expected = IndexSets(index, 0.25, score).of_match(match)
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
    core_neurons = SemanticIndex.core_neurons

    def noting(self, cluster, *options):
        made.append(cluster)
        return core_neurons(self, cluster, *options)

    monkeypatch.setattr(SemanticIndex, "core_neurons", noting)
    predictor("similarity").select([PROMPTS[1], PROMPTS[0], PROMPTS[1]], None, 3)
    assert made == [1, 0]


# Cluster and prompt


def statistics_of(model, ids, alpha=0.4):
    """By layer, the statistics of one row's tokens, from one dense pass."""
    found = {}
    layers = find_mlps(model)

    def add(number, z):
        found[number] = activation_statistics(z, np.array([0, len(z)]), alpha)

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
def test_hybrid_adds_prior_and_evidence(model, index, predictor, score):
    ids, prompt = token_ids(9), PROMPTS[1]
    hybrid = predictor("hybrid", score=score)
    sparse = SparseModel(model, hybrid)
    sparse.generate(ids, prompts=[prompt], max_new_tokens=3, do_sample=False)
    (chosen,) = sparse.latest.selections
    (match,) = index.lookup(prompt)
    name, weight = ("energy" if score == "energy" else "counts"), 64 / (64 + 9) * (1 + match.confidence) / 2
    prior, _ = index.statistics(match.cluster, score)
    for layer, own in statistics_of(model, ids).items():
        evidence = getattr(own, name)[0] / getattr(own, name)[0].sum()
        total = weight * prior[layer] / prior[layer].sum() + (1 - weight) * evidence
        n = len(total) // 4
        assert set(chosen.ids[layer].tolist()) == set(np.argsort(-total, kind="stable")[:n].tolist())
    assert (chosen.mode, chosen.cluster, chosen.confidence) == ("hybrid", 1, match.confidence)


def test_hybrid_lies_between_cluster_and_prompt(model, index, monkeypatch):
    """With all weight on one side it is similarity or stability."""
    ids, layers = token_ids(40), find_mlps(model)
    statistics = statistics_of(model, ids)

    def chosen(mode, **options):
        made = make_predictor(mode, layers, index, keep_ratio=0.25, **options)
        return made.select(PROMPTS[:1], statistics, 1)[0].ids

    similarity, stability = chosen("similarity"), chosen("stability")
    assert not same_ids(chosen("hybrid"), similarity) and not same_ids(chosen("hybrid"), stability)
    monkeypatch.setattr(routing, "prior_weight", lambda n_tokens, confidence: 1.0)
    assert same_ids(chosen("hybrid"), similarity)
    monkeypatch.setattr(routing, "prior_weight", lambda n_tokens, confidence: 0.0)
    assert same_ids(chosen("hybrid"), stability)


def test_hybrid_by_row_equals_single_rows(model, predictor):
    rows = [token_ids(n, seed=n) for n in (3, 8, 5)]
    ids = torch.cat([torch.nn.functional.pad(row, (8 - row.shape[1], 0)) for row in rows])
    mask = (torch.arange(8) >= torch.tensor([[8 - row.shape[1]] for row in rows])).long()
    sparse = SparseModel(model, predictor("hybrid"))
    options = {"max_new_tokens": 6, "do_sample": False}
    batch = sparse.generate(ids, attention_mask=mask, prompts=PROMPTS, **options)
    together = sparse.latest.selections
    for number, row in enumerate(rows):
        alone = sparse.generate(row, prompts=[PROMPTS[number]], **options)
        assert alone[0, -6:].tolist() == batch[number, -6:].tolist()
        assert same_ids(sparse.latest.selections[0].ids, together[number].ids)


def test_a_silent_layer_leaves_the_prior_alone(index, predictor, model):
    """A layer of a ReLU model may be all zeros over a short prompt."""
    layers = find_mlps(model)
    zeros = np.zeros((1, layers[0].d_ff), np.float32)
    silent = {n: ActivationStatistics(zeros.astype(np.int32), zeros, zeros) for n in range(len(layers))}
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


def test_matches_and_selections_tell_whether_the_prompt_is_familiar(index):
    (near,), (far,) = index.lookup([PROMPTS[0], "zzz qqq 0x3f"])
    assert near.confident and near.confidence == 1
    assert not far.confident and far.confidence < 0.05
    sets = IndexSets(index)
    assert sets.of_match(near).confident and not sets.of_match(far).confident
    assert NeuronSelection("dense").confident is None


# Fallback

FAR = "zzz qqq 0x3f"


def test_an_unfamiliar_prompt_falls_back_on_hybrid(model, predictor):
    statistics = statistics_of(model, token_ids(9))
    similarity, hybrid = predictor("similarity"), predictor("hybrid")
    assert similarity.alpha == 0.4
    assert similarity.select([FAR], None, 1) is None
    (chosen,) = similarity.select([FAR], statistics, 1)
    (expected,) = hybrid.select([FAR], statistics, 1)
    assert same_ids(chosen.ids, expected.ids)
    assert (chosen.mode, chosen.cluster, chosen.confident) == ("hybrid", expected.cluster, False)


@pytest.mark.parametrize("fallback", ["dense", "global", "none"])
def test_an_unfamiliar_prompt_falls_back_without_being_read(index, predictor, fallback):
    similarity = predictor("similarity", fallback=fallback)
    assert similarity.alpha is None
    far, near, again = similarity.select([FAR, PROMPTS[1], FAR], None, 3)
    cluster = index.lookup(FAR)[0].cluster
    expected = {"dense": {}, "global": index.core_neurons(None, 0.25), "none": index.core_neurons(cluster, 0.25)}
    assert same_ids(far.ids, expected[fallback])
    assert far.ids is again.ids
    assert (far.mode, far.cluster) == ("similarity" if fallback == "none" else fallback, cluster)
    assert (near.mode, near.confident, far.confident) == ("similarity", True, False)
    assert same_ids(near.ids, index.core_neurons(1, 0.25))


@pytest.mark.parametrize("fallback", ["hybrid", "dense", "global", "none"])
def test_a_familiar_prompt_is_not_read(model, predictor, fallback, monkeypatch):
    read = []
    monkeypatch.setattr(prompt_reader, "recorded_activations", lambda *_: read.append(1))
    sparse = SparseModel(model, predictor("similarity", fallback=fallback))
    sparse.generate(token_ids(5).repeat(2, 1), prompts=PROMPTS[:2], max_new_tokens=3, do_sample=False)
    assert not read and [s.mode for s in sparse.latest.selections] == ["similarity"] * 2


def test_only_the_unfamiliar_row_of_a_batch_falls_back(model, predictor):
    ids = token_ids(6).repeat(3, 1)
    prompts, options = [PROMPTS[0], FAR, PROMPTS[0]], {"max_new_tokens": 6, "do_sample": False}
    sparse = SparseModel(model, predictor("similarity"))
    batch = sparse.generate(ids, prompts=prompts, **options)
    chosen = sparse.latest.selections
    assert [selection.mode for selection in chosen] == ["similarity", "hybrid", "similarity"]
    assert chosen[0].ids is chosen[2].ids
    for row, mode in enumerate(["similarity", "hybrid"]):
        alone = SparseModel(model, predictor(mode))
        assert alone.generate(ids[:1], prompts=[prompts[row]], **options).tolist() == [batch[row].tolist()]
        assert same_ids(alone.latest.selections[0].ids, chosen[row].ids)


def test_a_prompt_is_embedded_once(index, predictor, model, monkeypatch):
    embedded = []
    lookup = SemanticIndex.lookup_embeddings
    monkeypatch.setattr(SemanticIndex, "lookup_embeddings", lambda *a: embedded.append(1) or lookup(*a))
    sparse = SparseModel(model, predictor("similarity"))
    sparse.generate(token_ids(5), prompts=[FAR], max_new_tokens=3, do_sample=False)
    assert sparse.latest.selections[0].mode == "hybrid" and len(embedded) == 1
