"""The neuron-major store: a model's MLP weights on disk, all that belongs to one neuron side by side.

One file: a header of 64 KiB, then for each layer a block [d_ff, n_parts, d_model] in the checkpoint's dtype. The parts are
the rows of the input projections, gate before up, and the column of the output projection. Biases are not in it.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coreinfer_sim.base.errors import ModelError, StoreError
from coreinfer_sim.base.files import atomic_path, cache_folder, locked, open_to_read
from coreinfer_sim.base.progress import Progress, readable_size
from coreinfer_sim.models.checkpoint import Checkpoint, bytes_of, drop_cached, raw, read_exactly, read_into

FORMAT_VERSION = 1
_MAGIC = "coreinfer-sim neurons"
_HEADER = 1 << 16
_ALIGN = 4096
_N_THREADS = 8
TASK_BYTES = 2 << 20
"""What one thread reads at a time."""
_BLOCK = 8 << 20
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16)}


@dataclass(frozen=True)
class PartSource:
    """Where a checkpoint keeps one part of a layer's neurons."""

    tensor: str
    in_columns: bool = False
    """Neurons are the tensor's columns; otherwise its rows."""
    first: int = 0
    """Row or column of neuron 0; not 0 in the second half of a fused projection."""


@dataclass(frozen=True)
class StoreShape:
    """What a store holds."""

    n_layers: int
    d_ff: int
    n_parts: int
    d_model: int
    dtype: str

    @property
    def neuron_bytes(self) -> int:
        """Bytes of one neuron's weights."""
        return self.n_parts * self.d_model * _DTYPES[self.dtype].itemsize

    @property
    def layer_bytes(self) -> int:
        """Bytes from one layer's block to the next, on page boundaries."""
        return -(-self.d_ff * self.neuron_bytes // _ALIGN) * _ALIGN

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return _HEADER + self.n_layers * self.layer_bytes


class NeuronStore:
    """An open store; its layers share one file and one pool of reading threads."""

    def __init__(self, path: Path) -> None:
        """Open a store after its header and size have been checked.

        Raises:
            StoreError: it is missing, damaged, or of another format version.
        """
        self.path = path
        self.shape, self._checksums = _read_header(path)
        self._handle = open_to_read(path)
        if hasattr(os, "posix_fadvise"):  # no reading ahead: the next neuron is often not wanted
            os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_RANDOM)
        self._pool = ThreadPoolExecutor(_N_THREADS, thread_name_prefix="neurons")
        self.layers = [LayerStore(self, number) for number in range(self.shape.n_layers)]

    def close(self) -> None:
        """Close the file; nothing can be read afterwards."""
        self._pool.shutdown()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def verify(self) -> None:
        """Read everything and compare it with the checksums.

        Raises:
            StoreError: a layer differs.
        """
        for layer, expected in zip(self.layers, self._checksums, strict=True):
            found = 0
            for begin, end in layer.ranges(_BLOCK):
                found = zlib.crc32(raw(layer.read_range(begin, end)), found)
            if found != expected:
                raise StoreError(
                    f"layer {layer.number} of the store {self.path} has the checksum {found:08x}, expected {expected:08x}; "
                    f"{_again(self.path)}"
                )


