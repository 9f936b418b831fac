"""Writing that survives a kill, and checksums."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coreinfer_sim.base.errors import ConfigError

_SEEKING = threading.Lock()
"""Where a read and the seek before it are two calls."""


def check_folder(path: Path) -> None:
    """Raise ConfigError unless the folder of a file that is to be written is there, before the work that it would hold."""
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent} for {path.name}; make it first.")


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def flush_to_disk(path: Path) -> None:
    """Force a file's or folder's contents to the disk; Windows opens no folders."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes what may be written
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_to_read(path: Path) -> int:
    """Return a handle for `read_at`, which the caller closes."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))


def read_at(handle: int, view: memoryview, offset: int) -> int:
    """Read a file from ``offset`` on into ``view``, from any thread; return the number of bytes, 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(handle, [view], offset)
    with _SEEKING:  # Windows
        os.lseek(handle, offset, os.SEEK_SET)
        found = os.read(handle, len(view))
    view[: len(found)] = found
    return len(found)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; it takes the real name only if the block ends well."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        flush_to_disk(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write(temporary path)`` make a file, then move it to ``path`` in one step."""
    with atomic_path(path) as part:
        write(part)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as readable JSON, in one step."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, lambda part: part.write_text(text, encoding="utf-8"))


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link(source: str, target: str) -> None:
    """Give a finished file a second place without a second copy, where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def cache_folder(part: str) -> Path:
    """Return where what can be made anew is kept: ``$COREINFER_SIM_CACHE`` or ``~/.cache/coreinfer_sim``, in it ``part``."""
    base = os.environ.get("COREINFER_SIM_CACHE")
    return (Path(base) if base else Path.home() / ".cache" / "coreinfer_sim") / part
