"""A gated MLP of which each token reads some neurons: estimates of gate and up, and the rest in one record a neuron.

Of floats, the estimate is a copy of 4 bits, and a record holds the rows as they are. Of codes, the estimate is their upper bits,
and a record holds the lower ones; no bit lies twice. The output row, a column of the down projection, ends the record: as it
is, or rounded along the row, as the blocks of a packed down projection run across neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from coreinfer_sim.engines.cutting import merge_delta
from coreinfer_sim.engines.lean import by_token
from coreinfer_sim.engines.lean.by_token import outputs_by_token
from coreinfer_sim.engines.lean.compact import of_gates
from coreinfer_sim.engines.lean.disk_records import LayerRecords
from coreinfer_sim.engines.lean.formats import BLOCK, FORMATS, HIGH, WHOLE, Scales
from coreinfer_sim.engines.lean.from_disk import outputs_from_disk
from coreinfer_sim.engines.lean.intrinsics import float_name, float_type, set_threads
from coreinfer_sim.engines.lean.kernels import added_address, rows_address, scales_address
from coreinfer_sim.engines.lean.many_rows import narrowed_planes_product, planes_product
from coreinfer_sim.engines.lean.matrix import Array, Matrix, filled_bias, scales_of
from coreinfer_sim.engines.lean.mlp_loops import by_token_loop, from_disk_loop
from coreinfer_sim.engines.lean.packing import lay, room, rounded_codes
from coreinfer_sim.engines.lean.products import LOOP, N_WORDS
from coreinfer_sim.engines.lean.record_part import RecordPart
from coreinfer_sim.engines.lean.record_rows import ROWS, n_outputs, output_rows, packed, unpacked, widened_outputs
from coreinfer_sim.engines.lean.rows import FLOATS
from coreinfer_sim.index.compensated import LayerCompensation
from coreinfer_sim.models.gguf_codes import QuantisedTensor

ESTIMATE = "Q4_0"
"""Of floats."""
LINE = 64
"""Bytes of which records are a multiple."""
_AT_ONCE = 32  # rows of inputs, which then stay in the caches
Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Reader = Callable[[int, torch.dtype | None], torch.Tensor]
Biases = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True, eq=False)
class RefittedOutputs:
    """What decode reads in place of the output rows of the records, where tokens leave neurons out."""

    rows: torch.Tensor
    """uint8 [n_ff, …], of the MLP's ``output_kind``."""
    bias: torch.Tensor | None
    """Float32, filled up to a multiple of 16."""


