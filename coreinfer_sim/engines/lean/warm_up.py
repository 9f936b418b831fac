"""Compiling the loops ahead of the first text."""

from __future__ import annotations

import functools

import numpy as np
import torch

from coreinfer_sim.engines.lean.attention import cache_loops
from coreinfer_sim.engines.lean.head import whole_head
from coreinfer_sim.engines.lean.intrinsics import SILU, bits, set_threads
from coreinfer_sim.engines.lean.matrix import Matrix
from coreinfer_sim.engines.lean.step import decode_step


@functools.cache
def warm_up(dtype: torch.dtype) -> None:
    """Compile the loops for a model's type, or load them where that was done before: some 30 seconds or one.

    Args:
        dtype: of the cache.
    """
    matrix = Matrix.of(torch.zeros(8, 8, dtype=dtype))
    words = matrix.words
    one, rows = np.ones((1, 8), np.float32), np.zeros(1, np.int64)
    keys, values = (torch.zeros(1, 1, 1, 8, dtype=dtype) for _ in range(2))
    decode_step(
        *(
            cache_loops(dtype),
            one.copy(),
            np.ones((2, 2, 8), np.float32),
            np.zeros((1, 0, 8), np.float32),
            np.ones((2, 2), np.float32),
        ),
        *(np.stack([words] * 4)[None], np.stack([words] * 3)[None, None]),
        *(np.full((1, 1), -1, np.float32), np.zeros((1, 1, 2), np.int64), np.ones(1, np.int64), rows, one, one),
        *(bits(keys), np.array([[keys.data_ptr(), values.data_ptr()]], np.int64), tuple(keys.shape), rows, rows, 0),
        *(np.float32(1), SILU, words[None], whole_head(matrix), np.zeros((1, 16), np.float32), set_threads()),
    )
