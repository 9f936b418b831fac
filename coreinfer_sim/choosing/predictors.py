"""Predictors: a prompt → the neurons that decode keeps.

Each returns a `NeuronSelection` and hides where the choice came from. Those that know the selection before prefill
need only the prompt's text; stability-guided and hybrid selection need the statistics of the prompt's own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from coreinfer_sim.base.errors import GenerationError
from coreinfer_sim.base.settings import Mode, Score
from coreinfer_sim.choosing.selection import NeuronSelection, refitted
from coreinfer_sim.choosing.statistics import ActivationStatistics, LayerStatistics
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.ranking import n_kept, top_ids
from coreinfer_sim.models.mlps import MLPLayer


class Predictor(Protocol):
    """Chooses the neurons of each prompt of a batch."""

    mode: str
    """Name of the way of choosing."""
    needs_text: bool
    """Whether the prompts' text is read."""
    alpha: float | None
    """If the prompts' own activations may be read: the share that makes C_α; else None."""

    def select(
        self, prompts: Sequence[str] | None, statistics: LayerStatistics | None, n_rows: int
    ) -> list[NeuronSelection] | None:
        """Return one selection a row; rows that keep the same neurons share the mapping of ids.

        It is first called before prefill, without statistics. None says that these prompts need them; then they are
        read during prefill, at some cost, and it is called again.
        """
        ...


class FixedPredictor:
    """The same selection for every prompt: dense, random, global, or one that is given."""

    needs_text = False
    alpha: float | None = None

    def __init__(self, selection: NeuronSelection) -> None:
        """Always choose ``selection``."""
        self.mode = selection.mode
        self._selection = selection

    def select(
        self, prompts: Sequence[str] | None, statistics: LayerStatistics | None, n_rows: int
    ) -> list[NeuronSelection]:
        """Return the one selection for every row."""
        return [self._selection] * n_rows


class ReadingPredictor:
    """What another predictor holds, of which each token reads a share; what that leaves dense is read as a whole."""

    def __init__(self, held: Predictor, read_ratio: float, index: SemanticIndex | None = None) -> None:
        """Let tokens read ``read_ratio`` of d_ff, on average, of what ``held`` chooses; ``index`` may know what they need."""
        self.mode, self.needs_text, self.alpha = held.mode, held.needs_text, held.alpha
        self.index = index
        self._held, self._read_ratio = held, read_ratio
        self._refit = None if index is None else index.refit(read_ratio)

    def select(
        self, prompts: Sequence[str] | None, statistics: LayerStatistics | None, n_rows: int
    ) -> list[NeuronSelection] | None:
        """Return what the other predictor does, with the read ratio."""
        found = self._held.select(prompts, statistics, n_rows)
        return None if found is None else [self._reading(selection) for selection in found]

    def _reading(self, selection: NeuronSelection) -> NeuronSelection:
        if selection.mode == Mode.DENSE.value:
            return selection
        reading = replace(selection, read_ratio=self._read_ratio)
        return reading if self._refit is None else refitted(reading, self._refit)


class StabilityPredictor:
    """The prompt's own core neurons, taken during prefill: CoreInfer's C_α^β, or by energy as in GRIFFIN.

    An expert that the prompt has not reached stays dense.
    """

    mode = Mode.STABILITY.value
    needs_text = False

    def __init__(self, keep_ratio: float, score: Score, layers: Sequence[int], alpha: float = 0.4) -> None:
        """Keep ``keep_ratio`` (β) of each of ``layers``, ranked by ``score``."""
        self._keep_ratio, self._score, self._layers = keep_ratio, score, set(layers)
        self.alpha: float | None = alpha

    def select(
        self, prompts: Sequence[str] | None, statistics: LayerStatistics | None, n_rows: int
    ) -> list[NeuronSelection] | None:
        """Return each row's own selection."""
        if statistics is None:
            return None
        check_read(statistics, self.mode)
        return [
            NeuronSelection(
                self.mode,
                {
                    number: torch.from_numpy(self._ids(layer, row))
                    for number, layer in statistics.items()
                    if number in self._layers and layer.reached(row)
                },
            )
            for row in range(n_rows)
        ]

    def _ids(self, statistics: ActivationStatistics, row: int) -> np.ndarray:
        score = statistics.ranked_by(self._score)
        return top_ids(score[row], statistics.activation[row], n_kept(self._keep_ratio, score.shape[1]))


def check_read(statistics: LayerStatistics, mode: str) -> None:
    """Raise GenerationError if prefill read no token."""
    if not statistics:
        raise GenerationError(f"{mode} mode read no prompt tokens; it needs at least one in this call.")


def random_selection(
    layers: Sequence[MLPLayer], numbers: Sequence[int], keep_ratio: float, seed: int
) -> NeuronSelection:
    """Choose neurons by chance, the floor that every predictor must beat."""
    generator = torch.Generator().manual_seed(seed)
    return NeuronSelection(
        Mode.RANDOM.value,
        {
            number: torch.randperm(layers[number].d_ff, generator=generator)[: n_kept(keep_ratio, layers[number].d_ff)]
            .sort()
            .values
            for number in numbers
        },
    )
