"""What makes compensated sets: fits in closed form, and training on from there if the build asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from coreinfer_sim.base.files import write_atomic
from coreinfer_sim.base.memory import free_memory, give_back_memory
from coreinfer_sim.base.processes import Report
from coreinfer_sim.base.settings import Budget, CompensationConfig
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.fitting.budgets import layer_costs, neurons_of
from coreinfer_sim.fitting.clustered_corpus import ClusteredCorpus
from coreinfer_sim.fitting.layerwise import Fit, fit_layers
from coreinfer_sim.fitting.least_squares import Moments
from coreinfer_sim.fitting.student import add_trained_change, training_bytes
from coreinfer_sim.fitting.training import distil, training_on
from coreinfer_sim.index.compensated import load_compensated, save_compensated
from coreinfer_sim.index.manifest import compensation_file
from coreinfer_sim.models.mlps import MLPLayer

FITTED_FOLDER = "fitted"
MOMENTS_FOLDER = "moments"
TRAINING_FOLDER = "training"
_GLOBAL_SHARE = 3
_MEASURED_TOKENS = 10_000
_ROOM = 0.8
"""Share of the free memory that training takes at most: reading texts and the rest of the machine need some."""


@dataclass(frozen=True)
class FitSets:
    """The job that fits one set by its number in `sets_to_fit` and leaves it on disk; it reports layers."""

    settings: CompensationConfig
    n_kept: Mapping[str, list[int]]
    """By keep ratio, the neurons of each layer that stay."""

    def result(self, corpus: ClusteredCorpus, number: int) -> Path:
        """Return where the set will be."""
        ratio, cluster = sets_to_fit(self.settings, corpus.n_clusters)[number]
        return fitted_path(corpus.folder, self.settings, ratio, cluster)

    def run(self, corpus: ClusteredCorpus, number: int, report: Report) -> None:
        """Fit a set; the whole corpus's leaves its moments, towards which those of clusters are shrunk."""
        ratio, cluster = sets_to_fit(self.settings, corpus.n_clusters)[number]
        _, texts = corpus.texts(cluster, set_tokens(self.settings.tokens, cluster))
        folder = corpus.folder / MOMENTS_FOLDER / f"{ratio:g}"
        leant_on = cluster is None and corpus.n_clusters > 1
        selection = fit_layers(
            corpus.language_model,
            texts,
            self.n_kept[f"{ratio:g}"],
            Fit(self.settings.ranking),
            prior=None if cluster is None else lambda layer: _load_moments(folder / f"{layer}.safetensors"),
            keep=(lambda layer, sums: _save_moments(folder / f"{layer}.safetensors", sums)) if leant_on else None,
            report=report,
        )
        save_set(self.result(corpus, number), selection)


def sets_to_fit(settings: CompensationConfig, n_clusters: int) -> list[tuple[float, int | None]]:
    """Return keep ratio and cluster of every set: first those of the whole corpus (None), which the others lean on."""
    clusters = [each for training in trainings(n_clusters) for each in training]
    return [(ratio, cluster) for cluster in clusters for ratio in settings.keep_ratios]


def trainings(n_clusters: int) -> list[tuple[int | None, ...]]:
    """Return whose sets are trained in one go: the whole corpus's (None), which a single cluster equals, then all clusters'."""
    return [(None,), tuple(range(n_clusters))] if n_clusters > 1 else [(None,)]


def train_sets(
    corpus: ClusteredCorpus, settings: CompensationConfig, clusters: Sequence[int | None], report: Report
) -> None:
    """Train the sets of some clusters in one go at all keep ratios, and leave them on disk.

    Args:
        corpus: of the build.
        settings: of the sets.
        clusters: one of `trainings`.
        report: takes the tokens that have been read, over all keep ratios once.
    """
    # 1) the texts, from the end, so that the fit's own, which no longer show what is wrong with it, come last or not at all
    language_model = corpus.language_model
    places, texts = corpus.texts(None, set_tokens(settings.distil_tokens, None), from_end=True)
    readers = [0] * len(texts) if len(clusters) == 1 else corpus.clustering.assignment[places].tolist()
    how = training_on(language_model.model.device.type, texts)
    # 2) the keep ratios that are trained side by side
    name, folder = ("corpus" if len(clusters) == 1 else "clusters"), corpus.folder / TRAINING_FOLDER
    ratios = [ratio for ratio in settings.keep_ratios if not are_trained(corpus.folder, ratio, clusters)]
    groups = broken_off(folder, name, ratios)
    left = [ratio for ratio in ratios if not any(ratio in group for group in groups)]
    room = int(_ROOM * free_memory(language_model.model.device))
    groups += trained_together(language_model.layers, left, room, len(clusters))
    # 3) training, and what it gives
    advance = _in_shares(report, len(groups))
    for group in groups:
        checkpoint = folder / f"{name}-{'-'.join(f'{ratio:g}' for ratio in group)}.safetensors"
        families = [_fitted(corpus, ratio, clusters) for ratio in group]
        found = distil(language_model, families, texts, readers, how, advance, checkpoint)
        for ratio, selections in zip(group, found, strict=True):
            for cluster, selection in zip(clusters, selections, strict=True):
                save_set(corpus.folder / compensation_file(ratio, cluster), selection)
        checkpoint.unlink(missing_ok=True)
        del families, found
        give_back_memory()  # the next ones' tensors have other shapes


