"""Semantic clusters: spherical k-means on sentence embeddings through FAISS, and the choice of k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import faiss
import numpy as np

from coreinfer_sim.base.errors import ClusteringError

N_ITERATIONS = 25
N_RESTARTS = 8  # fewer may leave a field of a small corpus without a cluster of its own
SAMPLE = 2000
"""Sentences that the number of clusters is chosen on."""
CANDIDATES = (2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192)
_SMALLEST_MEAN_SIZE = 8
_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Clustering:
    """Centroids and the cluster of every sentence."""

    centroids: np.ndarray
    """Unit norm, float32, [n_clusters, dim]."""
    assignment: np.ndarray
    """Cluster of each sentence, int64, [n_sentences]."""
    similarity: np.ndarray
    """Cosine similarity of each sentence to its centroid, float32, [n_sentences]."""

    def quantiles(self, cluster: int) -> dict[str, float]:
        """Return quantiles of the members' similarity to the centroid."""
        members = self.similarity[self.assignment == cluster]
        return {f"{q:g}": round(float(np.quantile(members, q)), 4) for q in _QUANTILES}

    def exemplars(self, cluster: int, n: int) -> list[int]:
        """Return the sentences nearest to the centroid."""
        members = np.flatnonzero(self.assignment == cluster)
        nearest_first: list[int] = members[np.argsort(-self.similarity[members], kind="stable")].tolist()
        return nearest_first[:n]


def cluster_embeddings(
    embeddings: np.ndarray, n_clusters: int, seed: int, advance: Callable[[int], None] | None = None
) -> Clustering:
    """Cluster unit vectors [n, dim] by cosine similarity; empty clusters are dropped, largest cluster first.

    Args:
        embeddings: unit norm, [n, dim].
        n_clusters: how many.
        seed: of the starts.
        advance: called with 1 after each of `N_RESTARTS` starts.

    Raises:
        ClusteringError: more clusters than different sentences.
    """
    n_different = len(np.unique(embeddings, axis=0))
    if n_clusters > n_different:
        raise ClusteringError(
            f"{n_clusters} clusters were asked for, but the corpus holds {n_different} different prompts; "
            "give a smaller number of clusters or a larger corpus."
        )
    embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
    runs = []
    for restart in range(N_RESTARTS):
        runs.append(_k_means(embeddings, n_clusters, N_RESTARTS * seed + restart))
        if advance:
            advance(1)
    found = max(runs, key=lambda run: run[0])[1]
    _, assignment = nearest(faiss_index(found), embeddings, 1)
    used, sizes = np.unique(assignment[:, 0], return_counts=True)
    order = used[np.argsort(-sizes, kind="stable")]
    centroids = np.ascontiguousarray(found[order])
    similarity, assignment = nearest(faiss_index(centroids), embeddings, 1)
    return Clustering(centroids, assignment[:, 0], similarity[:, 0])


def _k_means(embeddings: np.ndarray, n_clusters: int, seed: int) -> tuple[float, np.ndarray]:
    """Run spherical k-means once from a k-means++ start.

    Returns:
        The mean similarity to the nearest centroid, and the centroids [n_clusters, dim].
    """
    from sklearn.cluster import kmeans_plusplus

    start, _ = kmeans_plusplus(embeddings, n_clusters, random_state=seed % 2**32)
    kmeans = faiss.Kmeans(
        embeddings.shape[1],
        n_clusters,
        niter=N_ITERATIONS,
        spherical=True,
        seed=seed % (2**31 - 1),
        min_points_per_centroid=1,
        max_points_per_centroid=2**20,
    )
    kmeans.train(embeddings, init_centroids=start)
    centroids = np.asarray(kmeans.centroids)
    return float(nearest(faiss_index(centroids), embeddings, 1)[0].mean()), centroids


def faiss_index(centroids: np.ndarray) -> faiss.IndexFlatIP:
    """Put centroids [n_clusters, dim] into an exact inner-product index."""
    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids, dtype=np.float32))
    return index


def nearest(index: faiss.Index, embeddings: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return similarities and numbers of the ``k`` nearest clusters, both [n, k]."""
    return index.search(np.ascontiguousarray(embeddings, dtype=np.float32), k)


def choose_n_clusters(
    embeddings: np.ndarray, seed: int, report: Callable[[int, float], None] | None = None
) -> tuple[int, dict[int, float]]:
    """Choose k by the mean silhouette (cosine) over candidate k, on a sample of at most 2,000 sentences.

    Args:
        embeddings: unit norm, [n, dim].
        seed: of the sample and of k-means.
        report: called with every candidate and its silhouette.

    Returns:
        The best k and the curve, silhouette by k.

    Raises:
        ClusteringError: too few sentences to compare any k.
    """
    from sklearn.metrics import silhouette_score

    sample = embeddings
    if len(embeddings) > SAMPLE:
        sample = embeddings[np.sort(np.random.default_rng(seed).choice(len(embeddings), SAMPLE, replace=False))]
    curve: dict[int, float] = {}
    n_different = len(np.unique(sample, axis=0))
    for k in CANDIDATES:
        if k * _SMALLEST_MEAN_SIZE > len(sample) or k > n_different:
            break
        assignment = cluster_embeddings(sample, k, seed).assignment
        if len(np.unique(assignment)) < 2:
            continue
        curve[k] = round(float(silhouette_score(sample, assignment, metric="cosine")), 4)
        if report:
            report(k, curve[k])
    if not curve:
        raise ClusteringError(
            f"choosing the number of clusters needs at least {2 * _SMALLEST_MEAN_SIZE} different prompts, the corpus holds "
            f"{n_different}; name the number."
        )
    return max(curve, key=lambda k: (curve[k], -k)), curve
