"""SemanticIndex: the folder that a build leaves, and the lookups that decode needs."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import overload

import faiss
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import save
from safetensors.torch import load_file

from coreinfer_sim.base.errors import ConfigError, IndexFormatError, IndexMismatchError
from coreinfer_sim.base.files import flush_to_disk, sha256_of, write_json
from coreinfer_sim.base.memory import give_back_memory
from coreinfer_sim.base.settings import UNFAMILIAR, Score, check_ratio, layers_slice, parse_layers
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.choosing.statistics import n_kept, top_ids
from coreinfer_sim.index.clustering import faiss_index, nearest
from coreinfer_sim.index.compensated import StoredCompensation, load_compensated
from coreinfer_sim.index.encoder import SentenceEncoder
from coreinfer_sim.index.manifest import (
    CENTROIDS_FILE,
    CLUSTERS_FILE,
    INDEX_FILES,
    MANIFEST_FILE,
    NEURONS_FILE,
    REBUILD,
    FileInfo,
    Manifest,
    ProfileInfo,
    check_file,
    check_files,
    compensation_file,
    holds_sets,
    read_manifest,
)
from coreinfer_sim.models.mlps import MLPLayer, check_same_weights

STATISTICS = ("counts", "energy", "activation")
_RANKED_BY = {Score.ENERGY: "energy", Score.PAPER: "counts"}
_FLAT_HEADER = 45  # bytes before the vectors of a FAISS flat index: kind, dimension, count, flags, metric, length


@dataclass(frozen=True)
class Cluster:
    """What a person wants to know of one semantic cluster."""

    id: int
    size: int
    """Number of sentences."""
    n_tokens: int
    label: str
    """Distinctive terms."""
    exemplars: list[str]
    """Beginnings of the prompts nearest to the centroid."""
    exemplar_ids: list[str]
    """Their ids in the corpus."""
    similarity_quantiles: dict[str, float]
    """Quantiles of the members' cosine similarity to the centroid."""

    def confidence(self, similarity: float) -> float:
        """Return the share of the members that are as far from the others' centroid or farther, in [0, 1].

        It is interpolated between the quantiles, and 0 for a prompt farther away than every member.
        """
        # quantiles are stored with four decimals, and a member must not be farther away than itself
        return float(np.interp(round(similarity, 4), *self._quantiles))

    @cached_property
    def _quantiles(self) -> tuple[np.ndarray, np.ndarray]:
        """The quantiles of the members' similarity to the centroid of the others, and their levels, ascending.

        A member pulls the centroid towards itself, which a new prompt does not; in a small cluster every fifth would
        seem unfamiliar. With the sum S of n members, all unit vectors, and a member's similarity s to S / ‖S‖, its
        similarity to the others' centroid is (s‖S‖ − 1) / ‖S − x‖, where ‖S − x‖² = ‖S‖² − 2s‖S‖ + 1; and ‖S‖ is n times
        the mean similarity, the integral over the quantiles.
        """
        levels, values = (
            np.array([float(v) for v in side])
            for side in (self.similarity_quantiles, self.similarity_quantiles.values())
        )
        norm = self.size * float((np.diff(levels) * (values[1:] + values[:-1]) / 2).sum())
        if norm > 1:  # else there are no others
            values = (values * norm - 1) / np.sqrt(np.maximum(norm**2 - 2 * values * norm + 1, 1e-12))
        return values, levels


@dataclass(frozen=True)
class Match:
    """One cluster near a prompt."""

    cluster: int
    similarity: float
    label: str
    confidence: float = 1.0
    """Share of the cluster's own prompts that are as far from it or farther; see `Cluster.confidence`."""

    @property
    def confident(self) -> bool:
        """Whether the prompt is familiar: its confidence is at least 5 %, config's ``UNFAMILIAR``."""
        return self.confidence >= UNFAMILIAR


