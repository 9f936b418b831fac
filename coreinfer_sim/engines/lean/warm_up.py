"""Compiling the loops ahead of the first text."""

from __future__ import annotations

import functools

import numpy as np
import torch

from coreinfer_sim.engines.lean.attention import attention
from coreinfer_sim.engines.lean.intrinsics import SILU, bits, set_threads
from coreinfer_sim.engines.lean.mlp import dense_mlp, neuron_mlp
from coreinfer_sim.engines.lean.products import output


@functools.cache
def warm_up(dtype: torch.dtype, int8: bool = False) -> None:
    """Compile the loops for a model's type, or load them where that was done before: some 20 seconds or one.

    Args:
        dtype: of the cache and, unless they are int8, of the weights.
        int8: whether the weights are.
    """
    held = torch.int8 if int8 else dtype
    one, rows, eps = np.ones(8, np.float32), np.zeros(1, np.int64), np.float32(1e-6)
    hidden, product = np.ones((1, 8), np.float32), (bits(torch.zeros(8, 8, dtype=held)), one, one)
    keys, values = (bits(torch.zeros(1, 1, 1, 8, dtype=dtype)) for _ in range(2))
    nothing = np.zeros((0, 8), np.float32)
    set_threads()
    attention(
        *(hidden, one, nothing, eps, product, product, product, product, hidden.copy(), hidden.copy()),
        *(keys, values, rows, rows, 0, np.float32(1)),
    )
    neurons = bits(torch.zeros(4, 3, 8, dtype=held)), np.ones((4, 3), np.float32), np.zeros((4, 2), np.float32)
    neuron_mlp(hidden, rows, one, eps, *neurons, one, SILU, 1)
    dense_mlp(hidden, rows, one, eps, product, product, product, SILU)
    output(hidden, one, eps, *product, hidden.copy())
