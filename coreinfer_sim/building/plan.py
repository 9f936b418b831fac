"""What a build takes in disk and memory, said and checked before it takes it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coreinfer_sim.base.errors import BuildError, ClusteringError
from coreinfer_sim.base.processes import LIBRARY_BYTES
from coreinfer_sim.base.progress import counted, readable_size
from coreinfer_sim.base.rows import CorpusReport
from coreinfer_sim.base.settings import BuildConfig
from coreinfer_sim.building.folder import SHARDS_FOLDER
from coreinfer_sim.building.refit import refit_disk, refit_memory
from coreinfer_sim.fitting.costs import CompensationCosts
from coreinfer_sim.fitting.pipeline import LARGE_FOLDERS
from coreinfer_sim.fitting.workers import WEIGHTS_FOLDER
from coreinfer_sim.index.clustering import CANDIDATES, clustering_bytes
from coreinfer_sim.models.mlps import MLPLayer

_BYTES_PER_SUM = 3 * 8
_BYTES_PER_PROMPT, _BYTES_PER_TOKEN = 500, 5  # of texts in memory, about
_BYTES_PER_STATISTIC = 4 + 4 + 4 + 2 * 4  # with what float32 leaves of the exact sums of energy and activation, at most


@dataclass(frozen=True)
class BuildPlan:
    """The needs of a build whose corpus has been read."""

    layers: Sequence[MLPLayer]
    """Those that are recorded."""
    config: BuildConfig
    corpus: CorpusReport
    model_bytes: int
    """Of the language model."""
    layout_bytes: int
    """Of its MLPs in the layout in which is measured what tokens need; 0: nothing is measured."""
    shared_bytes: int
    """Of the file from which workers map the model's weights; 0: there is none."""
    dimension: int
    """Of the sentence encoder."""
    n_given: int | None = None
    """Clusters of the index whose centroids are taken; None: new ones are made."""

    @property
    def n_clusters(self) -> int:
        """Number of clusters, at most.

        Raises:
            ClusteringError: more were asked for than the corpus holds prompts.
        """
        wanted, n_sentences = self.config.clusters, self.corpus.n_kept
        if self.n_given is not None:
            return self.n_given
        if isinstance(wanted, str):
            return min(CANDIDATES[-1], max(1, n_sentences // 8))
        if wanted > n_sentences:
            raise ClusteringError(
                f"{counted(wanted, 'cluster')} were asked for, but the corpus holds {counted(n_sentences, 'prompt')}; give "
                "a smaller number of clusters or a larger corpus."
            )
        return wanted

    def describe(self) -> str:
        """Say what the build takes, in one line."""
        n_clusters, costs = self.n_clusters, CompensationCosts(self.layers, self.config.compensation)
        index_bytes, build_bytes = self._disk(n_clusters)
        model_bytes = self.model_bytes + LIBRARY_BYTES
        recording = max(costs.fitting(), costs.training(n_clusters), costs.comparing(), self._fitting())
        recording += n_clusters * self._n_values * (_BYTES_PER_SUM + _BYTES_PER_STATISTIC)
        clustering = clustering_bytes(self.corpus.n_kept, n_clusters, self.dimension)
        texts = _BYTES_PER_PROMPT * self.corpus.n_kept + _BYTES_PER_TOKEN * self.corpus.n_tokens
        memory = model_bytes + texts + max(recording, clustering)
        at_most = "at most " if self.config.clusters == "auto" and self.n_given is None else ""
        return (
            f"Plan: {counted(self.corpus.n_kept, 'prompt')}, {counted(self.corpus.n_tokens, 'token')}, "
            f"{at_most}{counted(n_clusters, 'cluster')}, {counted(self._n_shards, 'shard')}; "
            f"disk {at_most}{readable_size(index_bytes)} for the index and {readable_size(build_bytes)} while building; "
            f"peak memory about {readable_size(memory)} and {readable_size(model_bytes + costs.fitting())} for every further "
            "worker."
        )

    def check_disk(self, n_clusters: int, folder: Path, out: Path) -> None:
        """Refuse a disk that is too small for what this build has not written yet.

        Args:
            n_clusters: of the index.
            folder: of the build.
            out: the index that shall be made.

        Raises:
            BuildError: so it is.
        """
        names = (SHARDS_FOLDER, WEIGHTS_FOLDER, *LARGE_FOLDERS)
        written = (path for name in names for path in (folder / name).rglob("*") if path.is_file())
        taken = sum(path.stat().st_size for path in written)
        free, needed = shutil.disk_usage(folder).free, sum(self._disk(n_clusters)) - taken
        if free < needed:
            raise BuildError(
                f"{readable_size(free)} are free beside {out}, expected {readable_size(needed)}; free some space, or start "
                "anew with fewer clusters."
            )

    def _fitting(self) -> int:
        """Return the memory that measuring what tokens need takes, and fitting rows to it."""
        return self.layout_bytes + refit_memory(self.layers, self.config)

    @property
    def _n_shards(self) -> int:
        return -(-self.corpus.n_kept // self.config.shard_size)

    @property
    def _n_values(self) -> int:
        """Values of one statistic of one cluster."""
        return len(self.layers) * self.layers[0].d_ff

    def _disk(self, n_clusters: int) -> tuple[int, int]:
        """Return the bytes that the index takes, and what the build takes beside it until its end."""
        costs = CompensationCosts(self.layers, self.config.compensation)
        rows = refit_disk(self.layers, self.config)
        return (
            n_clusters * self._n_values * _BYTES_PER_STATISTIC + costs.index_disk(n_clusters) + rows,
            (self._n_shards + n_clusters) * self._n_values * _BYTES_PER_SUM
            + costs.build_disk(n_clusters)
            + rows
            + self.shared_bytes
            + 4 * self.corpus.n_kept * self.dimension,
        )
