"""A model's weights as an engine reads them, laid out once: a folder in the user's cache, memory-mapped by later starts.

The folder is named after the contents of the checkpoint. It is written whole or not at all, and never written over, so that any
number of processes share one copy of it in memory. It holds the tensors one after the other, and ``layout.json``.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from coreinfer_sim.base.errors import StoreError
from coreinfer_sim.base.files import cache_folder, flush_to_disk, mebibytes, remove, sha256_of, write_json
from coreinfer_sim.base.memory import advise
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.models.checkpoint import raw

VERSION = 1
_MANIFEST, _WEIGHTS, SOURCES = "layout.json", "weights.bin", "sources"
_ALIGN = 4096
_BLOCK = 1 << 22
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.uint8)}


@dataclass
class Layout:
    """What a folder says of itself."""

    source: str
    """What the user called the checkpoint."""
    weights: str
    """The weights' type."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the engine has to know besides, as JSON."""
    places: dict[str, tuple[str, Sequence[int], int]] = field(default_factory=dict)
    """Type, shape and offset of each tensor."""
    n_bytes: int = 0
    crc32: int = 0
    """Of all bytes."""
    mtime_ns: int = 0
    """When the weights were written last: what has changed since is read whole before it is used."""


def layout_folder(files: Sequence[Path], weights: str, progress: Progress) -> Path:
    """Return where the layout of a checkpoint is, or will be.

    Args:
        files: of the checkpoint, all of them; their contents are read when they are seen first, or have changed.
        weights: the weights' type.
        progress: of reading them.
    """
    return cache_folder("layouts") / f"{_digest(files, progress)[:24]}-{weights}-{VERSION}"


def _digest(files: Sequence[Path], progress: Progress) -> str:
    """Return a sha256 over the contents of files, which is kept for as long as their sizes and times stay."""
    names = [str(path.resolve()) for path in files]
    stats = [(path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    now = [[name, *stat] for name, stat in zip(names, stats, strict=True)]
    kept = cache_folder("layouts") / SOURCES / f"{hashlib.sha256(repr(names).encode()).hexdigest()[:24]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        before = json.loads(kept.read_text(encoding="utf-8"))
        if before["files"] == now:
            return str(before["sha256"])
    progress.start("Reading the checkpoint", sum(mebibytes(size) for size, _ in stats), "MiB")
    digest = hashlib.sha256("".join(sha256_of(path, progress) for path in files).encode()).hexdigest()
    progress.finish()
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"files": now, "sha256": digest})
    return digest


class LayoutWriter:
    """Writes the tensors of a layout into a folder."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        """Begin to write."""
        self.folder, self.layout = folder, layout
        """Takes further files, such as a tokenizer."""
        self._file = (folder / _WEIGHTS).open("wb")

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor."""
        padding = bytes(-self.layout.n_bytes % _ALIGN)
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.layout.places[name] = (dtype, tuple(tensor.shape), self.layout.n_bytes + len(padding))
        content = raw(tensor.detach().contiguous()) if tensor.numel() else memoryview(b"")
        for part in (memoryview(padding), *(content[at : at + _BLOCK] for at in range(0, len(content), _BLOCK))):
            self._file.write(part)
            self.layout.crc32 = zlib.crc32(part, self.layout.crc32)
            self.layout.n_bytes += len(part)

    def finish(self) -> None:
        """Write the rest."""
        self._file.close()
        flush_to_disk(self.folder / _WEIGHTS)
        self.layout.mtime_ns = (self.folder / _WEIGHTS).stat().st_mtime_ns
        content = json.dumps(asdict(self.layout))
        write_json(
            self.folder / _MANIFEST, {"version": VERSION, "crc32": zlib.crc32(content.encode()), "content": content}
        )

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


@contextmanager
def writing(place: Path, layout: Layout) -> Iterator[LayoutWriter]:
    """Write a layout within the block, alone in its folder; it takes its name only if the block ends well."""
    for left in place.parent.glob(".*.part"):  # by a killed process
        remove(left)
    part = place.with_name(f".{place.name}.part")
    part.mkdir(parents=True)
    writer = LayoutWriter(part, layout)
    try:
        yield writer
        writer.finish()
        os.rename(part, place)
    finally:
        writer.close()
        remove(part)


def read_layout(place: Path) -> Layout:
    """Return what a folder says of itself.

    Raises:
        StoreError: it is damaged.
    """
    try:
        outer = json.loads((place / _MANIFEST).read_text(encoding="utf-8"))
        if outer["version"] != VERSION:
            raise ValueError(f"its version is {outer['version']}, expected {VERSION}")
        if zlib.crc32(outer["content"].encode()) != outer["crc32"]:
            raise ValueError("the checksum of its description differs")
        layout = Layout(**json.loads(outer["content"]))
        found = (place / _WEIGHTS).stat()
        if found.st_size != layout.n_bytes:
            raise ValueError(f"it has {found.st_size:,} bytes, expected {layout.n_bytes:,}")
        if found.st_mtime_ns != layout.mtime_ns:
            if _crc32(place / _WEIGHTS) != layout.crc32:
                raise ValueError("the checksum of its weights differs")
            with suppress(OSError):  # so that the next start need not read them all
                os.utime(place / _WEIGHTS, ns=(found.st_atime_ns, layout.mtime_ns))
    except FileNotFoundError as error:
        raise StoreError(f"The weights in {place} are damaged ({Path(error.filename).name} is missing)") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"The weights in {place} are damaged ({_MANIFEST} does not describe them)") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"The weights in {place} are damaged ({error})") from error
    return layout


def weights_file(place: Path) -> Path:
    """Return the file in which the tensors of a layout lie."""
    return place / _WEIGHTS


def mapped_tensors(
    place: Path, layout: Layout, apart: Callable[[str], bool] = lambda _: False
) -> dict[str, torch.Tensor]:
    """Return the tensors of a layout, which stay in the file's memory map.

    Args:
        place: of the layout.
        layout: what it says of itself.
        apart: whether a tensor stays on the disk until it is read; all others are read ahead.
    """
    with weights_file(place).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, (dtype, shape, offset) in layout.places.items():
        count = int(torch.Size(shape).numel())
        if count:
            flat = torch.frombuffer(mapped, dtype=_DTYPES[dtype], count=count, offset=offset)
        else:
            flat = torch.empty(0, dtype=_DTYPES[dtype])
        tensors[name] = flat.view(*shape)
        for advice in () if apart(name) or not count else ("MADV_HUGEPAGE", "MADV_WILLNEED"):
            advise(flat, advice)  # which fails where the system has no huge pages for files
    return tensors


def _crc32(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found = zlib.crc32(block, found)
    return found


def kept_layouts() -> list[tuple[Path, Layout | None]]:
    """Return the folders of all layouts with what they say of themselves; None: they are damaged."""
    found: list[tuple[Path, Layout | None]] = []
    for place in sorted(cache_folder("layouts").glob("*-*-*")):
        try:
            found.append((place, read_layout(place)))
        except StoreError:
            found.append((place, None))
    return found
