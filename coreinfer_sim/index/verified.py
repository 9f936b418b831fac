"""Files of an index, compared with the checksums of its manifest, and with what was read first whenever they are read again."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from coreinfer_sim.base.errors import IndexFormatError
from coreinfer_sim.base.files import open_to_read, read_at
from coreinfer_sim.index.manifest import REBUILD, FileInfo

_BLOCK = 1 << 18
NUMPY_TYPES = {
    **{"U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8"},
    **{"I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"},
    **{"F16": "<f2", "F32": "<f4", "F64": "<f8"},
}
"""Safetensors' names of the types that numpy has, and numpy's."""
_ITEM_BYTES = {
    **{"U8": 1, "U16": 2, "U32": 4, "U64": 8, "I8": 1, "I16": 2, "I32": 4, "I64": 8},
    **{"BF16": 2, "F16": 2, "F32": 4, "F64": 8},
}


class VerifiedFile:
    """A file that is read piece by piece, and never as another one than it was at first.

    Nothing is mapped into memory: a mapped file that another program shortens ends this one.
    """

    def __init__(self, path: Path, expected: FileInfo | None = None, stays_open: bool = False) -> None:
        """Read the whole file once.

        Args:
            path: of the file.
            expected: of the manifest; None compares it with nothing.
            stays_open: go on reading the file that was opened, whatever takes its name.

        Raises:
            IndexFormatError: it is another file than expected, or cannot be read.
        """
        self.path, self.size = path, 0
        self._handle: int | None = None
        self._checksums: list[int] = []
        digest = hashlib.sha256()
        handle = self._open()
        try:
            while block := _read(handle, self.size, _BLOCK):
                digest.update(block)
                self._checksums.append(zlib.crc32(block))
                self.size += len(block)
        except OSError as error:
            raise self._unreadable(error) from error
        finally:
            if not stays_open:
                os.close(handle)
        if stays_open:
            self._handle = handle
            weakref.finalize(self, os.close, handle)
        if expected is not None and digest.hexdigest() != expected.sha256:
            raise IndexFormatError(
                f"{path} has the checksum {digest.hexdigest()[:12]}…, expected {expected.sha256[:12]}…; the file is damaged, "
                f"or was changed while it was in use – start again, copy it again or {REBUILD}."
            )

    def read(self, begin: int, end: int) -> memoryview:
        """Return the bytes from ``begin`` up to ``end``, in memory of the caller's own.

        Raises:
            IndexFormatError: the file is not what it was.
        """
        first, last = begin // _BLOCK, -(-end // _BLOCK)
        handle = self._open() if self._handle is None else self._handle
        try:
            content = memoryview(_read(handle, first * _BLOCK, (last - first) * _BLOCK))
        except OSError as error:
            raise self._unreadable(error) from error
        finally:
            if self._handle is None:
                os.close(handle)
        for number, checksum in enumerate(self._checksums[first:last]):
            if zlib.crc32(content[number * _BLOCK : (number + 1) * _BLOCK]) != checksum:
                raise IndexFormatError(
                    f"{self.path} was changed while it was in use, expected the file that was opened; start again."
                )
        return content[begin - first * _BLOCK : end - first * _BLOCK]

    def tensors(self) -> dict[str, StoredTensor]:
        """Return where a safetensors file keeps its tensors.

        Raises:
            IndexFormatError: it is no sound one.
        """
        try:
            begin = 8 + int.from_bytes(self.read(0, 8), "little")
            header: dict[str, Any] = json.loads(bytes(self.read(8, begin))) if begin <= self.size else {}
            header.pop("__metadata__", None)
            found = {name: _tensor(begin, self.size, **entry) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._unreadable(error) from error
        if not found:
            raise self._unreadable("it holds no tensors")
        return found

    def array(self, tensor: StoredTensor) -> np.ndarray:
        """Read a whole tensor, of one of `NUMPY_TYPES`."""
        return np.frombuffer(self.read(tensor.begin, tensor.end), NUMPY_TYPES[tensor.dtype]).reshape(tensor.shape)

    def _open(self) -> int:
        try:
            return open_to_read(self.path)
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, reason: object) -> IndexFormatError:
        return IndexFormatError(f"{self.path} cannot be read ({reason}); copy it again or {REBUILD}.")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    dtype: str
    """As safetensors name it."""
    shape: tuple[int, ...]
    begin: int
    end: int


class StoredArray:
    """An array [n, …] in a file, of which one row is read at a time."""

    def __init__(self, file: VerifiedFile, tensor: StoredTensor) -> None:
        """Stand for a tensor of at least one dimension, of one of `NUMPY_TYPES`."""
        self.shape, self.dtype = tensor.shape, np.dtype(NUMPY_TYPES[tensor.dtype])
        self._file, self._begin = file, tensor.begin
        self._row_bytes = (tensor.end - tensor.begin) // tensor.shape[0]

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def whole(self) -> np.ndarray:
        """Read all rows."""
        content = self._file.read(self._begin, self._begin + len(self) * self._row_bytes)
        return np.frombuffer(content, self.dtype).reshape(self.shape)

    def __getitem__(self, number: int) -> np.ndarray:
        """Read a row."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        begin = self._begin + number * self._row_bytes
        return np.frombuffer(self._file.read(begin, begin + self._row_bytes), self.dtype).reshape(self.shape[1:])


def _tensor(first: int, size: int, dtype: str, shape: list[int], data_offsets: list[int]) -> StoredTensor:
    begin, end = (first + offset for offset in data_offsets)
    if (
        not first <= begin <= end <= size
        or end - begin != prod(shape) * _ITEM_BYTES[dtype]
        or min(shape, default=0) < 0
    ):
        raise ValueError("a tensor lies outside, or has another size than its shape")
    return StoredTensor(dtype, tuple(shape), begin, end)


def _read(handle: int, offset: int, n_bytes: int) -> bytearray:
    """Read up to ``n_bytes``: fewer at the end of the file."""
    content = bytearray(n_bytes)
    done = 0
    while done < n_bytes and (n := read_at(handle, memoryview(content)[done:], offset + done)):
        done += n
    del content[done:]
    return content
