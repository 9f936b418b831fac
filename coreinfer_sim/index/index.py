"""SemanticIndex: the folder that a build leaves, and the lookups that decode needs."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

from coreinfer_sim.base.errors import ConfigError, IndexFormatError, IndexMismatchError
from coreinfer_sim.base.files import check_folder
from coreinfer_sim.base.memory import give_back_memory
from coreinfer_sim.base.settings import Score, check_ratio, layers_slice, members_within
from coreinfer_sim.index.checks import read_manifest, verified_files
from coreinfer_sim.index.clustering import nearest, searcher
from coreinfer_sim.index.clusters import Cluster, Match
from coreinfer_sim.index.encoder import SentenceEncoder
from coreinfer_sim.index.manifest import (
    CENTROIDS_FILE,
    CLUSTERS_FILE,
    INDEX_FILES,
    MANIFEST_FILE,
    NEURONS_FILE,
    REBUILD,
    Manifest,
    ProfileInfo,
    compensation_file,
)
from coreinfer_sim.index.names import check_no_own_demo, copy_demo, folder_of, is_ready_made
from coreinfer_sim.index.optional_parts import OptionalParts
from coreinfer_sim.index.places import find
from coreinfer_sim.index.ranking import n_kept, top_ids
from coreinfer_sim.index.remote import check_no_copy
from coreinfer_sim.index.storage import read_centroids, read_clusters, read_statistics, write_manifest
from coreinfer_sim.index.verified import StoredArray

if TYPE_CHECKING:  # an index is looked up and described without torch
    import torch

    from coreinfer_sim.index.compensated import StoredCompensation

_RANKED_BY = {Score.ENERGY: "energy", Score.PAPER: "counts"}


class SemanticIndex(OptionalParts):
    """Semantic clusters with their core-neuron statistics."""

    def __init__(
        self,
        manifest: Manifest,
        centroids: np.ndarray,
        clusters: Sequence[Cluster],
        statistics: Mapping[str, np.ndarray | StoredArray],
        name: str = "the index",
        encoder: SentenceEncoder | None = None,
        folder: Path | None = None,
    ) -> None:
        """Put an index together from its parts; `load` is the usual way.

        Args:
            manifest: what it was built from.
            centroids: unit norm, [n_clusters, dim].
            clusters: one entry a cluster.
            statistics: "counts", "energy" and "activation", each [n_clusters, n_recorded_layers, d_ff].
            name: for messages.
            encoder: embeds prompts; None loads the manifest's encoder when it is first needed.
            folder: where the compensated sets are, if there are any.
        """
        self.manifest = manifest
        self._folder = folder
        self.clusters = list(clusters)
        self.name = name
        self._statistics = statistics
        self.centroids = centroids
        self._searcher = searcher(centroids)
        self._encoder = encoder
        self._of_corpus: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.keeps_encoder = True
        """Whether the encoder stays in memory after a lookup; one that was not given is loaded again when it is needed."""

    @classmethod
    def load(cls, path: str | Path, encoder: SentenceEncoder | None = None) -> SemanticIndex:
        """Load an index after its sizes and checksums have been verified.

        Args:
            path: the index folder, or the name of an index; see `folder_of`.
            encoder: embeds prompts; None loads the manifest's encoder when it is first needed.

        Raises:
            IndexFormatError: no index, damaged, or of another format version.
        """
        folder = Path(os.path.realpath(folder_of(path)))  # the same one, whatever becomes of the working directory
        manifest = read_manifest(folder)
        files = verified_files(folder, manifest, INDEX_FILES)  # those of compensated sets follow when they are read
        settings, model = manifest.settings, manifest.model
        centroids = read_centroids(files[CENTROIDS_FILE], settings.n_clusters, manifest.encoder.dimension)
        shape = (settings.n_clusters, len(settings.layers), model.d_ff)
        return cls(
            manifest,
            centroids,
            read_clusters(files[CLUSTERS_FILE], settings.n_clusters),
            read_statistics(files[NEURONS_FILE], shape),
            name=str(path),
            encoder=encoder,
            folder=folder,
        )

    @property
    def folder(self) -> Path:
        """The folder that it was loaded from."""
        assert self._folder is not None
        return self._folder

    @property
    def model_place(self) -> str:
        """Where the model lies that the index was built from; its name on the hub, if it came from there.

        Raises:
            MissingModelError: it is not to be found.
        """
        return find(self.manifest.model, self._folder, self.name)

    def __len__(self) -> int:
        """Return the number of clusters."""
        return len(self.clusters)

    @cached_property
    def encoder(self) -> SentenceEncoder:
        """The sentence encoder, checked to be the one that the index was built with."""
        encoder = self._encoder or SentenceEncoder(find(self.manifest.encoder, self._folder, self.name))
        self.check_encoder(encoder)
        return encoder

    def check_encoder(self, encoder: SentenceEncoder) -> None:
        """Raise IndexMismatchError unless an encoder is the one that the index was built with."""
        if encoder.dimension != self.manifest.encoder.dimension:
            raise IndexMismatchError(
                f"the encoder {encoder.name} gives {encoder.dimension} dimensions, {self.name} was built with "
                f"{self.manifest.encoder.dimension}; use {self.manifest.encoder.name}."
            )
        encoder.check_probe(self.manifest.encoder.probe, self.name)

    @overload
    def lookup(self, text: str, k: int = 1) -> list[Match]: ...
    @overload
    def lookup(self, text: list[str], k: int = 1) -> list[list[Match]]: ...
    def lookup(self, text: str | list[str], k: int = 1) -> list[Match] | list[list[Match]]:
        """Return the ``k`` semantic clusters nearest to a prompt, or to each of several, best first."""
        if isinstance(text, str):
            return self.lookup([text], k)[0]
        return self.lookup_embeddings(self._embed(text), k)

    def _embed(self, texts: list[str]) -> np.ndarray:
        embeddings = self.encoder.encode(texts)
        if not self.keeps_encoder:
            del self.encoder
            gc.collect()  # modules refer to one another
            give_back_memory()
        return embeddings

    def lookup_embeddings(self, embeddings: np.ndarray, k: int = 1) -> list[list[Match]]:
        """Return the nearest clusters of unit vectors [n, dim]."""
        if not 1 <= k <= len(self):
            raise ConfigError(f"k is {k}, expected 1 to {len(self)}, the number of clusters in {self.name}.")
        similarities, numbers = nearest(self._searcher, embeddings, k)
        return [
            [
                Match(int(c), float(s), self.clusters[c].label, self.clusters[c].confidence(float(s)))
                for s, c in zip(*row, strict=True)
            ]
            for row in zip(similarities, numbers, strict=True)
        ]

    def core_neurons(
        self,
        cluster: int | None,
        keep_ratio: float | None = None,
        score: Score | str = Score.ENERGY,
        layers: str = ":",
    ) -> dict[int, torch.Tensor]:
        """Return a cluster's core neurons C^γ (CoreInfer, arXiv 2410.18311).

        Args:
            cluster: its number; None sums over all clusters.
            keep_ratio: share of d_ff that is kept; None uses `Manifest.plain_keep_ratio`.
            score: energy, or the paper's count of sentences.
            layers: slice of the model's layers, such as ``4:``.

        Returns:
            Ascending ids [n_kept] by layer number; an expert that no text of the corpus has reached is not named.
        """
        import torch

        if cluster is not None:
            self.check_cluster(cluster)
        values, ties = self.statistics(cluster, score)
        if keep_ratio is None:
            keep_ratio = self.manifest.plain_keep_ratio
        check_ratio("keep ratio", keep_ratio)
        n = n_kept(keep_ratio, self.manifest.model.d_ff)
        reached = self._reached(values, ties)
        return {
            layer: torch.from_numpy(top_ids(values[row], ties[row], n))
            for layer, row in self.rows_of_layers(layers).items()
            if reached[row]
        }

    def check_cluster(self, cluster: int) -> None:
        """Raise ConfigError for a number that is no cluster's."""
        if not 0 <= cluster < len(self):
            raise ConfigError(f"the cluster is {cluster}, expected 0 to {len(self) - 1} in {self.name}.")

    @property
    def recorded(self) -> str:
        """The layers that are in the index, as a slice."""
        blocks = self.manifest.model.blocks
        numbers = sorted(set(blocks))
        recorded = {blocks[each] for each in self.manifest.settings.layers}
        return layers_slice([place for place, number in enumerate(numbers) if number in recorded])

    def rows_of_layers(self, layers: str = ":") -> dict[int, int]:
        """Return the row of each layer of a slice in the statistics, of a mixture that of each of its experts.

        Raises:
            ConfigError: the slice names no layer, or one that was not recorded.
        """
        settings, model = self.manifest.settings, self.manifest.model
        blocks = model.blocks
        wanted = set(members_within(layers, blocks))
        if not wanted:
            raise ConfigError(f"layers is {layers!r}, which names none of the model's {len(set(blocks))} layers.")
        missing = wanted - set(settings.layers)
        if missing:
            lacks, held = (sorted({blocks[each] for each in found}) for found in (missing, settings.layers))
            raise ConfigError(
                f"layers {lacks} were not recorded in {self.name}, which holds {held}; name fewer in "
                f"layers, or {REBUILD}."
            )
        return {layer: row for row, layer in enumerate(settings.layers) if layer in wanted}

    def statistics(self, cluster: int | None, score: Score | str = Score.ENERGY) -> tuple[np.ndarray, np.ndarray]:
        """Return what ranks a cluster's neurons, and the summed activation, which breaks ties.

        Of an expert that no text of the cluster has reached, it is the whole corpus's.

        Args:
            cluster: its number; None sums over all clusters.
            score: energy, or the paper's count of sentences.

        Returns:
            Two arrays [n_recorded_layers, d_ff].
        """
        name = _RANKED_BY[Score(score)]
        own = self._statistic(name, cluster), self._statistic("activation", cluster)
        unused = ~self._reached(*own)[:, None]
        if cluster is None or not unused.any():
            return own
        if name not in self._of_corpus:
            self._of_corpus[name] = self.statistics(None, score)
        values, ties = (np.where(unused, *pair) for pair in zip(self._of_corpus[name], own, strict=True))
        return values, ties

    def _reached(self, values: np.ndarray, ties: np.ndarray) -> np.ndarray:
        """Return to which rows of statistics tokens have come, boolean [n_recorded_layers]: to all but some experts."""
        if self.manifest.model.places is None:
            return np.ones(len(values), bool)
        reached: np.ndarray = np.logical_or(values.any(axis=1), ties.any(axis=1))
        return reached

    def _statistic(self, name: str, cluster: int | None) -> np.ndarray:
        values = self._statistics[name]
        if cluster is not None:
            return np.asarray(values[cluster])
        total = np.zeros(values.shape[1:], np.int64 if values.dtype.kind in "iu" else np.float64)
        for number in range(len(values)):
            total += values[number]
        return total

    def check_writable(self) -> None:
        """Raise ConfigError unless `write_profiles` may write where the profiles are to go."""
        if is_ready_made(self.folder):
            check_no_own_demo()
        else:
            check_no_copy(self.folder, self.name)
            check_folder(self.folder / MANIFEST_FILE)

    def write_profiles(self, profiles: Mapping[str, ProfileInfo]) -> None:
        """Put profiles into the index folder's manifest, in one step.

        The index that comes with the package stays as it is: the user gets a copy of it, which from then on bears its name.

        Args:
            profiles: by the names of `Profile`, but for exact.

        Raises:
            ConfigError: there is such a copy by now.
            IndexFormatError: the folder holds another index by now.
        """
        found = read_manifest(self.folder)
        if found.identity() != self.manifest.identity():
            raise IndexFormatError(
                f"{self.name} holds another index than the one that was loaded; run the same command again for that."
            )
        if is_ready_made(self.folder):
            self._folder = copy_demo()
        self.manifest = replace(self.manifest, profiles=dict(profiles))
        write_manifest(self.folder, self.manifest)

    def warm_up(self, routed: bool = True) -> None:
        """Do once, for nothing, what the first prompt would, so that memory is measured with what that takes."""
        if routed:
            self.lookup("Hello.")
        self.core_neurons(0, layers=self.recorded)

    def compensated_set(
        self, keep_ratio: float, cluster: int | None
    ) -> tuple[dict[int, torch.Tensor], StoredCompensation]:
        """Read a compensated set, whose checksum is verified first.

        Args:
            keep_ratio: of which there are compensated sets; see `Manifest.holds_sets`.
            cluster: its number; None means the whole corpus.

        Returns:
            Ascending ids [n_kept] by layer number, and the layers' compensation.

        Raises:
            IndexFormatError: the file is damaged.
        """
        from coreinfer_sim.index.compensated import load_compensated

        assert self._folder is not None
        model = self.manifest.model
        name = compensation_file(keep_ratio, cluster)
        return load_compensated(self._folder / name, model.d_model, model.n_layers, self.manifest.files[name])
