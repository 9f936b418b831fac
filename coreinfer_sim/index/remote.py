"""Indexes at an address that fsspec opens: copied to the disk before they are read, and put there once they are whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coreinfer_sim.base.errors import BuildError, ConfigError, IndexFormatError, UnreachableError
from coreinfer_sim.base.files import cache_folder, remove, replacing
from coreinfer_sim.base.stores import RemoteFile
from coreinfer_sim.index.checks import read_manifest
from coreinfer_sim.index.manifest import MANIFEST_FILE, REBUILD
from coreinfer_sim.index.verified import VerifiedFile

_FOLDER = "indexes"


def fetched(address: str) -> Path:
    """Return the folder of a copy of an index in the user's cache, made unless that very index is there.

    Raises:
        UnreachableError: the store cannot be reached.
        IndexFormatError: there is no index, or no sound one.
    """
    source = RemoteFile(address)
    if not (source / MANIFEST_FILE).exists():
        raise IndexFormatError(
            f"{address} has no {MANIFEST_FILE}, expected a finished index; name another address or {REBUILD}."
        )
    with (source / MANIFEST_FILE).open() as file:
        content = file.read()
    place = cache_folder(_FOLDER) / hashlib.sha256(address.encode() + content).hexdigest()[:24]
    if (place / MANIFEST_FILE).is_file():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with replacing(place, MANIFEST_FILE) as part:
        part.mkdir()
        (part / MANIFEST_FILE).write_bytes(content)
        manifest = read_manifest(part)
        for name in manifest.file_names():  # which are ours, whatever the manifest lists
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).fetch(part / name)
            VerifiedFile(part / name, manifest.files[name])  # what is damaged on the way is not kept
    return place


def place_for(address: str) -> Path:
    """Return the folder on disk in which an index is made that goes to an address."""
    return cache_folder(_FOLDER) / f"to-{hashlib.sha256(address.encode()).hexdigest()[:24]}"


@contextmanager
def put_at(address: str, force: bool) -> Iterator[Path]:
    """Yield a place on disk to make an index at, which is put at an address, the manifest last, if the block ends well.

    Args:
        address: of the index folder.
        force: replace an index that is there.

    Raises:
        UnreachableError: the store cannot be reached; an index that was finished before that stays on disk.
        BuildError: there is something already.
    """
    target = RemoteFile(address)
    place = place_for(address)
    if (target / MANIFEST_FILE).exists() and not force:
        raise BuildError(
            f"{address} holds an index already, expected none; name another address or replace it with force."
        )
    if (place / MANIFEST_FILE).is_file():
        raise BuildError(
            f"{place} holds an index that was finished and could not be put at {address}, expected none; copy it there, or "
            "remove it."
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    yield place
    try:
        (target / MANIFEST_FILE).remove()  # nobody reads half of two indexes
        for name in [*read_manifest(place).file_names(), MANIFEST_FILE]:
            (target / name).put(place / name)
    except UnreachableError as error:
        raise UnreachableError(f"{error} The index is whole, and lies in {place}.") from error
    remove(place)


def check_no_copy(folder: Path, name: str) -> None:
    """Raise ConfigError if a folder is a copy of an index at an address, in which nothing is to be changed."""
    if folder.parent == cache_folder(_FOLDER):
        raise ConfigError(
            f"{name} lies at an address, where nothing is changed, expected an index on disk; copy it first."
        )
