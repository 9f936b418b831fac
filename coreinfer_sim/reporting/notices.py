"""What to look at before an index is trusted: topics too small, topics too large, prompts that lie far from all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from coreinfer_sim.base.progress import counted
from coreinfer_sim.index.index import SemanticIndex

_FEWEST = 8
"""Prompts of a topic, from fewer of which its neurons are those of single texts; the build's choice of k keeps to it, too."""
_LARGE = 5
"""Times the median topic."""
_FAR = 0.5
"""Times the median similarity of prompts to their topic's centre."""
_N_EXAMPLES = 5


@dataclass(frozen=True)
class Notice:
    """One thing to look at, with examples."""

    text: str
    examples: list[str]


def notices_of(index: SemanticIndex) -> list[Notice]:
    """Return what is unusual about an index."""
    return [*_sizes(index), *_far_prompts(index), *_promises(index)]


def _sizes(index: SemanticIndex) -> Iterator[Notice]:
    small = [cluster for cluster in index.clusters if cluster.size < _FEWEST]
    if small:
        yield Notice(
            f"{counted(len(small), 'topic')} of {len(index)} have fewer than {_FEWEST} prompts, so that their neurons are those "
            "of single texts; build with fewer clusters, or more prompts.",
            [f"{cluster.id}  {cluster.label}: {counted(cluster.size, 'prompt')}" for cluster in small[:_N_EXAMPLES]],
        )
    median = float(np.median([cluster.size for cluster in index.clusters]))
    large = [cluster for cluster in index.clusters if cluster.size > _LARGE * median]
    if large:
        yield Notice(
            f"{counted(len(large), 'topic')} of {len(index)} have more than {_LARGE} times as many prompts as the median topic; "
            "more clusters would part them, and fewer prompts of one kind would balance the corpus.",
            [f"{cluster.id}  {cluster.label}: {counted(cluster.size, 'prompt')}" for cluster in large[:_N_EXAMPLES]],
        )


def _far_prompts(index: SemanticIndex) -> Iterator[Notice]:
    """Look for prompts on the map that belong to no topic."""
    if index.manifest.map is None:
        return
    shown = index.map
    similarity = (shown.embeddings.astype(np.float32) @ index.centroids.T).max(axis=1)
    far = np.flatnonzero(similarity < _FAR * np.median(similarity))
    if len(far):
        nearest = far[np.argsort(similarity[far], kind="stable")][:_N_EXAMPLES].tolist()
        yield Notice(
            f"{counted(len(far), 'prompt')} of {len(shown):,} on the map are far from all topics: less than half as similar "
            "to the nearest one as the median prompt is; prompts of their kind are missing in the corpus, or they do not "
            "belong there.",
            [f"similarity {similarity[number]:.2f}: {shown.excerpts[number]}" for number in nearest]
            if shown.excerpts
            else [],
        )


def _promises(index: SemanticIndex) -> Iterator[Notice]:
    profile = index.manifest.profile
    if profile is None:
        yield Notice("Nothing was promised of this index's quality, as nothing was measured; it decodes densely.", [])
    elif profile.read_ratio == 1 and profile.keep_ratio == 1:
        yield Notice(
            f"Nothing sparse kept the promise of at most {profile.max_increase:.1%} more perplexity on "
            f"{counted(profile.n_rows, 'row')}; the index decodes densely.",
            [],
        )
    plain = [f"{info.keep_ratio:g}" for info in index.manifest.compensation if info.plain]
    if plain:
        yield Notice(f"Compensation did harm at keep ratio {', '.join(plain)}; plain neurons took its place.", [])
