"""transformers' own cache, held in buffers that have room for further positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer

SPARE = 256
"""Positions by which a cache grows beyond what it holds."""


def refuses_cache(cache: Any) -> str | None:
    """Return why a cache cannot be grown in place: full attention in every layer, tensors that grow with the text."""
    layers = getattr(cache, "layers", None) or []
    if len(layers) > 0 and all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers):
        return None
    return f"the cache is a {type(cache).__name__} that does not grow with the text in every layer"


class GrowingCache:
    """Buffers of the call that runs; transformers' cache sees views of them."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Keys and values by layer, [n_rows, n_heads, capacity, head_dim]."""
        self.addresses = np.zeros((0, 2), np.int64)
        """Of those."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each buffer."""
        return tuple(self.buffers[0][0].shape)

    def adopt(self, cache: Any, n_new: int) -> int:
        """Hold every layer's cache in a buffer with room for ``n_new`` positions; return how many it holds."""
        n_past = int(cache.get_seq_length())
        first = self.buffers[0][0] if self.buffers else None
        keys = cache.layers[0].keys
        if (
            first is None
            or keys.data_ptr() != first.data_ptr()
            or len(keys) != len(first)
            or n_past + n_new > first.shape[2]
        ):
            self.buffers = []
            for layer in cache.layers:  # each lets go of what it held before the next one is copied
                buffers = roomy(layer.keys, n_past, n_new), roomy(layer.values, n_past, n_new)
                self.buffers.append(buffers)
                layer.keys, layer.values = (buffer[:, :, :n_past] for buffer in buffers)
            self.addresses = np.array([[part.data_ptr() for part in buffers] for buffers in self.buffers], np.int64)
        return n_past

    def hand_back(self, cache: Any, n_positions: int) -> None:
        """Let transformers' cache see the first positions of the buffers."""
        for layer, (keys, values) in zip(cache.layers, self.buffers, strict=True):
            layer.keys, layer.values = keys.narrow(2, 0, n_positions), values.narrow(2, 0, n_positions)

    def release(self) -> None:
        """Let go of the buffers."""
        self.buffers = []


def roomy(states: torch.Tensor, n_past: int, n_new: int = 1) -> torch.Tensor:
    """Copy cached states [n_rows, n_heads, n_past, head_dim] into a buffer that grows by half of them at least."""
    n_rows, n_heads, _, head_dim = states.shape
    buffer = states.new_zeros(n_rows, n_heads, n_past + max(SPARE, n_new, n_past // 2), head_dim)
    buffer[:, :, :n_past] = states
    return buffer
