"""What decodes for each cluster: its own compensated set or the whole corpus's; or plain neurons for all of them.

Sets are compared on texts that none was fitted to. A cluster's own loses where the cluster is mixed or small, and
compensation that was fitted to few tokens may do more harm than good where few neurons are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum

import numpy as np
import torch

from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.cutting import Projections, compact_model
from coreinfer_sim.fitting.clustered_corpus import ClusteredCorpus
from coreinfer_sim.fitting.sets import load_set
from coreinfer_sim.fitting.training import divergences_of
from coreinfer_sim.index.compensated import LayerCompensation
from coreinfer_sim.index.manifest import compensation_file
from coreinfer_sim.index.ranking import top_ids


class Kind(str, Enum):
    """What decodes for a cluster, or for the whole corpus."""

    OWN = "own"
    """The set that was fitted to it."""
    CORPUS = "corpus"
    """What decodes for the whole corpus."""
    PLAIN = "plain"
    """As many neurons of each layer, by energy, and nothing that makes up for the others."""


Statistics = Callable[[int | None], tuple[np.ndarray, np.ndarray]]
"""Gives a cluster's, or under None the whole corpus's, energy and activation of neurons, [n_recorded, d_ff] each."""


def plain_set(
    statistics: tuple[np.ndarray, np.ndarray], numbers: Sequence[int], n_kept: Sequence[int], d_model: int
) -> NeuronSelection:
    """Return the neurons of highest energy with compensation that is nothing.

    Args:
        statistics: energy and activation, [n_recorded, d_ff] each.
        numbers: of the model's layers that were recorded.
        n_kept: neurons of each layer of the model that stay, [n_layers]; d_ff leaves the layer dense.
        d_model: width of the model.
    """
    ids, nothing = {}, {}
    for number, energy, activation in zip(numbers, *statistics, strict=True):
        n = n_kept[number]
        if n < len(energy):
            ids[number] = torch.from_numpy(top_ids(energy, activation, n))
            nothing[number] = LayerCompensation(torch.zeros(d_model))
    return NeuronSelection("compensated", ids, compensation=nothing)


def compare_sets(
    corpus: ClusteredCorpus,
    keep_ratios: Sequence[float],
    plain: Callable[[float, int | None], NeuronSelection],
    report: Callable[[int], None],
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Measure each cluster's finished set, the whole corpus's, and plain neurons on texts of the cluster that were held out.

    Args:
        corpus: of the build, whose folder holds the finished sets.
        keep_ratios: of these.
        plain: gives the plain set of a keep ratio and cluster; None: the whole corpus's.
        report: takes 1 after each text.

    Returns:
        By keep ratio and cluster the KL(dense ‖ sparse) a token of each text, "own", "corpus" and "plain", [n_texts]; clusters
        without such texts are left out. A single cluster has no set of its own, and the corpus's plain neurons.
    """
    layers = corpus.language_model.layers

    def fitted(ratio: float, cluster: int | None) -> dict[int, Projections]:
        return compact_model(layers, load_set(corpus.folder / compensation_file(ratio, cluster), layers))

    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for ratio in keep_ratios:
        of_corpus = fitted(ratio, None)
        found[f"{ratio:g}"] = by_cluster = {}
        for cluster in range(corpus.n_clusters):
            members = np.flatnonzero(corpus.held_out & (corpus.clustering.assignment == cluster))
            texts = [corpus.text(i) for i in members.tolist()]
            texts = [text for text in texts if len(text.ids) > 1]
            if not texts:
                continue
            own = cluster if corpus.n_clusters > 1 else None
            contenders = {Kind.CORPUS: of_corpus, Kind.PLAIN: compact_model(layers, plain(ratio, own))}
            if own is not None:
                contenders[Kind.OWN] = fitted(ratio, own)
            measured = divergences_of(corpus.language_model, texts, list(contenders.values()), report)
            by_cluster[str(cluster)] = {kind.value: losses for kind, losses in zip(contenders, measured, strict=True)}
            del contenders  # before the next ones take memory
    return found


def choose_kinds(found: Mapping[str, Mapping[str, Sequence[float]]], n_clusters: int) -> dict[int | None, Kind]:
    """Return what decodes for each cluster and, under None, for the whole corpus.

    Plain neurons decode everywhere if they serve all texts together better than the better set of each cluster, by more than
    one standard error: there is one such decision, as a cluster alone has too few texts for it.

    Args:
        found: by `compare_sets`, for one keep ratio.
        n_clusters: of the index; those without texts keep what is their own.
    """
    chosen: dict[int | None, Kind] = {None: Kind.OWN}
    losses: list[float] = []
    """What compensation costs more than plain neurons, by text."""
    for cluster in range(n_clusters):
        measured = found.get(str(cluster), {})
        sets = [kind for kind in (Kind.OWN, Kind.CORPUS) if kind in measured]  # of two equals a cluster takes its own
        chosen[cluster] = min(sets, key=lambda kind: sum(measured[kind]), default=Kind.OWN)
        if sets:
            losses += [a - b for a, b in zip(measured[chosen[cluster]], measured[Kind.PLAIN], strict=True)]
    if len(losses) > 1 and np.mean(losses) > np.std(losses, ddof=1) / math.sqrt(len(losses)):
        chosen = dict.fromkeys(chosen, Kind.PLAIN)
    return {**chosen, 0: Kind.CORPUS} if n_clusters == 1 else chosen
