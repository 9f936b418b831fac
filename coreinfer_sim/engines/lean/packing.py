"""Laying weights out as `formats` describes: from codes of other layouts, or by rounding floats."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange

from coreinfer_sim.engines.lean.formats import BLOCK, FORMATS, TILE, Format, Scales
from coreinfer_sim.engines.lean.intrinsics import inline, narrowed, parallel, set_threads, widened

Array = np.ndarray[Any, Any]
_ROWS = 4096  # of a matrix that are widened at a time
_TRIED = 7  # scales that are tried for a block of 4-bit codes
_RANGES = 9  # likewise, of codes above a minimum


@inline
def _half(value):
    """Return a float32 as float16 holds it."""
    return widened(narrowed(np.int16(0), value))


@inline
def _place(code_bits, code, j, lane, out):
    """Put the bits of one code into its block; ``lane`` is its byte in the group ``j``."""
    if code_bits < 4:
        out[64 * (j // 4) + lane] |= (code & 3) << (2 * (j % 4))
        if code_bits == 3:
            out[128 + lane] |= (code >> 2) << j
        return
    if code_bits == 8:
        out[64 * j + lane] = code
        return
    out[64 * (j % 4) + lane] |= (code & 15) << (4 * (j // 4))
    if code_bits == 5:
        out[256 + lane] |= (code >> 4) << j
    if code_bits == 6:
        out[256 + 64 * (j // 4) + lane] |= (code >> 4) << (2 * (j % 4))


@parallel
def lay_codes(code_bits, codes, out):
    """Interleave codes uint8 [n_out, n_in] into zeroed tiles uint8 [n_tiles, n_blocks, code_bytes]; n_in fills blocks."""
    for tile in prange(out.shape[0]):
        for row in range(16 * tile, min(codes.shape[0], 16 * tile + 16)):
            for block in range(out.shape[1]):
                into = out[tile, block]
                for i in range(32):
                    _place(code_bits, codes[row, 32 * block + i], i // 4, 4 * (row - 16 * tile) + i % 4, into)


@parallel
def _round(weight, zero, codes, scales):
    """Round floats [n, n_in] to codes uint8 about a code for zero, and scales float32 [n, n_blocks] that float16 holds."""
    most = np.float32(zero - 1)
    n_in = weight.shape[1]
    for row in prange(weight.shape[0]):
        for block in range(scales.shape[1]):
            first, last = 32 * block, min(n_in, 32 * block + 32)
            highest = np.float32(0.0)
            for i in range(first, last):
                highest = max(highest, abs(weight[row, i]))
            scale = _half(highest / most)
            inverse = np.float32(1.0) / scale if scale > np.float32(0.0) else np.float32(0.0)
            for i in range(first, last):
                code = np.rint(weight[row, i] * inverse)
                codes[row, i] = np.uint8(min(max(code, -most), most) + np.float32(zero))
            for i in range(last, first + 32):
                codes[row, i] = np.uint8(zero)
            scales[row, block] = scale


@inline
def _error(values, inverse, scale):
    """Return the squared error of a block that is rounded to -8 … 7 by a scale."""
    total = np.float32(0.0)
    for i in range(values.shape[0]):
        code = min(max(np.rint(values[i] * inverse), np.float32(-8.0)), np.float32(7.0))
        difference = values[i] - code * scale
        total += difference * difference
    return total


@parallel
def _round_to_4(weight, codes, scales, n_tried):
    """Do so with codes of 4 bits, 8 as zero; of some scales about that which the largest magnitude asks for, the best."""
    n_in = weight.shape[1]
    for row in prange(weight.shape[0]):
        for block in range(scales.shape[1]):
            first, last = 32 * block, min(n_in, 32 * block + 32)
            values = weight[row, first:last]
            peak = np.float32(0.0)
            for i in range(values.shape[0]):
                if abs(values[i]) > abs(peak):
                    peak = values[i]
            best, least = np.float32(0.0), np.float32(np.inf)
            for tried in range(n_tried if peak != np.float32(0.0) else 0):
                # the largest magnitude becomes -8, as in llama.cpp, or something between -9.5 and -6.5
                scale = _half(peak / np.float32(-9.5 + 3.0 * tried / (n_tried - 1)))
                if scale != np.float32(0.0):
                    error = _error(values, np.float32(1.0) / scale, scale)
                    if error < least:
                        best, least = scale, error
            inverse = np.float32(1.0) / best if best != np.float32(0.0) else np.float32(0.0)
            for i in range(first, last):
                code = min(max(np.rint(weight[row, i] * inverse), np.float32(-8.0)), np.float32(7.0))
                codes[row, i] = np.uint8(code + np.float32(8.0))
            for i in range(last, first + 32):
                codes[row, i] = np.uint8(8)
            scales[row, block] = best


@inline
def _error_above(values, lowest, inverse, scale):
    """Return the squared error of a block that is rounded to 0 … 15 times a scale, above a minimum."""
    total = np.float32(0.0)
    for i in range(values.shape[0]):
        code = min(max(np.rint((values[i] - lowest) * inverse), np.float32(0.0)), np.float32(15.0))
        difference = values[i] - lowest - code * scale
        total += difference * difference
    return total


@parallel
def _round_above(weight, codes, scales, minima, n_tried):
    """Round floats to codes of 4 bits above a minimum; of some ranges about the values' own, the one with the least error."""
    n_in = weight.shape[1]
    for row in prange(weight.shape[0]):
        for block in range(scales.shape[1]):
            first, last = 32 * block, min(n_in, 32 * block + 32)
            values = weight[row, first:last]
            low, high = np.float32(0.0), np.float32(0.0)
            for i in range(values.shape[0]):
                low = values[i] if i == 0 else min(low, values[i])
                high = values[i] if i == 0 else max(high, values[i])
            best, base, least = np.float32(0.0), _half(low), np.float32(np.inf)
            for tried in range(n_tried if high > low else 0):
                # from 5 % wider to 12 % narrower
                narrower = np.float32(-0.05 + 0.17 * tried / (n_tried - 1))
                lowest = _half(low + (high - low) * narrower * np.float32(0.5))
                scale = _half((high - low) * (np.float32(1.0) - narrower) / np.float32(15.0))
                if scale != np.float32(0.0):
                    error = _error_above(values, lowest, np.float32(1.0) / scale, scale)
                    if error < least:
                        best, base, least = scale, lowest, error
            inverse = np.float32(1.0) / best if best != np.float32(0.0) else np.float32(0.0)
            for i in range(first, last):
                code = min(max(np.rint((weight[row, i] - base) * inverse), np.float32(0.0)), np.float32(15.0))
                codes[row, i] = np.uint8(code)
            for i in range(last, first + 32):
                codes[row, i] = np.uint8(0)
            scales[row, block] = best
            minima[row, block] = base


