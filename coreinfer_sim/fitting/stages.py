"""The stages of a build that make compensated sets, each of which leaves its result in the build folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from coreinfer_sim.base.files import write_json
from coreinfer_sim.base.processes import LIBRARY_BYTES, default_workers, run_shards
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.settings import Start
from coreinfer_sim.building.folder import KEPT_NEURONS, link, read_kept_neurons, remove
from coreinfer_sim.building.jobs import Job, distiller, distiller_of, fitter, fitter_of, recorded_layers
from coreinfer_sim.building.shards import PartialSums
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.fitting.comparing import Kind, choose_kinds, compare_sets, plain_set
from coreinfer_sim.fitting.costs import CompensationCosts
from coreinfer_sim.fitting.sets import (
    Training,
    fitted_path,
    neurons_by_ratio,
    set_tokens,
    sets_to_fit,
    trainings,
)
from coreinfer_sim.fitting.texts import CalibrationCorpus, save_selection
from coreinfer_sim.index.manifest import COMPENSATION_FOLDER, CompensationInfo, compensation_file

_COMPARED = "compared.json"
_LEFT_BEHIND = (KEPT_NEURONS, _COMPARED, "moments", "fitted", "training", COMPENSATION_FOLDER)


def forget_sets(folder: Path) -> None:
    """Take away what the stages have left in a build folder."""
    for name in _LEFT_BEHIND:
        remove(folder / name)


class CompensationStages:
    """The stages in their order, and what an index takes from them."""

    def __init__(
        self, job: Job, corpus: CalibrationCorpus, sums: Callable[[], PartialSums], progress: Progress
    ) -> None:
        """Prepare to run.

        Args:
            job: of the build.
            corpus: to fit to.
            sums: gives the statistics of all clusters, which plain sets are made from once all else is done.
            progress: takes messages and progress.
        """
        self.job, self.corpus, self.progress = job, corpus, progress
        self.folder, self.settings, self.n_clusters = corpus.folder, corpus.settings, corpus.n_clusters
        self._sums = sums
        self._layers = recorded_layers(corpus.language_model, corpus.config)
        self._costs = CompensationCosts(self._layers, self.settings)

    def share_out(self) -> None:
        """Measure the layers' sensitivity, and share the neurons of compensated sets out among them."""
        path = self.folder / KEPT_NEURONS
        if not path.exists():
            self.progress.start("Measuring layers", len(self.corpus.language_model.layers), "layers")
            try:
                numbers = [layer.number for layer in self._layers]
                kept = neurons_by_ratio(self.corpus, numbers, self.progress.advance)
            finally:
                self.progress.finish()
            write_json(path, kept)

    def compensate_globally(self) -> None:
        """Fit the sets of the whole corpus, towards which the clusters' are shrunk."""
        self._fit(lambda cluster: cluster is None, "Compensating, whole corpus", 1)

    def distil_globally(self) -> None:
        """Train the whole corpus's sets on, if others begin with what these learn; else all go on side by side."""
        if self.settings.distil_from is not Start.CLUSTER or self.n_clusters == 1:
            self._distil(lambda training: training.clusters == (None,), "Distilling, whole corpus", 1)

    def compensate_clusters(self, workers: int | None) -> None:
        """Fit each cluster's set, unless the trained set of the whole corpus will be specialised."""
        if self.settings.own_fits:
            n_workers = workers or self._workers_within(self._costs.fitting())
            self._fit(lambda cluster: cluster is not None, "Compensating clusters", n_workers)

    def distil_clusters(self, workers: int | None) -> None:
        """Train each cluster's set on; the whole corpus's beside them, unless that has been done."""
        n_workers = workers or self._workers_within(self._costs.training(self.n_clusters))
        self._distil(lambda _training: True, "Distilling", n_workers)

    def choose_sets(self) -> None:
        """Find the clusters that the whole corpus's set serves better, and whether plain neurons serve all better."""
        path = self.folder / _COMPARED
        if not path.exists():
            n_texts = int(self.corpus.held_out.sum()) * len(self.settings.keep_ratios)
            self.progress.start("Comparing sets", n_texts, "texts")
            try:
                found = compare_sets(self.corpus, self._plain, self.progress.advance)
            finally:
                self.progress.finish()
            write_json(path, found)
        for ratio, kinds in self._kinds().items():
            served = ", ".join(str(c) for c, kind in kinds.items() if kind is Kind.CORPUS)
            if kinds[None] is Kind.PLAIN:
                self.progress.say(
                    f"Keep ratio {ratio:g}: on held-out texts compensation does more harm than good, so plain neurons decode; "
                    "give more texts, or more --compensate-tokens or --distil-tokens."
                )
            elif served and self.n_clusters > 1:
                self.progress.say(f"Keep ratio {ratio:g}: the whole corpus's set serves better in clusters {served}.")

    def put_sets(self, part: Path) -> None:
        """Put the sets into an index: each cluster's own, or what serves its texts better."""
        unfinished = shutil.ignore_patterns(".*")
        shutil.copytree(
            self.folder / COMPENSATION_FOLDER, part / COMPENSATION_FOLDER, copy_function=link, ignore=unfinished
        )
        for ratio, kinds in self._kinds().items():
            everywhere = part / compensation_file(ratio, None)
            for cluster, kind in kinds.items():  # the whole corpus first
                path = part / compensation_file(ratio, cluster)
                if kind is Kind.CORPUS:
                    path.unlink(missing_ok=True)
                    link(str(everywhere), str(path))
                elif kind is Kind.PLAIN:
                    save_selection(path, self._plain(ratio, cluster))

    def described(self) -> list[CompensationInfo]:
        """Return what an index says of its sets."""
        kept, kinds = read_kept_neurons(self.folder), self._kinds()
        return [
            CompensationInfo(
                keep_ratio=ratio,
                ranking=self.settings.ranking.value,
                budget=self.settings.budget.value,
                tokens=self.settings.tokens,
                distil_tokens=self.settings.distil_tokens,
                distil_from=self.settings.distil_from.value if self.settings.distil_tokens else None,
                n_kept=kept[f"{ratio:g}"],
                plain=kinds[ratio][None] is Kind.PLAIN,
            )
            for ratio in self.settings.keep_ratios
        ]

    def _plain(self, ratio: float, cluster: int | None) -> NeuronSelection:
        """Return the plain set of the widths of a compensated one."""
        numbers, d_model = [layer.number for layer in self._layers], self._layers[0].d_model
        n_kept = read_kept_neurons(self.folder)[f"{ratio:g}"]
        return plain_set(self._sums(), numbers, n_kept, cluster, d_model)

    def _kinds(self) -> dict[float, dict[int | None, Kind]]:
        """Return by keep ratio what decodes for each cluster and, under None, for the whole corpus."""
        found = json.loads((self.folder / _COMPARED).read_text(encoding="utf-8"))
        return {ratio: choose_kinds(found[f"{ratio:g}"], self.n_clusters) for ratio in self.settings.keep_ratios}

    def _fit(self, wanted: Callable[[int | None], bool], title: str, n_workers: int) -> None:
        sets = sets_to_fit(self.settings, self.n_clusters)
        numbers = [number for number, (_ratio, cluster) in enumerate(sets) if wanted(cluster)]
        if not numbers:
            return
        unfinished = [i for i in numbers if not fitted_path(self.folder, self.settings, *sets[i]).exists()]
        run = fitter(self.corpus, self.progress.advance)
        n_layers = len(self.corpus.language_model.layers)
        self.progress.start(title, len(numbers) * n_layers, "layers", (len(numbers) - len(unfinished)) * n_layers)
        try:
            run_shards(unfinished, run, n_workers, fitter_of, self.job, self.progress.advance)
        finally:
            self.progress.finish()

    def _distil(self, wanted: Callable[[Training], bool], title: str, n_workers: int) -> None:
        if not self.settings.distil_tokens:
            return
        every = trainings(self.settings, self.n_clusters)
        n_tokens = {i: self._tokens_of(training.clusters) for i, training in enumerate(every) if wanted(training)}
        unfinished = [
            i
            for i in n_tokens
            if not all(
                (self.folder / compensation_file(ratio, cluster)).exists()
                for ratio in self.settings.keep_ratios
                for cluster in every[i].clusters
            )
        ]
        if not unfinished:
            return
        done = sum(n_tokens.values()) - sum(n_tokens[i] for i in unfinished)
        run = distiller(self.corpus, self.progress.advance, alone=min(n_workers, len(unfinished)) == 1)
        self.progress.start(title, sum(n_tokens.values()), "tokens", done)
        try:
            run_shards(unfinished, run, n_workers, distiller_of, self.job, self.progress.advance)
        finally:
            self.progress.finish()

    def _workers_within(self, own_bytes: int) -> int:
        """Return how many processes fit that take ``own_bytes`` each beside the model and the libraries."""
        worker_bytes = self.corpus.language_model.model.get_memory_footprint() + LIBRARY_BYTES + own_bytes
        return default_workers(self.job.device, self.job.n_threads, worker_bytes, own_bytes)

    def _tokens_of(self, clusters: Sequence[int | None]) -> int:
        """Return how many tokens the sets of some clusters will be trained on in one go, about."""
        members = ~self.corpus.held_out
        cluster = clusters[0] if len(clusters) == 1 else None
        if cluster is not None:
            members &= self.corpus.clustering.assignment == cluster
        there = np.array([min(s.n_tokens, self.corpus.max_tokens) for s in self.corpus.sentences])[members].sum()
        return min(int(there), set_tokens(self.settings.distil_tokens, cluster))
