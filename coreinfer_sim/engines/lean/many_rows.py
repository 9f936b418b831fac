"""Products of many rows of inputs with weights that lie by neuron: prefill.

A tile's codes are put together again from both planes, in a buffer that stays in the cache, and multiplied as whole ones are, by
all rows. Output rows are widened some neurons at a time, for a product in torch.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from coreinfer_sim.engines.lean.formats import CODE_BYTES, FORMATS, TILE
from coreinfer_sim.engines.lean.intrinsics import address, inline, parallel, set_threads
from coreinfer_sim.engines.lean.kernels import MANY as ROWS_AT_ONCE
from coreinfer_sim.engines.lean.kernels import (
    call_five,
    call_whole_tile,
    call_widened,
    product_address,
    unpacked_address,
    whole_tile_address,
    widened_row_address,
)
from coreinfer_sim.engines.lean.matrix import Matrix, narrowed_product
from coreinfer_sim.engines.lean.products import (
    CODE_STEP,
    MANY,
    N_IN,
    N_OUT,
    ONE,
    SCALE_STEP,
    SCALES,
    WEIGHTS,
    rounded_rows,
    tile_product,
)

_INPUTS = 256
"""Rows of inputs for which a tile is put together once; their codes then stay in the second cache."""


def planes_product(high: Matrix, whole: str, records: torch.Tensor, begin: int, x: torch.Tensor) -> torch.Tensor:
    """Multiply float32 rows [n_rows, n_in] with a matrix whose codes have two planes; inputs are rounded to 8 bits.

    Args:
        high: the upper bits, with scales and bias.
        whole: format of the whole codes.
        records: uint8 [n_out, record_bytes].
        begin: place of the lower bits in each.
        x: the rows.

    Returns:
        Float32 [n_rows, n_out].
    """
    n_threads = set_threads()
    words = high.words.copy()
    words[ONE], words[MANY] = product_address(whole, 1), product_address(whole, ROWS_AT_ONCE)
    low = np.array([whole_tile_address(high.kind), records.data_ptr() + begin, records.shape[1]])
    out = torch.empty(len(x), len(high.weight) * TILE)
    n_bytes = CODE_BYTES[FORMATS[whole].bits]
    for part, into in zip(x.split(_INPUTS), out.split(_INPUTS), strict=True):
        given = rounded_rows(words, part.numpy())
        _multiply(n_threads, words, low, n_bytes, part.numpy(), *given, into.numpy())
    return out[:, : high.n_out]


def narrowed_planes_product(
    high: Matrix, whole: str, records: torch.Tensor, begin: int, x: torch.Tensor
) -> torch.Tensor:
    """Do as `planes_product`, but for weights that are made bfloat16 some at a time; see `matrix.narrowed_product`."""
    low = np.array([whole_tile_address(high.kind), records.data_ptr() + begin, records.shape[1]])
    function, n_bytes = unpacked_address(whole, 2), CODE_BYTES[FORMATS[whole].bits]

    def narrow(first: int, n_tiles: int, out: int) -> None:
        _narrow(high.words, low, n_bytes, function, first, n_tiles, out)

    return narrowed_product(high, x, narrow)


@inline
def _put_together(words, low, tile, buffer):
    """Set ``buffer`` to the whole codes of a tile; see `_multiply`."""
    high, n_rows = words[WEIGHTS] + tile * words[CODE_STEP], min(16, words[N_OUT] - 16 * tile)
    call_whole_tile(low[0], (high, low[1] + 16 * tile * low[2], low[2], n_rows, words[N_IN], address(buffer)))


@parallel
def _narrow(words, low, n_bytes, function, first, n_tiles, out):
    """Set ``out``, an address, to the bfloat16 weights of some tiles, transposed; see `_multiply` and `products.unpack`."""
    for i in prange(n_tiles):
        buffer = np.empty(words[N_IN] // 32 * n_bytes, np.uint8)
        tile = first + i
        _put_together(words, low, tile, buffer)
        scales = words[SCALES] + tile * words[SCALE_STEP]
        call_five(function, (address(buffer), scales, words[N_IN], out + 32 * i, 16 * n_tiles))


@parallel
def _multiply(n_threads, words, low, n_bytes, x, codes, factors, sums, out):
    """Multiply rows of inputs with all tiles.

    Args:
        n_threads: into how many parts the tiles are divided.
        words: of the high plane, but for the products, which are of whole codes.
        low: address of what puts a tile together, of the first row's lower bits, and bytes from row to row.
        n_bytes: of a tile's whole codes of one block.
        x: float32 [n_rows, n_in].
        codes: of `rounded`; so are factors and sums.
        factors: as codes.
        sums: as codes.
        out: float32.
    """
    n_tiles = (words[N_OUT] + 15) // 16
    for thread in prange(n_threads):
        buffer = np.empty(words[N_IN] // 32 * n_bytes, np.uint8)
        own = words.copy()
        own[WEIGHTS], own[CODE_STEP] = address(buffer), 0
        for tile in range(thread * n_tiles // n_threads, (thread + 1) * n_tiles // n_threads):
            _put_together(words, low, tile, buffer)
            tile_product(own, tile, x, codes, factors, sums, out, 16 * tile)


@parallel
def _widen(widen, rows, stride, n, out, out_stride, n_rows):
    """Widen rows, by the address of what does so with one."""
    for i in prange(n_rows):
        call_widened(widen, (rows + i * stride, n, out + i * out_stride))


def widened_codes(rows: torch.Tensor, kind: str, out: torch.Tensor) -> torch.Tensor:
    """Return output rows of codes, see `record_rows.output_rows`.

    Args:
        rows: uint8 [n_rows, …]; more bytes may lie behind.
        kind: to which they were rounded.
        out: float32 or bfloat16 [n_rows, n], which is filled and returned.
    """
    set_threads()
    size, n = out.element_size(), out.shape[1]
    widen = widened_row_address(kind, size)
    _widen(widen, rows.data_ptr(), rows.stride(0), n, out.data_ptr(), n * size, len(rows))
    return out
