"""transformers' own cache, held in buffers that have room for further positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from coreinfer_sim.engines.lean.attention import CAPACITY, FIRST, KEYS, VALUES

SPARE = 256
"""Positions by which a cache grows beyond what it holds."""


def refuses_cache(cache: Any, windows: Sequence[int]) -> str | None:
    """Return why a cache cannot be grown in place: tensors that grow with the text, each with what its layer's window sees.

    Args:
        cache: of transformers.
        windows: positions that each layer sees; 0: all.
    """
    layers = getattr(cache, "layers", None) or []
    if len(layers) == len(windows) and all(map(_grows, layers, windows)):
        return None
    return f"the cache is a {type(cache).__name__} that does not grow with the text in every layer"


def _grows(layer: Any, window: int) -> bool:
    if type(layer) is DynamicSlidingWindowLayer:
        return layer.is_initialized and not layer.record_past and 0 < window <= layer.sliding_window
    return type(layer) is DynamicLayer and layer.is_initialized


class GrowingCache:
    """Buffers of the call that runs; transformers' cache sees views of them."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Keys and values by layer, [n_rows, n_heads, capacity, head_dim]."""
        self.places = np.zeros((0, 4), np.int64)
        """Addresses, capacity and first position of each layer; see `attention.KEYS`. Layers with a window let go of the past."""
        self._seen: list[torch.Tensor] = []
        """The keys that transformers' cache was given by layer."""

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return where the layers of some rows [n_rows] lie, int64 [n_layers, n_rows, 4]; see `attention.KEYS`."""
        found = np.repeat(self.places[:, None], len(rows), 1)
        row_bytes = np.array([keys[0].nbytes for keys, _ in self.buffers])
        for part in (KEYS, VALUES):
            found[:, :, part] += row_bytes[:, None] * rows
        return found

    def adopt(self, cache: Any, n_new: int) -> int:
        """Hold every layer's cache in a buffer with room for ``n_new`` positions; return how many the text has."""
        n_past = int(cache.get_seq_length())
        if not self._seen or any(map(_other, self._seen, (layer.keys for layer in cache.layers))):
            self.buffers, self._seen = [], []
            self.places = np.zeros((len(cache.layers), 4), np.int64)
        room = self.places[:, CAPACITY] + self.places[:, FIRST]
        for number in np.flatnonzero(room < n_past + n_new).tolist():
            layer = cache.layers[number]  # each lets go of what it held before the next one is copied
            n_held = layer.keys.shape[2]
            buffers = roomy(layer.keys, n_held, n_new), roomy(layer.values, n_held, n_new)
            self.buffers[number : number + 1] = [buffers]
            self.places[number] = *(part.data_ptr() for part in buffers), buffers[0].shape[2], n_past - n_held
            layer.keys, layer.values = (buffer[:, :, :n_held] for buffer in buffers)
            self._seen[number : number + 1] = [layer.keys]
        return n_past

    def hand_back(self, cache: Any, n_positions: int) -> None:
        """Let transformers' cache see the first positions of the buffers, or the latest that a window leaves."""
        firsts = self.places[:, FIRST].tolist()
        for number, (layer, (keys, values)) in enumerate(zip(cache.layers, self.buffers, strict=True)):
            first, n = 0, n_positions - firsts[number]
            if type(layer) is DynamicSlidingWindowLayer:
                layer.cumulative_length = n_positions
                first = max(0, n - layer.sliding_window + 1)
            layer.keys, layer.values = keys.narrow(2, first, n - first), values.narrow(2, first, n - first)
            self._seen[number] = layer.keys


def _other(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one is not two and (one.data_ptr() != two.data_ptr() or len(one) != len(two))


def roomy(states: torch.Tensor, n_past: int, n_new: int = 1) -> torch.Tensor:
    """Copy cached states [n_rows, n_heads, n_past, head_dim] into a buffer that grows by half of them at least."""
    n_rows, n_heads, _, head_dim = states.shape
    buffer = states.new_zeros(n_rows, n_heads, n_past + max(SPARE, n_new, n_past // 2), head_dim)
    buffer[:, :, :n_past] = states
    return buffer
