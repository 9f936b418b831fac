"""Tensors of a local safetensors checkpoint, read straight into memory of ours: nothing is mapped, nothing stays cached.

A mapped file counts as this process's memory while it is read, and what the system caches counts against a control group.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from coreinfer_sim.base.errors import ModelError
from coreinfer_sim.base.files import read_at

SINGLE, SHARDED = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE = 8 << 20
_PAGE = 4096
_ROWS = 1024
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """From the beginning of the file, in bytes."""


class Checkpoint:
    """The tensors of a checkpoint folder, by name."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of ``folder``'s safetensors files, sharded or not.

        Raises:
            ModelError: there are none, or one of them is damaged.
        """
        self.folder = folder
        self.files = _files(folder)
        self.tensors: dict[str, StoredTensor] = {}
        """Those in floating point."""
        self.names: set[str] = set()
        """Of all tensors."""
        for path in self.files:
            names, tensors = _header(path)
            self.names.update(names)
            self.tensors.update(tensors)

    def fingerprint(self) -> str:
        """Return a hexadecimal name for these files: of where they are, and their names, sizes and times of change."""
        facts = [str(self.folder.resolve())]
        facts += [f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in self.files]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a whole tensor, in another dtype if one is named."""
        tensor = torch.empty(self.tensors[name].shape, dtype=self.tensors[name].dtype)
        self.read_rows(name, 0, tensor)
        return tensor if dtype is None else tensor.to(dtype)

    def read_rows(self, name: str, begin: int, out: torch.Tensor) -> None:
        """Fill ``out`` [n_rows, …] with a tensor's rows from ``begin`` on."""
        stored = self.tensors[name]
        row_bytes = bytes_of(out) // max(1, len(out)) if out.dim() else 0
        with stored.path.open("rb") as file:
            read_into(file.fileno(), out, stored.offset + begin * row_bytes, stored.path)

    def same(self, one: str, other: str) -> bool:
        """Return whether two tensors hold the same values, of which only some rows are read at a time."""
        first, second = self.tensors[one], self.tensors[other]
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        for begin in range(0, first.shape[0], _ROWS):
            rows = [torch.empty(min(_ROWS, first.shape[0] - begin), *first.shape[1:], dtype=first.dtype) for _ in "ab"]
            for name, part in zip((one, other), rows, strict=True):
                self.read_rows(name, begin, part)
            if not torch.equal(*rows):
                return False
        return True


def has_safetensors(folder: Path) -> bool:
    """Return whether a folder says that its weights are in safetensors files."""
    return (folder / SINGLE).is_file() or (folder / SHARDED).is_file()


def bytes_of(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def raw(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor as writable memory."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_into(handle: int, out: torch.Tensor, offset: int, path: Path) -> None:
    """Fill a contiguous tensor from a file, piece by piece, and keep none of it in the system's cache."""
    view = raw(out)
    for begin in range(0, len(view), _PIECE):
        piece = view[begin : begin + _PIECE]
        read_exactly(handle, piece, offset + begin, path)
        drop_cached(handle, offset + begin, len(piece))


def read_exactly(handle: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill ``view`` from ``offset`` on.

    Raises:
        ModelError: the file ends before.
    """
    done = 0
    while done < len(view):
        n = read_at(handle, view[done:], offset + done)
        if n == 0:
            raise ModelError(
                f"{path} ends after {offset + done:,} bytes, expected at least {offset + len(view):,}; fetch it again."
            )
        done += n


def drop_cached(handle: int, offset: int, n_bytes: int) -> None:
    """Tell the system that these bytes of a file need not stay in its cache; whole pages, as it keeps broken ones."""
    if hasattr(os, "posix_fadvise"):
        begin = offset // _PAGE * _PAGE
        end = -(-(offset + n_bytes) // _PAGE) * _PAGE
        os.posix_fadvise(handle, begin, end - begin, os.POSIX_FADV_DONTNEED)


def _files(folder: Path) -> list[Path]:
    """Return the files that transformers would read: one, or else those that the index file lists."""
    if not has_safetensors(folder):
        raise ModelError(
            f"{folder} has no {SINGLE}, expected a local checkpoint folder in safetensors format, which is what a memory "
            "budget reads; save the model with save_pretrained."
        )
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    try:
        names = sorted(set(json.loads((folder / SHARDED).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{folder / SHARDED} cannot be read ({error}); fetch the checkpoint again.") from error
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ModelError(
            f"{folder} lacks {len(absent)} of the {len(names)} files that its {SHARDED} lists "
            f"({', '.join(absent[:3])}{', …' if absent[3:] else ''}); fetch the checkpoint again."
        )
    return [folder / name for name in names]


def _header(path: Path) -> tuple[set[str], dict[str, StoredTensor]]:
    """Return the names of all tensors of a safetensors file, and where those in floating point lie."""
    size = path.stat().st_size
    with path.open("rb") as file:
        n_bytes = int.from_bytes(file.read(8), "little")
        text = file.read(n_bytes) if n_bytes <= min(size, _LARGEST_HEADER) else b""
    if size < 8 or size - 8 < n_bytes <= _LARGEST_HEADER:
        raise ModelError(f"{path} is cut off at {size:,} bytes, within its header; fetch it again.")
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        found = {}
        for name, entry in entries.items():
            begin, end = (8 + n_bytes + place for place in entry["data_offsets"])
            if end > size:
                raise ModelError(f"{path} has {size:,} bytes, expected at least {end:,}; fetch it again.")
            if entry["dtype"] in _DTYPES:
                found[name] = StoredTensor(path, _DTYPES[entry["dtype"]], tuple(entry["shape"]), begin)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} has no readable safetensors header ({error}); fetch it again.") from error
    return set(entries), found
