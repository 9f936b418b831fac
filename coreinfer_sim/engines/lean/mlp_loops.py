"""The loops of one layer's MLP, called by their address: each is compiled when the first MLP of its kind is laid out.

A step that held all of them would take far longer to compile. All take the same nine integers: address of the inputs
[n_rows, d_model], n_rows, d_model; addresses of the MLP's words [3, N_WORDS], of its threshold, and of what it counts
[N_COUNTS]; kind of the activation, n_threads, and address of the outputs.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numpy as np
from numba import types

from coreinfer_sim.engines.lean import (
    by_token,
    disk_reads,
    from_disk,
    intrinsics,
    kernels,
    mlp,
    output_code,
    products,
    relu,
)
from coreinfer_sim.engines.lean.by_token import outputs_by_token
from coreinfer_sim.engines.lean.from_disk import outputs_from_disk
from coreinfer_sim.engines.lean.intrinsics import array_at, set_threads
from coreinfer_sim.engines.lean.mlp import whole_mlp
from coreinfer_sim.engines.lean.products import N_WORDS
from coreinfer_sim.engines.lean.relu import outputs_of_nonzero

_SHARED: tuple[ModuleType, ...] = (intrinsics, kernels, products)
N_COUNTS, MARKS = 3, 2
"""What an MLP counts: neurons that any row has read, and the sum over its rows; behind them, where to mark which (0: nowhere)."""
_FLOATS, _WHOLE = np.empty(0, np.float32), np.empty(0, np.int64)


def _address(loop: Any, *sources: ModuleType) -> int:
    set_threads()  # code that is loaded from the disk looks for numba's threads
    return kernels.kept(types.void(*[types.int64] * 9), loop, sources=(*_SHARED, *sources))


@functools.cache
def whole_loop() -> int:
    """Return the address of `mlp.whole_mlp`."""

    def whole(x, n, d, words, _threshold, _n_read, kind, n_threads, out):
        stack = array_at(words, _WHOLE, (3, N_WORDS))
        whole_mlp(array_at(x, _FLOATS, (n, d)), stack, kind, n_threads, array_at(out, _FLOATS, (n, d)))

    return _address(whole, mlp)


@functools.cache
def by_token_loop() -> int:
    """Return the address of `by_token.outputs_by_token`."""

    def chosen(x, n, d, words, threshold, n_read, kind, n_threads, out):
        stack, counts = array_at(words, _WHOLE, (3, N_WORDS)), array_at(n_read, _WHOLE, (N_COUNTS,))
        least, made = array_at(threshold, _FLOATS, (1,))[0], array_at(out, _FLOATS, (n, d))
        outputs_by_token(array_at(x, _FLOATS, (n, d)), stack, kind, n_threads, least, counts, made, counts[MARKS])

    return _address(chosen, by_token, output_code)


@functools.cache
def from_disk_loop() -> int:
    """Return the address of `from_disk.outputs_from_disk`."""

    def chosen_from_disk(x, n, d, words, threshold, n_read, kind, n_threads, out):
        stack, counts = array_at(words, _WHOLE, (3, N_WORDS)), array_at(n_read, _WHOLE, (N_COUNTS,))
        least, made = array_at(threshold, _FLOATS, (1,))[0], array_at(out, _FLOATS, (n, d))
        outputs_from_disk(array_at(x, _FLOATS, (n, d)), stack, kind, n_threads, least, counts, made, counts[MARKS])

    return _address(chosen_from_disk, by_token, output_code, disk_reads, from_disk)


@functools.cache
def nonzero_loop() -> int:
    """Return the address of `relu.outputs_of_nonzero`."""

    def nonzero(x, n, d, words, _threshold, n_read, kind, n_threads, out):
        stack, counts = array_at(words, _WHOLE, (3, N_WORDS)), array_at(n_read, _WHOLE, (N_COUNTS,))
        given, made = array_at(x, _FLOATS, (n, d)), array_at(out, _FLOATS, (n, d))
        outputs_of_nonzero(given, stack, kind, n_threads, counts, made, counts[MARKS])

    return _address(nonzero, by_token, output_code, relu)
