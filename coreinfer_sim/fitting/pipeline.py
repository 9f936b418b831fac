"""The stages of a build that make compensated sets, each of which leaves its result in the build folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from coreinfer_sim.base.files import link, remove, write_json
from coreinfer_sim.base.processes import n_cores, torch_threads
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.settings import CompensationConfig
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.fitting.clustered_corpus import ClusteredCorpus
from coreinfer_sim.fitting.comparing import Kind, Statistics, choose_kinds, compare_sets, plain_set
from coreinfer_sim.fitting.costs import CompensationCosts
from coreinfer_sim.fitting.sets import (
    FITTED_FOLDER,
    MOMENTS_FOLDER,
    TRAINING_FOLDER,
    FitSets,
    are_trained,
    neurons_by_ratio,
    save_set,
    set_tokens,
    sets_to_fit,
    train_sets,
    trainings,
)
from coreinfer_sim.fitting.workers import Workers
from coreinfer_sim.index.manifest import COMPENSATION_FOLDER, CompensationInfo, compensation_file

KEPT_NEURONS_FILE = "neurons.json"
COMPARED_FILE = "compared.json"
LARGE_FOLDERS = (MOMENTS_FOLDER, FITTED_FOLDER, TRAINING_FOLDER, COMPENSATION_FOLDER)
"""What takes nearly all disk of these stages in a build folder."""


def forget_sets(folder: Path) -> None:
    """Take away what the stages have left in a build folder."""
    for name in (KEPT_NEURONS_FILE, COMPARED_FILE, *LARGE_FOLDERS):
        remove(folder / name)


@dataclass(frozen=True)
class CompensatedSets:
    """The finished sets in a build folder, and which of them decodes for whom."""

    folder: Path
    settings: CompensationConfig
    n_kept: Mapping[str, list[int]]
    """By keep ratio, the neurons of each layer that stay, [n_layers]."""
    kinds: Mapping[float, Mapping[int | None, Kind]]
    """By keep ratio, what decodes for each cluster and, under None, for the whole corpus."""
    plain: Callable[[float, int | None], NeuronSelection]
    """Gives the plain set of a keep ratio and cluster."""

    def put_into(self, index: Path) -> None:
        """Put the sets into the folder of an index: each cluster's own, or what serves its texts better."""
        unfinished = shutil.ignore_patterns(".*")
        shutil.copytree(
            self.folder / COMPENSATION_FOLDER, index / COMPENSATION_FOLDER, copy_function=link, ignore=unfinished
        )
        for ratio, kinds in self.kinds.items():
            everywhere = index / compensation_file(ratio, None)
            for cluster, kind in kinds.items():  # the whole corpus first
                path = index / compensation_file(ratio, cluster)
                if kind is Kind.CORPUS:
                    path.unlink(missing_ok=True)
                    link(str(everywhere), str(path))
                elif kind is Kind.PLAIN:
                    save_set(path, self.plain(ratio, cluster))

    def described(self) -> list[CompensationInfo]:
        """Return what an index says of its sets."""
        return [
            CompensationInfo(
                keep_ratio=ratio,
                ranking=self.settings.ranking.value,
                budget=self.settings.budget.value,
                tokens=self.settings.tokens,
                distil_tokens=self.settings.distil_tokens,
                n_kept=self.n_kept[f"{ratio:g}"],
                plain=kinds[None] is Kind.PLAIN,
            )
            for ratio, kinds in self.kinds.items()
        ]


def make_sets(workers: Workers, settings: CompensationConfig, statistics: Statistics) -> CompensatedSets:
    """Make the compensated sets of a build, from where an earlier run was broken off.

    Args:
        workers: of the build.
        settings: of the sets.
        statistics: of the clusters' neurons, asked for once all sets are fitted.
    """
    corpus, progress = workers.corpus, workers.progress
    training = bool(settings.distil_tokens)
    # 1) how many neurons each layer keeps
    with torch_threads(n_cores()):
        n_kept = _share_out(corpus, settings, progress)
        # 2) the whole corpus's sets, towards which the clusters' are shrunk
        _fit(workers, FitSets(settings, n_kept), "Compensating, whole corpus", of_clusters=False)
        if training:
            _train(corpus, settings, (None,), "Distilling, whole corpus", progress)
    # 3) each cluster's
    if corpus.n_clusters > 1:
        with torch_threads(workers.source.n_threads):
            _fit(workers, FitSets(settings, n_kept), "Compensating clusters", of_clusters=True)
    with torch_threads(n_cores()):
        for clusters in trainings(corpus.n_clusters)[1:] if training else ():
            _train(corpus, settings, clusters, "Distilling clusters", progress)
        # 4) which of them serve texts that none was fitted to
        plain = partial(_plain, corpus, n_kept, statistics)
        kinds = _compare(corpus, settings, plain, progress)
    return CompensatedSets(corpus.folder, settings, n_kept, kinds, plain)


