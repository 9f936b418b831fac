"""Records of neurons that come from the disk while a step runs: many reads in flight, and the choice of what stays in memory.

Reads are Linux' asynchronous ones (io_submit, see its manual page): one thread keeps the disk busy, and no copy is made. A record
is held for as long as its neuron is chosen more often than others, by sums over tokens that fade. Where a record lies does not
change what it gives.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from coreinfer_sim.engines.lean.instructions import I64
from coreinfer_sim.engines.lean.intrinsics import array_at, inline, serial

DEPTH = 256
"""Reads in flight."""
N_ROOM = DEPTH * (8 + 1 + 4)
"""Words of requests, of their addresses and of what the system says of those that have ended."""
N_FF, FILE, BEGIN, RECORD_BYTES, ALIGN, SYSCALL, SUBMIT, EVENTS, CONTEXT, ROOM = range(10)
AT, HEAT, FREE, N_SLOTS, QUOTA, N_HELD, HAND, N_CHOSEN, N_READ, N_BYTES, N_FAILED = range(10, 21)
"""Places in the words of a layer: neurons; number of the open file, where the first record begins in it, and bytes of each; bytes
of which offsets, sizes and addresses of reads are multiples; address of the C library's ``syscall``, and the numbers of two
calls; the context of reads, and room for them; addresses of where each record lies in memory (int64 [n_ff], 0: it does not), of
how often each was chosen of late (float32 [n_ff]) and of the free slots of all layers (their number, then their addresses);
slots of all layers; records that the layer may keep, and those that it does; neuron at which the search for one to give up goes
on; and what is counted: chosen neurons, those that were read, their bytes, and reads that failed."""
N_DISK_WORDS = 21
_FADES = np.float32(0.9)
_LOOKS = 64  # neurons that are looked at for one to give up
_TRIES = 1000  # calls that may achieve nothing, as when a signal comes


@intrinsic
def _call(_context, function, arguments):
    """Call a C function of six integers by its address."""

    def code(_context, builder, _signature, args):
        kind = ir.FunctionType(I64, [I64] * 6)
        where = builder.inttoptr(args[0], kind.as_pointer())
        return builder.call(where, [builder.extract_value(args[1], place) for place in range(6)])

    return types.int64(types.int64, types.UniTuple(types.int64, 6)), code


@inline
def lies_at(words):
    """Return where the layer's records lie in memory, int64 [n_ff]; 0: on the disk."""
    return array_at(words[AT], words, (words[N_FF],))


@inline
def n_free(words):
    """Return how many slots are free."""
    return array_at(words[FREE], words, (1,))[0]


@inline
def count_chosen(words, chosen):
    """Let the past fade, and count the neurons that a step has chosen, boolean [n_ff]."""
    heat = array_at(words[HEAT], np.empty(0, np.float32), (words[N_FF],))
    n = 0
    for i in range(chosen.shape[0]):
        heat[i] = heat[i] * _FADES + np.float32(chosen[i])
        n += chosen[i]
    words[N_CHOSEN] += n


@serial
def read_records(words, wanted, n):
    """Read the records of the first ``n`` neurons in ``wanted``, none of which is held, into free slots; there are enough."""
    at, free = lies_at(words), array_at(words[FREE], words, (1 + words[N_SLOTS],))
    requests = array_at(words[ROOM], words, (DEPTH, 8))
    pointers = array_at(words[ROOM] + 64 * DEPTH, words, (DEPTH,))
    events = array_at(words[ROOM] + 72 * DEPTH, words, (DEPTH, 4))
    size, align = words[RECORD_BYTES], words[ALIGN]
    for k in range(n):
        begin = words[BEGIN] + wanted[k] * size
        at[wanted[k]] = free[free[0]] + begin % align
        free[0] -= 1
    n_begun, n_ended, n_tries = 0, 0, 0
    while n_ended < n and n_tries < _TRIES:
        # 1) as many as may be in flight
        n_new = min(DEPTH - (n_begun - n_ended), n - n_begun)
        for k in range(n_new):
            begin = words[BEGIN] + wanted[n_begun + k] * size
            before = begin % align
            requests[k, 0] = before + size
            requests[k, 1] = 0
            requests[k, 2] = words[FILE] << 32  # and 0, which reads
            requests[k, 3] = at[wanted[n_begun + k]] - before
            requests[k, 4] = (before + size + align - 1) // align * align
            requests[k, 5] = begin - before
            requests[k, 6] = 0
            requests[k, 7] = 0
            pointers[k] = words[ROOM] + 64 * k
        if n_new > 0:
            taken = _call(words[SYSCALL], (words[SUBMIT], words[CONTEXT], n_new, words[ROOM] + 64 * DEPTH, 0, 0))
            n_tries += taken <= 0
            for k in range(taken):
                words[N_BYTES] += requests[k, 4]
            n_begun += max(0, taken)
        # 2) some that have ended
        flying = n_begun - n_ended
        least = flying if n_begun == n else min(flying, DEPTH // 4)
        given = (words[EVENTS], words[CONTEXT], least, DEPTH, words[ROOM] + 72 * DEPTH, 0)
        ended = _call(words[SYSCALL], given) if flying > 0 else 0
        n_tries += ended < 0
        for k in range(ended):
            words[N_FAILED] += events[k, 2] < events[k, 0]
        n_ended += max(0, ended)
    words[N_FAILED] += n - n_ended
    words[N_READ] += n


@serial
def keep_records(words, wanted, n, chosen):
    """Keep what `read_records` has read where it was chosen more often than what is held, and free the other slots."""
    at, free = lies_at(words), array_at(words[FREE], words, (1 + words[N_SLOTS],))
    heat = array_at(words[HEAT], np.empty(0, np.float32), (words[N_FF],))
    begin, size, align = words[BEGIN], words[RECORD_BYTES], words[ALIGN]
    for k in range(n):
        given_up = wanted[k]
        if words[N_HELD] < words[QUOTA]:
            words[N_HELD] += 1
            continue
        for _ in range(_LOOKS):
            i = words[HAND]
            words[HAND] = i + 1 if i + 1 < words[N_FF] else 0
            if at[i] != 0 and not chosen[i] and heat[i] < heat[wanted[k]]:
                given_up = i
                break
        free[0] += 1
        free[free[0]] = at[given_up] - (begin + given_up * size) % align
        at[given_up] = 0
