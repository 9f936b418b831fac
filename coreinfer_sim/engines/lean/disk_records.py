"""Records of neurons that stay in the file of a layout, some of them held in slots of memory: the Python side of `disk_reads`."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from coreinfer_sim.base.errors import ConfigError, StoreError
from coreinfer_sim.base.memory import advise
from coreinfer_sim.engines.lean import disk_reads as loops
from coreinfer_sim.engines.lean.disk_reads import DEPTH, N_DISK_WORDS, N_ROOM
from coreinfer_sim.engines.lean.matrix import Array
from coreinfer_sim.engines.sizes import BytesRead

_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
"""Numbers of io_setup, io_destroy, io_getevents and io_submit, by processor."""
ALIGNMENTS = (512, 4096)
"""Bytes of which reads may have to be multiples, as the disk wants it."""
_ROUND = 256  # neurons that a thread adds at a time: all of them may have to be read


def staged_records(n_ff: int) -> int:
    """Return for how many records there is room besides those that are kept, so that many reads can be in flight."""
    return min(n_ff, max(2 * _ROUND, n_ff // 3))


def slot_bytes(record_bytes: int, align: int = min(ALIGNMENTS)) -> int:
    """Return the bytes of memory that one record takes: reads begin and end at multiples of ``align``."""
    spare = 0 if record_bytes % align == 0 else align
    return -(-record_bytes // align) * align + spare


class LayerRecords:
    """Those of one layer."""

    def __init__(self, records: torch.Tensor, words: Array) -> None:
        """Stand for records [n_ff, record_bytes] that are mapped from the file, and what the loops read of them."""
        self._records, self.words = records, words

    def expect(self) -> None:
        """Let the system read them all ahead: prefill is about to."""
        advise(self._records, "MADV_WILLNEED")

    def forget(self) -> None:
        """Let go of the mapped pages."""
        advise(self._records, "MADV_DONTNEED")


class DiskRecords:
    """The records of all layers."""

    def __init__(
        self,
        path: Path,
        records: Sequence[torch.Tensor],
        begins: Sequence[int],
        tables: Sequence[torch.Tensor],
        n_bytes: int,
    ) -> None:
        """Open the file anew for direct reads.

        Args:
            path: of the file.
            records: of each layer, uint8 [n_ff, record_bytes], mapped.
            begins: where each begins in the file.
            tables: further tensors that are mapped from it, of which few rows are read.
            n_bytes: of memory for records, besides those that are read at a time.

        Raises:
            ConfigError: the system has no asynchronous reads.
        """
        calls = _CALLS.get(platform.machine()) if sys.platform == "linux" else None
        if calls is None:
            raise ConfigError(
                f"tokens read neurons from the disk on Linux alone, on x86-64 or ARM, but this is {sys.platform} on "
                f"{platform.machine()}; leave out the read ratio or the memory budget."
            )
        setup, destroy, events, submit = calls
        library = ctypes.CDLL(None, use_errno=True)
        handle, align = _opened(path)
        context = ctypes.c_ulong(0)
        if library.syscall(ctypes.c_long(setup), ctypes.c_long(DEPTH), ctypes.byref(context)) != 0:
            os.close(handle)
            raise ConfigError(
                f"the system gives no asynchronous reads ({os.strerror(ctypes.get_errno())}); raise fs.aio-max-nr, or leave "
                "out the read ratio or the memory budget."
            )
        weakref.finalize(self, _close, library, destroy, context.value, handle)
        # 1) slots
        n_ff, size = max(len(each) for each in records), max(each.shape[1] for each in records)
        one = slot_bytes(size, align)
        self.quota = min(n_ff, n_bytes // one // len(records))
        """Records that each layer may keep."""
        staged = min(n_ff, max(2 * _ROUND, staged_records(n_ff) * slot_bytes(size) // one))
        n_slots = self.quota * len(records) + staged
        self._slots = mmap.mmap(-1, n_slots * one)
        self.n_bytes = len(self._slots)
        """Of memory."""
        with suppress(AttributeError, OSError, ValueError):
            self._slots.madvise(mmap.MADV_HUGEPAGE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._slots))
        self._every_slot = np.concatenate([[n_slots], first + one * np.arange(n_slots)[::-1]]).astype(np.int64)
        self._free = self._every_slot.copy()
        # 2) words
        self._room = np.zeros(N_ROOM, np.int64)
        self._at = [np.zeros(len(each), np.int64) for each in records]
        self._heat = [np.zeros(len(each), np.float32) for each in records]
        self._words = np.zeros((len(records), N_DISK_WORDS), np.int64)
        for words, own, begin, at, heat in zip(self._words, records, begins, self._at, self._heat, strict=True):
            words[[loops.N_FF, loops.RECORD_BYTES]] = own.shape
            words[[loops.FILE, loops.BEGIN, loops.ALIGN]] = handle, begin, align
            words[loops.SYSCALL] = ctypes.cast(library.syscall, ctypes.c_void_p).value or 0
            words[[loops.SUBMIT, loops.EVENTS, loops.CONTEXT]] = submit, events, context.value
            words[[loops.ROOM, loops.FREE]] = self._room.ctypes.data, self._free.ctypes.data
            words[[loops.AT, loops.HEAT]] = at.ctypes.data, heat.ctypes.data
            words[[loops.N_SLOTS, loops.QUOTA]] = n_slots, self.quota
        self.layers = [LayerRecords(own, words) for own, words in zip(records, self._words, strict=True)]
        self._path, self._tables = path, list(tables)
        for table in tables:
            advise(table, "MADV_RANDOM")

    def end_step(self) -> BytesRead:
        """Let go of mapped rows of tables, and return what was read since the latest call.

        Raises:
            StoreError: reads have failed.
        """
        for table in self._tables:
            advise(table, "MADV_DONTNEED")
        counts = [loops.N_CHOSEN, loops.N_READ, loops.N_BYTES, loops.N_FAILED]
        n_chosen, n_missed, n_bytes, n_failed = (int(n) for n in self._words[:, counts].sum(0))
        self._words[:, counts] = 0
        if n_failed:
            self._free[:], self._words[:, loops.N_HELD] = self._every_slot, 0
            for at in self._at:
                at[:] = 0
            raise StoreError(
                f"{n_failed} of {n_missed} reads of {self._path} have failed; delete its folder, and it is made anew."
            )
        return BytesRead(disk=n_bytes, n_chosen=n_chosen, n_missed=n_missed)


def _opened(path: Path) -> tuple[int, int]:
    """Open a file for reads that pass the system's cache by, where it can; return the number, and what they are multiples of."""
    room = mmap.mmap(-1, max(ALIGNMENTS))
    for align in ALIGNMENTS:
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
            try:
                os.preadv(handle, [memoryview(room)[:align]], align)
                return handle, align
            except OSError:
                os.close(handle)
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
    return handle, ALIGNMENTS[0]


def _close(library: ctypes.CDLL, destroy: int, context: int, handle: int) -> None:
    library.syscall(ctypes.c_long(destroy), ctypes.c_ulong(context))
    os.close(handle)
