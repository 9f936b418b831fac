"""Writing that survives a kill, and checksums."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.progress import Progress

REPLACED = ".replaced"
"""Names what is being replaced: beside its place, or within a folder that cannot be renamed."""
LOCK_FILE = ".lock"
"""Held in a cache folder by who writes there."""
_SEEKING = threading.Lock()
"""Where a read and the seek before it are two calls."""


def check_folder(path: Path) -> None:
    """Raise ConfigError unless a file can be written where it is to go, before the work that it would hold."""
    if path.exists() and not path.is_file() and not path.is_dir():
        return  # a device takes what it gets
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder} for {path.name}; make it first.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{path.name} cannot be written into {folder} ({error.strerror}), expected a folder of which that is allowed; name "
            "another one, or copy it to where you may write."
        ) from error


def sha256_of(path: Path, progress: Progress | None = None) -> str:
    """Return the sha256 of a file as hexadecimal digits; ``progress`` is told of the MiB that were read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            if progress is not None:
                progress.advance(mebibytes(len(block)))
    return digest.hexdigest()


def mebibytes(n_bytes: int) -> int:
    """Return bytes in MiB, rounded up."""
    return -(-n_bytes // 2**20)


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
    """Yield a temporary name beside the file that ``path`` names; it takes the file's only if the block ends well."""
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path  # a device takes what it gets
        return
    path = Path(os.path.realpath(path))  # a link stays
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
    content = text.encode("utf-8", "backslashreplace")  # which is JSON's own way for bytes of a path that are no text
    write_atomic(path, lambda part: part.write_bytes(content))


@contextmanager
def replacing(path: Path, last: str = "") -> Iterator[Path]:
    """Yield a place to write a file or a folder to, which takes the place of what ``path`` names if the block ends well.

    A link stays, and what it names is replaced. What is there stays whole until then.

    Args:
        path: of what is made; what is there is of the same kind.
        last: a file of the folder without which nobody reads it: the first to go and the last to come.
    """
    place = Path(os.path.realpath(path))
    restore(place)
    part = place.with_name(f".{place.name}.part")
    remove(part)
    try:
        yield part
        _put(part, place, last)
    finally:
        remove(part)


def restore(place: Path) -> None:
    """Put a folder back that was taken away to be replaced, if a kill came between."""
    if not place.name:  # the root of a file system
        return
    aside = _aside(place)
    if not is_vacant(place):
        remove(aside)
    elif aside.exists():
        remove(place)
        os.replace(aside, place)


def is_vacant(path: Path) -> bool:
    """Return whether there is nothing, or an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _aside(place: Path) -> Path:
    return place.with_name(f".{place.name}{REPLACED}")


def _put(part: Path, place: Path, last: str) -> None:
    """Move a finished file or folder to its place."""
    if not place.exists() or (place.is_file() and part.is_file()):
        os.replace(part, place)
    elif part.is_dir() and is_vacant(place):  # the folder itself stays: it may be a mount point, or where somebody is
        _move_contents(part, place, last)
    elif os.path.ismount(place):
        _exchange_contents(part, place, last)
    else:
        aside = _aside(place)
        try:
            os.replace(place, aside)
            os.replace(part, place)
        except BaseException:
            if aside.exists() and not place.exists():
                os.replace(aside, place)
            raise
        with suppress(OSError):  # the next call tries again
            remove(aside)


def _move_contents(source: Path, target: Path, last: str) -> None:
    for path in sorted(source.iterdir(), key=lambda each: each.name == last):
        shutil.move(path, target / path.name)


def _exchange_contents(part: Path, place: Path, last: str) -> None:
    """Replace what is in a folder that cannot be renamed."""
    aside = place / REPLACED
    remove(aside)
    before = sorted(place.iterdir(), key=lambda each: each.name != last)
    aside.mkdir()
    try:
        for path in before:
            os.replace(path, aside / path.name)
        _move_contents(part, place, last)
    except BaseException:
        for path in place.iterdir():
            if path != aside:
                remove(path)
        _move_contents(aside, place, last)
        aside.rmdir()
        raise
    remove(aside)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
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
    """Return where what can be made anew is kept: ``$COREINFER_SIM_CACHE`` or the user's cache folder, in it ``part``."""
    base = os.environ.get("COREINFER_SIM_CACHE")
    return (Path(base) if base else platformdirs.user_cache_path("coreinfer_sim", appauthor=False)) / part


def locked(folder: Path, progress: Progress) -> FileLock:
    """Return a lock that one process at a time holds, in whatever container: process numbers would not tell those apart.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.say(f"Another process is writing to {folder}; waiting for it.")
        lock.acquire()
    return lock
