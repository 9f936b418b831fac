"""MLPs with a gate or without, dense or of held neurons alone."""

from __future__ import annotations

import numpy as np
from numba import prange

from coreinfer_sim.engines.lean.intrinsics import activate, parallel, serial
from coreinfer_sim.engines.lean.products import N_OUT, multiply, quantise_block, rounded, rounding, width


@parallel
def _activate(kind, first_up, both, inner, codes, factors, sums):
    """Set ``inner`` [n_rows, n_ff] to φ(gate) · up, or to φ(up) where there are no gates, and round it if need be.

    Args:
        kind: of the activation.
        first_up: column of the first up product; 0: there are no gates.
        both: products.
        inner: see above.
        codes: room for what the next matrix reads if it is packed; so are factors and sums.
        factors: as codes.
        sums: as codes.
    """
    n_rows, n_ff = inner.shape
    for task in prange(n_rows * ((n_ff + 511) // 512)):
        r, first = task % n_rows, task // n_rows * 512
        last = min(n_ff, first + 512)
        activate(both[r, first:last], kind, inner[r, first:last])
        if first_up > 0:
            for i in range(first, last):
                inner[r, i] *= both[r, first_up + i]
        for block in range(first // 32, min(factors.shape[1], first // 32 + 16)):
            quantise_block(inner[r], block, codes[r], factors[r], sums[r])
    # what fills the last span of a matrix up
    for r in range(n_rows):
        for block in range((n_ff + 511) // 512 * 16, factors.shape[1]):
            quantise_block(inner[r], block, codes[r], factors[r], sums[r])


@serial
def whole_mlp(x, stack, kind, n_threads, out):
    """Set ``out`` [n_rows, d_model] to what an MLP gives that reads all its neurons.

    Args:
        x: its inputs, float32 [n_rows, d_model].
        stack: words of gate, up and down, or of up, nothing and down; see `products`.
        kind: of the activation; see `intrinsics`.
        n_threads: that products use.
        out: float32.
    """
    n, n_ff = x.shape[0], stack[0, N_OUT]
    codes, factors, sums = rounded(stack[0], x)
    both = np.empty((n, width(stack[0]) + width(stack[1])), np.float32)
    multiply(n_threads, stack[:2], x, codes, factors, sums, both)
    inner = np.empty((n, n_ff), np.float32)
    codes, factors, sums = rounding(stack[2], n)
    _activate(kind, width(stack[0]) if stack[1, N_OUT] > 0 else 0, both, inner, codes, factors, sums)
    added = np.empty((n, width(stack[2])), np.float32)
    multiply(n_threads, stack[2:], inner, codes, factors, sums, added)
    for r in range(n):
        for j in range(out.shape[1]):
            out[r, j] = added[r, j]
