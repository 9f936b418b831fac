"""Semantic clusters of an analysis: fixed by a sample of the texts before the model reads any."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coreinfer_sim.analysis.texts import BLOCK, Texts
from coreinfer_sim.base.errors import CorpusError
from coreinfer_sim.base.memory import give_back_memory
from coreinfer_sim.base.progress import Progress, counted
from coreinfer_sim.base.rows import Row
from coreinfer_sim.index.clustering import cluster_embeddings, faiss_index, n_restarts, nearest
from coreinfer_sim.index.encoder import SentenceEncoder

SAMPLE = 4096
"""Texts that clusters are fitted to: the first of the random order, so that memory does not grow with the corpus."""


def fit_clusters(
    texts: Texts, encoders: Sequence[SentenceEncoder], numbers: Sequence[int], seed: int, progress: Progress
) -> dict[str, np.ndarray]:
    """Return the centroids of each encoder and number of clusters, by the name of `centroids_name`.

    Raises:
        CorpusError: there are fewer texts than twice the most clusters.
    """
    if len(texts) < 2 * max(numbers):
        raise CorpusError(
            f"the corpus holds {counted(len(texts), 'text')}, expected {2 * max(numbers)} or more for {max(numbers)} clusters; "
            "give a larger one, or smaller numbers in analyze.clusters."
        )
    found = {}
    for place, encoder in enumerate(encoders):
        n = min(SAMPLE, len(texts))
        parts = []
        progress.start(f"Embedding by {encoder.name}", n, "texts")
        try:
            for begin in range(0, n, BLOCK):
                block = [row.prompt for row in texts.rows(begin, min(begin + BLOCK, n))]
                parts.append(encoder.encode(block))
                give_back_memory()
                progress.advance(len(block))
        finally:
            progress.finish()
        embeddings = np.concatenate(parts)
        progress.start("Clustering", sum(n_restarts(n, k) for k in numbers), "starts")
        try:
            for k in numbers:
                clustering = cluster_embeddings(embeddings, k, seed, progress.advance)
                found[centroids_name(place, k)] = clustering.centroids
        finally:
            progress.finish()
    return found


def centroids_name(encoder: int, k: int) -> str:
    """Return what the centroids of an encoder's place and a number of clusters are called."""
    return f"centroids {encoder} {k}"


def clusters_of(rows: Sequence[Row], encoder: SentenceEncoder, centroids: Sequence[np.ndarray]) -> np.ndarray:
    """Return the nearest cluster of each text, for each of several clusterings, [n_clusterings, n_texts]."""
    embeddings = encoder.encode([row.prompt for row in rows])
    return np.stack([nearest(faiss_index(each), embeddings, 1)[1][:, 0] for each in centroids])
