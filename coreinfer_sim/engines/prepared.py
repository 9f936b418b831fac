"""Held neurons as an engine lays them out, kept for the next prompt as long as they fit into a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from coreinfer_sim.base.memory import give_back_memory
from coreinfer_sim.choosing.selection import NeuronSelection


@dataclass(frozen=True, eq=False)
class Prepared:
    """The held neurons of one selection, as an engine lays them out."""

    selection: NeuronSelection
    layers: Mapping[int, Any]
    """By layer number; a layer that is not named stays dense."""
    n_bytes: int
    """That they take in memory."""
    n_read: int
    """Bytes that a token reads of them: of experts, of as many as it takes."""


class PreparedCache:
    """Least recently used weights go first. What was asked for last is kept even if it alone is too large."""

    def __init__(self, limit: int) -> None:
        """Hold at most ``limit`` bytes."""
        self.limit = limit
        self._kept: OrderedDict[tuple[int, float], Prepared] = OrderedDict()
        self._lock = threading.RLock()

    @property
    def n_bytes(self) -> int:
        """Bytes that are held."""
        with self._lock:
            return sum(each.n_bytes for each in self._kept.values())

    def get(self, selection: NeuronSelection, make: Callable[[NeuronSelection], Prepared]) -> Prepared:
        """Return a selection's weights, made if they are not here; one thread makes them at a time.

        Two selections are the same if they share their mapping of ids, and tokens read the same share of it.
        """
        key = _key(selection)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = make(selection)  # which holds the selection, so that its id is not given anew
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and self.n_bytes > self.limit:
                self._kept.popitem(last=False)
            return self._kept[key]

    def keep_only(self, selection: NeuronSelection) -> None:
        """Let go of all weights but those of one selection, before others take their room."""
        with self._lock:
            others = [key for key in self._kept if key != _key(selection)]
            for key in others:
                del self._kept[key]
        if others:
            give_back_memory()

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._kept.clear()


def _key(selection: NeuronSelection) -> tuple[int, float]:
    return id(selection.ids), selection.read_ratio
