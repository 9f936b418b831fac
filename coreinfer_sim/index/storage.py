"""The files of an index folder: what is in them, and how they are written and read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import faiss
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from coreinfer_sim.base.errors import IndexFormatError
from coreinfer_sim.base.files import flush_to_disk, sha256_of, write_json
from coreinfer_sim.index.clustering import faiss_index
from coreinfer_sim.index.clusters import Cluster
from coreinfer_sim.index.manifest import (
    CENTROIDS_FILE,
    CLUSTERS_FILE,
    MANIFEST_FILE,
    NEURONS_FILE,
    REBUILD,
    FileInfo,
    Manifest,
)

STATISTICS = ("counts", "energy", "activation")
_TYPES = {"U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I32": "<i4", "I64": "<i8", "F32": "<f4", "F64": "<f8"}
"""Safetensors' names of the types that statistics may have, and numpy's."""
_FLAT_HEADER = 45  # bytes before the vectors of a FAISS flat index: kind, dimension, count, flags, metric, length


def read_centroids(folder: Path, n_clusters: int, dimension: int) -> np.ndarray:
    """Read the centroids, [n_clusters, dimension]; size and kind are checked first, so that a strange file is never parsed.

    Raises:
        IndexFormatError: the file is damaged, or holds other centroids.
    """
    path = folder / CENTROIDS_FILE
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
    return np.asarray(index.reconstruct_n(0, n_clusters))


def read_clusters(folder: Path, n_clusters: int) -> list[Cluster]:
    """Read the clusters' descriptions.

    Raises:
        IndexFormatError: the file is damaged, or describes other clusters.
    """
    path = folder / CLUSTERS_FILE
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


def read_statistics(folder: Path, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Map the statistics, each [n_clusters, n_recorded_layers, d_ff]: those of clusters that are never used are not read.

    Raises:
        IndexFormatError: the file is damaged, or holds other shapes.
    """
    path = folder / NEURONS_FILE
    try:
        statistics = _map_arrays(path, STATISTICS)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise IndexFormatError(f"{path} cannot be read ({error}); {REBUILD}.") from error
    for name, values in statistics.items():
        if values.shape != shape:
            raise IndexFormatError(f"{path}: {name} has the shape {values.shape}, expected {shape}; {REBUILD}.")
    return statistics


def _map_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Map arrays of a safetensors file into memory, copied where they are written to.

    Raises:
        SafetensorError: the file is damaged.
        KeyError: it lacks one, or holds values that numpy does not know.
    """
    with safe_open(path, framework="numpy"):  # checks the header
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        name: np.asarray(
            np.memmap(
                path,
                dtype=_TYPES[header[name]["dtype"]],
                mode="c",
                offset=8 + length + header[name]["data_offsets"][0],
                shape=tuple(header[name]["shape"]),
            )
        )
        for name in names
    }


def save_index(
    folder: Path,
    centroids: np.ndarray,
    clusters: Sequence[Cluster],
    statistics: Mapping[str, np.ndarray],
    manifest: Manifest,
) -> Manifest:
    """Write the files of an index, each forced to disk, the manifest last.

    Args:
        folder: where compensated sets are already, if there are any.
        centroids: unit norm, [n_clusters, dim].
        clusters: one entry a cluster.
        statistics: by the names in `STATISTICS`, each [n_clusters, n_recorded_layers, d_ff].
        manifest: whose ``files`` are not looked at.

    Returns:
        The manifest with its ``files``.
    """
    # Made in memory and written by Python, which reports a full disk; FAISS would not.
    (folder / CENTROIDS_FILE).write_bytes(faiss.serialize_index(faiss_index(centroids)).tobytes())
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


def remove_index(folder: Path) -> None:
    """Delete an index, the manifest first, so that what is left of a broken deletion does not load."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder)
