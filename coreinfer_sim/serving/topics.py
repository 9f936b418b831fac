"""What the page shows beside an answer: the map, where a prompt lies on it, and which neurons are a topic's and were read."""

from __future__ import annotations

import base64
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.generation.streaming import Watch
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.ranking import n_kept, top_ids
from coreinfer_sim.serving.errors import NoNeuronsError

_MOST_ANSWERS = 32
"""Whose latest tokens are known; more than are given at a time."""


def map_of(index: SemanticIndex) -> dict[str, Any]:
    """Return the map as plain JSON types: topics, and dots in the map's order.

    Raises:
        MissingMapError: there is none.
    """
    found = index.map
    x, y = found.coordinates.astype(float).round(4).T.tolist()
    return {
        "method": found.info().method,
        "n_prompts": index.manifest.corpus.n_sentences,
        "topics": [{"id": each.id, "label": each.label, "size": each.size} for each in index.clusters],
        "dots": {"x": x, "y": y, "topic": found.clusters.tolist(), "text": found.excerpts},
    }


def lookup_of(index: SemanticIndex, text: str, k: int) -> dict[str, Any]:
    """Return the ``k`` topics nearest to a text, and where it lies on the map, if there is one."""
    embeddings = index.encoder.encode([text])
    (matches,) = index.lookup_embeddings(embeddings, min(k, len(index)))
    return {
        "text": text,
        "matches": [{**vars(match), "confident": match.confident} for match in matches],
        "place": None if index.manifest.map is None else vars(index.map.place(embeddings[0])),
    }


class Neurons:
    """Which neurons are a topic's, and which ones the latest token of each of the last answers read."""

    def __init__(self, index: SemanticIndex) -> None:
        """Know no answer yet."""
        self._index = index
        self._n_topics: np.ndarray | None = None
        self._lock = threading.Lock()
        self._latest: OrderedDict[str, tuple[int, Mapping[int, torch.Tensor]]] = OrderedDict()

    def of_topic(self, cluster: int) -> dict[str, Any]:
        """Return a topic's core neurons, and those of them that are core neurons of at least half of the others, too.

        A core neuron is one of the share β of a layer, as the build has it, that give the topic's tokens most energy. Both
        are rows of bits by recorded layer; see `packed`.

        Raises:
            ConfigError: there is no such topic.
        """
        self._index.check_cluster(cluster)
        if self._n_topics is None:  # by neuron: of how many topics it is a core neuron
            self._n_topics = sum((self._core(each).astype(np.int32) for each in range(len(self._index))), np.int32(0))
        core = self._core(cluster)
        others = len(self._index) - 1
        shared = core & (2 * (self._n_topics - 1) >= max(1, others))
        settings, model = self._index.manifest.settings, self._index.manifest.model
        return {
            "n_layers": model.n_layers,
            "layers": list(settings.layers),
            "d_ff": model.d_ff,
            "core_ratio": settings.beta,
            "core": packed(core),
            "shared": packed(shared),
        }

    def _core(self, cluster: int) -> np.ndarray:
        """Return whether each neuron is a core neuron of a topic, boolean [n_recorded_layers, d_ff]."""
        energy, activation = self._index.statistics(cluster)
        d_ff = energy.shape[1]
        held = np.zeros(energy.shape, np.bool_)
        for row in range(len(held)):
            held[row, top_ids(energy[row], activation[row], n_kept(self._index.manifest.settings.beta, d_ff))] = True
        return held

    def begin(self, answer: str) -> Watch:
        """Begin to watch an answer; return what takes the neurons that its tokens read."""
        self._keep(answer, 0, {})
        return lambda ids: self._keep(answer, self._latest.get(answer, (0,))[0] + 1, ids)

    def _keep(self, answer: str, n_tokens: int, ids: Mapping[int, torch.Tensor]) -> None:
        with self._lock:
            self._latest[answer] = n_tokens, ids
            self._latest.move_to_end(answer)
            while len(self._latest) > _MOST_ANSWERS:
                self._latest.popitem(last=False)

    def of_answer(self, answer: str) -> dict[str, Any]:
        """Return what the latest token of an answer read, as rows of bits by layer of the model; see `packed`.

        The first token comes out of the prompt's last pass: decode reads from the second one on, and nothing is there before.

        Raises:
            NoNeuronsError: no such answer was watched, or too many came after it.
        """
        with self._lock:
            if answer not in self._latest:
                raise NoNeuronsError(answer)
            n_tokens, ids = self._latest[answer]
        model = self._index.manifest.model
        if not n_tokens:
            return {"n_tokens": 0, "d_ff": model.d_ff, "share": None, "read": None}
        read = np.zeros((model.n_layers, model.d_ff), np.bool_)
        for layer in range(model.n_layers):
            read[layer, ids[layer].numpy() if layer in ids else slice(None)] = True
        return {"n_tokens": n_tokens, "d_ff": model.d_ff, "share": round(float(read.mean()), 4), "read": packed(read)}


def packed(mask: np.ndarray) -> str:
    """Return rows of booleans as bits, the first one the highest of a byte, each row filled up to whole bytes, in base64."""
    return base64.b64encode(np.packbits(mask, axis=1).tobytes()).decode("ascii")


def check_watchable(tells: bool, name: str) -> None:
    """Raise ConfigError where nothing tells which neurons tokens read."""
    if not tells:
        raise ConfigError(
            f"coreinfer.neurons is true, but {name} is decoded by an engine that does not tell which neurons tokens read; "
            "leave it out."
        )
