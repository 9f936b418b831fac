"""Files at any address that fsspec opens, such as ``s3://bucket/prompts.parquet``: read as a stream, as files on disk are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

from coreinfer_sim.base.errors import CoreInferSimError, UnreachableError


def is_address(name: object) -> bool:
    """Tell whether a name is an address, rather than a path or a name."""
    return "://" in str(name)


@contextmanager
def reaching(address: str) -> Iterator[None]:
    """Turn what a store raises within the block into one error of ours."""
    try:
        yield
    except CoreInferSimError:
        raise
    except FileNotFoundError as error:
        raise UnreachableError(
            f"there is nothing at {address}, expected a file or folder; check the address."
        ) from error
    except Exception as error:  # each store raises errors of its own
        reason = " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
        raise UnreachableError(
            f"{address} cannot be reached ({reason}), expected an address that fsspec opens; check the address, the network "
            "and your credentials."
        ) from error


@dataclass(frozen=True, order=True)
class RemoteFile:
    """A file or folder at an address, with what readers of files ask of a path."""

    address: str

    def __str__(self) -> str:
        """Return the address."""
        return self.address

    def __truediv__(self, name: str) -> RemoteFile:
        """Return a file below this folder."""
        return RemoteFile(f"{self.address.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """Last part of the address."""
        return PurePosixPath(self.address).name

    @property
    def suffix(self) -> str:
        """As of a path."""
        return PurePosixPath(self.address).suffix

    def _store(self) -> tuple[Any, str]:
        import fsspec

        found: tuple[Any, str] = fsspec.core.url_to_fs(self.address)
        return found

    def exists(self) -> bool:
        """Tell whether anything is there, or raise UnreachableError if that cannot be told."""
        with reaching(self.address):
            store, path = self._store()
            store.invalidate_cache()
            return bool(store.exists(path))

    def is_dir(self) -> bool:
        """As of a path."""
        with reaching(self.address):
            store, path = self._store()
            return bool(store.isdir(path))

    def is_file(self) -> bool:
        """As of a path."""
        with reaching(self.address):
            store, path = self._store()
            return bool(store.isfile(path))

    def stat(self) -> SimpleNamespace:
        """Return an object with ``st_size``."""
        with reaching(self.address):
            store, path = self._store()
            return SimpleNamespace(st_size=int(store.info(path)["size"] or 0))

    def version(self) -> str:
        """Return what changes when the file does, as the store tells it."""
        with reaching(self.address):
            store, path = self._store()
            return str(store.checksum(path))

    def relative_to(self, folder: RemoteFile) -> PurePosixPath:
        """Return the path from a folder on."""
        return PurePosixPath(self.address[len(folder.address.rstrip("/")) + 1 :])

    def files(self) -> list[RemoteFile]:
        """Return all files below this folder."""
        with reaching(self.address):
            store, path = self._store()
            root = str(store._strip_protocol(path)).rstrip("/")
            return sorted(self / str(found)[len(root) + 1 :] for found in store.find(path))

    def open(self, mode: str = "rb") -> BufferedIOBase:
        """Open the file to read a stream of bytes, or to write one."""
        with reaching(self.address):
            store, path = self._store()
            opened: BufferedIOBase = store.open(path, mode)
            return opened

    def fetch(self, place: Path) -> None:
        """Copy the file to the disk."""
        with reaching(self.address):
            store, path = self._store()
            store.get_file(path, str(place))

    def put(self, source: Path) -> None:
        """Copy a file on disk to here."""
        with reaching(self.address):
            store, path = self._store()
            store.makedirs(store._parent(path), exist_ok=True)
            store.put_file(str(source), path)

    def remove(self) -> None:
        """Remove the file, if it is there."""
        with reaching(self.address):
            store, path = self._store()
            if store.exists(path):
                store.rm_file(path)


AnyFile = Path | RemoteFile
"""What corpora are read from."""
