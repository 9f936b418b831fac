"""Which neurons rank first: pure functions on arrays.

Ties are broken by the larger summed activation, then by the lower neuron id.
"""

from __future__ import annotations

import math

import numpy as np

from coreinfer_sim.base.settings import check_ratio


def n_kept(keep_ratio: float, d_ff: int) -> int:
    """Return how many of ``d_ff`` neurons a keep ratio leaves: rounded down, at least one."""
    check_ratio("keep ratio", keep_ratio)
    return max(1, math.floor(keep_ratio * d_ff + 1e-9))


def top_mask(counts: np.ndarray, activation: np.ndarray, n: int) -> np.ndarray:
    """Mark the ``n`` neurons with the highest counts in every row, exactly ``n`` a row.

    Args:
        counts: integers, [n_rows, d_ff].
        activation: not negative; the larger wins between equal counts, then the lower id; [n_rows, d_ff].
        n: how many to mark.

    Returns:
        Booleans, [n_rows, d_ff].
    """
    largest = activation.max(axis=1, keepdims=True, initial=0)
    fraction = activation / (largest.astype(np.float64) * (1 + 1e-9) + np.finfo(np.float64).tiny)
    key = counts + fraction  # the fraction stays under 1, so it only decides between equal counts
    cut = np.partition(key, key.shape[1] - n, axis=1)[:, key.shape[1] - n, None]
    mask: np.ndarray = key >= cut
    for row in np.flatnonzero(mask.sum(axis=1) > n):
        equal = np.flatnonzero(key[row] == cut[row])
        mask[row, equal[n - int((key[row] > cut[row]).sum()) :]] = False
    return mask


def top_ids(score: np.ndarray, activation: np.ndarray, n: int) -> np.ndarray:
    """Return the ids of the ``n`` neurons of one layer with the highest score, ascending.

    Args:
        score: [d_ff].
        activation: decides between equal scores; then the lower id wins; [d_ff].
        n: how many to return.
    """
    order = np.lexsort((np.arange(len(score)), -activation.astype(np.float64), -score.astype(np.float64)))
    return np.sort(order[:n])