def _share_out(corpus: ClusteredCorpus, settings: CompensationConfig, progress: Progress) -> dict[str, list[int]]:
    """Measure the layers' sensitivity, and share the neurons of compensated sets out among them."""
    path = corpus.folder / KEPT_NEURONS_FILE
    if not path.exists():
        progress.start("Measuring layers", len(corpus.language_model.layers), "layers")
        try:
            kept = neurons_by_ratio(corpus, settings, progress.advance)
        finally:
            progress.finish()
        write_json(path, kept)
    n_kept: dict[str, list[int]] = json.loads(path.read_text(encoding="utf-8"))
    return n_kept


def _fit(workers: Workers, job: FitSets, title: str, of_clusters: bool) -> None:
    """Fit the sets of the whole corpus or of the clusters."""
    corpus, settings = workers.corpus, job.settings
    sets = enumerate(sets_to_fit(settings, corpus.n_clusters))
    numbers = [number for number, (_, cluster) in sets if (cluster is not None) is of_clusters]
    n_bytes = CompensationCosts(corpus.layers, settings).fitting()
    sizes = dict.fromkeys(numbers, len(corpus.language_model.layers))
    workers.run(job, title, "layers", sizes, None, n_bytes, n_bytes, alone=not of_clusters)


def _train(
    corpus: ClusteredCorpus,
    settings: CompensationConfig,
    clusters: tuple[int | None, ...],
    title: str,
    progress: Progress,
) -> None:
    """Train sets on, unless that has been done."""
    if all(are_trained(corpus.folder, ratio, clusters) for ratio in settings.keep_ratios):
        return
    n_tokens = min(corpus.n_fitting_tokens(), set_tokens(settings.distil_tokens, None))
    progress.start(title, n_tokens, "tokens")
    try:
        train_sets(corpus, settings, clusters, progress.advance)
    finally:
        progress.finish()


def _plain(
    corpus: ClusteredCorpus, n_kept: Mapping[str, list[int]], statistics: Statistics, ratio: float, cluster: int | None
) -> NeuronSelection:
    """Return the plain set of the widths of a compensated one."""
    numbers, d_model = [layer.number for layer in corpus.layers], corpus.layers[0].d_model
    return plain_set(statistics(cluster), numbers, n_kept[f"{ratio:g}"], d_model)


def _compare(
    corpus: ClusteredCorpus,
    settings: CompensationConfig,
    plain: Callable[[float, int | None], NeuronSelection],
    progress: Progress,
) -> dict[float, dict[int | None, Kind]]:
    """Find the clusters that the whole corpus's set serves better, and whether plain neurons serve all better."""
    path = corpus.folder / COMPARED_FILE
    if not path.exists():
        progress.start("Comparing sets", int(corpus.held_out.sum()) * len(settings.keep_ratios), "texts")
        try:
            measured = compare_sets(corpus, settings.keep_ratios, plain, progress.advance)
        finally:
            progress.finish()
        write_json(path, measured)
    found = json.loads(path.read_text(encoding="utf-8"))
    kinds = {ratio: choose_kinds(found[f"{ratio:g}"], corpus.n_clusters) for ratio in settings.keep_ratios}
    for ratio, chosen in kinds.items():
        served = ", ".join(str(c) for c, kind in chosen.items() if kind is Kind.CORPUS)
        if chosen[None] is Kind.PLAIN:
            progress.say(
                f"Keep ratio {ratio:g}: on held-out texts compensation does more harm than good, so plain neurons decode; "
                "fit to more texts or tokens, or train on more."
            )
        elif served and corpus.n_clusters > 1:
            progress.say(f"Keep ratio {ratio:g}: the whole corpus's set serves better in clusters {served}.")
    return kinds
