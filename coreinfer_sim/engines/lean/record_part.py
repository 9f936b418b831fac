"""Projections of MLPs that lie by neuron, as linear maps for many rows of inputs: prefill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from coreinfer_sim.engines.lean.disk_records import LayerRecords
from coreinfer_sim.engines.lean.intrinsics import float_type
from coreinfer_sim.engines.lean.many_rows import widened_codes
from coreinfer_sim.engines.lean.matrix import Array
from coreinfer_sim.engines.lean.record_rows import ROWS, n_outputs
from coreinfer_sim.engines.lean.rows import FLOATS
from coreinfer_sim.models.loading import usable


class ByNeuron(Protocol):
    """An MLP with a record a neuron, which ends with its output row, a column of the down projection."""

    @property
    def n_ff(self) -> int:
        """Neurons."""

    @property
    def d_model(self) -> int:
        """Inputs, and outputs."""

    @property
    def kind(self) -> str:
        """Of the records' rows before."""

    @property
    def output_kind(self) -> str:
        """Of their output rows."""

    @property
    def records(self) -> torch.Tensor:
        """uint8 [n_ff, record_bytes]."""

    @property
    def on_disk(self) -> LayerRecords | None:
        """Where decode finds the records, if not in memory."""

    def begin_of(self, part: int) -> int:
        """Return where the gate (0), up (1) or output row (2) begins in a record."""

    def bias_of(self, part: int) -> torch.Tensor | None:
        """Return the bias of a projection, float32, filled up to a multiple of 16."""

    def rows(self, part: int, first: int, last: int) -> torch.Tensor:
        """Return rows of the neurons first … last, float32 [n, d_model]; ``first`` is a multiple of 16."""

    def times_codes(self, part: int, x: torch.Tensor, narrowed: bool) -> torch.Tensor:
        """Multiply float32 rows of inputs with gate or up rows of codes, and add the bias; see `Linear.times_narrowed`."""


@dataclass(frozen=True, eq=False)
class RecordPart:
    """Gate (0), up (1) or down projection (2) of such an MLP."""

    mlp: ByNeuron
    part: int

    packed = False

    @property
    def n_out(self) -> int:
        """Outputs."""
        return self.mlp.d_model if self.part == 2 else self.mlp.n_ff

    @property
    def n_in(self) -> int:
        """Inputs."""
        return self.mlp.n_ff if self.part == 2 else self.mlp.d_model

    def widened(self) -> torch.Tensor:
        """Return the weights, float32 [n_in, n_out]."""
        rows = [self.mlp.rows(self.part, n, min(self.mlp.n_ff, n + ROWS)) for n in range(0, self.mlp.n_ff, ROWS)]
        return torch.cat(rows) if self.part == 2 else torch.cat(rows).T

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply float32 rows [n_rows, n_in]: gate and up of codes by the loops of decode, all else in torch.

        The gate comes first: of records on the disk, mapped pages are read ahead then, and let go of after the down projection.
        """
        return self._many(x, narrowed=False)

    def times_narrowed(self, x: torch.Tensor) -> torch.Tensor:
        """Do so where the processor multiplies matrices of bfloat16."""
        return self._many(x, narrowed=True)

    def _many(self, x: torch.Tensor, narrowed: bool) -> torch.Tensor:
        on_disk = self.mlp.on_disk
        if on_disk is not None and self.part == 0:
            on_disk.expect()
        out = self._times(x, narrowed)
        if on_disk is not None and self.part == 2:
            on_disk.forget()
        return out

    def _times(self, x: torch.Tensor, narrowed: bool) -> torch.Tensor:
        mlp = self.mlp
        if mlp.kind not in FLOATS and self.part < 2:
            return mlp.times_codes(self.part, x.contiguous(), narrowed)
        if mlp.output_kind not in FLOATS:
            out = self._outputs(x)
        elif usable(dtype := float_type(mlp.output_kind), "cpu") is dtype:
            begin = mlp.begin_of(self.part)
            rows = mlp.records[:, begin : begin + mlp.d_model * dtype.itemsize].view(dtype)  # as they lie
            out = (x.to(dtype) @ (rows if self.part == 2 else rows.T)).float()
        else:
            out = self._widened_product(x)
        bias = mlp.bias_of(self.part)
        return out if bias is None else out.add_(bias[: self.n_out])

    def _outputs(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by output rows of codes, some of which are widened at a time, to a short type, as inputs of codes are."""
        mlp, dtype = self.mlp, usable(torch.bfloat16, "cpu")
        n, begin = n_outputs(mlp.output_kind, mlp.d_model), mlp.begin_of(2)
        given, out, room = x.to(dtype), torch.zeros(len(x), n), torch.empty(ROWS, n, dtype=dtype)
        for first in range(0, mlp.n_ff, ROWS):
            stored = mlp.records[first : first + ROWS, begin:]
            out += given[:, first : first + ROWS] @ widened_codes(stored, mlp.output_kind, room[: len(stored)])
        return out[:, : mlp.d_model]

    def _widened_product(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by floats for whose type the processor has no products, some widened at a time."""
        mlp, out = self.mlp, torch.zeros(len(x), self.n_out)
        for first in range(0, mlp.n_ff, ROWS):
            rows = mlp.rows(self.part, first, min(mlp.n_ff, first + ROWS))
            if self.part == 2:
                out.addmm_(x[:, first : first + ROWS], rows)
            else:
                torch.mm(x, rows.T, out=out[:, first : first + ROWS])
        return out

    def of_few(self, x: Array) -> torch.Tensor:
        """Multiply few rows in the same way."""
        return self.times(torch.from_numpy(x))
