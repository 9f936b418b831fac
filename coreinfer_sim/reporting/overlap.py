"""How many core neurons topics have in common: whether a topic owns neurons of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.ranking import n_kept, top_ids


@dataclass(frozen=True)
class Overlap:
    """Shares of a topic's core neurons that are another topic's too."""

    share: float
    """Of a layer's neurons that count as core neurons; as much would be in common by chance."""
    of_topics: np.ndarray
    """Mean over layers, [n_clusters, n_clusters]; 1 on the diagonal."""
    of_layers: dict[int, float]
    """Mean over pairs of topics, by layer; empty where there is one topic."""


def overlap(index: SemanticIndex) -> Overlap:
    """Compare the topics of an index by the neurons of the highest energy, as many of a layer as the build's β says."""
    share, d_ff, n_clusters = index.manifest.settings.beta, index.manifest.model.d_ff, len(index)
    rows = index.rows_of_layers(index.recorded)
    held = np.zeros((len(rows), n_clusters, d_ff), np.float32)
    for cluster in range(n_clusters):
        energy, activation = index.statistics(cluster)
        for place, row in enumerate(rows.values()):
            held[place, cluster, top_ids(energy[row], activation[row], n_kept(share, d_ff))] = 1
    common = held @ held.transpose(0, 2, 1) / n_kept(share, d_ff)
    others = ~np.eye(n_clusters, dtype=bool)
    of_layers = {layer: float(common[place][others].mean()) for place, layer in enumerate(rows)} if others.any() else {}
    return Overlap(share, common.mean(axis=0), of_layers)
