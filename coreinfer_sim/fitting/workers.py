"""Work that is shared: every worker has the same model and corpus, and runs the next open part of a job."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from coreinfer_sim.base.errors import BuildError
from coreinfer_sim.base.processes import (
    LIBRARY_BYTES,
    Finished,
    Report,
    RunShard,
    Watch,
    default_workers,
    run_shards,
    this_worker,
)
from coreinfer_sim.base.progress import Part, Progress
from coreinfer_sim.base.ray_tasks import Needs, RayCluster
from coreinfer_sim.base.rows import load_rows
from coreinfer_sim.base.scale_settings import Executor, ScaleConfig
from coreinfer_sim.base.settings import BuildConfig
from coreinfer_sim.fitting.clustered_corpus import ClusteredCorpus
from coreinfer_sim.index.clustering import Clustering
from coreinfer_sim.models.loading import load_model
from coreinfer_sim.models.sharing import SharedModel, share

SENTENCES_FILE = "corpus.jsonl"
CLUSTERING_FILE = "clustering.npz"
WEIGHTS_FOLDER = "weights"


class Job(Protocol):
    """Numbered parts of a stage, each of which leaves its result in the build folder; picklable."""

    def result(self, corpus: ClusteredCorpus, number: int) -> Path:
        """Return the file that a part leaves, in one step: where it is, the part is finished."""

    def run(self, corpus: ClusteredCorpus, number: int, report: Report) -> None:
        """Do one part.

        Args:
            corpus: of the build.
            number: which part.
            report: takes how many more of the stage's units are done.
        """


@dataclass(frozen=True)
class CorpusSource:
    """Where a further process finds the model and the corpus of a build; picklable."""

    model: str
    dtype: str
    device: str
    folder: Path
    config: BuildConfig
    max_tokens: int
    n_threads: int
    shared: SharedModel | None = None
    """The model, where processes share its weights; None: each loads it."""

    @property
    def shares_weights(self) -> bool:
        """Whether processes of one machine share weights: on CPUs, but for Windows, which removes no file that is mapped."""
        return self.device == "cpu" and os.name != "nt"

    def load(self) -> ClusteredCorpus:
        """Load what the first process has."""
        if not self.folder.is_dir():
            raise BuildError(
                f"{socket.gethostname()} finds no folder {self.folder}, expected the build's, which all workers share; give the "
                "index a place on a file system that every machine has under the same path."
            )
        torch.set_num_threads(self.n_threads)
        shared = self.shared
        language_model = load_model(self.model, self.dtype, self.device) if shared is None else shared.load()
        sentences = load_rows(self.folder / SENTENCES_FILE)
        clustering = read_clustering(self.folder)
        return ClusteredCorpus(language_model, sentences, clustering, self.config, self.max_tokens, self.folder)


def read_clustering(folder: Path) -> Clustering:
    """Read the clustering that a build has left in its folder."""
    with np.load(folder / CLUSTERING_FILE) as arrays:
        return Clustering(**arrays)


@dataclass
class Workers:
    """This process, which has loaded the corpus, and as many further ones as are wanted, here or in a Ray cluster."""

    corpus: ClusteredCorpus
    source: CorpusSource
    progress: Progress
    n_workers: int | None
    """Processes in all; None: as many as fill the cores and fit into memory, or as a Ray cluster has room for."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)

    def __post_init__(self) -> None:
        """Begin without a cluster."""
        self._cluster: RayCluster | None = None

    @contextmanager
    def open(self) -> Iterator[Workers]:
        """Hold what workers share within the block."""
        try:
            yield self
        finally:
            if self._cluster is not None:
                self._cluster.close()

    def run(
        self,
        job: Job,
        title: str,
        unit: str,
        sizes: Mapping[int, int],
        n_rows: Mapping[int, int] | None = None,
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
            n_rows: how many texts each part has, by its number; None: parts are no texts.
            worker_bytes: memory that a further process takes beside the model and the libraries.
            own_bytes: what this process will take beside them.
            alone: whether this process does all parts by itself.
        """
        left = [number for number in sizes if not job.result(self.corpus, number).exists()]
        done = sum(sizes.values()) - sum(sizes[number] for number in left)
        n_workers = 1 if alone else self.n_workers or self._n_fitting(worker_bytes, own_bytes)

        def finished(each: Finished) -> None:
            if each.worker != this_worker():  # which told it bit by bit
                self.progress.advance(sizes[each.number])
            rows = 0 if n_rows is None else n_rows[each.number]
            self.progress.part(Part(each.number, sizes[each.number], rows, each.worker, each.seconds))

        def run(number: int, report: Report) -> None:
            if job.result(self.corpus, number).exists():  # by a worker that was lost just after it had written it
                report(sizes[number])
            else:
                job.run(self.corpus, number, report)

        # what takes long is made ready before the stage begins
        watch, needs, cluster = Watch(self.progress.advance, finished, self.progress.failed), None, None
        helpers: list[Callable[[], RunShard]] = []
        if left and self.scale.executor is Executor.RAY and not alone:
            needs, cluster = self._needs(worker_bytes), self._ray(n_workers)
            n_workers = min(len(left), self.n_workers or cluster.room(needs))
        elif left:
            helpers = self._helpers(job, min(n_workers, len(left)) - 1)
            n_workers = len(helpers) + 1
        self.progress.start(title, sum(sizes.values()), unit, done)
        self.progress.share(n_workers)
        try:
            if cluster is None or needs is None:
                run_shards(left, run, helpers, watch)
            else:
                cluster.run(left, partial(_load, job, self._shared), needs, self.n_workers, watch)
        finally:
            self.progress.finish()

    def _helpers(self, job: Job, n: int) -> list[Callable[[], RunShard]]:
        """Return what makes each of ``n`` further processes of this machine run the job."""
        if not n:
            return []
        devices = (self.scale.devices or (self.source.device,) * (n + 1))[1 : n + 1]
        return [partial(_load, job, replace(self._shared, device=device)) for device in devices]

    def _ray(self, n_workers: int) -> RayCluster:
        if self._cluster is None:
            self._cluster = RayCluster(self.scale.ray_address, n_workers * self.source.n_threads)
        return self._cluster

    def _needs(self, worker_bytes: int) -> Needs:
        """Return what a task on a Ray cluster takes."""
        if self.source.device != "cpu":
            return Needs(self.source.n_threads, self.scale.gpu_share, LIBRARY_BYTES)
        return Needs(self.source.n_threads, 0.0, worker_bytes + self._own_bytes)

    @property
    def _own_bytes(self) -> int:
        """Memory that each worker on CPUs takes whatever it does."""
        shares, model = self.source.shares_weights, self.corpus.language_model.model
        return LIBRARY_BYTES + (0 if shares else int(model.get_memory_footprint()))

    @cached_property
    def _shared(self) -> CorpusSource:
        """The source for further processes, with weights that they share where these lie in the machine's own memory."""
        if not self.source.shares_weights:
            return self.source
        shared = share(self.corpus.language_model, self.source.folder / WEIGHTS_FOLDER)
        if shared is None:
            self.progress.say(
                f"Note: every worker loads {self.source.model} for itself, as it cannot be sent to others."
            )
        return replace(self.source, shared=shared)

    def _n_fitting(self, worker_bytes: int, own_bytes: int) -> int:
        """Return how many processes fill the cores and fit into memory."""
        if self.scale.devices is not None:
            return len(self.scale.devices)
        return default_workers(self.source.device, self.source.n_threads, worker_bytes + self._own_bytes, own_bytes)


@lru_cache(maxsize=1)
def _loaded(source: CorpusSource) -> ClusteredCorpus:
    """Load the corpus once for all stages that a worker process takes part in."""
    return source.load()


def _load(job: Job, source: CorpusSource) -> RunShard:
    """Load in a further process what the job needs."""
    corpus = _loaded(source)

    def run(number: int, report: Report) -> None:
        if not job.result(corpus, number).exists():  # else a worker was lost just after it had written that
            job.run(corpus, number, report)

    return run
