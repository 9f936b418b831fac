"""Token-wise and sentence-wise core neurons, and energy: pure functions on arrays.

Definitions are those of CoreInfer (arXiv 2410.18311) for C_α and C_α^β, and of GRIFFIN (arXiv 2404.01365) for the energy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from coreinfer_sim.base.settings import Score
from coreinfer_sim.index.ranking import n_kept, top_mask


def token_core_mask(z: torch.Tensor, alpha: float) -> torch.Tensor:
    """Mark each token's core neurons C_α: the top α share of its positive activations.

    Args:
        z: activation site, [n_tokens, d_ff].
        alpha: share of the positive entries, rounded up.

    Returns:
        Booleans, [n_tokens, d_ff].
    """
    n_core = torch.ceil(alpha * (z > 0).sum(-1, keepdim=True).cpu().double() - 1e-6).to(z.device, torch.int64)
    order = z.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(z.shape[-1], device=z.device).expand_as(order)
    return torch.zeros_like(z, dtype=torch.bool).scatter_(-1, order, rank < n_core)


@dataclass
class ActivationStatistics:
    """What one layer's activations say of each of ``n`` sentences; all arrays are [n, d_ff].

    ``counts`` is f(n; s), the number of tokens that hold the neuron in C_α; ``energy`` is e(n; s), the sum over
    tokens of (z_n / ‖z‖₂)²; ``activation`` is the sum of the positive activations, which breaks ties.
    """

    counts: np.ndarray
    energy: np.ndarray
    activation: np.ndarray

    def __add__(self, other: ActivationStatistics) -> ActivationStatistics:
        """Add the statistics of further tokens of the same sentences."""
        return ActivationStatistics(
            self.counts + other.counts, self.energy + other.energy, self.activation + other.activation
        )

    def reached(self, row: int) -> bool:
        """Return whether tokens of a sentence have come here, as they have unless this is an expert."""
        return bool(self.energy[row].any())

    def ranked_by(self, score: Score) -> np.ndarray:
        """Return the statistic that ranks the sentences' own neurons, [n, d_ff]."""
        return self.counts if score is Score.PAPER else self.energy

    def core_mask(self, beta: float) -> np.ndarray:
        """Mark the sentence-wise core neurons C_α^β, [n, d_ff]: none where no token has come, as to some experts."""
        marked = top_mask(self.counts, self.activation, n_kept(beta, self.counts.shape[1]))
        return marked & self.counts.any(axis=1, keepdims=True)


LayerStatistics = dict[int, ActivationStatistics]
"""By layer number, the statistics of every row of a batch, [n_rows, d_ff]; an expert that no row has reached may lack."""


def activation_statistics(z: torch.Tensor, starts: np.ndarray, alpha: float) -> ActivationStatistics:
    """Sum token-wise core neurons, energy and activation over the tokens of each sentence.

    Args:
        z: activation site of the sentences' tokens one after another, padding excluded, [n_tokens, d_ff].
        starts: where each sentence begins, and the total: [n_sentences + 1].
        alpha: share of the positive entries that makes C_α.
    """
    shape = (len(starts) - 1, z.shape[1])
    if z.dtype == torch.float64:
        z = z.float()
    if z.device.type == "cpu":
        from coreinfer_sim.choosing.accumulate import (
            accumulate,  # numba takes a while to import, and lookups never need it
        )

        result = ActivationStatistics(*(np.zeros(shape, kind) for kind in (np.int32, np.float32, np.float32)))
        accumulate(z.detach().contiguous(), np.asarray(starts), alpha, result.counts, result.energy, result.activation)
        return result
    sentence = torch.repeat_interleave(
        torch.arange(shape[0], device=z.device), torch.as_tensor(np.diff(starts), device=z.device)
    )
    square = z.float().square()
    parts = (
        token_core_mask(z, alpha).int(),
        square / square.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny),
        z.float().clamp_min(0),
    )
    sums = [torch.zeros(shape, dtype=part.dtype, device=z.device).index_add_(0, sentence, part) for part in parts]
    return ActivationStatistics(*(total.cpu().numpy() for total in sums))
