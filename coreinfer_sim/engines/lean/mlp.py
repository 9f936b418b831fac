"""Gated MLPs, dense or of held neurons alone."""

from __future__ import annotations

import numpy as np
from numba import prange

from coreinfer_sim.engines.lean.intrinsics import activated, normalise, parallel, serial
from coreinfer_sim.engines.lean.products import N_OUT, multiply, quantise_block, rounded, rounding, width


@parallel
def _activate(kind, first_up, both, inner, codes, factors, sums):
    """Set ``inner`` [n_rows, n_ff] to φ(gate) · up, and round it where the next matrix is packed."""
    n_rows, n_ff = inner.shape
    for task in prange(n_rows * ((n_ff + 511) // 512)):
        r, first = task % n_rows, task // n_rows * 512
        last = min(n_ff, first + 512)
        for i in range(first, last):
            inner[r, i] = activated(both[r, i], kind) * both[r, first_up + i]
        for block in range(first // 32, min(factors.shape[1], first // 32 + 16)):
            quantise_block(inner[r], block, codes[r], factors[r], sums[r])
    # what fills the last span of a matrix up
    for r in range(n_rows):
        for block in range((n_ff + 511) // 512 * 16, factors.shape[1]):
            quantise_block(inner[r], block, codes[r], factors[r], sums[r])


@serial
def gated_mlp(hidden, rows, norm, eps, stack, kind, n_threads):
    """Add a gated MLP to some rows of ``hidden`` [n_rows, d_model].

    Args:
        hidden: residual stream.
        rows: which rows, [n].
        norm: weight of the norm before, [d_model].
        eps: of the norm.
        stack: words of gate, up and down; see `products`.
        kind: of the activation, SILU or RELU.
        n_threads: that products use.
    """
    n, d_model, n_ff = rows.shape[0], hidden.shape[1], stack[0, N_OUT]
    x = np.empty((n, d_model), np.float32)
    for r in range(n):
        normalise(hidden[rows[r]], norm, eps, x[r])
    codes, factors, sums = rounded(stack[0], x)
    both = np.empty((n, width(stack[0]) + width(stack[1])), np.float32)
    multiply(n_threads, stack[:2], x, codes, factors, sums, both)
    inner = np.empty((n, n_ff), np.float32)
    codes, factors, sums = rounding(stack[2], n)
    _activate(kind, width(stack[0]), both, inner, codes, factors, sums)
    added = np.empty((n, width(stack[2])), np.float32)
    multiply(n_threads, stack[2:], inner, codes, factors, sums, added)
    for r in range(n):
        for j in range(d_model):
            hidden[rows[r], j] += added[r, j]
