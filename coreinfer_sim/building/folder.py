"""The folders of a build: the index that shall be made, and the folder at work, which only one process may hold."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from coreinfer_sim.base.errors import DISK_FULL, BuildError, ClusteringError, ConfigError, CorpusError
from coreinfer_sim.base.files import REPLACED, is_vacant, remove, restore, write_json
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.resuming import differing
from coreinfer_sim.building.log import LOG_FILE
from coreinfer_sim.fitting.pipeline import forget_sets
from coreinfer_sim.index.manifest import (
    COMPENSATION_FOLDER,
    INDEX_FILES,
    MANIFEST_FILE,
    OPTIONAL,
)

SHARDS_FOLDER = "shards"
SETTINGS_FILE = "plan.json"
LOCK_FILE = "lock"


def check_output(out: Path, force: bool) -> None:
    """Raise BuildError if something stands where the index shall go that may not be replaced.

    Args:
        out: the index folder, no link.
        force: replace an index.
    """
    restore(out)
    if is_vacant(out):
        return
    names = {path.name for path in out.iterdir()} if out.is_dir() else {""}
    parts = {*INDEX_FILES, *OPTIONAL.values(), COMPENSATION_FOLDER, REPLACED}
    rest_of_index = names <= parts
    if not rest_of_index and not (out / MANIFEST_FILE).is_file():
        found = "exists already and is no index" if out.is_dir() else "is a file"
        raise BuildError(f"{out} {found}, expected a new or an empty folder; name another one.")
    foreign = sorted(names - {*parts, MANIFEST_FILE})
    if force and foreign:
        raise BuildError(
            f"{out} holds {foreign[0]}, which is not the index's and would be lost, expected an index alone; move it, or name "
            "another folder."
        )
    if not force and not (rest_of_index and (work_folder(out) / SETTINGS_FILE).exists()):
        raise BuildError(
            f"{out} exists already, expected a new or an empty folder; name another one or replace it with force."
        )


def work_folder(out: Path) -> Path:
    """Return the folder in which an index is built."""
    return out.parent / f"{out.name}.build"


@contextmanager
def holding(out: Path, force: bool) -> Iterator[None]:
    """Hold the place of an index for this process alone: what is made there from other indexes, and a build, exclude each other.

    Args:
        out: the index folder to make, no link.
        force: replace an index.

    Raises:
        BuildError: something stands there, or a build of that index is at work or was broken off.
    """
    check_output(out, force)
    folder = work_folder(out)
    with build_folder(folder):
        check_output(out, force)  # once more, as something may have come there before the lock
        if not force and (folder / SETTINGS_FILE).exists():
            raise BuildError(
                f"{folder} holds a build that was broken off, expected none; finish it by its command, or name another folder."
            )
        yield


@contextmanager
def build_folder(folder: Path) -> Iterator[None]:
    """Hold the build folder for this process alone; a failed start leaves none behind in the way of the next one."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK_FILE, timeout=0)
    try:
        held = lock.acquire()
    except filelock.Timeout as error:
        raise BuildError(
            f"another build is at work in {folder}, expected none; wait for it or name another folder."
        ) from error
    with held:
        for path in list(folder.rglob(".*.part")):  # what a kill cut short
            remove(path)
        new = not (folder / SETTINGS_FILE).exists()
        try:
            yield
        except (ConfigError, CorpusError, ClusteringError):
            if new and not (folder / SHARDS_FOLDER).exists():  # another setting is needed, which cannot go on from here
                _remove_held(folder)
            raise
        except OSError as error:
            if error.errno in DISK_FULL and error.filename is None:
                error.filename = str(folder)  # which disk is full
            raise
        finally:
            if folder.exists() and {path.name for path in folder.iterdir()} <= {
                LOCK_FILE,
                LOG_FILE,
                SETTINGS_FILE,
            }:
                _remove_held(folder)


def _remove_held(folder: Path) -> None:
    """Remove a build folder while its lock is held; Windows keeps the lock's file."""
    shutil.rmtree(folder, ignore_errors=os.name == "nt")


def begin_or_continue(folder: Path, settings: dict[str, Any], force: bool, progress: Progress) -> None:
    """Write the settings of a build into its folder, or compare them with those of a build that was broken off there.

    Args:
        folder: of the build, held by this process.
        settings: all that the index depends on; compensation lies under "config".
        force: drop what other settings have left; of a build that only compensates otherwise, the statistics stay.
            What the same settings have left is gone on with.
        progress: takes a message.

    Raises:
        BuildError: the folder holds a build with other settings.
    """
    settings = json.loads(json.dumps(settings))  # as they will be read
    path = folder / SETTINGS_FILE
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    different = [] if found is None else differing(found, settings)
    if different and not force:
        raise BuildError(
            f"{folder} holds a build with other settings – {', '.join(different)} –, expected the same; repeat them to go on, "
            "or start anew with force – where only compensation differs, behind the statistics."
        )
    if found is not None and not different:
        progress.say(f"Continuing the build in {folder}.")
        return
    if found is not None and _without_compensation(found) == _without_compensation(settings):
        forget_sets(folder)
        progress.say(f"Making other compensated sets from the statistics in {folder}.")
    else:
        _clear(folder)
    write_json(path, settings)


def _without_compensation(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what statistics depend on."""
    return {**settings, "config": {**settings["config"], "compensation": None}}


def _clear(folder: Path) -> None:
    """Empty the build folder, whose lock stays held."""
    for path in folder.iterdir():
        if path.name != LOCK_FILE:
            remove(path)
