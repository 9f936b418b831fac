"""Semantic clusters, and how near a prompt lies to one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from coreinfer_sim.base.settings import UNFAMILIAR


@dataclass(frozen=True)
class Cluster:
    """What a person wants to know of one semantic cluster."""

    id: int
    size: int
    """Number of sentences."""
    n_tokens: int
    label: str
    """Distinctive terms."""
    exemplars: list[str]
    """Beginnings of the prompts nearest to the centroid."""
    exemplar_ids: list[str]
    """Their ids in the corpus."""
    similarity_quantiles: dict[str, float]
    """Quantiles of the members' cosine similarity to the centroid."""

    def confidence(self, similarity: float) -> float:
        """Return the share of the members that are as far from the others' centroid or farther, in [0, 1].

        It is interpolated between the quantiles, and 0 for a prompt farther away than every member.
        """
        # quantiles are stored with four decimals, and a member must not be farther away than itself
        return float(np.interp(round(similarity, 4), *self.quantiles_to_others))

    @cached_property
    def quantiles_to_others(self) -> tuple[np.ndarray, np.ndarray]:
        """Quantiles of the members' similarity to the centroid of the others, and their levels, both ascending.

        A member pulls the centroid towards itself, which a new prompt does not; in a small cluster every fifth would
        seem unfamiliar. With the sum S of n members, all unit vectors, and a member's similarity s to S / ‖S‖, its
        similarity to the others' centroid is (s‖S‖ − 1) / ‖S − x‖, where ‖S − x‖² = ‖S‖² − 2s‖S‖ + 1; and ‖S‖ is n times
        the mean similarity, the integral over the quantiles.
        """
        levels, values = (
            np.array([float(v) for v in side])
            for side in (self.similarity_quantiles, self.similarity_quantiles.values())
        )
        norm = self.size * float((np.diff(levels) * (values[1:] + values[:-1]) / 2).sum())
        if norm > 1:  # else there are no others
            values = (values * norm - 1) / np.sqrt(np.maximum(norm**2 - 2 * values * norm + 1, 1e-12))
        return values, levels


@dataclass(frozen=True)
class Match:
    """One cluster near a prompt."""

    cluster: int
    similarity: float
    label: str
    confidence: float = 1.0
    """Share of the cluster's own prompts that are as far from it or farther; see `Cluster.confidence`."""

    @property
    def confident(self) -> bool:
        """Whether the prompt is familiar: its confidence is at least ``UNFAMILIAR``, 5 %."""
        return self.confidence >= UNFAMILIAR
