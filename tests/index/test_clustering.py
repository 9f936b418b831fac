"""Clusters: the planted ones are found, and the same every time."""

from __future__ import annotations

import numpy as np
import pytest

from coreinfer_sim.base.errors import ClusteringError, ConfigError
from coreinfer_sim.base.settings import BuildConfig
from coreinfer_sim.index import clustering as clustering_module
from coreinfer_sim.index.clustering import (
    Clustering,
    choose_n_clusters,
    cluster_embeddings,
    faiss_index,
    n_restarts,
    n_trained,
    nearest,
    quantiles_of,
    searcher,
)


def planted(sizes: list[int], spread: float = 0.05, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors around as many orthogonal directions as there are sizes, shuffled, and their directions."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    vectors = np.eye(24)[labels] + spread * random.standard_normal((len(labels), 24))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), labels


def test_planted_clusters_are_found_largest_first():
    embeddings, labels = planted([10, 40, 25])
    clustering = cluster_embeddings(embeddings, 3, seed=0)
    assert np.bincount(clustering.assignment).tolist() == [40, 25, 10]
    for number, direction in enumerate([1, 2, 0]):
        assert set(labels[clustering.assignment == number]) == {direction}
        assert clustering.centroids[number].argmax() == direction


def test_centroids_are_unit_vectors_and_every_sentence_is_with_its_nearest():
    embeddings, _ = planted([30, 20, 10], spread=0.3)
    clustering = cluster_embeddings(embeddings, 5, seed=3)
    assert clustering.centroids.dtype == np.float32 and clustering.assignment.dtype == np.int64
    np.testing.assert_allclose(np.linalg.norm(clustering.centroids, axis=1), 1, atol=1e-5)
    cosine = embeddings @ clustering.centroids.T
    np.testing.assert_array_equal(clustering.assignment, cosine.argmax(axis=1))
    np.testing.assert_allclose(clustering.similarity, cosine.max(axis=1), atol=1e-6)
    sizes = np.bincount(clustering.assignment, minlength=5)
    assert sizes.min() > 0 and (np.diff(sizes) <= 0).all()


@pytest.mark.parametrize("seed", [0, 1, 77])
def test_a_seed_gives_the_same_clusters_to_the_last_bit(seed):
    embeddings, _ = planted([50, 50, 50], spread=0.6)
    one, other = (cluster_embeddings(embeddings, 7, seed) for _ in range(2))
    for name in ("centroids", "assignment", "similarity"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_the_seed_matters_where_there_is_no_structure():
    embeddings, _ = planted([150], spread=3.0)
    found = [cluster_embeddings(embeddings, 12, seed).centroids for seed in range(3)]
    assert not np.array_equal(found[0], found[1]) or not np.array_equal(found[1], found[2])


@pytest.mark.parametrize("seed", [2**31 - 1, 2**31, 2**63, -5])
def test_every_seed_that_the_settings_accept_clusters(seed):
    try:
        config = BuildConfig(seed=seed)
    except ConfigError:
        return
    embeddings, _ = planted([10, 10])
    assert len(cluster_embeddings(embeddings, 2, config.seed).centroids) == 2


def test_one_cluster_holds_everything():
    embeddings, _ = planted([9, 8])
    clustering = cluster_embeddings(embeddings, 1, seed=0)
    assert clustering.assignment.tolist() == [0] * 17
    mean = embeddings.mean(axis=0)
    np.testing.assert_allclose(clustering.centroids[0], mean / np.linalg.norm(mean), atol=1e-4)


def test_as_many_clusters_as_sentences():
    embeddings, _ = planted([2, 2, 2], spread=0.5)
    clustering = cluster_embeddings(embeddings, 6, seed=0)
    np.testing.assert_allclose(clustering.similarity, 1, atol=1e-5)
    assert sorted(clustering.assignment) == list(range(6))


def test_more_clusters_than_different_sentences_are_refused():
    embeddings = np.repeat(planted([1, 1, 1])[0], 5, axis=0)
    assert len(cluster_embeddings(embeddings, 3, seed=0).centroids) == 3
    with pytest.raises(
        ClusteringError, match=r"4 clusters were asked for, .* 3 different prompts; .*smaller number of clusters"
    ):
        cluster_embeddings(embeddings, 4, seed=0)


def test_members_come_nearest_first_with_their_quantiles():
    similarity = np.array([0.5, 0.9, 0.1, 0.7, 0.9, 0.3], np.float32)
    clustering = Clustering(np.eye(2, dtype=np.float32), np.array([0, 0, 1, 0, 0, 0]), similarity)
    first, second = clustering.members()
    quantiles = quantiles_of(similarity[first])
    assert list(quantiles) == ["0", "0.01", "0.05", "0.25", "0.5", "0.75", "1"]
    assert (quantiles["0"], quantiles["0.25"], quantiles["0.5"], quantiles["1"]) == (0.3, 0.5, 0.7, 0.9)
    assert quantiles_of(similarity[second]) == dict.fromkeys(quantiles, 0.1)
    assert quantiles_of(np.zeros(0, np.float32)) == dict.fromkeys(quantiles, 1.0)  # nothing is familiar to no texts
    assert first.tolist() == [1, 4, 3, 0, 5] and second.tolist() == [2]
    three = Clustering(np.eye(3, dtype=np.float32), np.array([0, 0, 2, 0, 0, 0]), similarity)
    assert [len(members) for members in three.members()] == [5, 0, 1]


def test_many_prompts_are_clustered_by_a_sample_and_assigned_in_blocks(monkeypatch, tmp_path):
    embeddings, labels = planted([400, 300, 200, 100])
    whole = cluster_embeddings(embeddings, 4, seed=0)
    embeddings.tofile(tmp_path / "embeddings.f32")
    mapped = np.memmap(tmp_path / "embeddings.f32", np.float32, "r", shape=embeddings.shape)
    monkeypatch.setattr(clustering_module, "_LEAST_TRAINED", 200)
    monkeypatch.setattr(clustering_module, "_TRAINED_PER_CLUSTER", 40)
    monkeypatch.setattr(clustering_module, "_MOST_DISTANCES", 500)
    monkeypatch.setattr(clustering_module, "_BLOCK", 64)
    assert (n_trained(1000, 4), n_trained(1000, 10), n_trained(150, 4)) == (200, 400, 150)
    assert (n_restarts(1000, 4), n_restarts(1000, 2)) == (1, 8)
    starts = []
    found = cluster_embeddings(mapped, 4, 0, starts.append)
    assert starts == [1] and len(np.unique(labels[found.assignment == 0])) == 1
    np.testing.assert_array_equal(found.assignment, whole.assignment)
    np.testing.assert_array_equal(found.assignment, (embeddings @ found.centroids.T).argmax(axis=1))


def test_many_clusters_are_searched_in_lists(monkeypatch):
    random = np.random.default_rng(0)
    centroids = planted([40] * 24, spread=0.1)[0]
    prompts = planted([20] * 24, spread=0.1, seed=1)[0]
    exact = nearest(searcher(centroids), prompts, 5)
    monkeypatch.setattr(clustering_module, "_MOST_COMPARED", 900)
    monkeypatch.setattr(clustering_module, "_N_PROBED", 6)
    index = searcher(centroids)
    assert type(index).__name__ == "IndexIVFFlat"
    assert (nearest(index, prompts, 1)[1][:, 0] == exact[1][:, 0]).mean() >= 0.99
    shuffled = random.permutation(len(prompts))
    np.testing.assert_array_equal(nearest(index, prompts[shuffled], 5)[1], nearest(index, prompts, 5)[1][shuffled])
    assert sorted(nearest(index, prompts[:1], 960)[1][0].tolist()) == list(
        range(960)
    )  # all are there where all are wanted


def test_nearest_orders_by_cosine():
    centroids = np.eye(4, dtype=np.float32)
    query = np.array([[0.1, 0.9, 0.3, -0.5]], np.float32)
    similarities, numbers = nearest(faiss_index(centroids), query, 4)
    assert numbers.tolist() == [[1, 2, 0, 3]]
    np.testing.assert_allclose(similarities, [[0.9, 0.3, 0.1, -0.5]], atol=1e-7)


# The choice of k


@pytest.mark.parametrize("k", [2, 3, 4, 6, 8])
def test_auto_finds_the_planted_number(k):
    embeddings, _ = planted([20] * k, spread=0.1)
    reported: dict[int, float] = {}
    best, curve = choose_n_clusters(embeddings, 0, reported.__setitem__)
    assert best == k
    assert curve == reported and curve[k] == max(curve.values()) and len(curve) >= 3


def test_auto_is_the_same_every_time_on_a_sample(monkeypatch):
    embeddings, _ = planted([120, 110, 90], spread=0.2)
    whole = choose_n_clusters(embeddings, 5)
    monkeypatch.setattr(clustering_module, "SAMPLE", 100)
    best, curve = choose_n_clusters(embeddings, 5)
    assert best == 3 and max(curve) == 12  # 100 of the 320 sentences, eight to a cluster
    assert (best, curve) == choose_n_clusters(embeddings, 5) != whole


def test_auto_compares_only_numbers_that_leave_eight_sentences_a_cluster():
    embeddings, _ = planted([13, 12])
    assert list(choose_n_clusters(embeddings, 0)[1]) == [2, 3]


def test_auto_needs_enough_sentences():
    embeddings, _ = planted([8, 7])
    with pytest.raises(ClusteringError, match=r"needs at least 16 .* holds 15; .*name the number"):
        choose_n_clusters(embeddings, 0)


def test_auto_copes_with_prompts_that_repeat():
    embeddings = np.repeat(planted([1, 1, 1])[0], 20, axis=0)
    assert choose_n_clusters(embeddings, 0)[0] == 3
