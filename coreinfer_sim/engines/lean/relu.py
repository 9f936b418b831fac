"""MLPs with ReLU of which each token reads the neurons that are not zero: nothing is left out.

The gate rows are read whole. Where a gate is positive, its neuron's record is read: the up row and the output row. Everywhere
else the neuron is zero, whatever its up row holds. An MLP without up rows has records of output rows alone.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from coreinfer_sim.engines.lean.by_token import (
    AHEAD,
    BY_CODES,
    N_OUTPUTS,
    RECORD_BYTES,
    RECORDS,
    ROWS,
    TILES,
    add_waiting,
    marks_at,
    output_at,
    started,
    summed,
)
from coreinfer_sim.engines.lean.intrinsics import activated, address, float_at, inline, parallel, serial
from coreinfer_sim.engines.lean.kernels import call_rows
from coreinfer_sim.engines.lean.output_code import TOGETHER
from coreinfer_sim.engines.lean.products import BIAS, N_IN, N_OUT, tile_product


@inline
def _add(stack, first, positive, n_own, at, gates, x, codes, factors, starts, kind, room, values, rows, out):
    """Add neurons to the outputs of one row of inputs.

    ``positive`` names them, from ``first`` on, in order; ``at`` [n] says where records lie.
    """
    own = stack[2]
    n_in = stack[0, N_IN] if own[BY_CODES] else x.shape[0]
    n_waiting = 0
    for c in range(n_own):
        i = positive[c]
        record = at[i]
        value = activated(gates[i], kind)
        if own[ROWS] != 0:
            after = at[positive[min(c + AHEAD, n_own - 1)]]
            given = (address(factors), address(x), address(codes), address(starts), n_in, address(room), after)
            call_rows(own[ROWS], (record, 0, *given))
            up = room[0]
            if stack[1, BIAS] != 0:
                up += float_at(stack[1, BIAS] + 4 * (first + i))
            value *= up
        values[n_waiting] = value
        rows[n_waiting] = output_at(own, first + i, record)
        n_waiting = add_waiting(own, first, at, positive, c, n_own, values, rows, n_waiting + 1, out)


@parallel
def _not_zero(n_threads, stack, kind, x, codes, factors, sums, starts, out, n_read, marks):
    """Set ``out`` [n_threads, n_rows, outputs] to parts of the outputs; count neurons in ``n_read`` [n_threads, 2].

    ``marks`` is of `marks_at`.
    """
    n_rows, n_ff = x.shape[0], stack[0, N_OUT]
    n_tiles = (n_ff + 15) // 16
    for thread in prange(n_threads):
        gates = np.empty((n_rows, 16 * TILES), np.float32)
        positive, at = np.empty(16 * TILES, np.int64), np.empty(16 * TILES, np.int64)
        room, values = np.zeros(1, np.float32), np.zeros(TOGETHER, np.float32)
        rows = np.empty(2 * TOGETHER, np.int64)
        end = (thread + 1) * n_tiles // n_threads
        for begin in range(thread * n_tiles // n_threads, end, TILES):
            first, last = 16 * begin, min(n_ff, 16 * min(end, begin + TILES))
            for tile in range(begin, min(end, begin + TILES)):
                tile_product(stack[0], tile, x, codes, factors, sums, gates, 16 * (tile - begin))
            for i in range(last - first):
                at[i] = stack[2, RECORDS] + (first + i) * stack[2, RECORD_BYTES]
            by_any = np.zeros(last - first, np.bool_)
            for r in range(n_rows):
                n_own = 0
                for i in range(last - first):
                    if marks.shape[1] > 0:
                        marks[r, first + i] = gates[r, i] > np.float32(0.0)
                    if gates[r, i] > np.float32(0.0):
                        positive[n_own] = i
                        n_own += 1
                        by_any[i] = True
                n_read[thread, 1] += n_own
                given = (x[r], codes[r], factors[r], starts[r])
                _add(stack, first, positive, n_own, at, gates[r], *given, kind, room, values, rows, out[thread, r])
            n_read[thread, 0] += by_any.sum()


@serial
def outputs_of_nonzero(x, stack, kind, n_threads, n_read, out, marks=0):
    """Set ``out`` [n_rows, d_model] to what an MLP with ReLU adds.

    Args:
        x: normalised inputs, float32 [n_rows, d_model].
        stack: words of the gate rows, of the up rows' bias, and of the records, int64 [3, N_WORDS].
        kind: of the activation, which is zero wherever its input is not positive.
        n_threads: that share the neurons.
        n_read: int64 [2]; neurons that are not zero in any row, and the sum over rows of those of each, are added.
        out: float32.
        marks: where to mark those of each row, see `marks_at`; 0: nowhere.
    """
    codes, factors, sums, starts = started(stack, x)
    parts = np.zeros((n_threads, x.shape[0], stack[2, N_OUTPUTS]), np.float32)
    counts = np.zeros((n_threads, 2), np.int64)
    found = marks_at(marks, x.shape[0], stack[0, N_OUT])
    _not_zero(n_threads, stack, kind, x, codes, factors, sums, starts, parts, counts, found)
    summed(stack[2], parts, counts, n_read, out)
