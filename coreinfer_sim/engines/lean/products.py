"""Products of few rows with matrices that are read once, in whatever type they are held."""

from __future__ import annotations

import numpy as np
from numba import prange

from coreinfer_sim.engines.lean.intrinsics import address, float_at, inline, parallel, serial
from coreinfer_sim.engines.lean.kernels import call_five, call_product

ONE, MANY, WEIGHTS, SCALES, BIAS, N_OUT, N_IN, CODE_STEP, SCALE_STEP, PACKED, UNPACKED, LOOP = range(12)
"""Places in the words of a matrix: addresses of the product with one row and with four, of weights, scales and bias (0: none);
outputs; inputs, filled up to the type's span; bytes from tile to tile of weights and of scales; 1 if its inputs are rounded to
8 bits; address of what widens a tile; of an MLP's first matrix, that of its loop (see `mlp_loops`)."""
N_WORDS = 14  # of a matrix the last two are nothing


@inline
def quantise_block(x, block, codes, factors, sums):
    """Round 32 inputs to 8 bits with a scale of their own, the largest magnitude 127, as llama.cpp does (Q8_0).

    Args:
        x: float32 [n].
        block: which 32; those beyond x are zero.
        codes: int8, as many as the matrix expects.
        factors: float32, one every 32 codes.
        sums: int32 sums of codes, one every 16.
    """
    n = x.shape[0]
    first, last = min(n, 32 * block), min(n, 32 * block + 32)
    highest = np.float32(0.0)
    for j in range(first, last):
        highest = max(highest, abs(x[j]))
    factor = highest / np.float32(127.0)
    inverse = np.float32(1.0) / factor if factor > np.float32(0.0) else np.float32(0.0)
    for j in range(first, last):
        codes[j] = np.int8(np.rint(x[j] * inverse))
    for j in range(last, 32 * block + 32):
        codes[j] = np.int8(0)
    factors[block] = factor
    for half in range(2):
        total = np.int32(0)
        for j in range(32 * block + 16 * half, 32 * block + 16 * half + 16):
            total += np.int32(codes[j])
        sums[2 * block + half] = total


@inline
def rounding(words, n):
    """Return room for the codes, factors and sums of ``n`` rows of inputs of a matrix; none where it takes floats."""
    n_in = words[N_IN] if words[PACKED] else 0
    return np.empty((n, n_in), np.int8), np.empty((n, n_in // 32), np.float32), np.empty((n, n_in // 16), np.int32)


@inline
def _round_row(x, codes, factors, sums):
    for block in range(factors.shape[0]):
        quantise_block(x, block, codes, factors, sums)


@inline
def rounded(words, x):
    """Return the codes, factors and sums of rows of inputs of a matrix."""
    codes, factors, sums = rounding(words, x.shape[0])
    for r in range(x.shape[0]):
        _round_row(x[r], codes[r], factors[r], sums[r])
    return codes, factors, sums


@inline
def width(words):
    """Return the outputs of a matrix, filled up to whole tiles."""
    return (words[N_OUT] + 15) // 16 * 16


@inline
def tile_product(words, tile, x, codes, factors, sums, out, column):
    """Set the columns of ``out`` from ``column`` on to one tile's products with all rows of inputs."""
    n_x, stride = out.shape[0], out.shape[1]
    weights = words[WEIGHTS] + tile * words[CODE_STEP]
    scales = words[SCALES] + tile * words[SCALE_STEP]
    n_in, n_rows = words[N_IN], min(16, words[N_OUT] - 16 * tile)
    r = 0
    while r < n_x:
        n, function = (4, words[MANY]) if n_x - r >= 4 else (1, words[ONE])
        given = (address(x[r]), address(codes[r]), address(factors[r]), address(sums[r]))
        where = address(out[r]) + 4 * column
        call_product(function, (weights, scales, *given, n_in, n_rows, where, stride))
        r += n
    if words[BIAS] != 0:
        for i in range(16):
            for r in range(n_x):
                out[r, column + i] += float_at(words[BIAS] + 4 * (16 * tile + i))


@parallel
def multiply(n_threads, stack, x, codes, factors, sums, out):
    """Multiply rows of inputs with several matrices of as many inputs.

    Args:
        n_threads: into how many parts the tiles are divided.
        stack: words of each matrix, int64 [n, N_WORDS].
        x: float32 [n_rows, n_in].
        codes: of `rounded`, int8 [n_rows, ...]; so are factors and sums. Read by packed matrices alone.
        factors: as codes.
        sums: as codes.
        out: float32 [n_rows, n]: outputs of one matrix after those of the other, each filled up to a multiple of 16.
    """
    n_tiles = np.zeros(stack.shape[0] + 1, np.int64)
    for m in range(stack.shape[0]):
        n_tiles[m + 1] = n_tiles[m] + (stack[m, N_OUT] + 15) // 16
    total = n_tiles[-1]
    for thread in prange(n_threads):
        m = 0
        for tile in range(thread * total // n_threads, (thread + 1) * total // n_threads):
            while tile >= n_tiles[m + 1]:
                m += 1
            tile_product(stack[m], tile - n_tiles[m], x, codes, factors, sums, out, 16 * tile)


@parallel
def unpack(words, function, first, n_tiles, out, size):
    """Set ``out`` [n_in, 16 · n_tiles], an address, to the weights of some tiles of a packed matrix, transposed.

    Args:
        words: of the matrix.
        function: address of what widens one tile; see `kernels.unpacked_address`.
        first: tile.
        n_tiles: how many.
        out: address of the first weight.
        size: bytes of each.
    """
    for i in prange(n_tiles):
        tile = first + i
        weights = words[WEIGHTS] + tile * words[CODE_STEP]
        scales = words[SCALES] + tile * words[SCALE_STEP]
        call_five(function, (weights, scales, words[N_IN], out + 16 * size * i, 16 * n_tiles))


@serial
def unpack_rows(words, ids, out):
    """Set ``out`` [n, n_in] to the weights of some outputs of a packed matrix."""
    n_in = words[N_IN]
    tile_weights = np.empty((n_in, 16), np.float32)
    for i in range(ids.shape[0]):
        tile, lane = ids[i] // 16, ids[i] % 16
        weights = words[WEIGHTS] + tile * words[CODE_STEP]
        scales = words[SCALES] + tile * words[SCALE_STEP]
        call_five(words[UNPACKED], (weights, scales, n_in, address(tile_weights), 16))
        for j in range(out.shape[1]):
            out[i, j] = tile_weights[j, lane]


@serial
def product(n_threads, stack, x, out):
    """Do as `multiply` for inputs that nothing was made of yet."""
    codes, factors, sums = rounded(stack[0], x)
    multiply(n_threads, stack, x, codes, factors, sums, out)


@parallel
def rounded_rows(words, x):
    """Do as `rounded` for many rows, which threads share."""
    codes, factors, sums = rounding(words, x.shape[0])
    for r in prange(x.shape[0]):
        _round_row(x[r], codes[r], factors[r], sums[r])
    return codes, factors, sums