def n_tiles(n_out: int) -> int:
    """Return the tiles of so many outputs."""
    return -(-n_out // TILE)


def room(format_: Format, n_out: int, n_in: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return zeroed codes [n_tiles, n_blocks, code_bytes] and scales [n_tiles, n_spans, scale_bytes], uint8."""
    filled = -(-n_in // format_.filled) * format_.filled
    codes = torch.zeros(n_tiles(n_out), filled // BLOCK, format_.code_bytes, dtype=torch.uint8)
    return codes, torch.zeros(n_tiles(n_out), filled // format_.span, format_.scale_bytes, dtype=torch.uint8)


def packed_floats(weight: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix [n_out, n_in] as `rounded_codes` does and lay it out; returns what `room` does."""
    format_ = FORMATS[name]
    n_out, n_in = weight.shape
    codes, scales = room(format_, n_out, n_in)
    set_threads()
    for begin in range(0, n_out, _ROWS):  # little is widened at a time
        loose, parts = rounded_codes(weight[begin : begin + _ROWS], name, codes.shape[1] * BLOCK)
        lay(format_, loose, parts, begin, codes, scales)
    return codes, scales


def rounded_codes(weight: torch.Tensor, name: str, n_filled: int) -> tuple[Array, dict[str, Array]]:
    """Round a matrix [n_out, n_in] to Q8_0, Q6_0, Q4_0 or Q4_1.

    Returns:
        Codes uint8 [n_out, n_filled]; ``scale`` and, of Q4_1, ``minimum``, float16 [n_out, n_filled / 32].
    """
    floats = weight.detach().float().contiguous().numpy()
    codes = np.empty((len(floats), n_filled), np.uint8)
    scales, minima = np.zeros((2, len(floats), n_filled // BLOCK), np.float32)
    if name == "Q4_1":
        _round_above(floats, codes, scales, minima, _RANGES)
        return codes, {"scale": scales.astype(np.float16), "minimum": minima.astype(np.float16)}
    if name == "Q4_0":
        _round_to_4(floats, codes, scales, _TRIED)
    else:
        _round(floats, FORMATS[name].offset, codes, scales)
    return codes, {"scale": scales.astype(np.float16)}


def lay(
    format_: Format,
    codes: Array,
    parts: dict[str, Array],
    begin: int,
    all_codes: torch.Tensor,
    all_scales: torch.Tensor,
) -> None:
    """Put rows of a matrix from ``begin``, a multiple of 16, on into their tiles.

    Args:
        format_: of the codes.
        codes: uint8 [n_rows, n_in].
        parts: scales as GGUF files hold them, [n_rows, …]: float16 ``scale`` and ``minimum`` a block; or float16 ``d`` and
            ``d_min`` a span with 8-bit ``scale`` and ``minimum``.
        begin: number of the first row.
        all_codes: of the whole matrix, see `room`.
        all_scales: likewise.
    """
    first, n = begin // TILE, n_tiles(len(codes))
    lay_codes(format_.bits, codes, all_codes[first : first + n].numpy())
    records = all_scales[first : first + n].numpy()
    if format_.scales is Scales.HALF:
        records[:] = _bytes(_tiles(parts["scale"], n))
    elif format_.scales is Scales.HALF_MIN:
        records[:] = _bytes(np.stack([_tiles(parts[name], n) for name in ("scale", "minimum")], 2))
    else:
        names = ("d", "d_min") if format_.scales is Scales.SUPER_MIN else ("d",)
        outer = np.stack([_tiles(parts[name], n) for name in names], 2)  # [n_tiles, n_spans, 1 or 2, 16]
        small = [
            parts[name].reshape(len(codes), records.shape[1], -1) for name in ("scale", "minimum") if name in parts
        ]
        inner = np.stack([_tiles(part, n) for part in small], 3)  # [n_tiles, n_spans, 8 or 16, 1 or 2, 16]
        records[..., : 32 * len(names)] = _bytes(outer)
        records[..., 32 * len(names) :] = inner.view(np.uint8).reshape(*records.shape[:2], -1)


@parallel
def _gather(lanes, ids, out):
    """Put some of the rows that are interleaved in ``lanes`` [n_tiles, n, 16] into ``out``, of the same kind."""
    for tile in prange(out.shape[0]):
        for lane in range(min(16, ids.shape[0] - 16 * tile)):
            row = ids[16 * tile + lane]
            for k in range(out.shape[1]):
                out[tile, k, lane] = lanes[row // 16, k, row % 16]


@parallel
def gather_inputs(weight, ids, out):
    """Set ``out`` [n_out, n] to some columns of a matrix [n_out, n_in]; each row is read in its order."""
    for row in prange(weight.shape[0]):
        for i in range(ids.shape[0]):
            out[row, i] = weight[row, ids[i]]


def gathered(
    format_: Format, codes: torch.Tensor, scales: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales of some outputs [n] of a matrix, as they are."""
    set_threads()

    def take(lanes: torch.Tensor) -> torch.Tensor:
        source = lanes.reshape(len(lanes), -1, TILE)
        made = torch.zeros(n_tiles(len(ids)), *source.shape[1:], dtype=source.dtype)
        _gather(source.numpy(), ids.numpy(), made.numpy())
        return made.reshape(-1, *lanes.shape[1:])

    fours = take(codes.view(torch.int32)).view(torch.uint8)
    n_outer = {Scales.HALF: 32, Scales.HALF_MIN: 64, Scales.SUPER_MIN: 64, Scales.SUPER_HALVES: 32}[format_.scales]
    outer = take(scales[..., :n_outer].contiguous().view(torch.int16)).view(torch.uint8)
    return fours, torch.cat([outer, take(scales[..., n_outer:].contiguous())], -1) if n_outer < scales.shape[
        -1
    ] else outer


def _tiles(rows: Array, n: int) -> Array:
    """Turn [n_rows, …] into [n_tiles, …, 16], filled up with zeros."""
    filled = np.zeros((n * TILE, *rows.shape[1:]), rows.dtype)
    filled[: len(rows)] = rows
    return np.ascontiguousarray(np.moveaxis(filled.reshape(n, TILE, *rows.shape[1:]), 1, -1))


def _bytes(values: Array) -> Array:
    """Return the bytes of [n_tiles, n_spans, …]."""
    flat = np.ascontiguousarray(values).view(np.uint8)
    return flat.reshape(*values.shape[:2], -1)
