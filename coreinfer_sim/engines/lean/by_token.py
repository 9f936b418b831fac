"""Gated MLPs of which each token reads the neurons that it needs.

A first step estimates what every neuron would give, from a few bits of its gate and up rows; a second one reads the rest of the
neurons whose estimate reaches a threshold, and no others count. A neuron counts by |z_n| · ‖w_out,n‖, where z is φ(gate) · up.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from coreinfer_sim.engines.lean.intrinsics import (
    activate,
    activated,
    address,
    array_at,
    float_at,
    inline,
    parallel,
    serial,
)
from coreinfer_sim.engines.lean.kernels import call_five, call_rows
from coreinfer_sim.engines.lean.output_code import TOGETHER
from coreinfer_sim.engines.lean.products import BIAS, N_IN, N_OUT, SCALE_STEP, SCALES, rounded, tile_product

ROWS, ADDED, RECORDS, RECORD_BYTES, UP_AT, OUT_AT, SCALED, MIDDLE, N_OUTPUTS, OUT_BIAS, OUT_NORMS, ON_DISK = range(12)
REFITTED, REFITTED_BYTES = 12, 13
"""Places in the words of a layer's records: addresses of the products with two rows and of what adds output rows; address of
the first record, and bytes of each; where its up row and its output row begin; of rows that complete the estimate's codes
the address of what multiplies their scales (0: they are floats), and twice the middle of what they can add to a code; outputs
that a record holds; addresses of the outputs' bias (0: none), of ‖w_out‖, and of the words of records that lie on the disk (see
`disk_reads`; 0: all lie in memory); address of output rows that are read in place of those in the records (0: none), and bytes of
each."""
BY_CODES = SCALED
TILES = 16
"""Whose neurons are estimated before the chosen among them are read."""
AHEAD = 2
"""Chosen neurons by which a record is asked for before it is read."""


@parallel
def starts_of(codes, middle, out):
    """Set ``out`` [n_rows, n_in / 4] to what ``middle`` in place of each code makes of four inputs, negative."""
    for r in prange(out.shape[0]):
        for j in range(out.shape[1]):
            total = np.int32(0)
            for i in range(4 * j, 4 * j + 4):
                total += np.int32(codes[r, i])
            out[r, j] = -middle * total


@inline
def _chosen(gates, ups, norms, first, threshold, kind, reads, places):
    """Mark in ``reads`` [n_rows, n] which rows of inputs read a neuron; list the neurons that any reads; return their number."""
    n_rows, n = reads.shape
    scores = np.empty(n, np.float32)
    any_row = np.zeros(n, np.bool_)
    for r in range(n_rows):
        activate(gates[r], kind, scores)
        for i in range(n):
            scores[i] = abs(scores[i] * ups[r, i]) * float_at(norms + 4 * (first + i))
        for i in range(n):
            reads[r, i] = scores[i] >= threshold
            any_row[i] |= reads[r, i]
    n_chosen = 0
    for i in range(n):
        if any_row[i]:
            places[n_chosen] = i
            n_chosen += 1
    return n_chosen


@inline
def output_at(own, n, record):
    """Return where the output row of a neuron lies whose record lies at ``record``."""
    return record + own[OUT_AT] if own[REFITTED] == 0 else own[REFITTED] + n * own[REFITTED_BYTES]


@inline
def add_waiting(own, first, at, chosen, c, n_own, values, rows, n_waiting, out):
    """Add what neurons give to the outputs, once as many wait as are added together, or none follows.

    What other rows of inputs read does not matter, so that one alone gives the same.

    Args:
        own: words of the records.
        first: neuron from which ``chosen`` counts.
        at: addresses of the records of the neurons that ``chosen`` numbers, int64 [n].
        chosen: neurons that are read, in order.
        c: place of the latest one among them.
        n_own: how many they are.
        values: of those that wait, float32 [TOGETHER].
        rows: addresses of their output rows, int64 [2 TOGETHER]; those that are read next come into the second half.
        n_waiting: how many wait.
        out: float32 [outputs].

    Returns:
        How many wait now.
    """
    together = TOGETHER if own[BY_CODES] else 1
    if n_waiting < together and c < n_own - 1:
        return n_waiting
    for k in range(n_waiting, together):
        values[k], rows[k] = np.float32(0.0), rows[0]
    for k in range(together):
        following = chosen[min(c + (1 if together > 1 else AHEAD) + k, n_own - 1)]
        rows[together + k] = output_at(own, first + following, at[following])
    call_five(own[ADDED], (address(rows), address(values), own[N_OUTPUTS], address(out), 0))
    return 0


@inline
def read_chosen(stack, first, places, n_chosen, at, reads, x, codes, factors, starts, gates, ups, kind, scaled, out):
    """Add the chosen neurons to the outputs.

    ``at`` [n] says where their records lie; ``scaled`` [n_rows, 2, 2 n_blocks, 16] is room for a tile's scales.
    """
    own = stack[2]
    n_in = stack[0, N_IN] if own[BY_CODES] else x.shape[1]
    room, values = np.zeros(2, np.float32), np.zeros(TOGETHER, np.float32)
    rows = np.empty(2 * TOGETHER, np.int64)
    chosen = np.empty(n_chosen, np.int64)
    for r in range(x.shape[0]):
        n_own, tile_of_scales, n_waiting = 0, -1, 0
        for c in range(n_chosen):
            if reads[r, places[c]]:
                chosen[n_own] = places[c]
                n_own += 1
        for c in range(n_own):
            i = chosen[c]
            n = first + i
            record = at[i]
            after = at[chosen[min(c + AHEAD, n_own - 1)]]
            if own[BY_CODES] and n // 16 != tile_of_scales:
                tile_of_scales = n // 16
                for part in range(2):
                    scales = stack[part, SCALES] + tile_of_scales * stack[part, SCALE_STEP]
                    of_tile = (scales, address(factors[r]), factors.shape[1], address(scaled[r, part]), 0)
                    call_five(own[SCALED], of_tile)
            # gate and up, exactly
            given = (address(x[r]), address(codes[r]), address(starts[r]), n_in, address(room), after)
            call_rows(own[ROWS], (record, own[UP_AT], address(scaled[r]) + 4 * (n % 16), *given))
            gate, up = room[0], room[1]
            if own[BY_CODES]:
                gate += gates[r, i]
                up += ups[r, i]
            else:
                if stack[0, BIAS] != 0:
                    gate += float_at(stack[0, BIAS] + 4 * n)
                if stack[1, BIAS] != 0:
                    up += float_at(stack[1, BIAS] + 4 * n)
            values[n_waiting] = activated(gate, kind) * up
            rows[n_waiting] = output_at(own, n, record)
            n_waiting = add_waiting(own, first, at, chosen, c, n_own, values, rows, n_waiting + 1, out[r])


@inline
def choose(stack, begin, end, threshold, kind, x, codes, factors, sums, gates, ups, reads, places):
    """Estimate the neurons of the tiles begin … end, and choose among them; see `_chosen`."""
    first, last = 16 * begin, min(stack[0, N_OUT], 16 * end)
    if threshold > np.float32(0.0) or stack[2, BY_CODES]:
        for part in range(2):
            for tile in range(begin, end):
                made = gates if part == 0 else ups
                tile_product(stack[part], tile, x, codes, factors, sums, made, 16 * (tile - begin))
        return _chosen(gates, ups, stack[2, OUT_NORMS], first, threshold, kind, reads, places)
    for i in range(last - first):  # all are read, and none is a part of what it was estimated by
        places[i] = i
    return last - first


@parallel
def _by_token(n_threads, stack, threshold, kind, x, codes, factors, sums, starts, out, n_read, marks):
    """Set ``out`` [n_threads, n_rows, outputs] to parts of the outputs; count neurons in ``n_read`` [n_threads, 2].

    ``marks`` is of `marks_at`.
    """
    n_rows, n_ff = x.shape[0], stack[0, N_OUT]
    n_tiles = (n_ff + 15) // 16
    for thread in prange(n_threads):
        gates = np.empty((n_rows, 16 * TILES), np.float32)
        ups = np.empty((n_rows, 16 * TILES), np.float32)
        places = np.empty(16 * TILES, np.int64)
        at = np.empty(16 * TILES, np.int64)
        scaled = np.empty((n_rows, 2, 2 * factors.shape[1], 16), np.float32)
        end = (thread + 1) * n_tiles // n_threads
        for begin in range(thread * n_tiles // n_threads, end, TILES):
            first, last = 16 * begin, min(n_ff, 16 * min(end, begin + TILES))
            reads = np.ones((n_rows, last - first), np.bool_)
            estimates = (x, codes, factors, sums, gates, ups)
            n_chosen = choose(stack, begin, min(end, begin + TILES), threshold, kind, *estimates, reads, places)
            n_read[thread, 0] += n_chosen
            for r in range(n_rows):
                for i in range(last - first):
                    n_read[thread, 1] += reads[r, i]
                    if marks.shape[1] > 0:
                        marks[r, first + i] = reads[r, i]
            for i in range(last - first):
                at[i] = stack[2, RECORDS] + (first + i) * stack[2, RECORD_BYTES]
            if n_chosen > 0:
                given = (x, codes, factors, starts, gates, ups, kind, scaled, out[thread])
                read_chosen(stack, first, places, n_chosen, at, reads, *given)


@inline
def marks_at(where, n_rows, n_ff):
    """Return what tells which neurons each row reads, uint8 [n_rows, n_ff], at an address; of 0 columns if that is 0."""
    like = np.empty(0, np.uint8)
    return array_at(where if where != 0 else address(like), like, (n_rows, n_ff if where != 0 else 0))


@inline
def started(stack, x):
    """Return the codes, factors and sums of inputs, and where products with the lower bits of codes start; see `starts_of`."""
    codes, factors, sums = rounded(stack[0], x)
    starts = np.empty((x.shape[0], codes.shape[1] // 4), np.int32)
    if stack[2, MIDDLE] != 0:
        starts_of(codes, stack[2, MIDDLE], starts)
    return codes, factors, sums, starts


@serial
def outputs_by_token(x, stack, kind, n_threads, threshold, n_read, out, marks=0):
    """Set ``out`` [n_rows, d_model] to what a gated MLP adds of which each row of inputs reads some neurons.

    Args:
        x: normalised inputs, float32 [n_rows, d_model].
        stack: words of the gate's and the up rows' estimates, and of the records, int64 [3, N_WORDS].
        kind: of the activation, SILU or RELU.
        n_threads: that share the neurons.
        threshold: neurons whose estimate is smaller are not read; 0: all are.
        n_read: int64 [2]; neurons that any row read, and the sum over rows of what each read, are added.
        out: float32.
        marks: where to mark the neurons that each row reads, see `marks_at`; 0: nowhere.
    """
    codes, factors, sums, starts = started(stack, x)
    parts = np.zeros((n_threads, x.shape[0], stack[2, N_OUTPUTS]), np.float32)
    counts = np.zeros((n_threads, 2), np.int64)
    found = marks_at(marks, x.shape[0], stack[0, N_OUT])
    _by_token(n_threads, stack, threshold, kind, x, codes, factors, sums, starts, parts, counts, found)
    summed(stack[2], parts, counts, n_read, out)


@inline
def summed(own, parts, counts, n_read, out):
    """Set ``out`` [n_rows, d_model] to the sum of all threads' parts and the bias, and add up what they counted."""
    for thread in range(parts.shape[0]):
        n_read[0] += counts[thread, 0]
        n_read[1] += counts[thread, 1]
    for r in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[r, j] = parts[0, r, j]
        for thread in range(1, parts.shape[0]):
            for j in range(out.shape[1]):
                out[r, j] += parts[thread, r, j]
        if own[OUT_BIAS] != 0:
            for j in range(out.shape[1]):
                out[r, j] += float_at(own[OUT_BIAS] + 4 * j)
