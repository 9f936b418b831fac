"""What changed between two indexes: their parts, and each topic's texts and neurons."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.reporting.comparing import compare, facts_of
from coreinfer_sim.reporting.overlap import core_masks, in_common


@dataclass(frozen=True)
class TopicChange:
    """A topic now, and the one that it was."""

    id: int
    """Number now."""
    was: int
    """Number before: of the same centroid, or of the nearest one."""
    label: str
    similarity: float
    """Of the two centroids."""
    size: int
    """Prompts now."""
    size_was: int
    in_common: float | None
    """Share of the core neurons that were so before; None: of another model."""

    @property
    def is_same(self) -> bool:
        """Whether nothing shows that it changed."""
        return self.size == self.size_was and self.in_common == 1 and self.similarity > 1 - 1e-6


@dataclass(frozen=True)
class Differences:
    """What changed between two indexes."""

    facts: list[list[str]]
    """What differs: its name, before, now."""
    topics: list[TopicChange]
    """A row a topic that is there now; empty where the encoders differ."""
    gone: list[int]
    """Numbers of the topics before that none of these was."""
    note: str
    """Why topics or their neurons are not compared; empty where they are."""


def differences(before: SemanticIndex, now: SemanticIndex) -> Differences:
    """Compare an index with one that was made of it, or with any other."""
    found = compare(before, now, _facts(before), _facts(now))
    if not found.topics:
        return Differences(found.facts, [], [], found.note)
    # 1) which topic each one was
    same = np.array_equal(before.centroids, now.centroids)
    similarity = now.centroids @ before.centroids.T
    was = np.arange(len(now)) if same else similarity.argmax(axis=1)
    # 2) how much of its neurons it kept
    a, b = before.manifest.settings, now.manifest.settings
    layers = [layer for layer in a.layers if layer in b.layers]
    common: list[float | None] = [None] * len(now)
    if not found.note:
        shares = in_common(core_masks(now, a.beta, layers), core_masks(before, a.beta, layers)).mean(axis=0)
        common = [float(shares[number, other]) for number, other in enumerate(was.tolist())]
    topics = [
        TopicChange(
            number,
            other,
            now.clusters[number].label,
            float(similarity[number, other]),
            now.clusters[number].size,
            before.clusters[other].size,
            common[number],
        )
        for number, other in enumerate(was.tolist())
    ]
    return Differences(found.facts, topics, sorted(set(range(len(before))) - set(was.tolist())), found.note)


def _facts(index: SemanticIndex) -> list[list[str]]:
    """Return what an index is, and which optional parts it has."""
    m = index.manifest
    corpora = [] if m.sums is None else [corpus.source for corpus in m.sums.corpora]
    return [
        *facts_of(index),
        ["clusters", str(len(index))],
        ["corpora", ", ".join(corpora) or m.corpus.source],
        ["map", "none" if m.map is None else f"{m.map.n_prompts:,} prompts"],
        ["thresholds", ", ".join(m.histograms) or "none"],
        ["refitted rows", "none" if m.refit is None else f"read ratio {m.refit.read_ratio:g}"],
        ["exact sums", "none" if m.sums is None else "yes"],
    ]
