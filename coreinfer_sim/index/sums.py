"""The exact sums of an index, by which indexes are added up: what float32 leaves of them, and the members' similarities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import save

from coreinfer_sim.base.errors import IndexFormatError
from coreinfer_sim.index.manifest import REBUILD
from coreinfer_sim.index.verified import NUMPY_TYPES, VerifiedFile

ENERGY_UNIT = 2.0**-30
ACTIVATION_UNIT = 2.0**-16
_UNITS = {"energy": ENERGY_UNIT, "activation": ACTIVATION_UNIT}


@dataclass(frozen=True)
class Sums:
    """Exact sums of all clusters; the first three are int64 [n_clusters, n_recorded_layers, d_ff]."""

    counts: np.ndarray
    """Sentences whose C_α^β holds the neuron."""
    energy: np.ndarray
    """In units of 2^-30."""
    activation: np.ndarray
    """In units of 2^-16."""
    similarity: np.ndarray
    """Cosine similarity of each sentence to its centroid, by cluster, in each the highest first, float32 [n_sentences]."""

    def statistics(self) -> dict[str, np.ndarray]:
        """Return what an index ranks neurons by: counts in the smallest type, energy and activation in float32."""
        found = {"counts": self.counts.astype(np.min_scalar_type(int(self.counts.max(initial=0))))}
        return found | {name: (getattr(self, name) * unit).astype(np.float32) for name, unit in _UNITS.items()}

    def as_bytes(self) -> bytes:
        """Return as a safetensors file what `statistics` leaves out."""
        statistics = self.statistics()
        tensors = {name: _smallest(getattr(self, name) - _whole(statistics[name], name)) for name in _UNITS}
        content: bytes = save({**tensors, "similarity": np.ascontiguousarray(self.similarity, np.float32)})
        return content


def read_sums(file: VerifiedFile, statistics: Mapping[str, np.ndarray], n_sentences: int) -> Sums:
    """Read the sums of an index.

    Args:
        file: what `Sums.as_bytes` has made.
        statistics: of the index, whole.
        n_sentences: of its corpus.

    Raises:
        IndexFormatError: the file is damaged, or of other shapes.
    """
    tensors, shape = file.tensors(), statistics["energy"].shape
    found = {name: tensor.shape for name, tensor in tensors.items()}
    expected = {"energy": shape, "activation": shape, "similarity": (n_sentences,)}
    numbers = all(tensor.dtype in NUMPY_TYPES for tensor in tensors.values())
    if found != expected or not numbers:
        raise IndexFormatError(f"{file.path} holds {found}, expected {expected} as numbers; {REBUILD}.")
    energy, activation = (_whole(statistics[name], name) + file.array(tensors[name]) for name in _UNITS)
    return Sums(statistics["counts"].astype(np.int64), energy, activation, file.array(tensors["similarity"]))


def _whole(values: np.ndarray, name: str) -> np.ndarray:
    """Return float32 sums in their units as int64: powers of two, so that nothing is rounded."""
    return np.asarray((values.astype(np.float64) / _UNITS[name]).astype(np.int64))


def _smallest(values: np.ndarray) -> np.ndarray:
    """Return whole numbers in the smallest signed type that holds them."""
    least, most = int(values.min(initial=0)), int(values.max(initial=0))
    kinds = (np.int8, np.int16, np.int32)
    return values.astype(
        next((kind for kind in kinds if np.iinfo(kind).min <= least and most <= np.iinfo(kind).max), np.int64)
    )
