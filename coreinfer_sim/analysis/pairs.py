"""Pairs of a block's texts: what their core neurons have in common, and how alike their meanings and their words are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from coreinfer_sim.analysis.experiment import SCORES, core_masks
from coreinfer_sim.analysis.reading import Reader
from coreinfer_sim.analysis.texts import Batch
from coreinfer_sim.choosing.statistics import activation_statistics


def pairs_of(n_texts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return both members of every pair of different texts, each [n_pairs]."""
    first, second = np.triu_indices(n_texts, 1)
    return first, second


def common_of_pairs(reader: Reader, ids: Sequence[Sequence[int]], alpha: float, beta: float) -> np.ndarray:
    """Count the core neurons that the texts of each pair have in common.

    Returns:
        Integers, [n_scores, n_layers, n_pairs].
    """
    first, second = pairs_of(len(ids))
    found = np.zeros((len(SCORES), reader.n_layers, len(first)), np.int64)
    masks = [np.zeros((len(SCORES), len(ids), reader.d_ff), bool) for _ in range(reader.n_layers)]

    def take(place: int, z: torch.Tensor, batch: Batch) -> None:
        masks[place][:, batch.places] = core_masks(activation_statistics(z, batch.starts, alpha), beta)

    reader.activations(ids, take)
    for place, of_layer in enumerate(masks):
        held = of_layer.astype(np.float32)
        found[:, place] = np.rint(held @ held.swapaxes(1, 2)).astype(np.int64)[:, first, second]
    return found


def shared_tokens(ids: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the share of two texts' different tokens that both have (Jaccard), [n_pairs]."""
    sets = [set(each) for each in ids]
    first, second = pairs_of(len(ids))
    return np.array(
        [len(sets[a] & sets[b]) / max(1, len(sets[a] | sets[b])) for a, b in zip(first, second, strict=True)]
    )
