"""Compiling the loops ahead of the first text."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from coreinfer_sim.base.files import cache_folder, locked
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.engines.lean.attention import OF_NONE, cache_like, cache_loops
from coreinfer_sim.engines.lean.compact import WholeMLP
from coreinfer_sim.engines.lean.head import whole_head
from coreinfer_sim.engines.lean.intrinsics import SILU, set_threads
from coreinfer_sim.engines.lean.matrix import Matrix
from coreinfer_sim.engines.lean.mlp_loops import N_COUNTS
from coreinfer_sim.engines.lean.products import rounded_rows
from coreinfer_sim.engines.lean.step import N_NORMS, NO_NORM, Layers, decode_step


@functools.cache
def warm_up(dtype: torch.dtype) -> None:
    """Compile the loops for a model's type, or load them where that was done before: some 30 seconds or one.

    Args:
        dtype: of the cache.
    """
    with _alone():
        _step(dtype)


@contextmanager
def _alone() -> Iterator[None]:
    """Let one process compile at a time: what numba keeps on the disk is not made for several that write it at once."""
    try:
        lock = locked(cache_folder("loops"), Progress())
    except OSError:  # there is no place for it; then nothing is kept either, or the risk is taken
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _step(dtype: torch.dtype) -> None:
    """Decode one token of the smallest model."""
    matrix = Matrix.of(torch.zeros(8, 8, dtype=dtype))
    words = matrix.words
    one, rows = np.ones((1, 8), np.float32), np.zeros(1, np.int64)
    keys, values = (torch.zeros(1, 1, 1, 8, dtype=dtype) for _ in range(2))
    layers = Layers(
        np.full((2, N_NORMS), NO_NORM),
        np.ones((2, N_NORMS, 2, 8), np.float32),
        np.ones((2, N_NORMS + 1), np.float32),
        np.full(1, OF_NONE),
        np.zeros((1, 0, 2, 8), np.float32),
        np.array([[0, 16, 32]]),
        np.stack([words] * 4)[None],
        rows,
        rows,
        np.array([[1, 0]], np.float32),
        0,
        0,
        np.float32(1),
        SILU,
    )
    rounded_rows(words, one)  # of prefill
    angles = np.ones((1, 1, 4), np.float32)
    decode_step(
        *(cache_loops(dtype), one.copy(), layers, WholeMLP((matrix, matrix), matrix).words[None, None]),
        *(
            np.zeros((1, 1), np.float32),
            np.zeros((1, 1, N_COUNTS), np.int64),
            np.ones(1, np.int64),
            rows,
            angles,
            angles,
        ),
        *(cache_like(dtype), np.array([[[keys.data_ptr(), values.data_ptr(), 1, 0]]], np.int64), 1, rows, rows),
        *(words[None], whole_head(matrix), np.zeros((1, 16), np.float32), set_threads()),
    )