class LayerStore:
    """One layer's neurons on disk."""

    def __init__(self, store: NeuronStore, number: int) -> None:
        """Read layer ``number`` of ``store``."""
        self._store, self.number = store, number
        shape = store.shape
        self.d_ff, self.n_parts, self.d_model = shape.d_ff, shape.n_parts, shape.d_model
        self.dtype = _DTYPES[shape.dtype]
        self._begin = _HEADER + number * shape.layer_bytes
        self._size = shape.neuron_bytes

    def read_neurons(self, ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weights of the neurons ``ids`` (int64 [n], in any order), [n, n_parts, d_model].

        Neighbours are read in one go, and several threads write into the result's own memory.

        Args:
            ids: of neurons.
            out: receives the result; None makes it.

        Raises:
            StoreError: an id lies outside the layer, or the file has become too short.
        """
        wanted = ids.cpu().numpy()
        if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < self.d_ff:
            raise StoreError(f"neurons {wanted.min()} to {wanted.max()} were asked for, expected 0 to {self.d_ff - 1}.")
        out = self._checked(len(wanted), out)
        step = max(1, TASK_BYTES // self._size)
        breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
        edges = np.unique(np.concatenate([[0], breaks, np.arange(0, len(wanted), step), [len(wanted)]]))
        view = raw(out) if len(wanted) else memoryview(b"")
        tasks = [
            self._store._pool.submit(self._read_runs, view, wanted, edges[(edges >= at) & (edges <= at + step)])
            for at in range(0, len(wanted), step)
        ]
        for task in tasks:
            task.result()
        return out

    def read_range(self, begin: int, end: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weights of the neurons from ``begin`` up to ``end``, [end − begin, n_parts, d_model]."""
        out = self._checked(end - begin, out)
        try:
            read_into(self._store._handle, out, self._begin + begin * self._size, self._store.path)
        except (ModelError, OSError) as error:
            raise self._unreadable(error) from error
        return out

    def ranges(self, n_bytes: int) -> list[tuple[int, int]]:
        """Cut the neurons into ranges of at most ``n_bytes``, at least one neuron each."""
        step = max(1, n_bytes // self._size)
        return [(begin, min(begin + step, self.d_ff)) for begin in range(0, self.d_ff, step)]

    def _checked(self, n: int, out: torch.Tensor | None) -> torch.Tensor:
        shape = (n, self.n_parts, self.d_model)
        if out is None:
            return torch.empty(shape, dtype=self.dtype)
        if out.shape != shape or out.dtype != self.dtype or not out.is_contiguous():
            raise StoreError(f"out is {out.dtype} {tuple(out.shape)}, expected {self.dtype} {shape}, contiguous.")
        return out

    def _read_runs(self, view: memoryview, ids: np.ndarray, edges: np.ndarray) -> None:
        """Read the runs of neighbours between ``edges``, places in ``ids``, and let the system forget them."""
        size, handle = self._size, self._store._handle
        try:
            for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
                offset = self._begin + int(ids[first]) * size
                read_exactly(handle, view[first * size : last * size], offset, self._store.path)
        except (ModelError, OSError) as error:
            raise self._unreadable(error) from error
        touched = ids[edges[0] : edges[-1]]
        low, high = int(touched.min()), int(touched.max()) + 1
        drop_cached(handle, self._begin + low * size, (high - low) * size)

    def _unreadable(self, error: Exception) -> StoreError:
        path = self._store.path
        return StoreError(f"layer {self.number} of the store {path} cannot be read ({error}); {_again(path)}")


def store_path(checkpoint: Checkpoint) -> Path:
    """Return where a checkpoint's store is, or will be."""
    return cache_folder("stores") / f"{checkpoint.fingerprint()}.neurons"


def open_or_make(
    path: Path,
    checkpoint: Checkpoint,
    layers: Sequence[Sequence[PartSource]],
    shape: StoreShape,
    progress: Progress | None = None,
) -> NeuronStore:
    """Open the store at ``path``, after making it if it is not there.

    Args:
        path: of the store.
        checkpoint: where the weights come from.
        layers: for each layer where its parts are.
        shape: of the store.
        progress: receives progress.

    Raises:
        StoreError: there is no room, the store is damaged, or it has another shape.
    """
    if not path.exists():
        progress = progress or Progress()
        with _alone(path, progress):
            if not path.exists():  # another process may have made it meanwhile
                make_store(path, checkpoint, layers, shape, progress)
    store = NeuronStore(path)
    if store.shape != shape:
        store.close()
        raise StoreError(f"the store {path} holds {store.shape}, expected {shape}; {_again(path)}")
    return store


def make_store(
    path: Path,
    checkpoint: Checkpoint,
    layers: Sequence[Sequence[PartSource]],
    shape: StoreShape,
    progress: Progress,
) -> None:
    """Write a store in one step; in memory are one projection at a time and a block of neurons."""
    try:
        for part in path.parent.glob(f".{path.name}.*.part"):  # what a killed process left
            part.unlink(missing_ok=True)
        progress.say(f"Writing the model's MLPs neuron by neuron to {path}: {readable_size(shape.file_bytes)}, once.")
        free = shutil.disk_usage(path.parent).free
        if free < shape.file_bytes:
            raise StoreError(
                f"{path.parent} has {readable_size(free)} free, expected {readable_size(shape.file_bytes)} for the model's "
                "MLPs; make room, or name another folder in COREINFER_SIM_CACHE."
            )
        progress.start("Writing neurons", shape.n_layers, "layers")
        with atomic_path(path) as part, part.open("wb") as file:
            checksums = []
            for number, sources in enumerate(layers):
                file.seek(_HEADER + number * shape.layer_bytes)
                checksums.append(_write_layer(file, checkpoint, sources, shape))
                file.flush()
                os.fsync(file.fileno())
                drop_cached(file.fileno(), 0, file.tell())
                progress.advance(1)
            file.truncate(shape.file_bytes)
            file.seek(0)
            file.write(_header(shape, checksums))
        progress.finish()
    except OSError as error:
        raise StoreError(
            f"the store {path} cannot be written ({error}), expected a folder with room for "
            f"{readable_size(shape.file_bytes)}; name another in COREINFER_SIM_CACHE."
        ) from error


def _write_layer(file: Any, checkpoint: Checkpoint, sources: Sequence[PartSource], shape: StoreShape) -> int:
    """Write one layer's block where the file stands, and return its checksum."""
    whole = {source.tensor: checkpoint.read(source.tensor) for source in sources if source.in_columns}
    checksum = 0
    step = max(1, _BLOCK // shape.neuron_bytes)
    for begin in range(0, shape.d_ff, step):
        n = min(step, shape.d_ff - begin)
        block = torch.empty(n, shape.n_parts, shape.d_model, dtype=_DTYPES[shape.dtype])
        for place, source in enumerate(sources):
            at = source.first + begin
            if source.in_columns:
                rows = whole[source.tensor][:, at : at + n].T
            else:
                rows = block.new_empty(n, shape.d_model)
                checkpoint.read_rows(source.tensor, at, rows)
            block[:, place].copy_(rows)
        checksum = zlib.crc32(raw(block), checksum)
        file.write(raw(block))
        assert bytes_of(block) == n * shape.neuron_bytes
    return checksum


def _header(shape: StoreShape, checksums: Sequence[int]) -> bytes:
    content = json.dumps({**asdict(shape), "checksums": list(checksums)})
    text = json.dumps(
        {"kind": _MAGIC, "format_version": FORMAT_VERSION, "crc32": zlib.crc32(content.encode()), "content": content}
    )
    return text.encode().ljust(_HEADER, b" ")


def _read_header(path: Path) -> tuple[StoreShape, list[int]]:
    try:
        with path.open("rb") as file:
            outer = json.loads(file.read(_HEADER))
        if outer["kind"] != _MAGIC or zlib.crc32(outer["content"].encode()) != outer["crc32"]:
            raise ValueError("its checksum differs")
        version = outer["format_version"]
        content = json.loads(outer["content"])
        checksums = content.pop("checksums")
        shape = StoreShape(**content) if version == FORMAT_VERSION else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"the store {path} has no readable header ({error}); {_again(path)}") from error
    if shape is None:
        raise StoreError(f"the store {path} has format version {version}, expected {FORMAT_VERSION}; {_again(path)}")
    size = path.stat().st_size
    if size != shape.file_bytes:
        raise StoreError(f"the store {path} has {size:,} bytes, expected {shape.file_bytes:,}; {_again(path)}")
    return shape, checksums


def _again(path: Path) -> str:
    return f"delete it, and it is made anew from the checkpoint: rm '{path}'"


@contextmanager
def _alone(path: Path, progress: Progress) -> Iterator[None]:
    """Let one process at a time make stores in a folder."""
    try:
        lock = locked(path.parent, progress)
    except OSError as error:
        raise StoreError(
            f"{path.parent} cannot be used ({error}), expected a folder for the model's MLPs; name another in "
            "COREINFER_SIM_CACHE."
        ) from error
    try:
        yield
    finally:
        lock.release()
