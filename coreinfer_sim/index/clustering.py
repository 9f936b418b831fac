"""Semantic clusters: spherical k-means on sentence embeddings through FAISS, and the choice of k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from coreinfer_sim.base.errors import ClusteringError

N_ITERATIONS = 25
_MOST_RESTARTS = 8  # fewer may leave a field of a small corpus without a cluster of its own
_MOST_DISTANCES = 1 << 25
"""Prompts times clusters up to which k-means starts so often; in a larger corpus one start finds what there is."""
_LEAST_TRAINED, _TRAINED_PER_CLUSTER = 100_000, 64
"""Prompts that k-means is trained on, of a larger corpus: so many, or so many for each cluster; FAISS asks for 39 or more."""
_FEW, _MOST_PLUS_PLUS, _LOOKED_AT = 256, 1024, 16
"""Clusters up to which k-means++ looks at all prompts for a start, and up to which at so many a cluster; for more it would take
longer than k-means itself, which then starts from prompts drawn at random."""
_BLOCK = 1 << 16
"""Prompts that are assigned at a time."""
_MOST_COMPARED = 4096
"""Clusters up to which a prompt is compared with every centroid, in less than a millisecond."""
_N_LISTS, _IN_LIST, _N_PROBED = 256, 64, 24
"""Most of the lists in which more centroids lie, the least in one of fewer, and how many lists are searched for a prompt."""
_MOST_WANTED = 32
"""Clusters up to which these lists hold the nearest; for more all are searched."""
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

    def members(self) -> list[np.ndarray]:
        """Return the sentences of each cluster, the nearest to its centroid first; of equals, the first."""
        order = np.lexsort((-self.similarity, self.assignment))
        return np.split(order, np.searchsorted(self.assignment[order], np.arange(1, len(self.centroids))))


def quantiles_of(similarity: np.ndarray) -> dict[str, float]:
    """Return quantiles of members' similarity to their centroid, [n_members].

    A cluster without members has all of them at 1, so that no prompt is familiar to it.
    """
    values = similarity if len(similarity) else np.ones(1)
    return {f"{q:g}": round(float(np.quantile(values, q)), 4) for q in _QUANTILES}


def assign(centroids: np.ndarray, embeddings: np.ndarray) -> Clustering:
    """Put unit vectors [n, dim] to the nearest of given centroids, in whose order clusters stay; some may be empty."""
    index = searcher(centroids)
    similarity, assignment = np.empty(len(embeddings), np.float32), np.empty(len(embeddings), np.int64)
    for begin in range(0, len(embeddings), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        found = nearest(index, embeddings[block], 1)
        similarity[block], assignment[block] = found[0][:, 0], found[1][:, 0]
    return Clustering(centroids, assignment, similarity)


def n_trained(n: int, n_clusters: int) -> int:
    """Return how many of ``n`` prompts k-means is trained on."""
    return min(n, max(_LEAST_TRAINED, _TRAINED_PER_CLUSTER * n_clusters))


def n_restarts(n: int, n_clusters: int) -> int:
    """Return how often k-means is started on ``n`` prompts."""
    return _MOST_RESTARTS if n_trained(n, n_clusters) * n_clusters <= _MOST_DISTANCES else 1


def clustering_bytes(n: int, n_clusters: int, dimension: int) -> int:
    """Return the memory that clustering takes, about: the prompts that k-means is trained on, and a copy while it looks at them.

    All prompts' embeddings are mapped from the disk, and read in blocks.
    """
    return 4 * (3 * n_trained(n, n_clusters) * dimension + 3 * n_clusters * dimension + 6 * n)


def cluster_embeddings(
    embeddings: np.ndarray, n_clusters: int, seed: int, advance: Callable[[int], None] | None = None
) -> Clustering:
    """Cluster unit vectors [n, dim] by cosine similarity; empty clusters are dropped, largest cluster first.

    k-means is trained on `n_trained` of them, drawn at random; all are assigned, in blocks.

    Args:
        embeddings: unit norm, float32, [n, dim]; may be mapped from a file.
        n_clusters: how many.
        seed: of the sample and of the starts.
        advance: called with 1 after each of `n_restarts` starts.

    Raises:
        ClusteringError: more clusters than different sentences.
    """
    n = n_trained(len(embeddings), n_clusters)
    sample = embeddings
    if n < len(embeddings):
        sample = embeddings[np.sort(np.random.default_rng(seed).choice(len(embeddings), n, replace=False))]
    sample = np.ascontiguousarray(sample, dtype=np.float32)
    n_different = len(np.unique(sample, axis=0))
    if n_clusters > n_different:
        raise ClusteringError(
            f"{n_clusters} clusters were asked for, but the corpus holds {n_different} different prompts; "
            "give a smaller number of clusters or a larger corpus."
        )
    runs = []
    for restart in range(n_restarts(len(embeddings), n_clusters)):
        runs.append(_k_means(sample, n_clusters, _MOST_RESTARTS * seed + restart))
        if advance:
            advance(1)
    found = max(runs, key=lambda run: run[0])[1]
    used, sizes = np.unique(assign(found, embeddings).assignment, return_counts=True)
    order = used[np.argsort(-sizes, kind="stable")]
    return assign(np.ascontiguousarray(found[order]), embeddings)


def _k_means(embeddings: np.ndarray, n_clusters: int, seed: int) -> tuple[float, np.ndarray]:
    """Run spherical k-means once, from a k-means++ start unless there are too many clusters for that.

    Returns:
        The mean similarity to the nearest centroid, and the centroids [n_clusters, dim].
    """
    start = None
    if n_clusters <= _MOST_PLUS_PLUS:
        from sklearn.cluster import kmeans_plusplus

        every = 1 if n_clusters <= _FEW else max(1, len(embeddings) // (_LOOKED_AT * n_clusters))
        start, _ = kmeans_plusplus(embeddings[::every], n_clusters, random_state=seed % 2**32)
    kmeans = faiss.Kmeans(
        embeddings.shape[1],
        n_clusters,
        niter=N_ITERATIONS,
        spherical=True,
        seed=seed % (2**31 - 1),
        min_points_per_centroid=1,
        max_points_per_centroid=2**20,
        gpu=start is None and hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus() > 0,
    )
    kmeans.train(embeddings, init_centroids=start)
    centroids = np.asarray(kmeans.centroids)
    return float(assign(centroids, embeddings).similarity.mean()), centroids


def faiss_index(centroids: np.ndarray) -> faiss.IndexFlatIP:
    """Put centroids [n_clusters, dim] into an exact inner-product index."""
    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids, dtype=np.float32))
    return index


def searcher(centroids: np.ndarray) -> faiss.Index:
    """Return what finds the nearest of centroids [n_clusters, dim]: all are compared, or of many those in the nearest lists.

    An inverted file is made in seconds whenever an index is loaded, where a graph (HNSW) takes far longer.
    """
    flat = faiss_index(centroids)
    if len(centroids) <= _MOST_COMPARED:
        return flat
    dimension, n_lists = centroids.shape[1], min(_N_LISTS, len(centroids) // _IN_LIST)
    lists = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimension), dimension, n_lists, faiss.METRIC_INNER_PRODUCT)
    vectors = np.ascontiguousarray(centroids, dtype=np.float32)
    lists.train(vectors)
    lists.add(vectors)
    lists.nprobe = _N_PROBED
    return lists


def nearest(index: faiss.Index, embeddings: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return similarities and numbers of the ``k`` nearest clusters, both [n, k]."""
    vectors = np.ascontiguousarray(embeddings, dtype=np.float32)
    if k > _MOST_WANTED and isinstance(index, faiss.IndexIVF):
        every: Any = faiss.SearchParametersIVF
        return index.search(vectors, k, params=every(nprobe=_N_LISTS))
    return index.search(vectors, k)


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