class SemanticIndex:
    """Semantic clusters with their core-neuron statistics."""

    def __init__(
        self,
        manifest: Manifest,
        centroids: np.ndarray,
        clusters: Sequence[Cluster],
        statistics: Mapping[str, np.ndarray],
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
        self._searcher = faiss_index(centroids)
        self._encoder = encoder
        self.keeps_encoder = True
        """Whether the encoder stays in memory after a lookup; one that was not given is loaded again when it is needed."""

    @classmethod
    def load(cls, path: str | Path, encoder: SentenceEncoder | None = None) -> SemanticIndex:
        """Load an index after its sizes and checksums have been verified.

        Args:
            path: the index folder.
            encoder: embeds prompts; None loads the manifest's encoder when it is first needed.

        Raises:
            IndexFormatError: no index, damaged, or of another format version.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        check_files(folder, manifest, INDEX_FILES)  # those of compensated sets follow when they are read
        settings, model = manifest.settings, manifest.model
        centroids = _read_centroids(folder / CENTROIDS_FILE, settings.n_clusters, manifest.encoder.dimension)
        shape = (settings.n_clusters, len(settings.layers), model.d_ff)
        return cls(
            manifest,
            centroids,
            _read_clusters(folder / CLUSTERS_FILE, settings.n_clusters),
            _read_statistics(folder / NEURONS_FILE, shape),
            name=str(path),
            encoder=encoder,
            folder=folder,
        )

    def __len__(self) -> int:
        """Return the number of clusters."""
        return len(self.clusters)

    @cached_property
    def encoder(self) -> SentenceEncoder:
        """The sentence encoder, checked to be the one that the index was built with."""
        encoder = self._encoder or SentenceEncoder(self.manifest.encoder.name)
        if encoder.dimension != self.manifest.encoder.dimension:
            raise IndexMismatchError(
                f"the encoder {encoder.name} gives {encoder.dimension} dimensions, {self.name} was built with "
                f"{self.manifest.encoder.dimension}; use {self.manifest.encoder.name}."
            )
        encoder.check_probe(self.manifest.encoder.probe, self.name)
        return encoder

    @overload
    def lookup(self, text: str, k: int = 1) -> list[Match]: ...
    @overload
    def lookup(self, text: list[str], k: int = 1) -> list[list[Match]]: ...
    def lookup(self, text: str | list[str], k: int = 1) -> list[Match] | list[list[Match]]:
        """Return the ``k`` semantic clusters nearest to a prompt, or to each of several, best first."""
        if isinstance(text, str):
            return self.lookup([text], k)[0]
        embeddings = self.encoder.encode(text)
        if not self.keeps_encoder:
            del self.encoder
            gc.collect()  # modules refer to one another
            give_back_memory()
        return self.lookup_embeddings(embeddings, k)

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
        """Return a cluster's core neurons C^γ.

        Args:
            cluster: its number; None takes all clusters together.
            keep_ratio: share of d_ff that is kept; None takes that of `wanted_sets` without compensation.
            score: energy, or the paper's count of sentences.
            layers: slice of the model's layers, such as ``4:``.

        Returns:
            Ascending ids [n_kept] by layer number.
        """
        if cluster is not None:
            self.check_cluster(cluster)
        values, ties = self.statistics(cluster, score)
        keep_ratio, _ = self.wanted_sets(keep_ratio, compensated=False)
        check_ratio("keep ratio", keep_ratio)
        n = n_kept(keep_ratio, self.manifest.model.d_ff)
        return {
            layer: torch.from_numpy(top_ids(values[row], ties[row], n))
            for layer, row in self.rows_of_layers(layers).items()
        }

    def check_cluster(self, cluster: int) -> None:
        """Raise ConfigError for a number that is no cluster's."""
        if not 0 <= cluster < len(self):
            raise ConfigError(f"the cluster is {cluster}, expected 0 to {len(self) - 1} in {self.name}.")

    @property
    def recorded(self) -> str:
        """The layers that are in the index, as a slice."""
        return layers_slice(self.manifest.settings.layers)

    def rows_of_layers(self, layers: str = ":") -> dict[int, int]:
        """Return the row of each layer of a slice in the statistics.

        Raises:
            ConfigError: the slice names no layer, or one that was not recorded.
        """
        settings, model = self.manifest.settings, self.manifest.model
        wanted = set(parse_layers(layers, model.n_layers))
        if not wanted:
            raise ConfigError(f"layers is {layers!r}, which names none of the model's {model.n_layers} layers.")
        missing = wanted - set(settings.layers)
        if missing:
            raise ConfigError(
                f"layers {sorted(missing)} were not recorded in {self.name}, which holds {settings.layers}; name fewer "
                f"with --layers, or {REBUILD}."
            )
        return {layer: row for row, layer in enumerate(settings.layers) if layer in wanted}

    def statistics(self, cluster: int | None, score: Score | str = Score.ENERGY) -> tuple[np.ndarray, np.ndarray]:
        """Return what ranks a cluster's neurons, and the summed activation, which breaks ties.

        Args:
            cluster: its number; None sums over all clusters.
            score: energy, or the paper's count of sentences.

        Returns:
            Two arrays [n_recorded_layers, d_ff].
        """
        return self._statistic(_RANKED_BY[Score(score)], cluster), self._statistic("activation", cluster)

    def _statistic(self, name: str, cluster: int | None) -> np.ndarray:
        values = self._statistics[name]
        if cluster is not None:
            return values[cluster]
        return values.sum(axis=0, dtype=np.int64 if values.dtype.kind in "iu" else np.float64)

    def selection(
        self,
        match: Match,
        keep_ratio: float | None = None,
        score: Score | str = Score.ENERGY,
        layers: str = ":",
        compensated: bool = True,
    ) -> NeuronSelection:
        """Return the core neurons of a match's cluster as a selection.

        Args:
            match: of a prompt.
            keep_ratio: share that is kept; None takes that of `wanted_sets`.
            score: energy, or the paper's count of sentences.
            layers: slice of the model's layers.
            compensated: take the compensated set if the index holds one of this keep ratio (then ``score`` does not
                matter, unless it is the paper's, which is never compensated) and the profile, where its keep ratio is
                taken, is not of plain sets.
        """
        found = self.cluster_selection(match.cluster, keep_ratio, score, layers, compensated)
        return replace(found, similarity=match.similarity, confidence=match.confidence)

    def cluster_selection(
        self,
        cluster: int,
        keep_ratio: float | None = None,
        score: Score | str = Score.ENERGY,
        layers: str = ":",
        compensated: bool = True,
    ) -> NeuronSelection:
        """Return a cluster's set without a prompt; arguments as for `selection`."""
        self.check_cluster(cluster)
        found = self._selection(cluster, keep_ratio, score, layers, compensated)
        return replace(found, mode="similarity", cluster=cluster, label=self.clusters[cluster].label)

    def global_selection(
        self,
        keep_ratio: float | None = None,
        score: Score | str = Score.ENERGY,
        layers: str = ":",
        compensated: bool = True,
    ) -> NeuronSelection:
        """Return one set for all prompts, from the whole corpus; arguments as for `selection`."""
        return replace(self._selection(None, keep_ratio, score, layers, compensated), mode="global")

    def _selection(
        self, cluster: int | None, keep_ratio: float | None, score: Score | str, layers: str, compensated: bool
    ) -> NeuronSelection:
        keep_ratio, compensated = self.wanted_sets(keep_ratio, compensated and Score(score) is Score.ENERGY)
        if compensated:
            wanted = self.rows_of_layers(layers)
            ids, repairs = self._compensated(keep_ratio, cluster)
            return NeuronSelection(
                "compensated",
                {layer: ids[layer] for layer in ids if layer in wanted},
                compensation=repairs.only(wanted),
            )
        return NeuronSelection("statistics", self.core_neurons(cluster, keep_ratio, score, layers))

    def write_profile(self, profile: ProfileInfo) -> None:
        """Put a profile into the index folder's manifest, in one step."""
        assert self._folder is not None
        self.manifest = replace(self.manifest, profile=profile)
        write_json(self._folder / MANIFEST_FILE, self.manifest.as_dict())

    def wanted_sets(self, keep_ratio: float | None = None, compensated: bool = True) -> tuple[float, bool]:
        """Return the keep ratio that decodes, and whether compensated sets do.

        Args:
            keep_ratio: None takes the profile's, or where there is none, that of the first compensated sets or the build's γ.
            compensated: False: plain sets, of which None takes the profile's if that is of such, else γ.
        """
        if keep_ratio is not None:
            return keep_ratio, compensated and self.has_compensation(keep_ratio)
        profile, fitted = self.manifest.profile, self.manifest.compensation
        if profile is not None and (compensated or not profile.compensated):
            return profile.keep_ratio, profile.compensated
        if compensated and fitted:
            return fitted[0].keep_ratio, True
        return self.manifest.settings.gamma, False

    def has_compensation(self, keep_ratio: float) -> bool:
        """Return whether the index holds compensated sets of this keep ratio."""
        return holds_sets(self.manifest.compensation, keep_ratio)

    def fitted_neurons(self, keep_ratio: float) -> list[int] | None:
        """Return how many neurons of each layer the compensated sets of this keep ratio hold; None if there are none."""
        found = (info for info in self.manifest.compensation if math.isclose(info.keep_ratio, keep_ratio))
        return next((info.n_kept for info in found), None)

    def warm_up(self, routed: bool = True) -> None:
        """Do once, for nothing, what the first prompt would, so that memory is measured with what that takes."""
        if routed:
            self.lookup("Hello.")
        self.core_neurons(0)

    def _compensated(
        self, keep_ratio: float, cluster: int | None
    ) -> tuple[dict[int, torch.Tensor], StoredCompensation]:
        """Read a compensated set, whose checksum is verified first."""
        assert self._folder is not None
        model = self.manifest.model
        name = compensation_file(keep_ratio, cluster)
        check_file(self._folder, self.manifest, name)
        return load_compensated(self._folder / name, model.d_model, model.n_layers)

    def check_model(self, layers: Sequence[MLPLayer], tokenizer_sha256: str | None = None) -> None:
        """Raise IndexMismatchError unless these are the MLPs (and tokenizer) that the index was built from."""
        model = self.manifest.model
        command = "coreinfer-sim build-index"
        found = (layers[0].family.name, len(layers), layers[0].d_model, layers[0].d_ff)
        expected = (model.family, model.n_layers, model.d_model, model.d_ff)
        if found != expected:
            raise IndexMismatchError(
                f"the model is {_shape_text(*found)}, but {self.name} was built from {model.name}, {_shape_text(*expected)}; "
                f"use that model, or build an index for this one: {command}"
            )
        check_same_weights(model.weight_sketch, layers, f"{self.name} ({model.name})", command)
        if tokenizer_sha256 is not None and tokenizer_sha256 != model.tokenizer_sha256:
            raise IndexMismatchError(
                f"the tokenizer's vocabulary ({tokenizer_sha256[:12]}…) is not the one {self.name} was built with "
                f"({model.tokenizer_sha256[:12]}…); use the tokenizer of {model.name}."
            )


def _shape_text(family: str, n_layers: int, d_model: int, d_ff: int) -> str:
    return f"{family} with {n_layers} layers, d_model {d_model}, d_ff {d_ff}"


def _read_centroids(path: Path, n_clusters: int, dimension: int) -> np.ndarray:
    """Read the centroids; the file's size and kind are checked first, so that a strange file is never parsed."""
    expected = _FLAT_HEADER + 4 * n_clusters * dimension
    with path.open("rb") as file:
        kind = file.read(4)
    if path.stat().st_size != expected or kind != b"IxFI":
        raise IndexFormatError(
            f"{path} has {path.stat().st_size} bytes of kind {kind!r}, expected a flat inner-product index of "
            f"{expected} bytes for {n_clusters} clusters; {REBUILD}."
        )
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise IndexFormatError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}); {REBUILD}.") from error
    if (index.ntotal, index.d) != (n_clusters, dimension):
        raise IndexFormatError(
            f"{path} holds {index.ntotal} centroids of {index.d} dimensions, expected {n_clusters} of {dimension}; "
            f"{REBUILD}."
        )
    return index.reconstruct_n(0, n_clusters)


