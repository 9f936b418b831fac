"""How many core neurons topics have in common: whether a topic owns neurons of its own."""

from __future__ import annotations

from collections.abc import Sequence
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
    share, layers = index.manifest.settings.beta, index.manifest.settings.layers
    held = core_masks(index, share, layers)
    common = in_common(held, held)
    others = ~np.eye(len(index), dtype=bool)
    compared = enumerate(layers) if others.any() else ()
    of_layers = {layer: float(common[place][others].mean()) for place, layer in compared}
    return Overlap(share, common.mean(axis=0), of_layers)


def core_masks(index: SemanticIndex, share: float, layers: Sequence[int]) -> np.ndarray:
    """Return 1 for the neurons of the highest energy of every topic, float32 [n_layers, n_clusters, d_ff].

    Args:
        index: of the topics.
        share: of a layer's neurons.
        layers: recorded ones.
    """
    d_ff, rows = index.manifest.model.d_ff, index.rows_of_layers(index.recorded)
    held = np.zeros((len(layers), len(index), d_ff), np.float32)
    for cluster in range(len(index)):
        energy, activation = index.statistics(cluster)
        for place, layer in enumerate(layers):
            row = rows[layer]
            held[place, cluster, top_ids(energy[row], activation[row], n_kept(share, d_ff))] = 1
    return held


def in_common(held: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the share of each set that is in each other one of as many neurons.

    Args:
        held: [n_layers, n_clusters, d_ff].
        others: [n_layers, n_others, d_ff].

    Returns:
        [n_layers, n_clusters, n_others].
    """
    n_held: np.ndarray = held.sum(axis=2, keepdims=True)
    return np.asarray(held @ others.transpose(0, 2, 1) / n_held)
