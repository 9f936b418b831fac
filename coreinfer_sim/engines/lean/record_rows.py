"""Rows of one neuron as a record holds them: whole codes or their lower bits, and output rows of codes, with scales behind."""

from __future__ import annotations

import numpy as np
import torch

from coreinfer_sim.engines.lean.formats import BLOCK, FORMATS, GROUP, TILE
from coreinfer_sim.engines.lean.intrinsics import float_type
from coreinfer_sim.engines.lean.many_rows import widened_codes
from coreinfer_sim.engines.lean.matrix import Array, Matrix
from coreinfer_sim.engines.lean.packing import n_tiles, rounded_codes
from coreinfer_sim.engines.lean.rows import FLOATS

ROWS = 2048
"""Neurons that are widened or rounded at a time."""


def packed(codes: Array, n_bits: int) -> Array:
    """Pack codes of few bits [n, n_in]; n_in is a multiple of 64.

    64 bytes hold 64 · 8 / n_bits of them, the first 64 in the lowest bits. Of the rest, each 64 lie likewise in as many bytes as
    they need.
    """
    n_parts = 8 // n_bits
    n_whole = codes.shape[1] // (GROUP * n_parts) * GROUP * n_parts
    return np.concatenate(
        [
            _packed(codes[:, :n_whole], n_bits, GROUP),
            _packed(codes[:, n_whole:], n_bits, GROUP // n_parts),
        ],
        1,
    )


def _packed(codes: Array, n_bits: int, n_together: int) -> Array:
    parts = codes.reshape(len(codes), codes.shape[1] // (8 // n_bits * n_together), 8 // n_bits, n_together)
    made = np.zeros((len(codes), parts.shape[1], n_together), np.uint8)
    for place in range(parts.shape[2]):
        made |= parts[:, :, place] << (n_bits * place)
    return made.reshape(len(codes), parts.shape[1] * n_together)


def unpacked(bytes_: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Return the codes [n, n_in] again, uint8."""
    n_whole = bytes_.shape[1] // GROUP * GROUP
    return torch.cat(
        [
            _unpacked(bytes_[:, :n_whole], n_bits, GROUP),
            _unpacked(bytes_[:, n_whole:], n_bits, GROUP * n_bits // 8),
        ],
        1,
    )


def _unpacked(bytes_: torch.Tensor, n_bits: int, n_together: int) -> torch.Tensor:
    lines = bytes_.reshape(len(bytes_), bytes_.shape[1] // n_together, 1, n_together)
    shifts = torch.arange(0, 8, n_bits, dtype=torch.uint8)[:, None]
    return ((lines >> shifts) & ((1 << n_bits) - 1)).flatten(1)


def code_rows(matrix: Matrix) -> torch.Tensor:
    """Return the rows of a matrix of Q8_0 or Q4_0 codes, taken out of their tiles, uint8 [n_out, …]: codes, and scales behind."""
    assert matrix.scales is not None
    parts = []
    for tiles, unit in ((matrix.weight, torch.int32), (matrix.scales, torch.int16)):
        lanes = tiles.view(unit).reshape(len(tiles), -1, TILE)
        parts.append(lanes.transpose(1, 2).flatten(0, 1)[: matrix.n_out].contiguous().view(torch.uint8))
    return torch.cat(parts, 1)


def in_tiles(rows: torch.Tensor, kind: str, n_in: int, bias: torch.Tensor | None) -> Matrix:
    """Return the matrix that `code_rows` has taken apart; more bytes may lie behind. ``n_in`` is a multiple of 64."""
    format_, begin, made = FORMATS[kind], 0, []
    n_blocks = n_in // BLOCK
    for of_tile, unit in ((format_.code_bytes, torch.int32), (format_.scale_bytes, torch.int16)):
        end = begin + n_blocks * of_tile // TILE
        lanes = torch.zeros(n_tiles(len(rows)) * TILE, (end - begin) // unit.itemsize, dtype=unit)
        lanes[: len(rows)] = rows[:, begin:end].contiguous().view(unit)
        tiles = lanes.unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()
        made.append(tiles.view(torch.uint8).reshape(len(tiles), n_blocks, of_tile))
        begin = end
    return Matrix(kind, len(rows), n_in, *made, bias)


def n_outputs(kind: str, d_model: int) -> int:
    """Return the outputs of a row of some kind: those of codes fill groups of 64."""
    return d_model if kind in FLOATS else -(-d_model // GROUP) * GROUP


def output_rows(down: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the output rows of all neurons, uint8 [n_ff, …], from a down projection [d_model, n_ff].

    Args:
        down: floats.
        kind: a floating type; or Q8_0 or Q4_1, to which they are rounded along the row.
    """
    if kind in FLOATS:
        return down.T.contiguous().to(float_type(kind)).view(torch.uint8)
    bits, n = FORMATS[kind].bits, n_outputs(kind, len(down))
    rows = []
    for begin in range(0, down.shape[1], ROWS):
        codes, parts = rounded_codes(down[:, begin : begin + ROWS].T, kind, n)
        # fours of 64 codes change places, so that four rows interleave in the outputs' order: `whole_code.emit_widened_row`
        codes = codes.reshape(len(codes), -1, 4, 4, 4).swapaxes(2, 3).reshape(codes.shape)
        codes = codes if bits == 8 else packed(codes, bits)
        rows.append(np.concatenate([codes, *(part.view(np.uint8) for part in parts.values())], 1))
    return torch.from_numpy(np.concatenate(rows))


def widened_outputs(stored: torch.Tensor, kind: str, d_model: int) -> torch.Tensor:
    """Return what `output_rows` has made, float32 [n, d_model]; more bytes may lie behind."""
    if kind in FLOATS:
        dtype = float_type(kind)
        return stored[:, : d_model * dtype.itemsize].view(dtype).float()
    return widened_codes(stored, kind, torch.empty(len(stored), n_outputs(kind, d_model)))[:, :d_model]
