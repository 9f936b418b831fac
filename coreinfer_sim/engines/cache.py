"""Compact weights of recent selections, kept for the next prompt as long as they fit into a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

from coreinfer_sim.choosing.selection import NeuronSelection

T = TypeVar("T")
DEFAULT_BYTES = 2 * 2**30


class CompactCache:
    """Least recently used compact weights go first. What was asked for last is kept even if it alone is too large."""

    def __init__(self, limit: int = DEFAULT_BYTES) -> None:
        """Hold at most ``limit`` bytes."""
        self.limit = limit
        self._kept: OrderedDict[tuple[int, str], tuple[NeuronSelection, Any, int]] = OrderedDict()
        self._lock = threading.RLock()

    @property
    def n_bytes(self) -> int:
        """Bytes that are held."""
        with self._lock:
            return sum(n for _, _, n in self._kept.values())

    def get(self, selection: NeuronSelection, form: str, make: Callable[[], T], size: Callable[[T], int]) -> T:
        """Return a selection's compact weights, made if they are not here; one thread makes them at a time.

        Args:
            selection: two are the same if they share their mapping of ids.
            form: in which they are held.
            make: cuts the weights.
            size: of the result, in bytes.
        """
        key = id(selection.ids), form
        with self._lock:
            if key not in self._kept:
                made = make()
                self._kept[key] = selection, made, size(made)
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and self.n_bytes > self.limit:
                self._kept.popitem(last=False)
            found: T = self._kept[key][1]
            return found

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._kept.clear()
