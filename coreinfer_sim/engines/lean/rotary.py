"""Angles of rotary positions, as a model's own module computes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from coreinfer_sim.models.positions import GROWING, rope_types

_STATIC = {"default", "linear", "llama3", "yarn"}
"""Types whose angles depend on the position alone."""
_SPARE = 256  # positions by which the table grows


def refuses_ropes(config: Any) -> str | None:
    """Return why a model's rotary positions cannot be computed here, or None if they can."""
    unknown = sorted(rope_types(config) - _STATIC - GROWING)
    return f"its rotary positions are of type {', '.join(unknown)}" if unknown else None


class Angles:
    """Cosine and sine for any positions, from one table for each kind of layer."""

    def __init__(self, config: Any, rotary: Any, kinds: Sequence[str | None]) -> None:
        """Take a model's module, or None if it has no rotary positions.

        Args:
            config: of the model.
            rotary: transformers' module.
            kinds: of each layer, as the module names them (empty: it has one for all); None: a layer without rotary positions.
        """
        self._rotary = rotary
        named = sorted({kind for kind in kinds if kind is not None})
        self._kinds = named or [""]
        self._still = None in kinds and rotary is not None
        """Whether the last table turns nothing."""
        self.turns = [len(named) if kind is None else named.index(kind) for kind in kinds]
        if rotary is None:
            self.turns = [0] * len(kinds)
        self._grows = bool(rope_types(config) & GROWING)
        self._table = torch.zeros(2, 1, 0, 0)

    def of(self, positions: torch.Tensor) -> torch.Tensor:
        """Return cosine and sine, float32 [2, n_tables, n_rows, half of the rotated features], contiguous.

        Args:
            positions: [n_rows], of one step: the longest text decides where angles depend on the length.
        """
        if self._rotary is None:
            return torch.zeros(2, 1, len(positions), 0)
        if self._grows:
            return self._computed(positions)
        n = int(positions.max()) + 1
        if n > self._table.shape[2]:
            self._table = self._computed(torch.arange(max(2 * n, _SPARE)))
        return self._table[:, :, positions]

    def of_text(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the same for positions that follow each other, each as a step of its own would see it."""
        if self._rotary is None or not self._grows:
            return self.of(positions)
        return torch.cat([self.of(positions[i : i + 1]) for i in range(len(positions))], 2)

    def _computed(self, positions: torch.Tensor) -> torch.Tensor:
        tables = []
        for kind in self._kinds:
            own = torch.stack(self._rotary(torch.zeros(1), positions[None], *([kind] if kind else [])))[:, 0]
            half = own.shape[-1] // 2
            # each angle is there twice: in both halves, or beside itself
            tables.append(own[..., :half] if torch.equal(own[..., :half], own[..., half:]) else own[..., ::2])
        if self._still:
            tables.append(torch.stack([torch.ones_like(tables[0][0]), torch.zeros_like(tables[0][0])]))
        return torch.stack(tables, 1).contiguous()
