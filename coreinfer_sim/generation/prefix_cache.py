"""Keys and values of texts that were read, kept for prompts that begin with the same tokens.

What is kept is what prefill would write again but for the order of sums, so that no text depends on which neurons an earlier
one read: positions that prefill read, and decoded ones where decode read them with the weights of prefill. The tokens of a
sparse answer saw fewer neurons; they are read once more with the prompt that repeats them, and are kept from then on.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from coreinfer_sim.models.positions import depends_on_what_follows

Writer = Mapping[int, torch.Tensor] | None
"""Which neurons were read where keys and values were written: the ids of a selection; None: all."""


@dataclass(frozen=True, eq=False)
class _Kept:
    """The keys and values of one text, by layer [1, n_heads, n_positions, head_dim]."""

    ids: np.ndarray
    writer: Writer
    states: Sequence[tuple[torch.Tensor, torch.Tensor]]

    @property
    def n_bytes(self) -> int:
        return sum(part.nbytes for pair in self.states for part in pair)

    def n_common(self, ids: np.ndarray, writer: Writer) -> int:
        """Return how many tokens two texts have in common at their beginning; 0 if other neurons read them."""
        n = min(len(ids), len(self.ids)) if writer is self.writer else 0
        differ = np.flatnonzero(self.ids[:n] != ids[:n])
        return int(differ[0]) if len(differ) else n


class PrefixCache:
    """Texts of one model up to a number of bytes; those used longest ago go first."""

    def __init__(self, limit: int) -> None:
        """Hold at most ``limit`` bytes; 0: nothing."""
        self.limit = limit
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def n_bytes(self) -> int:
        """Bytes that are held."""
        with self._lock:
            return self._n_bytes()

    def find(self, model: Any, ids: torch.Tensor, writer: Writer) -> DynamicCache | None:
        """Return a cache of the longest beginning of a prompt that is kept; None: there is none.

        The last token is left to be read, as its logits are wanted. What is kept stays as it is while the cache grows.

        Args:
            model: of transformers.
            ids: of the prompt, [n_tokens].
            writer: what will read the rest.
        """
        wanted = ids.cpu().numpy()
        with self._lock:
            found = {key: kept.n_common(wanted, writer) for key, kept in self._kept.items()}
            n = min(max(found.values(), default=0), len(wanted) - 1)
            if n == 0:
                return None
            best = max(found, key=lambda key: found[key])
            self._kept.move_to_end(best)
            kept = self._kept[best]
        cache = DynamicCache(config=model.config)
        for number, (keys, values) in enumerate(kept.states):
            given = keys[:, :, :n], values[:, :, :n]
            layer = cache.layers[number] if number < len(cache.layers) else None
            if type(layer) is DynamicLayer:  # which copies them when it grows, so that they need not be copied here
                layer.lazy_initialization(*given)
                layer.keys, layer.values = given
            else:
                cache.update(*given, number)
        return cache

    def keep(self, model: Any, ids: torch.Tensor, cache: Any, writer: Writer) -> None:
        """Keep the beginning of a text, as far as it was read in all layers and fits.

        Nothing is kept of caches that cannot be cut: those with other than one row, those whose windows have let go of
        positions, and those whose keys depend on what follows.

        Args:
            model: of transformers.
            ids: of the text, [n_tokens].
            cache: of transformers, which may go beyond these tokens, and, where a pass was broken off, further in some layers.
            writer: what has read them.
        """
        layers = getattr(cache, "layers", [])
        if self.limit == 0 or not layers or depends_on_what_follows(model.config) or not all(map(_can_be_cut, layers)):
            return
        a_position = sum(part[:, :, :1].nbytes for layer in layers for part in (layer.keys, layer.values))
        n = min(len(ids), self.limit // a_position, *(layer.keys.shape[2] for layer in layers))
        if n == 0:
            return
        own = ids[:n].cpu().numpy().copy()
        with self._lock:
            for key, kept in list(self._kept.items()):
                n_common = kept.n_common(own, writer)
                if n_common == n:  # the text is the beginning of one that is there
                    self._kept.move_to_end(key)
                    return
                if n_common == len(kept.ids):
                    del self._kept[key]
            while self._n_bytes() + n * a_position > self.limit:
                self._kept.popitem(last=False)
            states = [(layer.keys[:, :, :n].clone(), layer.values[:, :, :n].clone()) for layer in layers]
            new = _Kept(own, writer, states)
            self._kept[id(new)] = new

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._kept.clear()

    def _n_bytes(self) -> int:
        return sum(kept.n_bytes for kept in self._kept.values())


def _can_be_cut(layer: Any) -> bool:
    """Tell whether a layer of a cache holds one row's keys and values of all positions that it has seen."""
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or not layer.is_initialized:
        return False
    return len(layer.keys) == 1 and layer.keys.shape[2] == layer.get_seq_length()
