"""Products of few rows with a weight matrix that is read once, in its stored type."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import prange

from coreinfer_sim.engines.lean.intrinsics import bits, dot, normalise, parallel, serial, set_threads

_ROWS = 8  # output features that one task of a product computes


@parallel
def linear(weight, scale, bias, x, out):
    """Set ``out`` [n_rows, n_out] to ``x`` [n_rows, n_in] times ``weight`` [n_out, n_in], scaled and shifted by row."""
    n_out = weight.shape[0]
    for task in prange((n_out + _ROWS - 1) // _ROWS):
        for i in range(task * _ROWS, min(n_out, (task + 1) * _ROWS)):
            for r in range(x.shape[0]):  # innermost, so that a row of weights is read once for all rows
                out[r, i] = dot(weight[i], x[r]) * scale[i] + bias[i]


@serial
def output(hidden, norm, eps, weight, scale, bias, logits):
    """Set ``logits`` [n_rows, vocabulary] from the residual stream; see `linear`."""
    x = np.empty(hidden.shape, np.float32)
    for r in range(hidden.shape[0]):
        normalise(hidden[r], norm, eps, x[r])
    linear(weight, scale, bias, x, logits)


@functools.cache
def warm_up_linear(dtype: torch.dtype) -> None:
    """Compile `linear` alone for weights of a type, or load it where that was done before."""
    one = np.ones(8, np.float32)
    set_threads()
    linear(bits(torch.zeros(8, 8, dtype=dtype)), one, one, np.ones((1, 8), np.float32), np.ones((1, 8), np.float32))
