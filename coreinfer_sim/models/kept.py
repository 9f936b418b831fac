"""What is kept in the user's cache folder: laid-out weights, neuron stores, thresholds, counts, models, a built llama.cpp."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.files import cache_folder, remove
from coreinfer_sim.models.layout_file import SOURCES, kept_layouts


@dataclass(frozen=True)
class Kept:
    """One entry."""

    path: Path
    what: str
    """For people."""
    n_bytes: int
    date: str
    """Of its making, as 2026-01-31."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**asdict(self), "path": str(self.path)}


def kept() -> list[Kept]:
    """Return all entries of the cache folder.

    Raises:
        ConfigError: it is a file.
    """
    folder = cache_folder("")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, expected the cache folder; name a folder in COREINFER_SIM_CACHE.")
    return [_entry(path, what) for path, what in _found()]


def clear() -> list[Kept]:
    """Delete all entries, and return them.

    Raises:
        ConfigError: as `kept`.
        OSError: one cannot be deleted; it has the entry's path.
    """
    found = kept()
    for path in (*(each.path for each in found), cache_folder("layouts") / SOURCES):
        try:
            remove(path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
    return found


def _found() -> Iterator[tuple[Path, str]]:
    for path, layout in kept_layouts():
        yield path, "damaged weights" if layout is None else f"{layout.weights} weights of {layout.source}"
    for path in sorted(cache_folder("stores").glob("*.neurons")):
        yield path, "neurons of a model under a memory budget"
    for path in sorted(cache_folder("thresholds").glob("*.json")):
        yield path, "what tokens need of a model's neurons, for a read ratio"
    for path in sorted(cache_folder("analyses").glob("*/*.safetensors")):
        yield path.parent, "what an analysis has counted"
    for path in sorted(cache_folder("models").glob("*.gguf*")):
        yield path, "a model that was fetched"
    for path in sorted(path for path in cache_folder("llama.cpp").glob("*") if path.is_dir()):
        yield path, f"llama.cpp, built from {path.name}"


def _entry(path: Path, what: str) -> Kept:
    files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    date = datetime.date.fromtimestamp(path.stat().st_mtime).isoformat()
    return Kept(path, what, sum(each.stat().st_size for each in files), date)
