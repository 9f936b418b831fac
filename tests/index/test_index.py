"""Lookups, and core neurons by score, keep ratio and layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from index_folder import (
    PROMPTS,
    STATISTICS,
    clusters,
    manifest,
    save,
)

from coreinfer_sim.base.errors import ConfigError, IndexMismatchError
from coreinfer_sim.base.settings import Score
from coreinfer_sim.index.clusters import Match
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import (
    EncoderInfo,
)

RANKS = {  # neurons of layer 1, best first
    (0, "energy"): [0, 3, 2, 4, 1, 5],  # 2, 3 and 4 tie at 3: first the larger activation, then the lower id
    (0, "paper"): [0, 1, 4, 5, 3, 2],  # 1 and 4 tie at 2, 5 and 3 at 1: the larger activation
    (1, "energy"): [5, 1, 0, 4, 2, 3],  # 0, 2, 3 and 4 tie at 0
    (2, "energy"): [0, 1, 2, 3, 4, 5],  # everything ties, in the activation too
    (None, "energy"): [5, 1, 0, 3, 4, 2],  # sums [5, 5, 3, 3, 3, 9] and [3, 9, 1, 2, 2, 7]
    (None, "paper"): [0, 3, 1, 4, 5, 2],  # sums [300, 2, 0, 251, 2, 1]: more than a byte holds
}


def test_lookup_is_the_same_before_and_after_saving(tmp_path, encoder):
    info = EncoderInfo(encoder.name, encoder.dimension, True, "cosine", encoder.probe())
    centroids = encoder.encode(PROMPTS)
    folder = save(tmp_path / "index", centroids=centroids, encoder=info)
    before = SemanticIndex(manifest(encoder=info), centroids, clusters(), STATISTICS, encoder=encoder)
    after = SemanticIndex.load(folder, encoder)
    queries = [*PROMPTS, "Where do planets come from?"]
    assert after.lookup(queries, k=3) == before.lookup(queries, k=3)
    for cluster in (0, 1, 2, None):
        for score in Score:
            one, other = (i.core_neurons(cluster, 0.5, score, "1:") for i in (before, after))
            assert one.keys() == other.keys() == {1, 2}
            assert all(torch.equal(one[layer], other[layer]) for layer in one)


def test_lookup_finds_the_nearest_clusters_best_first(tmp_path, encoder):
    info = EncoderInfo(encoder.name, encoder.dimension, True, "cosine", encoder.probe())
    centroids = encoder.encode(PROMPTS)
    index = SemanticIndex.load(save(tmp_path / "index", centroids=centroids, encoder=info), encoder)
    for number, prompt in enumerate(PROMPTS):
        (match,) = index.lookup(prompt)
        assert (match.cluster, match.label) == (number, f"label {number}")
        assert match.similarity == pytest.approx(1, abs=1e-5)
    query = "Where do planets come from?"
    matches = index.lookup(query, k=3)
    cosine = centroids @ encoder.encode([query])[0]
    assert [match.cluster for match in matches] == np.argsort(-cosine).tolist()
    assert [match.similarity for match in matches] == pytest.approx(np.sort(cosine)[::-1].tolist(), abs=1e-6)


def test_a_list_of_prompts_is_looked_up_like_each_prompt(tmp_path, encoder):
    info = EncoderInfo(encoder.name, encoder.dimension, True, "cosine", encoder.probe())
    index = SemanticIndex.load(save(tmp_path / "index", centroids=encoder.encode(PROMPTS), encoder=info), encoder)
    together, apart = index.lookup(PROMPTS, k=2), [index.lookup(prompt, k=2) for prompt in PROMPTS]
    assert [[m.cluster for m in row] for row in together] == [[m.cluster for m in row] for row in apart]
    np.testing.assert_allclose(
        [[m.similarity for m in row] for row in together], [[m.similarity for m in row] for row in apart], atol=1e-5
    )
    assert isinstance(index.lookup(PROMPTS[0])[0], Match) and isinstance(index.lookup(PROMPTS[:1])[0], list)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_k_is_a_number_of_clusters(index, k):
    with pytest.raises(ConfigError, match=rf"k is {k}, expected 1 to 3, the number of clusters"):
        index.lookup_embeddings(np.eye(4)[:1], k)


def test_the_encoder_of_the_manifest_is_loaded_when_needed(tmp_path, encoder):
    info = EncoderInfo(encoder.name, encoder.dimension, True, "cosine", encoder.probe())
    index = SemanticIndex.load(save(tmp_path / "index", centroids=encoder.encode(PROMPTS), encoder=info))
    assert index.lookup(PROMPTS[2])[0].cluster == 2


def test_an_index_may_let_go_of_its_encoder_after_each_lookup(tmp_path, encoder):
    info = EncoderInfo(encoder.name, encoder.dimension, True, "cosine", encoder.probe())
    index = SemanticIndex.load(save(tmp_path / "index", centroids=encoder.encode(PROMPTS), encoder=info))
    kept = index.lookup(PROMPTS)
    assert "encoder" in vars(index)
    index.keeps_encoder = False
    for _ in range(2):
        assert index.lookup(PROMPTS) == kept
        assert "encoder" not in vars(index)


def test_an_encoder_of_other_dimensions_is_refused(index_folder, encoder):
    with pytest.raises(
        IndexMismatchError, match=r"gives 384 dimensions, .* was built with 4; use sentence-transformers/"
    ):
        SemanticIndex.load(index_folder, encoder).lookup("stars")


def test_an_encoder_that_embeds_otherwise_is_refused(tmp_path, encoder):
    info = EncoderInfo(encoder.name, encoder.dimension, True, "cosine", [v + 0.1 for v in encoder.probe()])
    folder = save(tmp_path / "index", centroids=encoder.encode(PROMPTS), encoder=info)
    with pytest.raises(IndexMismatchError, match="embeds the test sentence as"):
        SemanticIndex.load(folder, encoder).lookup("stars")


# Core neurons


@pytest.mark.parametrize(("cluster", "score"), RANKS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_core_neurons_are_the_best_by_score_then_activation_then_id(index, cluster, score, n):
    ids = index.core_neurons(cluster, n / 6, score, "1:")
    assert list(ids) == [1, 2]
    assert ids[1].dtype == torch.int64
    assert ids[1].tolist() == sorted(RANKS[cluster, score][:n])


@pytest.mark.parametrize(("keep_ratio", "n"), [(0.01, 1), (1 / 6, 1), (0.49, 2), (0.5, 3), (0.84, 5), (1.0, 6)])
def test_the_keep_ratio_is_chosen_at_load_time(index, keep_ratio, n):
    assert [len(ids) for ids in index.core_neurons(0, keep_ratio, layers="1:").values()] == [n, n]


def test_energy_and_the_gamma_of_the_build_are_the_defaults(index):
    assert index.core_neurons(0, layers="1")[1].tolist() == sorted(RANKS[0, "energy"][:3])


def test_every_layer_has_its_own_core_neurons(index):
    ids = index.core_neurons(0, 0.5, layers="1:")
    assert ids[1].tolist() == [0, 2, 3] and ids[2].tolist() == [3, 4, 5]
    assert index.core_neurons(0, 0.5, "paper", "2")[2].tolist() == [0, 1, 3]  # all counts tie, 3 is the most active


@pytest.mark.parametrize(("layers", "expected"), [("1:", [1, 2]), ("1", [1]), ("-1:", [2]), ("2:9", [2])])
def test_layers_are_those_of_the_model(index, layers, expected):
    assert list(index.core_neurons(0, layers=layers)) == expected


def test_a_layer_that_was_not_recorded_is_refused(index):
    with pytest.raises(
        ConfigError, match=r"layers \[0\] were not recorded in .* holds \[1, 2\]; .*name fewer in layers"
    ):
        index.core_neurons(0)


@pytest.mark.parametrize("cluster", [-1, 3])
def test_a_cluster_that_is_not_there_is_refused(index, cluster):
    with pytest.raises(ConfigError, match=f"the cluster is {cluster}, expected 0 to 2"):
        index.core_neurons(cluster, layers="1:")


@pytest.mark.parametrize("keep_ratio", [0, -0.5, 1.01])
def test_a_keep_ratio_out_of_range_is_refused(index, keep_ratio):
    with pytest.raises(ConfigError, match=f"keep ratio is {keep_ratio}, expected a number above 0"):
        index.core_neurons(0, keep_ratio, layers="1:")
