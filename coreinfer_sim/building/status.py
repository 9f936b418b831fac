"""How far a build is, from its log: for another terminal, or another machine that sees the folder."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from coreinfer_sim.base.errors import BuildError
from coreinfer_sim.base.stores import RemoteFile
from coreinfer_sim.building.folder import work_folder
from coreinfer_sim.building.log import LOG_FILE
from coreinfer_sim.index.manifest import MANIFEST_FILE
from coreinfer_sim.index.remote import place_for

_CLOCKS = 5.0  # seconds by which two clocks of one machine may differ


@dataclass
class BuildStatus:
    """What the log of a build says."""

    state: str
    """``running``, ``stopped``, ``finished``, or ``unknown`` where it runs on another machine."""
    folder: str
    host: str | None = None
    pid: int | None = None
    heard: float | None = None
    """Seconds since the last line."""
    stage: str | None = None
    """At work, or where the build was broken off."""
    unit: str | None = None
    done: int = 0
    total: int | None = None
    workers: int = 1
    units_per_second: float | None = None
    """Since the stage began, or was gone on with."""
    rows_per_second: float | None = None
    """Texts, likewise; None where parts of the stage are no texts."""
    seconds_left: float | None = None
    """Of the stage."""
    parts: int = 0
    """Finished since then."""
    failures: list[str] = field(default_factory=list)
    """Of workers, in all runs of the build."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def build_status(out: Path) -> BuildStatus:
    """Return how far the build of an index is.

    Args:
        out: the folder of the index, or the one in which it is built.

    Raises:
        BuildError: there is neither.
    """
    folder = out if (out / LOG_FILE).is_file() else work_folder(out)
    if (folder / LOG_FILE).is_file():
        return _of_log(folder)
    if (out / MANIFEST_FILE).is_file():
        return BuildStatus("finished", str(out))
    raise BuildError(
        f"there is neither an index nor a build at {out}, expected one; name the folder that was given to it."
    )


def status_at(address: str) -> BuildStatus:
    """Return how far the build of an index is that goes to an address, as it is seen on the machine that builds it.

    Args:
        address: of the index folder.

    Raises:
        BuildError: there is neither an index there nor a build here.
        UnreachableError: the store cannot be reached.
    """
    place = place_for(address)
    if work_folder(place).is_dir() or place.is_dir():
        return build_status(place)
    if (RemoteFile(address) / MANIFEST_FILE).exists():
        return BuildStatus("finished", address)
    raise BuildError(
        f"there is no index at {address}, and no build of one on this machine, expected one; name the address that it has."
    )


def _of_log(folder: Path) -> BuildStatus:
    found = BuildStatus("unknown", str(folder))
    began = last = 0.0
    done_before = n_rows = 0
    for event in _events(folder / LOG_FILE):
        kind, last = event["event"], event["time"]
        if kind == "begin":
            found.host, found.pid, began_run = event["host"], event["pid"], last
            found.stage, found.unit, found.workers = None, None, 1
        elif kind == "stage":
            found.stage, found.unit, found.total, done_before = (
                event[name] for name in ("stage", "unit", "total", "done")
            )
            found.done, found.workers, found.parts, began, n_rows = done_before, 1, 0, last, 0
        elif kind == "share":
            found.workers = event["workers"]
        elif kind == "failed":
            found.failures.append(event["text"])
        if kind in ("progress", "part", "finish"):
            found.done = event["done"]
        if kind == "part":
            found.parts += 1
            n_rows += event["n_rows"]
    seconds = last - began
    if found.stage is not None and seconds > 0 and found.done > done_before:
        found.units_per_second = (found.done - done_before) / seconds
        found.rows_per_second = n_rows / seconds if n_rows else None
        if found.total is not None:
            found.seconds_left = (found.total - found.done) / found.units_per_second
    found.heard = max(0.0, time.time() - last)
    if found.host == socket.gethostname():
        found.state = "running" if _is_alive(found.pid, began_run) else "stopped"
    return found


def _events(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log; the last may be cut short, as the build was killed or writes it now."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def _is_alive(pid: int | None, began: float) -> bool:
    """Return whether the process that wrote the log is at work, and not another one that was given its number."""
    try:
        created: float = psutil.Process(pid).create_time()
        return created <= began + _CLOCKS
    except psutil.Error:
        return False
