"""Confidence: how familiar a prompt is to its cluster."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny_index import QUANTILES, tiny_index
from tiny_models import tiny_model

from coreinfer_sim.index.clusters import Cluster, Match
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.mlps import find_mlps


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def index(model, encoder) -> SemanticIndex:
    """Three clusters whose centroids are PROMPTS, with statistics drawn by chance."""
    return tiny_index(find_mlps(model), encoder)


@pytest.mark.parametrize(
    ("similarity", "confidence"),
    [(0.1, 0), (0.2, 0), (0.205, 0.005), (0.25, 0.05), (0.325, 0.15), (0.5, 0.5), (0.9, 1), (0.95, 1)],
)
def test_confidence_is_the_share_of_members_farther_away(index, similarity, confidence):
    cluster = replace(index.clusters[0], size=10**6)
    assert cluster.confidence(similarity) == pytest.approx(confidence, abs=1e-4)
    match = Match(0, similarity, "", round(cluster.confidence(similarity), 3))
    assert match.confident == (confidence >= 0.05)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_members_that_are_all_the_same_are_familiar_with_themselves(index, size):
    same = replace(index.clusters[0], size=size, similarity_quantiles=dict.fromkeys(QUANTILES, 1.0))
    assert same.confidence(0.99996) == same.confidence(1.00004) == 1
    assert same.confidence(0.999) == 0


@pytest.mark.parametrize("n", [2, 5, 30])
def test_a_member_is_compared_with_the_others(n):
    random = np.random.default_rng(0)
    members = random.normal(size=(n, 40)) + 0.5
    members /= np.linalg.norm(members, axis=1, keepdims=True)

    def similarity_to(which):
        total = members[which].sum(0)
        return members @ total / np.linalg.norm(total)

    everyone = similarity_to(np.ones(n, bool))
    levels = np.linspace(0, 1, 101)
    quantiles = {f"{level:g}": float(np.quantile(everyone, level)) for level in levels}
    cluster = Cluster(0, n, n, "", [], [], quantiles)
    others = [similarity_to(np.arange(n) != i)[i] for i in range(n)]
    np.testing.assert_allclose(cluster.quantiles_to_others[0], np.quantile(others, levels), atol=0.02)
    assert cluster.confidence(min(others) - 0.03) == 0 and cluster.confidence(max(others) + 0.03) == 1
