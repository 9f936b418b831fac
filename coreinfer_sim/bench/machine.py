"""The machine: what it is, and how fast it reads memory, which bounds decode from above."""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

from coreinfer_sim.base.processor import processor, processor_features

LIBRARIES = ("torch", "transformers", "sentence-transformers", "faiss-cpu", "numpy", "numba", "datasets")


def machine() -> dict[str, Any]:
    """Describe the machine: processor, cores, memory, and the GPU if torch can use one."""
    import torch

    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "processor": processor(),
        "instructions": processor_features(),
        **gpu,
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def header(*more: str) -> dict[str, Any]:
    """Say where, with what and when something is measured; ``more`` names further packages, if they are installed."""
    return {
        "machine": machine(),
        "versions": {name: found for name in (*LIBRARIES, *more) if (found := _version(name)) is not None},
        "date": datetime.date.today().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class ReadBandwidth:
    """Measures how fast all threads together read memory in one long stream.

    The loop is torch's sum of float32 far beyond the caches, which does little but read; its matrix-vector product
    reads more slowly than decode does.
    """

    def __init__(self, n_bytes: int = 1 << 30, n_threads: int | None = None, device: str = "cpu") -> None:
        """Allocate the memory.

        Args:
            n_bytes: that are read; cut to an eighth of the memory that is free.
            n_threads: of this process from now on; None leaves torch's choice.
            device: of torch.
        """
        import torch

        if n_threads is not None:
            torch.set_num_threads(n_threads)
        n_bytes = min(n_bytes, psutil.virtual_memory().available // 8)
        self._values = torch.ones(max(1, n_bytes // 4), device=device)
        self._found: list[float] = []
        self._read()  # the first pass pays for pages and threads

    def _read(self) -> float:
        """Read everything once; return the seconds."""
        begin = time.perf_counter()
        self._values.sum().item()  # waits for the device
        return time.perf_counter() - begin

    def measure(self, n_times: int = 3) -> None:
        """Read everything ``n_times`` and remember how long it took."""
        n_bytes = self._values.numel() * self._values.element_size()
        self._found += [n_bytes / self._read() / 1e9 for _ in range(n_times)]

    @property
    def highest(self) -> float:
        """The fastest pass, in GB/s: what the machine can do; slower ones were disturbed."""
        return max(self._found)

    def as_dict(self) -> dict[str, float]:
        """Return plain JSON types, in GB/s."""
        return {
            "median": round(statistics.median(self._found), 2),
            "lowest": round(min(self._found), 2),
            "highest": round(self.highest, 2),
        }