@dataclass(frozen=True, eq=False)
class TokenMLP:
    """Gate and up [n_ff, d_model] and down [d_model, n_ff], by neuron."""

    gate: Matrix
    """Its estimate; so is ``up``."""
    up: Matrix
    kind: str
    """Of the records' gate and up rows: a floating type, or the format of the high plane."""
    output_kind: str
    """Of their output rows: a floating type, or the format to which they are rounded."""
    records: torch.Tensor
    """uint8 [n_ff, record_bytes]: gate row, up row and output row."""
    norms: torch.Tensor
    """‖w_out‖ of each neuron, float32 [n_ff]."""
    bias: torch.Tensor | None
    """Of the outputs, float32, filled up to a multiple of 16."""
    on_disk: LayerRecords | None = None
    """Where decode finds the records, which are mapped from a file; None: in memory."""
    refitted: RefittedOutputs | None = None
    """Prefill reads the records' own; None: decode does, too."""

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
        """What `by_token.outputs_by_token` reads, int64 [3, N_WORDS]."""
        words = np.zeros(N_WORDS, np.int64)
        words[by_token.ROWS], words[by_token.ADDED] = rows_address(self.kind), added_address(self.output_kind)
        words[by_token.RECORDS], words[by_token.RECORD_BYTES] = self.records.data_ptr(), self.record_bytes
        words[by_token.UP_AT], words[by_token.OUT_AT] = self._row_bytes, 2 * self._row_bytes
        words[by_token.SCALED] = scales_address(self.kind) if self.packed else 0
        words[by_token.MIDDLE] = FORMATS[self.kind].step - 1 if self.packed else 0
        words[by_token.N_OUTPUTS] = n_outputs(self.output_kind, self.d_model)
        bias = self.bias
        if self.refitted is not None:
            rows, bias = self.refitted.rows, self.refitted.bias
            words[by_token.REFITTED], words[by_token.REFITTED_BYTES] = rows.data_ptr(), rows.shape[1]
        words[by_token.OUT_BIAS] = 0 if bias is None else bias.data_ptr()
        words[by_token.OUT_NORMS] = self.norms.data_ptr()
        words[by_token.ON_DISK] = 0 if self.on_disk is None else self.on_disk.words.ctypes.data
        stack = np.stack([self.gate.words, self.up.words, words])
        stack[0, LOOP] = by_token_loop() if self.on_disk is None else from_disk_loop()
        return stack

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
        """Bytes in memory; of what was refitted, those beside the MLP that it was made of."""
        return self.estimate_bytes + self.records.nbytes if self.refitted is None else self.refitted.rows.nbytes

    @property
    def dense_bytes(self) -> int:
        """Bytes that a token reads which reads all neurons: those of floats need no estimate."""
        return self.n_bytes if self.packed else self.records.nbytes

    def bytes_read(self, n_read: int, n_steps: int, read_ratio: float) -> int:
        """Return the bytes that steps read which have read so many records; to read all floats, nothing is estimated."""
        estimated = self.packed or read_ratio < 1
        return self.estimate_bytes * n_steps * estimated + n_read * self.record_bytes

    def begin_of(self, part: int) -> int:
        """Return where the gate (0), up (1) or output row (2) begins in a record."""
        return part * self._row_bytes

    def bias_of(self, part: int) -> torch.Tensor | None:
        """Return the bias of a projection."""
        return (self.gate.bias, self.up.bias, self.bias)[part]

    def times_codes(self, part: int, x: torch.Tensor, narrowed: bool) -> torch.Tensor:
        """Multiply rows of inputs with gate (0) or up (1) of codes, put together from both planes; see `many_rows`."""
        product = narrowed_planes_product if narrowed else planes_product
        return product((self.gate, self.up)[part], WHOLE[self.kind], self.records, self.begin_of(part), x)

    def rows(self, part: int, first: int, last: int) -> torch.Tensor:
        """Return gate (0), up (1) or output rows (2) of the neurons first … last, float32 [n, d_model].

        ``first`` is a multiple of 16.
        """
        begin = self.begin_of(part)
        if part == 2:
            return widened_outputs(self.records[first:last, begin:], self.output_kind, self.d_model)
        if not self.packed:
            return self.records[first:last, begin : begin + self._row_bytes].view(float_type(self.kind)).float()
        format_, estimate = FORMATS[self.kind], (self.gate, self.up)[part]
        low = unpacked(self.records[first:last, begin : begin + self._row_bytes], format_.low_bits)
        values = (low.float() - (format_.step - 1) / 2).mul_(scales_of(estimate, first, last))[:, : self.d_model]
        return values.add_(estimate.widened(first, last).T)

    def contributions(self, x: torch.Tensor, kind: int) -> torch.Tensor:
        """Return by how much each neuron is estimated to count, float32 [n_rows, n_ff]; ``kind`` is of the activation."""
        return of_gates(self.gate.times(x), kind).mul_(self.up.times(x)).abs_().mul_(self.norms)

    def outputs(self, x: torch.Tensor, kind: int, threshold: float = 0.0) -> tuple[torch.Tensor, int]:
        """Return what decode makes of normalised inputs [n_rows, d_model], and how many neurons they read in all."""
        out, n_read = torch.empty_like(x), np.zeros(2, np.int64)
        n_threads, read = set_threads(), outputs_by_token if self.on_disk is None else outputs_from_disk
        n_rows = _AT_ONCE if self.on_disk is None else max(1, len(x))  # what lies on the disk is read once for all
        for begin in range(0, len(x), n_rows):
            given, made = (each[begin : begin + n_rows].numpy() for each in (x, out))
            read(given, self.words, kind, n_threads, np.float32(threshold), n_read, made)
        return out, int(n_read[1])

    def whole_outputs(self, x: torch.Tensor, kind: int) -> torch.Tensor:
        """Return what all neurons give for normalised inputs [n_rows, d_model], by the products of prefill."""
        gate, up, down = self.parts
        return down.times(of_gates(gate.times(x), kind).mul_(up.times(x)))

    def held(self, ids: torch.Tensor, compensation: LayerCompensation | None = None) -> TokenMLP:
        """Return the MLP of some neurons [n] alone, the compensation merged into its output rows."""
        gate, up = self.gate.outputs(ids), self.up.outputs(ids)
        records, norms, bias = self.records[ids], self.norms[ids], self.bias
        if compensation is not None:
            outputs, bias = self._compensated(ids, compensation)
            ends = output_rows(outputs, self.output_kind)
            records[:, 2 * self._row_bytes : 2 * self._row_bytes + ends.shape[1]] = ends
            norms = outputs.norm(dim=0)
        return replace(self, gate=gate, up=up, records=records, norms=norms, bias=bias)

    def refit(self, change: LayerCompensation) -> TokenMLP:
        """Return the MLP over the same memory, whose decode reads changed output rows: what tokens choose stays the same."""
        outputs, bias = self._compensated(torch.arange(self.n_ff), change)
        rows = output_rows(outputs, self.output_kind)
        return replace(self, refitted=RefittedOutputs(F.pad(rows, (0, -rows.shape[1] % LINE)), bias))

    def _compensated(
        self, ids: torch.Tensor, compensation: LayerCompensation
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return output weights [d_model, n] of some neurons with a compensation merged in, and the bias, if there is one."""
        outputs = torch.cat([self.rows(2, n, n + ROWS) for n in range(0, self.n_ff, ROWS)])[ids].T.contiguous()
        merge_delta(outputs, compensation)
        bias = compensation.bias.float()
        return outputs, filled_bias(bias if self.bias is None else self.bias[: self.d_model] + bias)


def of_weights(weights: Weights, biases: Biases, rounded: str | None = None) -> TokenMLP:
    """Lay out a gated MLP whose weights stay as they are, or are rounded along the rows of its neurons.

    Args:
        weights: gate and up [n_ff, d_model], down [d_model, n_ff].
        biases: of the three.
        rounded: to Q8_0 or Q4_1; None: they stay.
    """
    gate, up, down = (weight.detach() for weight in weights)
    if rounded is None:
        estimates = [Matrix.of(part, bias, ESTIMATE) for part, bias in zip((gate, up), biases, strict=False)]
        rows = [part.contiguous().view(torch.uint8) for part in (gate, up)]
        kind = float_name(gate.dtype)
        return _of_parts(estimates, rows, kind, down, kind, biases[2])
    kind = HIGH[rounded]
    planes = [_split(_rounded_rows(part, rounded), kind, *part.shape) for part in (gate, up)]
    return _of_planes(planes, biases, down, rounded)


def of_stored(codes: Sequence[QuantisedTensor | None], read: Reader, biases: Biases) -> TokenMLP:
    """Lay out a gated MLP as it is stored: gate and up as codes of a GGUF file where both are of one type, floats as floats.

    Args:
        codes: of gate, up and down, as far as the file's weights are codes.
        read: returns the weights of one of the three, in a type or in the model's own.
        biases: of the three.
    """
    gate, up, down = codes
    if gate is None or up is None or gate.layout != up.layout:
        return of_weights((read(0, None), read(1, None), read(2, None)), biases)
    planes = [_split(part.rows(), HIGH[part.layout], part.n_out, part.n_in) for part in (gate, up)]
    few = down is not None and FORMATS[down.layout].bits == 4
    return _of_planes(planes, biases, read(2, torch.float32), "Q4_1" if few else "Q8_0")


Planes = tuple[Matrix, torch.Tensor]
"""The high plane of a matrix, and the lower bits of its codes row by row."""


def _of_planes(planes: Sequence[Planes], biases: Biases, down: torch.Tensor, outputs: str) -> TokenMLP:
    estimates = [replace(high, bias=filled_bias(bias)) for (high, _), bias in zip(planes, biases, strict=False)]
    return _of_parts(estimates, [low for _, low in planes], estimates[0].kind, down, outputs, biases[2])


def _of_parts(
    estimates: Sequence[Matrix],
    rows: Sequence[torch.Tensor],
    kind: str,
    down: torch.Tensor,
    outputs: str,
    bias: torch.Tensor | None,
) -> TokenMLP:
    """Put together estimates, and gate, up and output rows of records, which fill whole lines of 64 bytes."""
    parts = [*rows, output_rows(down, outputs)]
    n_bytes = sum(part.shape[1] for part in parts)
    parts.append(torch.zeros(len(parts[0]), -n_bytes % LINE, dtype=torch.uint8))
    norms = torch.cat([down[:, n : n + ROWS].float().norm(dim=0) for n in range(0, down.shape[1], ROWS)])
    return TokenMLP(estimates[0], estimates[1], kind, outputs, torch.cat(parts, 1), norms, filled_bias(bias))


def _rounded_rows(weight: torch.Tensor, rounded: str) -> Iterator[tuple[int, Array, dict[str, Array]]]:
    """Round a matrix, some rows at a time; see `QuantisedTensor.rows`."""
    set_threads()
    n_filled = -(-weight.shape[1] // BLOCK) * BLOCK
    for begin in range(0, len(weight), ROWS):
        yield begin, *rounded_codes(weight[begin : begin + ROWS], rounded, n_filled)


def _split(rows: Iterable[tuple[int, Array, dict[str, Array]]], kind: str, n_out: int, n_in: int) -> Planes:
    """Divide the codes of a matrix into planes; ``rows`` as `QuantisedTensor.rows` yields them."""
    format_ = FORMATS[kind]
    codes, scales = room(format_, n_out, n_in)
    n_filled = codes.shape[1] * BLOCK
    set_threads()
    low = []
    for begin, whole, parts in rows:
        filled = _filled(whole, n_filled)
        lay(format_, filled >> format_.low_bits, _filled_parts(format_.scales, parts, n_filled), begin, codes, scales)
        low.append(packed(filled & (format_.step - 1), format_.low_bits))
    return Matrix(kind, n_out, n_in, codes, scales, None), torch.from_numpy(np.concatenate(low))


def _filled(values: Array, n: int) -> Array:
    return np.pad(values, ((0, 0), (0, n - values.shape[1])))


def _filled_parts(scales: Scales, parts: dict[str, Array], n_filled: int) -> dict[str, Array]:
    """Fill up the scales of blocks; those of types with scales of scales fill their spans."""
    if scales not in (Scales.HALF, Scales.HALF_MIN):
        return parts
    return {name: _filled(part, n_filled // BLOCK) for name, part in parts.items()}
