"""What every experiment is: sums of a bounded size that blocks of texts add to, and the numbers that they come to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coreinfer_sim.analysis.intervals import N_GROUPS, Measure, Sums
from coreinfer_sim.analysis.reading import Reader
from coreinfer_sim.analysis.texts import Texts
from coreinfer_sim.base.analysis_settings import AnalysisConfig
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.rows import Row
from coreinfer_sim.choosing.statistics import ActivationStatistics
from coreinfer_sim.index.encoder import SentenceEncoder
from coreinfer_sim.index.ranking import n_kept, top_ids

SCORES = ("counts", "energy")
"""What ranks a text's neurons: the paper's counts of tokens that hold them in C_α, or their energy."""


@dataclass(frozen=True)
class Picture:
    """How the numbers of an experiment are drawn: a line for each series, over a number."""

    title: str
    x: str
    """The label that lies on the horizontal axis; numbers without it are not drawn."""
    x_title: str
    y_title: str
    series: tuple[str, ...]
    """Labels that part the lines."""
    where: dict[str, tuple[Any, ...]]
    """Values of labels of the numbers that are drawn; None: without the label."""
    is_log: bool = False


@dataclass
class Setting:
    """What an experiment is run with."""

    reader: Reader
    config: AnalysisConfig
    encoders: Sequence[SentenceEncoder]
    texts: Texts
    progress: Progress


class Experiment(ABC):
    """One question to a model and a corpus.

    ``sums`` are those of each group of texts; ``memory`` is what blocks leave for later ones, whatever their group. Both are all
    that is kept of a text, and what a run that was broken off goes on from.
    """

    unit = measured = "texts"
    """The sum that is zero for groups that tell nothing."""
    needs_encoder = False
    least_texts = 2

    def __init__(self, setting: Setting) -> None:
        """Begin with no text."""
        self.reader, self.config, self.texts = setting.reader, setting.config, setting.texts
        self.encoders, self.progress = setting.encoders, setting.progress
        self.sums: Sums = {"texts": np.zeros(N_GROUPS, np.int64)}
        self.memory: dict[str, np.ndarray] = {}

    @classmethod
    @abstractmethod
    def picture(cls, config: AnalysisConfig) -> Picture:
        """Say how the numbers are drawn."""

    def prepare(self) -> None:  # noqa: B027  # most need nothing
        """Put into ``memory`` what must be known before the first block."""

    @abstractmethod
    def add(self, group: int, number: int, rows: Sequence[Row], ids: list[list[int]]) -> None:
        """Add a block of texts to ``sums``.

        Args:
            group: of the block.
            number: of the block.
            rows: its texts.
            ids: their tokens.
        """

    def check(self) -> None:  # noqa: B027  # most can count something of any text
        """Raise CorpusError if nothing could be counted."""

    @abstractmethod
    def measures(self, sums: Sums) -> list[Measure]:
        """Return what sums without their first axis come to."""

    def remarks(self) -> list[str]:
        """Say what was left out."""
        return []

    def counted(self, name: str, *shape: int, kind: type = np.int64) -> None:
        """Add a sum, zero for each group."""
        self.sums[name] = np.zeros((N_GROUPS, *shape), kind)


def core_masks(statistics: ActivationStatistics, beta: float) -> np.ndarray:
    """Mark the core neurons of each text by each of `SCORES`, bool [n_scores, n_texts, d_ff]."""
    energy = statistics.energy
    n = n_kept(beta, energy.shape[1])
    by_energy = energy >= np.partition(energy, -n, axis=1)[:, -n, None]
    for row in np.flatnonzero(by_energy.sum(axis=1) > n):  # equal ones
        by_energy[row] = False
        by_energy[row, top_ids(energy[row], statistics.activation[row], n)] = energy[row].any()
    return np.stack([statistics.core_mask(beta), by_energy])
