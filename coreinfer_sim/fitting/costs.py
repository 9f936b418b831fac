"""What the compensation stages of a build take in disk and memory, known before they start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coreinfer_sim.base.settings import CompensationConfig
from coreinfer_sim.fitting.sets import trainings
from coreinfer_sim.fitting.student import checkpoint_bytes, training_bytes
from coreinfer_sim.models.mlps import MLPLayer, dense_bytes


@dataclass(frozen=True)
class CompensationCosts:
    """Bytes that compensation takes, nothing without settings."""

    layers: Sequence[MLPLayer]
    """Those that become sparse."""
    settings: CompensationConfig | None

    def index_disk(self, n_clusters: int) -> int:
        """Return the disk that the sets of an index need."""
        return self._of_cluster() * (n_clusters + 1 if n_clusters > 1 else 1)

    def build_disk(self, n_clusters: int) -> int:
        """Return the disk that is needed beside the sets until the build has ended."""
        if self.settings is None:
            return 0
        n_bytes = 0
        if n_clusters > 1:
            n_bytes += self._moments() * len(self.layers) * len(self.settings.keep_ratios)
        if self.settings.distil_tokens:  # the sets as they were fitted stay until the end
            n_bytes += self.index_disk(n_clusters) + self._of_training(checkpoint_bytes, n_clusters)
        return n_bytes

    def fitting(self) -> int:
        """Return the memory that fitting a set takes beside the model, texts aside: moments, and copies to factor them."""
        return 0 if self.settings is None else 4 * self._moments()

    def training(self, n_clusters: int) -> int:
        """Return the memory that one training takes beside the model, texts aside."""
        return self._of_training(training_bytes, n_clusters)

    def comparing(self) -> int:
        """Return the memory that sets take side by side when they are compared: a cluster's, the corpus's and plain neurons."""
        return 0 if self.settings is None else 3 * int(max(self.settings.keep_ratios) * dense_bytes(self.layers))

    def _of_cluster(self) -> int:
        """Return the disk that one cluster's sets need, of all keep ratios."""
        if self.settings is None:
            return 0
        d_ff, d_model = self.layers[0].d_ff, self.layers[0].d_model
        n_bytes = 0
        for ratio in self.settings.keep_ratios:
            n_kept = int(ratio * d_ff)
            n_bytes += 4 * n_kept + 2 * (n_kept * d_model + d_model)
        return n_bytes * len(self.layers)

    def _moments(self) -> int:
        """Return the bytes of one layer's moments of all neurons."""
        d_ff, d_model = self.layers[0].d_ff, self.layers[0].d_model
        return 4 * d_ff * (d_ff + d_model)

    def _of_training(self, n_bytes: Callable[[Sequence[MLPLayer], float, int], int], n_clusters: int) -> int:
        """Add up over the keep ratios what a training takes of something."""
        if self.settings is None or not self.settings.distil_tokens:
            return 0
        n_sharing = max(map(len, trainings(n_clusters)))
        return sum(n_bytes(self.layers, ratio, n_sharing) for ratio in self.settings.keep_ratios)
