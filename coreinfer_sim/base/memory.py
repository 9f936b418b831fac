"""What this process holds in memory, as the operating system counts it, and giving back what it does not need."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE, _ANY = 1 << 20, 1 << 30
_LOCK = threading.Lock()
_HEAP = {"small": False, "users": 0}
"""Whether `keep_heap_small` was called, and how many blocks of `reusing_memory` run."""


def give_back_memory() -> None:
    """Return free heap to the system where the C library can: batches of many shapes would else pile up holes in it."""
    trim = _of_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def keep_heap_small() -> None:
    """Let glibc place blocks of 1 MiB and more outside the heap, so that freeing them returns them at once.

    By itself it raises that limit to 32 MiB as such blocks come and go, and then keeps them.
    """
    _HEAP["small"] = True
    _from_outside(_LARGE)


@contextmanager
def reusing_memory() -> Iterator[None]:
    """Let large blocks that are freed in the block serve again there, although the heap is kept small; at its end they go back.

    A pass over a prompt makes hundreds of tensors of a few sizes; each would else be made of pages that the system clears anew.
    """
    if not _HEAP["small"]:
        yield
        return
    with _LOCK:
        _HEAP["users"] += 1
        _from_outside(_ANY)
    try:
        yield
    finally:
        with _LOCK:
            _HEAP["users"] -= 1
            if not _HEAP["users"]:
                _from_outside(_LARGE)
                give_back_memory()


def _from_outside(n_bytes: int) -> None:
    """Let blocks of so many bytes and more lie outside the heap."""
    option = _of_c_library("mallopt")
    if option is not None:
        option(_M_MMAP_THRESHOLD, n_bytes)
        option(_M_TRIM_THRESHOLD, n_bytes)


def advise(mapped: torch.Tensor, advice: str) -> None:
    """Give the system advice, such as MADV_DONTNEED, on the pages of a mapped file in which a tensor lies, if it takes any."""
    call, value = _of_c_library("madvise"), getattr(mmap, advice, None)
    if call is None or value is None:
        return
    begin = mapped.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    n_bytes = mapped.data_ptr() + mapped.nbytes - begin
    call(ctypes.c_void_p(begin), ctypes.c_size_t(n_bytes), ctypes.c_int(value))


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free in the memory of a device."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def resident_bytes() -> int:
    """Return the bytes that this process holds in memory now, mapped files included."""
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """Return the most bytes that this process has held so far; where the system does not say, those it holds now."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resident_bytes()


def _of_c_library(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform != "win32" else None
