"""The map of a corpus: its prompts as dots of the plane, where what is alike in meaning lies near."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import save

from coreinfer_sim.base.errors import IndexFormatError
from coreinfer_sim.base.plain import excerpt, plain
from coreinfer_sim.index.manifest import REBUILD, MapInfo
from coreinfer_sim.index.verified import VerifiedFile

MOST_PROMPTS = 1000
"""On a map; of a larger corpus as many are drawn, so that the time and the file stay small."""
_FEWEST_FOR_TSNE = 100
"""Its neighbourhoods of 30 prompts would hold a third of a smaller corpus; PCA lays that out."""
_ITERATIONS = 500
_N_NEAREST = 5
_ROUNDING = 1e-3
"""Added to squared distances, which half precision knows about as exactly."""
_TSNE, _PCA = "t-SNE", "PCA"
_TYPES = {"coordinates": "F32", "clusters": "I32", "embeddings": "F16", "excerpts": "U8", "excerpt_ends": "I64"}


@dataclass(frozen=True)
class Place:
    """Where a prompt stands on a map."""

    x: float
    y: float
    nearest: list[int]
    """The dots that it stands among, nearest in meaning first."""
    similarity: list[float]
    """Cosine similarity to each of them."""


@dataclass(frozen=True)
class PromptMap:
    """Prompts of the corpus, or as many as were drawn at random, in the corpus's order."""

    coordinates: np.ndarray
    """Within [-1, 1], float32, [n_prompts, 2]."""
    clusters: np.ndarray
    """Cluster of each, int32, [n_prompts]."""
    embeddings: np.ndarray
    """Unit norm, float16, [n_prompts, dim]."""
    excerpts: list[str] | None
    """The beginning of each; None: the build kept no texts."""

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.coordinates)

    def place(self, embedding: np.ndarray) -> Place:
        """Return where a prompt stands: at the mean of its nearest dots, weighted by the inverse of the squared distance.

        Args:
            embedding: unit norm, [dim].
        """
        similarity = self.embeddings.astype(np.float32) @ embedding
        nearest = np.argsort(-similarity, kind="stable")[:_N_NEAREST]
        weights = 1 / (2 * np.maximum(0, 1 - similarity[nearest]) + _ROUNDING)
        x, y = np.average(self.coordinates[nearest], axis=0, weights=weights).tolist()
        return Place(x, y, nearest.tolist(), similarity[nearest].tolist())

    def info(self) -> MapInfo:
        """Return what the manifest says of it."""
        return MapInfo(len(self), _method(len(self)), self.excerpts is not None)

    def as_bytes(self) -> bytes:
        """Return it as a safetensors file."""
        tensors = {
            name: np.ascontiguousarray(getattr(self, name))  # as safetensors writes what lies in memory
            for name in ("coordinates", "clusters", "embeddings")
        }
        if self.excerpts is not None:
            encoded = [text.encode("utf-8", "replace") for text in self.excerpts]
            tensors["excerpts"] = np.frombuffer(b"".join(encoded), np.uint8)
            tensors["excerpt_ends"] = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        content: bytes = save(tensors)
        return content


def lay_out(
    embeddings: np.ndarray, assignment: np.ndarray, prompts: Sequence[str], seed: int, texts: bool
) -> PromptMap:
    """Make the map of a corpus; the same for any number of threads.

    Args:
        embeddings: unit norm, [n, dim].
        assignment: cluster of each prompt, [n].
        prompts: of the corpus.
        seed: of the prompts that are drawn where there are more than `MOST_PROMPTS`, and of t-SNE.
        texts: keep the beginnings of prompts.
    """
    n = len(embeddings)
    shown = np.arange(n)
    if n > MOST_PROMPTS:
        shown = np.sort(np.random.default_rng(seed).choice(n, MOST_PROMPTS, replace=False))
    vectors = np.asarray(embeddings[shown], np.float32)
    places = _tsne(vectors, seed) if _method(len(shown)) == _TSNE else _pca(vectors)
    middle = (places.max(axis=0) + places.min(axis=0)) / 2
    places = (places - middle) / max(np.abs(places - middle).max(), np.finfo(np.float32).tiny)
    return PromptMap(
        places.astype(np.float32),
        assignment[shown].astype(np.int32),
        vectors.astype(np.float16),
        [excerpt(prompts[number]) for number in shown.tolist()] if texts else None,
    )


def _method(n_prompts: int) -> str:
    return _TSNE if n_prompts >= _FEWEST_FOR_TSNE else _PCA


def _tsne(vectors: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # sums over threads would differ, and every later step with them
        return np.asarray(TSNE(metric="cosine", max_iter=_ITERATIONS, random_state=seed).fit_transform(vectors))


def _pca(vectors: np.ndarray) -> np.ndarray:
    from sklearn.decomposition import PCA
    from threadpoolctl import threadpool_limits

    n_axes = min(2, len(vectors) - 1, vectors.shape[1])
    if not n_axes:  # a single prompt
        return np.zeros((1, 2), np.float32)
    with threadpool_limits(1):
        places = PCA(n_axes, svd_solver="full").fit_transform(vectors)
    return np.pad(places, ((0, 0), (0, 2 - n_axes)))


def read_map(file: VerifiedFile, info: MapInfo, dimension: int, n_clusters: int) -> PromptMap:
    """Read a map.

    Raises:
        IndexFormatError: the file is damaged, or holds another map than the manifest says.
    """
    n, tensors = info.n_prompts, file.tensors()
    shapes: dict[str, tuple[int, ...]] = {"coordinates": (n, 2), "clusters": (n,), "embeddings": (n, dimension)}
    if info.texts:
        n_bytes = tensors["excerpts"].end - tensors["excerpts"].begin if "excerpts" in tensors else 0
        shapes |= {"excerpts": (n_bytes,), "excerpt_ends": (n,)}
    expected = {name: (_TYPES[name], shape) for name, shape in shapes.items()}
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise IndexFormatError(f"{file.path} holds {found}, expected {expected}; {REBUILD}.")
    values = {name: file.array(tensor) for name, tensor in tensors.items()}
    ends = values.get("excerpt_ends", np.zeros(1, np.int64))
    sound = (
        np.isfinite(values["coordinates"]).all()
        and np.isfinite(values["embeddings"]).all()
        and values["clusters"].min() >= 0
        and values["clusters"].max() < n_clusters
        and (np.diff(ends, prepend=0) >= 0).all()
        and ends[-1] == len(values.get("excerpts", ()))
    )
    if not sound:
        raise IndexFormatError(f"{file.path} has an impossible value, expected dots of {n_clusters} topics; {REBUILD}.")
    return PromptMap(
        values["coordinates"],
        values["clusters"],
        values["embeddings"],
        _texts(values["excerpts"], ends) if info.texts else None,
    )


def _texts(content: np.ndarray, ends: np.ndarray) -> list[str]:
    """Cut texts out of their bytes; they are a stranger's, and made fit to be shown."""
    whole, begins = content.tobytes(), [0, *ends.tolist()]
    return [
        plain(whole[begin:end].decode("utf-8", "replace")) for begin, end in zip(begins, ends.tolist(), strict=False)
    ]
