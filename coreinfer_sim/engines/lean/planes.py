"""A gated MLP of which each token reads some neurons: estimates of gate and up, and the rest in one record a neuron.

Of floats, the estimate is a copy of 4 bits, and a record holds the rows as they are. Of codes, the estimate is their upper bits,
and a record holds the lower ones; no bit lies twice. The output row, a column of the down projection, ends the record.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from coreinfer_sim.engines.cutting import merge_delta
from coreinfer_sim.engines.lean import by_token
from coreinfer_sim.engines.lean.by_token import outputs_by_token
from coreinfer_sim.engines.lean.compact import of_gates
from coreinfer_sim.engines.lean.formats import BLOCK, FORMATS, TILE
from coreinfer_sim.engines.lean.intrinsics import set_threads
from coreinfer_sim.engines.lean.kernels import added_address, float_name, float_type, rows_address, scales_address
from coreinfer_sim.engines.lean.matrix import Array, Matrix, filled_bias
from coreinfer_sim.engines.lean.packing import lay, room, rounded_codes
from coreinfer_sim.engines.lean.products import N_WORDS
from coreinfer_sim.engines.lean.rows import FLOATS
from coreinfer_sim.index.compensated import LayerCompensation

HIGH = {"Q8_0": "Q8_0 high", "Q4_0": "Q4_0 high"}
"""Types whose codes have two planes, and the format of the high one."""
_ESTIMATE = "Q4_0"  # of floats
_LINE = 64
ROWS = 2048
"""Neurons that are widened or rounded at a time."""
_AT_ONCE = 32  # rows of inputs, which then stay in the caches
Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Biases = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True, eq=False)
class TokenMLP:
    """Gate and up [n_ff, d_model] and down [d_model, n_ff], by neuron."""

    gate: Matrix
    """Its estimate; so is ``up``."""
    up: Matrix
    kind: str
    """Of the records' rows: a floating type, or the format of the high plane."""
    records: torch.Tensor
    """uint8 [n_ff, record_bytes]: gate row, up row and output row."""
    norms: torch.Tensor
    """‖w_out‖ of each neuron, float32 [n_ff]."""
    bias: torch.Tensor | None
    """Of the outputs, float32, filled up to a multiple of 16."""

    @property
    def n_ff(self) -> int:
        """Neurons."""
        return self.gate.n_out

    @property
    def d_model(self) -> int:
        """Inputs, and outputs."""
        return self.gate.n_in

    @property
    def packed(self) -> bool:
        """Whether the weights are codes with scales; the inputs of gate and up are then rounded to 8 bits."""
        return self.kind not in FLOATS

    @property
    def parts(self) -> tuple[RecordPart, RecordPart, RecordPart]:
        """Gate, up and down projection."""
        return RecordPart(self, 0), RecordPart(self, 1), RecordPart(self, 2)

    @cached_property
    def words(self) -> Array:
        """What `by_token.mlp_by_token` reads, int64 [3, N_WORDS]."""
        words = np.zeros(N_WORDS, np.int64)
        words[by_token.ROWS], words[by_token.ADDED] = rows_address(self.kind), added_address(self.kind)
        words[by_token.RECORDS], words[by_token.RECORD_BYTES] = self.records.data_ptr(), self.record_bytes
        words[by_token.UP_AT], words[by_token.OUT_AT] = self._row_bytes, 2 * self._row_bytes
        words[by_token.SCALED] = scales_address() if self.packed else 0
        words[by_token.HALF] = FORMATS[self.kind].step // 2 if self.packed else 0
        words[by_token.N_OUTPUTS] = _n_outputs(self.kind, self.d_model)
        words[by_token.OUT_BIAS] = 0 if self.bias is None else self.bias.data_ptr()
        words[by_token.OUT_NORMS] = self.norms.data_ptr()
        return np.stack([self.gate.words, self.up.words, words])

    @property
    def _row_bytes(self) -> int:
        """Of the gate's or up projection's part of a record."""
        if self.packed:
            return self.gate.n_filled * FORMATS[self.kind].low_bits // 8
        return self.d_model * float_type(self.kind).itemsize

    @cached_property
    def estimate_bytes(self) -> int:
        """Bytes that every token reads."""
        return self.gate.n_bytes + self.up.n_bytes + self.norms.nbytes

    @property
    def record_bytes(self) -> int:
        """Bytes that a token reads of each neuron that it chooses."""
        return int(self.records.shape[1])

    @property
    def n_bytes(self) -> int:
        """Bytes in memory."""
        return self.estimate_bytes + self.records.nbytes

    def rows(self, part: int, first: int, last: int) -> torch.Tensor:
        """Return gate (0), up (1) or output rows (2) of the neurons first … last, float32 [n, d_model].

        ``first`` is a multiple of 16.
        """
        begin = part * self._row_bytes
        if not self.packed:
            return self.floats(part)[first:last].float()
        bits = FORMATS[self.kind].low_bits
        if part == 2:
            return _widened_outputs(self.records[first:last, begin:], self.kind, self.d_model)
        estimate = (self.gate, self.up)[part]
        low = _unpacked(self.records[first:last, begin : begin + self._row_bytes], bits)
        scales = _scales_of(estimate, first, last).repeat_interleave(BLOCK, 1)
        low = (low.float() - FORMATS[self.kind].step // 2).mul_(scales)[:, : self.d_model]
        return low.add_(estimate.widened(first, last).T)

    def floats(self, part: int) -> torch.Tensor:
        """Return gate (0), up (1) or output rows (2) of floats where they lie, [n_ff, d_model]."""
        begin = part * self._row_bytes
        return self.records[:, begin : begin + self._row_bytes].view(float_type(self.kind))

    def contributions(self, x: torch.Tensor, kind: int) -> torch.Tensor:
        """Return by how much each neuron is estimated to count, float32 [n_rows, n_ff]; ``kind`` is of the activation."""
        return of_gates(self.gate.times(x), kind).mul_(self.up.times(x)).abs_().mul_(self.norms)

    def outputs(self, x: torch.Tensor, kind: int, threshold: float = 0.0) -> tuple[torch.Tensor, int]:
        """Return what decode makes of normalised inputs [n_rows, d_model], and how many neurons they read in all."""
        out, n_read = torch.empty_like(x), np.zeros(2, np.int64)
        n_threads = set_threads()
        for begin in range(0, len(x), _AT_ONCE):
            given, made = (each[begin : begin + _AT_ONCE].numpy() for each in (x, out))
            outputs_by_token(given, self.words, kind, n_threads, np.float32(threshold), n_read, made)
        return out, int(n_read[1])

    def held(self, ids: torch.Tensor, compensation: LayerCompensation | None = None) -> TokenMLP:
        """Return the MLP of some neurons [n] alone, the compensation merged into its output rows."""
        gate, up = self.gate.outputs(ids), self.up.outputs(ids)
        records, norms, bias = self.records[ids], self.norms[ids], self.bias
        if compensation is not None:
            outputs = torch.cat([self.rows(2, n, n + ROWS) for n in range(0, self.n_ff, ROWS)])[ids].T.contiguous()
            merge_delta(outputs, compensation)
            added = compensation.bias.float()
            bias = filled_bias(added if bias is None else bias[: self.d_model] + added)
            ends = _output_rows(outputs, self.kind)
            records[:, 2 * self._row_bytes : 2 * self._row_bytes + ends.shape[1]] = ends
            norms = outputs.norm(dim=0)
        return replace(self, gate=gate, up=up, records=records, norms=norms, bias=bias)


@dataclass(frozen=True, eq=False)
class RecordPart:
    """Gate (0), up (1) or down projection (2) of such an MLP as a linear map for many rows of inputs."""

    mlp: TokenMLP
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
        """Multiply float32 rows [n_rows, n_in], some weights at a time."""
        mlp = self.mlp
        out = torch.zeros(len(x), self.n_out)
        for first in range(0, mlp.n_ff, ROWS):
            last = min(mlp.n_ff, first + ROWS)
            rows = mlp.rows(self.part, first, last)
            if self.part == 2:
                out.addmm_(x[:, first:last], rows)
            else:
                torch.mm(x, rows.T, out=out[:, first:last])
        bias = (mlp.gate.bias, mlp.up.bias, mlp.bias)[self.part]
        return out if bias is None else out.add_(bias[: self.n_out])

    def of_few(self, x: Array) -> torch.Tensor:
        """Multiply few rows in the same way."""
        return self.times(torch.from_numpy(x))


def of_weights(weights: Weights, biases: Biases, rounded: str | None = None) -> TokenMLP:
    """Lay out a gated MLP whose weights stay as they are, or are rounded to Q8_0 or Q4_0 along the rows of its neurons.

    Args:
        weights: gate and up [n_ff, d_model], down [d_model, n_ff].
        biases: of the three.
        rounded: to what.
    """
    gate, up, down = (weight.detach() for weight in weights)
    if rounded is None:
        kind = float_name(gate.dtype)
        estimates = [Matrix.of(part, bias, _ESTIMATE) for part, bias in zip((gate, up), biases, strict=False)]
        rows = [part.contiguous().view(torch.uint8) for part in (gate, up)]
    else:
        kind = HIGH[rounded]
        estimates, rows = [], []
        for part, bias in zip((gate, up), biases, strict=False):
            estimate, low = _split(part, bias, rounded)
            estimates.append(estimate)
            rows.append(low)
    outputs = _output_rows(down, kind)
    parts = [*rows, outputs]
    n_bytes = sum(part.shape[1] for part in parts)
    parts.append(torch.zeros(len(outputs), -n_bytes % _LINE, dtype=torch.uint8))
    norms = torch.cat([down[:, n : n + ROWS].float().norm(dim=0) for n in range(0, down.shape[1], ROWS)])
    return TokenMLP(estimates[0], estimates[1], kind, torch.cat(parts, 1), norms, filled_bias(biases[2]))


def _split(weight: torch.Tensor, bias: torch.Tensor | None, rounded: str) -> tuple[Matrix, torch.Tensor]:
    """Round a matrix; return the high plane of its codes, and the lower bits row by row."""
    format_ = FORMATS[HIGH[rounded]]
    n_out, n_in = weight.shape
    codes, scales = room(format_, n_out, n_in)
    set_threads()
    low = []
    for begin in range(0, n_out, ROWS):
        whole, factors = rounded_codes(weight[begin : begin + ROWS], rounded, codes.shape[1] * BLOCK)
        lay(format_, whole >> format_.low_bits, {"scale": factors}, begin, codes, scales)
        low.append(_packed(whole & (format_.step - 1), format_.low_bits))
    estimate = Matrix(HIGH[rounded], n_out, n_in, codes, scales, filled_bias(bias))
    return estimate, torch.from_numpy(np.concatenate(low))


def _n_outputs(kind: str, d_model: int) -> int:
    """Return the outputs of a record: those of codes fill whole lines of 64 bytes."""
    if kind in FLOATS:
        return d_model
    in_line = _LINE * 8 // (2 * FORMATS[kind].low_bits)
    return -(-d_model // in_line) * in_line


def _output_rows(down: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the ends of all records, uint8 [n_ff, …], from a down projection [d_model, n_ff]."""
    if kind in FLOATS:
        return down.T.contiguous().to(float_type(kind)).view(torch.uint8)
    bits, n = 2 * FORMATS[kind].low_bits, _n_outputs(kind, len(down))
    ends = []
    for begin in range(0, down.shape[1], ROWS):
        rows = down[:, begin : begin + ROWS].T
        codes, scales = rounded_codes(rows, "Q8_0" if bits == 8 else "Q4_0", n)
        codes = codes ^ 128 if bits == 8 else _packed(codes, 4)  # 128 less, as signed bytes
        ends.append(np.concatenate([codes, scales.view(np.uint8)], 1))
    return torch.from_numpy(np.concatenate(ends))


def _widened_outputs(stored: torch.Tensor, kind: str, d_model: int) -> torch.Tensor:
    """Return what `_output_rows` has rounded, float32 [n, d_model]."""
    bits, n = 2 * FORMATS[kind].low_bits, _n_outputs(kind, d_model)
    n_bytes = n * bits // 8
    codes = stored[:, :n_bytes]
    wide = codes.view(torch.int8).float() if bits == 8 else _unpacked(codes, 4).float() - 8
    scales = stored[:, n_bytes : n_bytes + n // BLOCK * 2].contiguous().view(torch.float16).float()
    return wide.mul_(scales.repeat_interleave(BLOCK, 1))[:, :d_model]


def _packed(codes: Array, n_bits: int) -> Array:
    """Pack codes of few bits [n, n_in]: 64 bytes hold 64 · 8 / n_bits of them, the first 64 in the lowest bits."""
    parts = codes.reshape(len(codes), -1, 8 // n_bits, _LINE)
    packed = np.zeros((len(codes), parts.shape[1], _LINE), np.uint8)
    for place in range(parts.shape[2]):
        packed |= parts[:, :, place] << (n_bits * place)
    return packed.reshape(len(codes), -1)


def _unpacked(packed: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Return the codes [n, n_in] again."""
    lines = packed.reshape(len(packed), -1, 1, _LINE)
    shifts = torch.arange(0, 8, n_bits, dtype=torch.uint8)[:, None]
    return ((lines >> shifts) & ((1 << n_bits) - 1)).reshape(len(packed), -1)


def _scales_of(matrix: Matrix, first: int, last: int) -> torch.Tensor:
    """Return the scales of some outputs, float32 [n, n_blocks]."""
    assert matrix.scales is not None
    tiles = matrix.scales[first // TILE : -(-last // TILE)].view(torch.float16)  # [n_tiles, n_blocks · 16]
    return tiles.reshape(len(tiles), -1, TILE).transpose(1, 2).flatten(0, 1)[: last - first].float()