def _read_clusters(path: Path, n_clusters: int) -> list[Cluster]:
    try:
        with path.open(encoding="utf-8") as file:  # splitlines() would also cut at characters inside a text
            clusters = [Cluster(**json.loads(line)) for line in file]
    except (ValueError, TypeError) as error:
        raise IndexFormatError(f"{path} cannot be read ({error}); {REBUILD}.") from error
    for cluster in clusters:
        if not cluster.similarity_quantiles:
            raise IndexFormatError(f"{path}: cluster {cluster.id} has no similarity quantiles; {REBUILD}.")
    if [cluster.id for cluster in clusters] != list(range(n_clusters)):
        raise IndexFormatError(f"{path} describes {len(clusters)} clusters, expected {n_clusters}; {REBUILD}.")
    return clusters


def _read_statistics(path: Path, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    try:
        tensors = load_file(path)  # mapped: of the clusters that are never asked for, nothing is read
        statistics = {name: tensors[name].numpy() for name in STATISTICS}
    except (SafetensorError, OSError, KeyError) as error:
        raise IndexFormatError(f"{path} cannot be read ({error}); {REBUILD}.") from error
    for name, values in statistics.items():
        if values.shape != shape:
            raise IndexFormatError(f"{path}: {name} has the shape {values.shape}, expected {shape}; {REBUILD}.")
    return statistics


def save_parts(
    folder: Path,
    centroids: np.ndarray,
    clusters: Sequence[Cluster],
    statistics: Mapping[str, np.ndarray],
    manifest_without_files: Manifest,
) -> Manifest:
    """Write an index folder's files, each forced to disk, the manifest last, and return the whole manifest."""
    # Made in memory and written by Python, which reports a full disk; FAISS would not.
    (folder / CENTROIDS_FILE).write_bytes(faiss.serialize_index(faiss_index(centroids)).tobytes())
    (folder / NEURONS_FILE).write_bytes(save({name: np.ascontiguousarray(v) for name, v in statistics.items()}))
    lines = [json.dumps(asdict(cluster), ensure_ascii=False) for cluster in clusters]
    (folder / CLUSTERS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = {}
    for name in manifest_without_files.file_names():
        flush_to_disk(folder / name)
        files[name] = FileInfo((folder / name).stat().st_size, sha256_of(folder / name))
    manifest = Manifest(**{**vars(manifest_without_files), "files": files})
    write_json(folder / MANIFEST_FILE, manifest.as_dict())
    flush_to_disk(folder)
    return manifest


def remove_index(folder: Path) -> None:
    """Delete an index, the manifest first, so that what is left of a broken deletion does not load."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder)
