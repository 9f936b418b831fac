"""Rows of one neuron as a record holds them: lower bits of codes, and output rows of codes with scales behind them."""

from __future__ import annotations

import numpy as np
import torch

from coreinfer_sim.engines.lean.formats import FORMATS, GROUP
from coreinfer_sim.engines.lean.intrinsics import float_type
from coreinfer_sim.engines.lean.many_rows import widened_codes
from coreinfer_sim.engines.lean.matrix import Array
from coreinfer_sim.engines.lean.packing import rounded_codes
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
