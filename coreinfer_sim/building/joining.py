"""Fewer clusters out of those of an index: joined by their centroids and sizes, their sums added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np

from coreinfer_sim.base.errors import ClusteringError
from coreinfer_sim.base.progress import Progress, counted, shown
from coreinfer_sim.building.folder import holding
from coreinfer_sim.building.merging import Members, joined, members_of, note_left_out, profiles_by_token, write_changed
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.sums import Sums

_MOST = 8192
"""Clusters that are compared pair by pair, which takes the square of their number in memory."""
_LEAST_WEIGHT = 1e-3
"""Of a cluster without members, which thereby joins the nearest one."""
_N_TERMS = 4


def recluster(
    index: SemanticIndex, n_clusters: int, out: str | Path, force: bool = False, progress: Progress | None = None
) -> SemanticIndex:
    """Join clusters of an index until there are so many, the largest first; their sums are added up exactly.

    The pair is joined next whose joining costs the members the least similarity to their centroid. The members' similarities
    to a joined centroid are estimated, as an index holds no embeddings: s · cos φ, with the similarity s to the old centroid and
    the angle φ between the two.

    Args:
        index: with exact sums.
        n_clusters: fewer than it has.
        out: the index folder to make.
        force: replace an index that exists, which may be this one.
        progress: takes messages; None: see `shown`.

    Raises:
        ClusteringError: it has no more clusters than that, or too many.
        MissingSumsError: an earlier release built it.
        BuildError: something stands where the index shall go.
    """
    out = Path(out).resolve()
    with holding(out, force):
        _check(index, n_clusters)
        return _join_to(index, n_clusters, out, shown(progress))


def _join_to(index: SemanticIndex, n_clusters: int, out: Path, progress: Progress) -> SemanticIndex:
    """Make the index of joined clusters at a place that this process holds."""
    sums = index.sums()
    members = members_of(index, sums)
    # 1) which join, the largest group first
    weights = np.array([part.similarity.sum(dtype=np.float64) for part in members])
    groups = join(index.centroids, weights, n_clusters)
    groups.sort(key=lambda group: -sum(members[number].cluster.size for number in group))
    # 2) their members and sums
    centroids = np.stack([_centre(index.centroids[group], weights[group]) for group in groups]).astype(np.float32)
    parts = [_joined(number, group, members, index.centroids, centroids[number]) for number, group in enumerate(groups)]
    counts, energy, activation = (
        np.stack([part[group].sum(0) for group in groups]) for part in (sums.counts, sums.energy, sums.activation)
    )
    new = Sums(counts, energy, activation, np.concatenate([part.similarity for part in parts]))
    # 3) the index
    now = np.zeros(len(index), np.int32)
    for number, group in enumerate(groups):
        now[group] = number
    prompt_map = None if index.manifest.map is None else replace(index.map, clusters=now[index.map.clusters])
    profiles = profiles_by_token(index.manifest)
    note_left_out([index.manifest], profiles, True, progress)
    progress.say("How near prompts lie to a joined cluster is estimated, as an index holds no embeddings.")
    manifest = replace(
        index.manifest,
        settings=replace(index.manifest.settings, n_clusters=n_clusters),
        compensation=[],
        profiles=profiles,
    )
    clusters = [part.cluster for part in parts]
    return write_changed(index, out, manifest, centroids, clusters, new, index.histograms, prompt_map, index)


def _check(index: SemanticIndex, n_clusters: int) -> None:
    asked = f"{counted(n_clusters, 'cluster')} were asked for, and {index.name} has {len(index)}"
    if n_clusters > len(index):
        raise ClusteringError(
            f"{asked}, which only their texts can split, and an index holds none; give its corpus too."
        )
    if not 1 <= n_clusters < len(index):
        raise ClusteringError(f"{asked}, expected 1 to {len(index) - 1}; give another number.")
    if len(index) > _MOST:
        raise ClusteringError(
            f"{index.name} has {len(index):,} clusters, expected at most {_MOST:,} to compare every pair; build an index with "
            "fewer."
        )


def join(centroids: np.ndarray, weights: np.ndarray, n: int) -> list[list[int]]:
    """Join clusters until ``n`` are left.

    Spherical k-means maximises Σ_c ‖S_c‖ over clusters, S_c being the sum of its members. Joining a and b loses
    ‖S_a‖ + ‖S_b‖ - ‖S_a + S_b‖ of that, and the pair that loses least is joined, again and again (as in Ward, 1963).

    Args:
        centroids: unit norm, [n_clusters, dim].
        weights: ‖S_c‖, the sum of the members' similarities, [n_clusters].
        n: how many are left.

    Returns:
        The numbers of the clusters in each, ascending.
    """
    norms = np.maximum(weights, _LEAST_WEIGHT)
    sums = centroids.astype(np.float64) * norms[:, None]
    groups: list[list[int]] = [[number] for number in range(len(sums))]
    open_ = np.ones(len(sums), bool)
    losses = np.stack([_losses(sums, norms, number, open_) for number in range(len(sums))])
    best, other = losses.min(1), losses.argmin(1)
    for _ in range(len(sums) - n):
        a = int(best.argmin())
        b = int(other[a])
        groups[a] = sorted(groups[a] + groups[b])
        sums[a] += sums[b]
        norms[a] = np.linalg.norm(sums[a])
        open_[b] = False
        losses[b], losses[:, b], best[b] = np.inf, np.inf, np.inf
        losses[a] = losses[:, a] = _losses(sums, norms, a, open_)
        nearer = losses[a] < best
        best[nearer], other[nearer] = losses[a][nearer], a
        stale = np.flatnonzero(open_ & (((other == a) & ~nearer) | (other == b)))
        for number in {a, *stale.tolist()}:
            best[number], other[number] = losses[number].min(), losses[number].argmin()
    return [group for group, is_open in zip(groups, open_.tolist(), strict=True) if is_open]


def _losses(sums: np.ndarray, norms: np.ndarray, number: int, open_: np.ndarray) -> np.ndarray:
    """Return what joining one cluster with each other one loses, [n_clusters]; infinite for itself and those that are gone."""
    together = np.sqrt(np.maximum(norms**2 + norms[number] ** 2 + 2 * sums @ sums[number], 0))
    found = norms + norms[number] - together
    found[~open_] = found[number] = np.inf
    return np.asarray(found)


def _centre(centroids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total = (centroids.astype(np.float64) * np.maximum(weights, _LEAST_WEIGHT)[:, None]).sum(0)
    return np.asarray(total / np.linalg.norm(total))


def _joined(
    number: int, group: Sequence[int], members: Sequence[Members], centroids: np.ndarray, centroid: np.ndarray
) -> Members:
    """Return a group as one cluster; one that stands alone stays what it is."""
    if len(group) == 1:
        (alone,) = group
        return Members(replace(members[alone].cluster, id=number), members[alone].similarity)
    parts = [
        Members(
            members[each].cluster, members[each].similarity * np.float32(min(1.0, float(centroids[each] @ centroid)))
        )
        for each in group
    ]
    largest_first = sorted(parts, key=lambda part: -part.cluster.size)
    in_turns = zip_longest(*(part.cluster.label.split(", ") for part in largest_first))
    terms = list(dict.fromkeys(term for turn in in_turns for term in turn if term))
    return joined(number, ", ".join(terms[:_N_TERMS]), parts)
