"""Reading a prompt's own activations while prefill runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from coreinfer_sim.choosing.statistics import ActivationStatistics, LayerStatistics, activation_statistics
from coreinfer_sim.models.mlps import MLPLayer
from coreinfer_sim.models.taps import ActivationTap, recorded_activations


class PromptReader:
    """Sums up the prompt's own activations over the passes of prefill."""

    def __init__(self, mask: torch.Tensor, alpha: float) -> None:
        self._mask, self.alpha = mask.cpu(), alpha
        self._starts = np.zeros(1, np.int64)
        self._n_beams = 1
        self._tap: ActivationTap | None = None
        self.statistics: LayerStatistics = {}

    @contextmanager
    def reading(self, layers: Sequence[MLPLayer]) -> Iterator[None]:
        """Read the activation site of every pass in the block that `begin` announced."""
        with recorded_activations(layers, self._add) as self._tap:
            yield

    def begin(self, input_ids: torch.Tensor, n_past: int) -> None:
        """Announce a pass over ``input_ids`` [n_rows · n_beams, n_positions] after ``n_past`` positions."""
        assert self._tap is not None
        self._n_beams = len(input_ids) // len(self._mask)
        mask = self._mask[:, n_past : n_past + input_ids.shape[1]].repeat_interleave(self._n_beams, 0)
        self._starts = np.concatenate([[0], np.cumsum(mask.sum(1).numpy())])
        self._tap.set_mask(mask)

    def pause(self) -> None:
        """Read nothing more: decode has begun."""
        assert self._tap is not None
        self._tap.pause()

    def _add(self, layer: int, z: torch.Tensor) -> None:
        every = activation_statistics(z, self._starts, self.alpha)
        step = self._n_beams  # all beams of a prompt have read the same
        own = ActivationStatistics(every.counts[::step], every.energy[::step], every.activation[::step])
        self.statistics[layer] = self.statistics[layer] + own if layer in self.statistics else own
