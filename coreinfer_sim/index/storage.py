"""The files of an index folder: what is in them, and how they are written and read."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from safetensors.numpy import save

from coreinfer_sim.base.errors import IndexFormatError
from coreinfer_sim.base.files import flush_to_disk, sha256_of, write_json
from coreinfer_sim.base.plain import plain
from coreinfer_sim.index.clustering import faiss_index
from coreinfer_sim.index.clusters import Cluster
from coreinfer_sim.index.manifest import (
    CENTROIDS_FILE,
    CLUSTERS_FILE,
    HISTOGRAMS_FILE,
    MANIFEST_FILE,
    MAP_FILE,
    NEURONS_FILE,
    REBUILD,
    SUMS_FILE,
    FileInfo,
    Manifest,
)
from coreinfer_sim.index.prompt_map import PromptMap
from coreinfer_sim.index.sums import Sums
from coreinfer_sim.index.verified import NUMPY_TYPES, StoredArray, VerifiedFile

STATISTICS = ("counts", "energy", "activation")
_FLAT_HEADER = 45  # bytes before the vectors of a FAISS flat index: kind, dimension, count, flags, metric, length


def read_centroids(file: VerifiedFile, n_clusters: int, dimension: int) -> np.ndarray:
    """Read the centroids, [n_clusters, dimension]; size and kind are checked first, so that a strange file is never parsed.

    Raises:
        IndexFormatError: the file is damaged, or holds other centroids.
    """
    content, expected = file.read(0, file.size), _FLAT_HEADER + 4 * n_clusters * dimension
    kind = bytes(content[:4])
    if file.size != expected or kind != b"IxFI":
        raise IndexFormatError(
            f"{file.path} has {file.size} bytes of kind {kind!r}, expected a flat inner-product index of "
            f"{expected} bytes for {n_clusters} clusters; {REBUILD}."
        )
    try:
        index = faiss.deserialize_index(np.frombuffer(content, np.uint8))
    except RuntimeError as error:
        raise IndexFormatError(
            f"{file.path} cannot be read ({' '.join(str(error).split())[:200]}); {REBUILD}."
        ) from error
    if (index.ntotal, index.d) != (n_clusters, dimension):
        raise IndexFormatError(
            f"{file.path} holds {index.ntotal} centroids of {index.d} dimensions, expected {n_clusters} of {dimension}; "
            f"{REBUILD}."
        )
    return np.asarray(index.reconstruct_n(0, n_clusters))


def read_clusters(file: VerifiedFile, n_clusters: int) -> list[Cluster]:
    """Read the clusters' descriptions, whose label and exemplars are a stranger's words and made fit to be shown.

    Raises:
        IndexFormatError: the file is damaged, or describes other clusters.
    """
    path, content = file.path, bytes(file.read(0, file.size))
    try:  # splitlines() would also cut at characters inside a text
        clusters = [_cluster(**json.loads(line)) for line in io.StringIO(content.decode("utf-8"), newline=None)]
    except (ValueError, TypeError) as error:
        raise IndexFormatError(f"{path} cannot be read ({error}); {REBUILD}.") from error
    for cluster in clusters:
        if not cluster.similarity_quantiles:
            raise IndexFormatError(f"{path}: cluster {cluster.id} has no similarity quantiles; {REBUILD}.")
    if [cluster.id for cluster in clusters] != list(range(n_clusters)):
        raise IndexFormatError(f"{path} describes {len(clusters)} clusters, expected {n_clusters}; {REBUILD}.")
    return clusters


def _cluster(label: str, exemplars: list[str], **rest: Any) -> Cluster:
    return Cluster(label=plain(label), exemplars=[plain(text) for text in exemplars], **rest)


def read_statistics(file: VerifiedFile, shape: tuple[int, int, int]) -> dict[str, StoredArray]:
    """Find the statistics, each [n_clusters, n_recorded_layers, d_ff]: those of a cluster are read when it is used.

    Raises:
        IndexFormatError: the file is damaged, or holds other shapes.
    """
    tensors, statistics = file.tensors(), {}
    for name in STATISTICS:
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype not in NUMPY_TYPES:
            raise IndexFormatError(f"{file.path} lacks {name}, expected {', '.join(STATISTICS)} as numbers; {REBUILD}.")
        if tensor.shape != shape:
            raise IndexFormatError(f"{file.path}: {name} has the shape {tensor.shape}, expected {shape}; {REBUILD}.")
        statistics[name] = StoredArray(file, tensor)
    return statistics


def read_histograms(file: VerifiedFile, layouts: Sequence[str], n_layers: int) -> dict[str, np.ndarray]:
    """Read the histograms of layouts, each [n_layers, n_bins].

    Raises:
        IndexFormatError: the file is damaged, or holds others.
    """
    tensors = file.tensors()
    if sorted(tensors) != sorted(layouts):
        raise IndexFormatError(f"{file.path} holds {sorted(tensors)}, expected {sorted(layouts)}; {REBUILD}.")
    found = {}
    for name, tensor in tensors.items():
        if (
            tensor.dtype not in NUMPY_TYPES
            or tensor.dtype[0] == "F"
            or len(tensor.shape) != 2
            or tensor.shape[0] != n_layers
        ):
            raise IndexFormatError(
                f"{file.path}: {name} has the shape {tensor.shape} of {tensor.dtype}, expected whole numbers of {n_layers} "
                f"layers; {REBUILD}."
            )
        found[name] = file.array(tensor)
    return found


def save_index(
    folder: Path,
    centroids: np.ndarray,
    clusters: Sequence[Cluster],
    statistics: Mapping[str, np.ndarray] | Sums,
    manifest: Manifest,
    histograms: Mapping[str, np.ndarray] | None = None,
    prompt_map: PromptMap | None = None,
) -> Manifest:
    """Write the files of an index, each forced to disk, the manifest last.

    Args:
        folder: where compensated sets are already, if there are any.
        centroids: unit norm, [n_clusters, dim].
        clusters: one entry a cluster.
        statistics: by the names in `STATISTICS`, each [n_clusters, n_recorded_layers, d_ff], or the exact sums behind them,
            which are then kept as well.
        manifest: whose ``files``, ``histograms`` and ``map`` are not looked at; its ``sums`` say of which corpora those are.
        histograms: of what tokens need, by layout, whole numbers [n_layers, n_bins].
        prompt_map: of the corpus.

    Returns:
        The manifest with these.
    """
    manifest = replace(
        manifest, histograms=sorted(histograms or ()), map=None if prompt_map is None else prompt_map.info()
    )
    if histograms:
        smallest = {name: counts.astype(np.min_scalar_type(int(counts.max()))) for name, counts in histograms.items()}
        (folder / HISTOGRAMS_FILE).write_bytes(save(smallest))
    if prompt_map is not None:
        (folder / MAP_FILE).write_bytes(prompt_map.as_bytes())
    # Made in memory and written by Python, which reports a full disk; FAISS would not.
    (folder / CENTROIDS_FILE).write_bytes(faiss.serialize_index(faiss_index(centroids)).tobytes())
    if isinstance(statistics, Sums):
        (folder / SUMS_FILE).write_bytes(statistics.as_bytes())
        statistics = statistics.statistics()
    (folder / NEURONS_FILE).write_bytes(save({name: np.ascontiguousarray(v) for name, v in statistics.items()}))
    lines = [json.dumps(asdict(cluster), ensure_ascii=False) for cluster in clusters]
    (folder / CLUSTERS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = {}
    for name in manifest.file_names():
        flush_to_disk(folder / name)
        files[name] = FileInfo((folder / name).stat().st_size, sha256_of(folder / name))
    whole = replace(manifest, files=files)
    write_manifest(folder, whole)
    flush_to_disk(folder)
    return whole


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put a manifest in place in one step."""
    write_json(folder / MANIFEST_FILE, manifest.as_dict())
