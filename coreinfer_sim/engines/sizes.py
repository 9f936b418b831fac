"""Bytes of weights: what an engine will hold and read, and what it has read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coreinfer_sim.models.budgeted import ModelShape
from coreinfer_sim.models.loading import LanguageModel


@dataclass(frozen=True)
class Bytes:
    """What held neurons cost, known before anything is loaded."""

    held: int
    """Bytes in memory."""
    read: int
    """Bytes that one token reads."""


@dataclass(frozen=True)
class BytesRead:
    """Bytes of weights that decode has read, counted while it ran."""

    mlp: int = 0
    """In the MLPs."""
    other: int = 0
    """Outside: attention, norms and the output head. The cache is not counted."""
    n_steps: int = 0
    """Decode steps; of `Engine.forced`, positions."""
    share: float = 0.0
    """Of the model's neurons that were read in full, summed over steps; of a batch the mean over its rows."""
    disk: int = 0
    """Bytes that came from the disk."""
    n_chosen: int = 0
    """Neurons that tokens have chosen among those that may lie on the disk."""
    n_missed: int = 0
    """Those of them that were not in memory."""

    def __add__(self, further: BytesRead) -> BytesRead:
        """Add what further steps read."""
        return BytesRead(*map(sum, zip(vars(self).values(), vars(further).values(), strict=True)))

    @property
    def read_ratio(self) -> float:
        """Share of the model's neurons that a step read in full; 0 before the first."""
        return self.share / self.n_steps if self.n_steps else 0.0

    @property
    def found_ratio(self) -> float | None:
        """Share of the chosen neurons that were in memory; None where all are."""
        return 1 - self.n_missed / self.n_chosen if self.n_chosen else None

    @property
    def disk_per_step(self) -> int | None:
        """Bytes of one step that came from the disk; None where all are in memory."""
        return round(self.disk / self.n_steps) if self.n_chosen else None

    @property
    def mlp_per_step(self) -> int:
        """MLP bytes of one step; 0 before the first."""
        return round(self.mlp / self.n_steps) if self.n_steps else 0

    @property
    def per_step(self) -> int:
        """All bytes of one step; 0 before the first."""
        return round((self.mlp + self.other) / self.n_steps) if self.n_steps else 0


@dataclass(frozen=True)
class DiskParts:
    """Bytes of a model of which tokens choose neurons that lie on the disk."""

    shape: ModelShape
    resident: int
    """Weights outside the MLPs that stay in memory."""
    estimates: int
    """By which tokens choose."""
    layer: int
    """Records of one layer's neurons, through which prefill passes."""
    records: int
    """Memory that all records would take."""
    staged: int
    """Memory for records that are read at a time."""
    making: int
    """Memory that laying the weights out takes; 0: that was done before."""


Planner = Callable[[LanguageModel, DiskParts], tuple[int, int]]
"""Given a model without weights, says how many bytes of memory there are for records, and for how many positions."""
