"""An MLP with ReLU as `relu` reads it: gate rows that every token reads, and up and output row of each neuron in one record.

One that is not gated has input rows in place of gate rows, and no up rows. Gate and up rows are what dense decode reads. Output
rows of 16-bit weights are so too; those of packed weights are rounded along the row, as the blocks of a down projection run
across neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from coreinfer_sim.engines.cutting import merge_delta
from coreinfer_sim.engines.lean import by_token
from coreinfer_sim.engines.lean.formats import FORMATS, GROUP
from coreinfer_sim.engines.lean.intrinsics import float_name, float_type, set_threads
from coreinfer_sim.engines.lean.kernels import added_address, rows_address
from coreinfer_sim.engines.lean.matrix import Array, Matrix, filled_bias
from coreinfer_sim.engines.lean.mlp_loops import nonzero_loop
from coreinfer_sim.engines.lean.products import BIAS, LOOP, N_WORDS
from coreinfer_sim.engines.lean.record_part import RecordPart
from coreinfer_sim.engines.lean.record_rows import ROWS, code_rows, in_tiles, n_outputs, output_rows, widened_outputs
from coreinfer_sim.engines.lean.relu import outputs_of_nonzero
from coreinfer_sim.engines.lean.rows import FLOATS
from coreinfer_sim.index.compensated import LayerCompensation

_LINE = 64
_AT_ONCE = 32  # rows of inputs, which then stay in the caches
_OUTPUTS = {"Q8_0": "Q8_0", "Q4_0": "Q4_1"}


@dataclass(frozen=True, eq=False)
class ReluMLP:
    """Gate and up [n_ff, d_model], or input rows alone, and down [d_model, n_ff], by neuron."""

    gate: Matrix
    """Or the input rows."""
    kind: str
    """Of the records' up rows: a floating type, Q8_0 or Q4_0; empty: there are none."""
    output_kind: str
    """Of their output rows: a floating type, or the format to which they are rounded."""
    records: torch.Tensor
    """uint8 [n_ff, record_bytes]: up row and output row."""
    up_bias: torch.Tensor | None
    """Float32, filled up to a multiple of 16; so is ``bias``."""
    bias: torch.Tensor | None
    """Of the outputs."""
    on_disk = None  # as of its zeros none is read from there

    @property
    def n_ff(self) -> int:
        """Neurons."""
        return self.gate.n_out

    @property
    def d_model(self) -> int:
        """Inputs, and outputs."""
        return self.gate.n_in

    @property
    def parts(self) -> tuple[Matrix | RecordPart, ...]:
        """Gate, up and down projection, or input and output projection."""
        return self.gate, *([RecordPart(self, 1)] if self.kind else []), RecordPart(self, 2)

    @cached_property
    def words(self) -> Array:
        """What `relu.outputs_of_nonzero` reads, int64 [3, N_WORDS]."""
        up, words = np.zeros((2, N_WORDS), np.int64)
        up[BIAS] = 0 if self.up_bias is None else self.up_bias.data_ptr()
        words[by_token.ROWS] = rows_address(self.kind, 1) if self.kind else 0
        words[by_token.ADDED] = added_address(self.output_kind)
        words[by_token.RECORDS], words[by_token.RECORD_BYTES] = self.records.data_ptr(), self.record_bytes
        words[by_token.OUT_AT] = self._row_bytes
        words[by_token.BY_CODES] = int(self.output_kind not in FLOATS)
        words[by_token.MIDDLE] = FORMATS[self.kind].offset if self.kind in FORMATS else 0
        words[by_token.N_OUTPUTS] = n_outputs(self.output_kind, self.d_model)
        words[by_token.OUT_BIAS] = 0 if self.bias is None else self.bias.data_ptr()
        stack = np.stack([self.gate.words, up, words])
        stack[0, LOOP] = nonzero_loop()
        return stack

    @property
    def _row_bytes(self) -> int:
        """Of the up projection's part of a record."""
        if self.kind in FLOATS:
            return self.d_model * float_type(self.kind).itemsize
        if not self.kind:
            return 0
        return _filled_row(self.d_model * FORMATS[self.kind].bits // 8 + self.d_model // 16)

    @property
    def record_bytes(self) -> int:
        """Bytes that a token reads of each neuron that is not zero."""
        return int(self.records.shape[1])

    @property
    def n_bytes(self) -> int:
        """Bytes in memory."""
        return self.gate.n_bytes + self.records.nbytes

    def bytes_read(self, n_read: int, n_steps: int, read_ratio: float) -> int:
        """Return the bytes that steps read which have read so many records; none is an estimate, whatever the ratio."""
        return self.gate.n_bytes * n_steps + n_read * self.record_bytes

    def begin_of(self, part: int) -> int:
        """Return where the up (1) or output row (2) begins in a record."""
        return (part - 1) * self._row_bytes

    def bias_of(self, part: int) -> torch.Tensor | None:
        """Return the bias of a projection."""
        return (self.gate.bias, self.up_bias, self.bias)[part]

    def times_codes(self, part: int, x: torch.Tensor, narrowed: bool) -> torch.Tensor:
        """Multiply rows of inputs with up rows of codes, which are put into tiles again some at a time."""
        tiles = (self._tiles(first, min(self.n_ff, first + ROWS)) for first in range(0, self.n_ff, ROWS))
        return torch.cat([each.times_narrowed(x) if narrowed else each.times(x) for each in tiles], 1)

    def _tiles(self, first: int, last: int) -> Matrix:
        bias = None if self.up_bias is None else self.up_bias[first : -(-last // 16) * 16]
        return in_tiles(self.records[first:last], self.kind, self.d_model, bias)

    def rows(self, part: int, first: int, last: int) -> torch.Tensor:
        """Return gate (0), up (1) or output rows (2) of the neurons first … last, float32 [n, d_model].

        ``first`` is a multiple of 16.
        """
        if part == 0:
            return self.gate.widened(first, last).T
        if part == 2:
            return widened_outputs(self.records[first:last, self._row_bytes :], self.output_kind, self.d_model)
        if self.kind in FLOATS:
            return self.records[first:last, : self._row_bytes].view(float_type(self.kind)).float()
        return self._tiles(first, last).widened().T

    def outputs(self, x: torch.Tensor, kind: int, threshold: float = 0.0) -> tuple[torch.Tensor, int]:
        """Return what decode makes of normalised inputs [n_rows, d_model], and how many neurons were not zero in all.

        No threshold leaves any out.
        """
        out, n_read = torch.empty_like(x), np.zeros(2, np.int64)
        n_threads = set_threads()
        for begin in range(0, len(x), _AT_ONCE):
            given, made = (each[begin : begin + _AT_ONCE].numpy() for each in (x, out))
            outputs_of_nonzero(given, self.words, kind, n_threads, n_read, made)
        return out, int(n_read[1])

    def held(self, ids: torch.Tensor, compensation: LayerCompensation | None = None) -> ReluMLP:
        """Return the MLP of some neurons [n] alone, the compensation merged into its output rows."""
        records, bias = self.records[ids], self.bias
        up_bias = None if self.up_bias is None else filled_bias(self.up_bias[ids])
        if compensation is not None:
            outputs = torch.cat([self.rows(2, n, n + ROWS) for n in range(0, self.n_ff, ROWS)])[ids].T.contiguous()
            merge_delta(outputs, compensation)
            added = compensation.bias.float()
            bias = filled_bias(added if bias is None else bias[: self.d_model] + added)
            ends = output_rows(outputs, self.output_kind)
            records[:, self._row_bytes : self._row_bytes + ends.shape[1]] = ends
        return replace(self, gate=self.gate.outputs(ids), records=records, up_bias=up_bias, bias=bias)


def fits(d_model: int, rounded: str | None) -> bool:
    """Return whether rows of so many inputs can lie by neuron: those of codes fill groups of 64."""
    return rounded is None or d_model % GROUP == 0


def of_relu(
    weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], rounded: str | None = None
) -> ReluMLP:
    """Lay out an MLP whose weights stay as they are, or are rounded.

    Args:
        weights: gate and up [n_ff, d_model], or input rows alone, and down [d_model, n_ff].
        biases: of each.
        rounded: Q8_0 or Q4_0, see `fits`; None: they stay.
    """
    gate, *ups, down = (weight.detach() for weight in weights)
    kind = float_name(down.dtype) if rounded is None else rounded
    outputs = kind if rounded is None else _OUTPUTS[rounded]
    parts: list[torch.Tensor] = []
    for up in ups:
        parts.append(up.contiguous().view(torch.uint8) if rounded is None else code_rows(Matrix.of(up, None, rounded)))
        if rounded is not None:
            parts.append(_zeros(*parts))
    parts.append(output_rows(down, outputs))
    parts.append(_zeros(*parts))
    up_bias, bias = filled_bias(biases[1]) if ups else None, filled_bias(biases[-1])
    of_gate = Matrix.of(gate, biases[0], rounded)
    return ReluMLP(of_gate, kind if ups else "", outputs, torch.cat(parts, 1), up_bias, bias)


def _filled_row(n_bytes: int) -> int:
    return -(-n_bytes // _LINE) * _LINE


def _zeros(*parts: torch.Tensor) -> torch.Tensor:
    """Return what fills parts of a record up to whole lines of 64 bytes."""
    return torch.zeros(len(parts[0]), -sum(part.shape[1] for part in parts) % _LINE, dtype=torch.uint8)
