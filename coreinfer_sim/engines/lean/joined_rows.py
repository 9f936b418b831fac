"""Rows of several calls that one step decodes: each with its own cache, those of the same neurons side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch

from coreinfer_sim.engines.lean.compact import WholeMLP
from coreinfer_sim.engines.lean.kv_cache import GrowingCache
from coreinfer_sim.engines.lean.matrix import Array
from coreinfer_sim.engines.lean.mlp_loops import MARKS, N_COUNTS
from coreinfer_sim.engines.prepared import Prepared
from coreinfer_sim.engines.steps import CallState, Step, StepInputs


@dataclass
class LeanCall(CallState):
    """What belongs to one call."""

    cache: GrowingCache = field(default_factory=GrowingCache)
    ready: dict[int, tuple[Prepared, list[Any], Array, Array]] = field(default_factory=dict)
    """By prepared selection: all layers' MLPs, their words, int64 [n_layers, 3, N_WORDS], and thresholds."""


class JoinedRows:
    """The rows that have not finished, call by call."""

    def __init__(self, steps: Sequence[Step]) -> None:
        """Join the rows of some calls."""
        self._steps = steps
        self._rows = [np.flatnonzero(~one.inputs.finished) for one in steps]
        self._picked = [torch.from_numpy(own) for own in self._rows]
        self._caches = [cast(LeanCall, one.call).cache for one in steps]
        self.parts: list[tuple[list[int], Prepared]] = []
        """Places of the rows that decode by the same neurons, and these."""
        self._of_calls: list[list[tuple[list[int], Prepared, int]]] = []
        """The same for each call's own rows, with the number of the part."""
        numbers: dict[tuple[int, float], int] = {}
        first = 0
        for one, own in zip(steps, self._rows, strict=True):
            place_of, n, found = {row: first + i for i, row in enumerate(own.tolist())}, one.inputs.n_copies, []
            for rows, prepared in one.groups:
                places = [place_of[row * n + i] for row in rows for i in range(n) if row * n + i in place_of]
                if places:
                    number = numbers.setdefault(_neurons(prepared), len(self.parts))
                    self.parts += [([], prepared)] if number == len(self.parts) else []
                    self.parts[number][0].extend(places)
                    found.append((places, prepared, number))
            self._of_calls.append(found)
            first += len(own)
        self._marks: dict[int, list[Array]] = {}
        """Which neurons the rows of a part read, by its number, in each layer; of the parts that a watched call is in."""

    def counts(self, mlps: Sequence[Sequence[Any]]) -> Array:
        """Return what a step counts in, see `decode_step`; ``mlps`` are those of each part, [n_parts][n_layers]."""
        made = np.zeros((len(self.parts), len(mlps[0]), N_COUNTS), np.int64)
        for one, own in zip(self._steps, self._of_calls, strict=True):
            for number in {number for _, _, number in own if one.call.watched} - set(self._marks):
                n = len(self.parts[number][0])
                self._marks[number] = [np.zeros((n, mlp.n_ff), np.bool_) for mlp in mlps[number]]
                made[number, :, MARKS] = [marks.ctypes.data for marks in self._marks[number]]
        return made

    def chosen(self, mlps: Sequence[Sequence[Any]]) -> Iterator[dict[int, Mapping[int, Array]]]:
        """Yield what the rows of each call chose, see `CallState.chosen`; ``mlps`` as for `counts`."""
        for one, own in zip(self._steps, self._of_calls, strict=True):
            found: dict[int, Mapping[int, Array]] = {}
            for places, prepared, number in own if one.call.watched else ():
                rows = np.isin(self.parts[number][0], places)
                of_layers = enumerate(zip(mlps[number], self._marks[number], strict=True))
                found[id(prepared)] = {n: marks[rows] for n, (mlp, marks) in of_layers if not isinstance(mlp, WholeMLP)}
            yield found

    @property
    def _sizes(self) -> list[int]:
        return [len(own) for own in self._rows]

    def parts_of_calls(self, n_read: Array) -> Iterator[tuple[list[tuple[list[int], Prepared]], Array]]:
        """Yield the parts of each call, and what they read of ``n_read``, which `counts` has made.

        That is all neurons that any row of a part has read, and a share of the sum over its rows.
        """
        for own in self._of_calls:
            shares = [len(places) / len(self.parts[number][0]) for places, _, number in own]
            counts = n_read[[number for _, _, number in own]][:, :, :MARKS]
            counts[:, :, 1] = np.rint(counts[:, :, 1] * np.array(shares)[:, None])
            yield [(places, prepared) for places, prepared, _ in own], counts

    def joined(self, of_call: Callable[[StepInputs, torch.Tensor], torch.Tensor], dimension: int = 0) -> Array:
        """Return what a function makes of the inputs of each call and its rows [n], all calls' one after the other."""
        made = [of_call(one.inputs, own) for one, own in zip(self._steps, self._picked, strict=True)]
        return np.asarray(torch.cat(made, dimension).numpy())

    def adopt(self) -> tuple[Array, Array]:
        """Make room for a position in every cache; return where each row's lies, see `attention.KEYS`, and how long it is."""
        n_past = [cache.adopt(one.inputs.cache, 1) for cache, one in zip(self._caches, self._steps, strict=True)]
        places = [cache.of_rows(own) for cache, own in zip(self._caches, self._rows, strict=True)]
        return np.concatenate(places, 1), np.repeat(n_past, self._sizes)

    def hand_back(self) -> None:
        """Let transformers' caches see the new position."""
        for cache, one in zip(self._caches, self._steps, strict=True):
            cache.hand_back(one.inputs.cache, int(one.inputs.cache.get_seq_length()) + 1)

    def parted(self, logits: torch.Tensor) -> list[torch.Tensor]:
        """Return each call's logits [n_rows, 1, vocabulary]; those of rows that have finished are zero."""
        found = []
        for one, picked, own in zip(self._steps, self._picked, logits.split(self._sizes), strict=True):
            n_rows = len(one.inputs.finished)
            if len(own) < n_rows:
                own = torch.zeros(n_rows, own.shape[1]).index_copy(0, picked, own)
            found.append(own[:, None])
        return found


def _neurons(prepared: Prepared) -> tuple[int, float]:
    """Return what is the same for selections that read the same weights: where nothing is cut, all are alike."""
    return id(prepared) if prepared.layers else 0, prepared.selection.read_ratio
