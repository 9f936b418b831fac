"""The folders of a build: the one at work, which only one process may hold, and small files in it."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from coreinfer_sim.base.corpus import Sentence
from coreinfer_sim.base.errors import BuildError, ClusteringError, ConfigError, CorpusError
from coreinfer_sim.index.manifest import MANIFEST_FILE

KEPT_NEURONS = "neurons.json"
PLAN = "plan.json"
LOCK = "lock"
_SHORT = 40
"""Characters of two values that a message can show."""
FORCED = "forced"
"""Left where --force began a build, which goes on when it is repeated as it was, --force included."""


def check_output(out: Path, force: bool) -> None:
    """Raise BuildError if something stands where the index shall go that may not be replaced."""
    if out.exists():
        if not (out / MANIFEST_FILE).is_file():
            raise BuildError(
                f"{out} exists already and is no index, which --force would replace, expected a new folder; name another one."
            )
        if not force:
            raise BuildError(f"{out} exists already, expected a new folder; name another one or give --force.")


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def build_folder(folder: Path) -> Iterator[None]:
    """Hold the build folder for this process alone; a failed start leaves none behind in the way of the next one."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK, timeout=0)
    try:
        held = lock.acquire()
    except filelock.Timeout as error:
        raise BuildError(
            f"another build is at work in {folder}, expected none; wait for it or name another folder."
        ) from error
    with held:
        for path in folder.rglob(".*.part"):  # what a kill cut short
            path.unlink()
        new = not (folder / PLAN).exists()
        try:
            yield
        except (ConfigError, CorpusError, ClusteringError):
            if new and not (folder / "shards").exists():  # another setting must be given, which cannot go on from here
                _remove_held(folder)
            raise
        finally:
            if folder.exists() and {path.name for path in folder.iterdir()} <= {LOCK, PLAN, FORCED}:
                _remove_held(folder)


def _remove_held(folder: Path) -> None:
    """Remove a build folder while its lock is held; Windows keeps the lock's file."""
    shutil.rmtree(folder, ignore_errors=os.name == "nt")


def clear(folder: Path) -> None:
    """Empty the build folder, whose lock stays held."""
    for path in folder.iterdir():
        if path.name != LOCK:
            remove(path)


def differing(found: Any, plan: dict[str, Any], group: str = "") -> list[str]:
    """Return the settings that differ: their names, and both values where these are short."""
    names: list[str] = []
    for name, value in plan.items():
        other = found.get(name) if isinstance(found, dict) else None
        if isinstance(value, dict) and isinstance(other, dict):
            names += differing(other, value, "compensation " if name == "compensation" else group)
        elif other != value:
            there, here = ("not given" if each is None else str(each) for each in (other, value))
            values = "" if len(there + here) > _SHORT else f" ({there} there, {here} here)"
            names.append(f"{group}{name}{values}")
    return names


def read_sentences(path: Path) -> list[Sentence]:
    """Read the corpus that a build has drawn."""
    with path.open(encoding="utf-8") as file:
        return [Sentence(**json.loads(line)) for line in file]


def link(source: str, target: str) -> None:
    """Give a finished file a second place without a second copy, where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def save_npy(array: np.ndarray, path: Path) -> None:
    """Write an array as .npy."""
    buffer = io.BytesIO()  # numpy's own message on a full disk names no cause
    np.save(buffer, array)
    path.write_bytes(buffer.getbuffer())


def save_npz(path: Path, **arrays: Any) -> None:
    """Write named arrays as .npz."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    path.write_bytes(buffer.getbuffer())


def read_kept_neurons(folder: Path) -> dict[str, list[int]]:
    """Read by keep ratio how many neurons each layer keeps, [n_layers]."""
    kept: dict[str, list[int]] = json.loads((folder / KEPT_NEURONS).read_text(encoding="utf-8"))
    return kept
