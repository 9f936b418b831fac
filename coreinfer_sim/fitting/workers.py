"""Work that processes share: each loads the same model and corpus, and runs the next open part of a job."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from coreinfer_sim.base.processes import LIBRARY_BYTES, Report, RunShard, default_workers, run_shards
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.rows import load_rows
from coreinfer_sim.base.settings import BuildConfig
from coreinfer_sim.fitting.clustered_corpus import ClusteredCorpus
from coreinfer_sim.index.clustering import Clustering
from coreinfer_sim.models.loading import load_model

SENTENCES_FILE = "corpus.jsonl"
CLUSTERING_FILE = "clustering.npz"


class Job(Protocol):
    """Numbered parts of a stage, each of which leaves its result in the build folder; it pickles."""

    def run(self, corpus: ClusteredCorpus, number: int, report: Report) -> None:
        """Do one part.

        Args:
            corpus: of the build.
            number: which part.
            report: takes how many more of the stage's units are done.
        """


@dataclass(frozen=True)
class CorpusSource:
    """Where a further process finds the model and the corpus of a build; it pickles."""

    model: str
    dtype: str
    device: str
    folder: Path
    config: BuildConfig
    max_tokens: int
    n_threads: int

    def load(self) -> ClusteredCorpus:
        """Load what the first process has."""
        torch.set_num_threads(self.n_threads)
        language_model = load_model(self.model, self.dtype, self.device)
        sentences = load_rows(self.folder / SENTENCES_FILE)
        clustering = read_clustering(self.folder)
        return ClusteredCorpus(language_model, sentences, clustering, self.config, self.max_tokens, self.folder)


def read_clustering(folder: Path) -> Clustering:
    """Read the clustering that a build has left in its folder."""
    with np.load(folder / CLUSTERING_FILE) as arrays:
        return Clustering(**arrays)


@dataclass(frozen=True)
class Workers:
    """This process, which has loaded the corpus, and as many further ones as are wanted."""

    corpus: ClusteredCorpus
    source: CorpusSource
    progress: Progress
    n_workers: int | None
    """Processes in all; None: as many as fill the cores and fit into memory."""

    def run(
        self,
        job: Job,
        title: str,
        unit: str,
        sizes: Mapping[int, int],
        finished: Collection[int],
        worker_bytes: int = 0,
        own_bytes: int = 0,
        alone: bool = False,
    ) -> None:
        """Run the parts of a job that are not finished.

        Args:
            job: what is done.
            title: of the stage, for people.
            unit: of its sizes, in the plural.
            sizes: how many units each part has, by its number.
            finished: numbers of the parts that an earlier run has done.
            worker_bytes: memory that a further process takes beside the model and the libraries.
            own_bytes: what this process will take beside them.
            alone: whether this process does all parts by itself.
        """
        open_parts = [number for number in sizes if number not in finished]
        done = sum(sizes[number] for number in finished)
        n_workers = 1 if alone else self.n_workers or self._n_fitting(worker_bytes, own_bytes)
        run = partial(job.run, self.corpus)
        self.progress.start(title, sum(sizes.values()), unit, done)
        try:
            run_shards(open_parts, run, n_workers, partial(_load, job, self.source), self.progress.advance)
        finally:
            self.progress.finish()

    def _n_fitting(self, worker_bytes: int, own_bytes: int) -> int:
        """Return how many processes fill the cores and fit into memory."""
        model_bytes = self.corpus.language_model.model.get_memory_footprint()
        worker_bytes += model_bytes + LIBRARY_BYTES
        return default_workers(self.source.device, self.source.n_threads, worker_bytes, own_bytes)


def _load(job: Job, source: CorpusSource) -> RunShard:
    """Load in a further process what the job needs."""
    return partial(job.run, source.load())
