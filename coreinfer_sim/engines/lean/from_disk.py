"""Gated MLPs of which each token reads the neurons that it needs, where their records lie on the disk; see `by_token`."""

from __future__ import annotations

import numpy as np
from numba import prange

from coreinfer_sim.engines.lean.by_token import (
    N_OUTPUTS,
    ON_DISK,
    TILES,
    choose,
    marks_at,
    read_chosen,
    started,
    summed,
)
from coreinfer_sim.engines.lean.disk_reads import (
    N_DISK_WORDS,
    count_chosen,
    keep_records,
    lies_at,
    n_free,
    read_records,
)
from coreinfer_sim.engines.lean.intrinsics import array_at, parallel, serial
from coreinfer_sim.engines.lean.products import N_OUT


@parallel
def _mark(n_threads, stack, threshold, kind, x, codes, factors, sums, all_gates, all_ups, marks):
    """Set ``marks`` [n_rows, n_ff] to which neurons each row of inputs reads, and keep the estimates [n_rows, n_ff]."""
    n_rows, n_ff = x.shape[0], stack[0, N_OUT]
    n_tiles = (n_ff + 15) // 16
    for thread in prange(n_threads):
        gates = np.empty((n_rows, 16 * TILES), np.float32)
        ups = np.empty((n_rows, 16 * TILES), np.float32)
        places = np.empty(16 * TILES, np.int64)
        end = (thread + 1) * n_tiles // n_threads
        for begin in range(thread * n_tiles // n_threads, end, TILES):
            first, last = 16 * begin, min(n_ff, 16 * min(end, begin + TILES))
            reads = np.ones((n_rows, last - first), np.bool_)
            estimates = (x, codes, factors, sums, gates, ups)
            choose(stack, begin, min(end, begin + TILES), threshold, kind, *estimates, reads, places)
            for r in range(n_rows):
                for i in range(last - first):
                    marks[r, first + i] = reads[r, i]
                    all_gates[r, first + i] = gates[r, i]
                    all_ups[r, first + i] = ups[r, i]


@parallel
def _add(begins, ends, stack, kind, x, codes, factors, starts, all_gates, all_ups, marks, lies, out):
    """Add to ``out`` what the chosen neurons of the tiles ``begins`` … ``ends`` of each thread give."""
    n_rows, n_ff = x.shape[0], stack[0, N_OUT]
    for thread in prange(begins.shape[0]):
        gates = np.empty((n_rows, 16 * TILES), np.float32)
        ups = np.empty((n_rows, 16 * TILES), np.float32)
        places = np.empty(16 * TILES, np.int64)
        at = np.empty(16 * TILES, np.int64)
        scaled = np.empty((n_rows, 2, 2 * factors.shape[1], 16), np.float32)
        for begin in range(begins[thread], ends[thread], TILES):
            first, last = 16 * begin, min(n_ff, 16 * min(ends[thread], begin + TILES))
            reads = np.zeros((n_rows, last - first), np.bool_)
            n_chosen = 0
            for i in range(last - first):
                at[i] = lies[first + i]
                any_row = False
                for r in range(n_rows):
                    reads[r, i] = marks[r, first + i]
                    gates[r, i] = all_gates[r, first + i]
                    ups[r, i] = all_ups[r, first + i]
                    any_row |= reads[r, i]
                if any_row:
                    places[n_chosen] = i
                    n_chosen += 1
            if n_chosen > 0:
                given = (x, codes, factors, starts, gates, ups, kind, scaled, out[thread])
                read_chosen(stack, first, places, n_chosen, at, reads, *given)


@serial
def _from_disk(n_threads, stack, threshold, kind, x, codes, factors, sums, starts, out, n_read, told):
    """Do as `by_token._by_token`: in rounds, each of as many neurons as there are free slots for; ``told`` is of `marks_at`."""
    n_rows, n_ff = x.shape[0], stack[0, N_OUT]
    n_tiles = (n_ff + 15) // 16
    words = array_at(stack[2, ON_DISK], stack, (N_DISK_WORDS,))
    lies = lies_at(words)
    # 1) which neurons
    gates, ups = np.empty((n_rows, n_ff), np.float32), np.empty((n_rows, n_ff), np.float32)
    marks, chosen = np.zeros((n_rows, n_ff), np.bool_), np.zeros(n_ff, np.bool_)
    _mark(n_threads, stack, threshold, kind, x, codes, factors, sums, gates, ups, marks)
    for r in range(n_rows):
        for i in range(n_ff):
            chosen[i] |= marks[r, i]
            n_read[0, 1] += marks[r, i]
            if told.shape[1] > 0:
                told[r, i] = marks[r, i]
    for i in range(n_ff):
        n_read[0, 0] += chosen[i]
    count_chosen(words, chosen)
    # 2) read and add them, each thread those of its own tiles in their order
    begins, ends = np.empty(n_threads, np.int64), np.empty(n_threads, np.int64)
    for thread in range(n_threads):
        ends[thread] = thread * n_tiles // n_threads
    wanted = np.empty(n_ff, np.int64)
    n_left = n_tiles
    while n_left > 0:
        n_wanted, room = 0, n_free(words)
        for thread in range(n_threads):
            begins[thread] = ends[thread]
            own_end = (thread + 1) * n_tiles // n_threads
            while ends[thread] < own_end:
                end, n = min(own_end, ends[thread] + TILES), n_wanted
                for i in range(16 * ends[thread], min(n_ff, 16 * end)):
                    if chosen[i] and lies[i] == 0 and n < room:
                        wanted[n] = i
                        n += 1
                    elif chosen[i] and lies[i] == 0:
                        n = room + 1
                        break
                if n > room:
                    break
                n_wanted, n_left, ends[thread] = n, n_left - (end - ends[thread]), end
        read_records(words, wanted, n_wanted)
        _add(begins, ends, stack, kind, x, codes, factors, starts, gates, ups, marks, lies, out)
        keep_records(words, wanted, n_wanted, chosen)


@serial
def outputs_from_disk(x, stack, kind, n_threads, threshold, n_read, out, marks=0):
    """Do as `by_token.outputs_by_token`."""
    codes, factors, sums, starts = started(stack, x)
    parts = np.zeros((n_threads, x.shape[0], stack[2, N_OUTPUTS]), np.float32)
    counts = np.zeros((n_threads, 2), np.int64)
    told = marks_at(marks, x.shape[0], stack[0, N_OUT])
    _from_disk(n_threads, stack, threshold, kind, x, codes, factors, sums, starts, parts, counts, told)
    summed(stack[2], parts, counts, n_read, out)