def are_trained(folder: Path, ratio: float, clusters: Sequence[int | None]) -> bool:
    """Return whether a build folder holds the trained sets of some clusters at a keep ratio."""
    return all((folder / compensation_file(ratio, cluster)).exists() for cluster in clusters)


def _fitted(corpus: ClusteredCorpus, ratio: float, clusters: Sequence[int | None]) -> list[NeuronSelection]:
    """Return the sets of some clusters as training begins; clusters' hold what the whole corpus's has learnt already."""
    layers, folder = corpus.language_model.layers, corpus.folder / FITTED_FOLDER
    own = [load_set(folder / compensation_file(ratio, cluster), layers) for cluster in clusters]
    if len(clusters) == 1:
        return own
    before, after = (load_set(each / compensation_file(ratio, None), layers) for each in (folder, corpus.folder))
    return [add_trained_change(each, before, after) for each in own]


def _in_shares(report: Report, n_shares: int) -> Report:
    """Return what takes the tokens of ``n_shares`` runs over the same texts and reports those of one run."""
    n_read = n_reported = 0

    def advance(n: int) -> None:
        nonlocal n_read, n_reported
        n_read += n
        report(n_read // n_shares - n_reported)
        n_reported = n_read // n_shares

    return advance


def broken_off(folder: Path, name: str, ratios: Sequence[float]) -> list[list[float]]:
    """Return the groups of keep ratios whose training was broken off, whatever memory was free when they were made.

    Args:
        folder: of the checkpoints.
        name: with which theirs begin.
        ratios: that are not trained yet.
    """
    groups: list[list[float]] = []
    for path in sorted(folder.glob(f"{name}-*.safetensors")):
        names = path.stem.split("-")[1:]
        group = [ratio for ratio in ratios if f"{ratio:g}" in names]
        if len(group) == len(names) and not any(ratio in other for other in groups for ratio in group):
            groups.append(group)
    return groups


def trained_together(
    layers: Sequence[MLPLayer], keep_ratios: Sequence[float], room: int, n_sharing: int = 1
) -> list[list[float]]:
    """Group keep ratios whose sets can be trained side by side within ``room`` bytes; a set that cannot is a group."""
    groups: list[list[float]] = []
    taken = room
    for ratio in keep_ratios:
        n_bytes = training_bytes(layers, ratio, n_sharing)
        if taken + n_bytes > room:
            groups.append([])
            taken = 0
        groups[-1].append(ratio)
        taken += n_bytes
    return groups


def set_tokens(tokens: int, cluster: int | None) -> int:
    """Return the tokens that a set is fitted or trained on; the set of the whole corpus takes more than a cluster's."""
    return tokens * (_GLOBAL_SHARE if cluster is None else 1)


def fitted_path(folder: Path, settings: CompensationConfig, ratio: float, cluster: int | None) -> Path:
    """Return where a set that is fitted in closed form is: in its final place, unless it is trained on from there."""
    return folder / (FITTED_FOLDER if settings.distil_tokens else ".") / compensation_file(ratio, cluster)


def neurons_by_ratio(
    corpus: ClusteredCorpus, settings: CompensationConfig, report: Callable[[int], None]
) -> dict[str, list[int]]:
    """Return how many neurons each layer keeps at each keep ratio, measured if the budget asks for it.

    Args:
        corpus: what to measure on.
        settings: of the sets.
        report: takes 1 after each layer that was measured.
    """
    language_model, costs = corpus.language_model, None
    if settings.budget is Budget.SENSITIVITY:
        _, texts = corpus.texts(None, min(_MEASURED_TOKENS, settings.tokens))
        n_held = max(1, len(texts) // 8)
        held, fitted = texts[:n_held], texts[n_held:] or texts
        measured = layer_costs(language_model, fitted, held, Fit(settings.ranking), report)
        costs = measured if measured.any() else None  # texts of one token say nothing
    recorded = [layer.number for layer in corpus.layers]
    return {f"{ratio:g}": neurons_of(language_model.layers, recorded, ratio, costs) for ratio in settings.keep_ratios}


def save_set(path: Path, selection: NeuronSelection) -> None:
    """Write a selection with its compensation."""
    save_compensated(path, selection.ids, selection.compensation or {})


def load_set(path: Path, layers: Sequence[MLPLayer]) -> NeuronSelection:
    """Read what `save_set` wrote for a model of these layers."""
    ids, compensation = load_compensated(path, layers[0].d_model, len(layers))
    return NeuronSelection("compensated", ids, compensation=compensation)


def _save_moments(path: Path, moments: Moments) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    n_tokens = torch.tensor(moments.n_tokens, dtype=torch.float64)
    content = save({**vars(moments), "n_tokens": n_tokens})
    write_atomic(path, lambda part: part.write_bytes(content))


def _load_moments(path: Path) -> Moments:
    tensors = load_file(path)
    moments = Moments(*tensors["cross"].shape)
    vars(moments).update({**tensors, "n_tokens": float(tensors["n_tokens"])})
    return moments
