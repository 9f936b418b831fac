"""What a build tells, as lines of JSON in its folder: for machines, and for whoever asks how far it is."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coreinfer_sim.base.progress import Part, Progress

LOG_FILE = "log.jsonl"
_PAUSE = 1.0  # seconds between two lines on how far a stage is


class LoggedProgress(Progress):
    """Passes everything on, and writes each event into the log: ``time`` (seconds since 1970), ``event``, and what it is of.

    Events are ``begin`` (a run of the build), ``say``, ``stage``, ``share``, ``progress``, ``part``, ``failed`` and ``finish``.
    """

    def __init__(self, folder: Path, shown: Progress) -> None:
        """Begin a run of the build in a folder; what earlier runs wrote stays."""
        self._path, self._shown = folder / LOG_FILE, shown
        self._done, self._written = 0, 0.0
        self._write("begin", host=socket.gethostname(), pid=os.getpid())

    def say(self, text: str) -> None:
        """Write a line of text."""
        self._shown.say(text)
        self._write("say", text=text)

    def start(self, stage: str, total: int | None, unit: str, done: int = 0) -> None:
        """Write what begins."""
        self._shown.start(stage, total, unit, done)
        self._done = done
        self._write("stage", stage=stage, total=total, unit=unit, done=done)

    def share(self, n_workers: int) -> None:
        """Write how many workers there are."""
        self._shown.share(n_workers)
        self._write("share", workers=n_workers)

    def advance(self, n: int) -> None:
        """Write how far the stage is, once a second at most."""
        self._shown.advance(n)
        self._done += n
        if time.monotonic() - self._written >= _PAUSE:
            self._write("progress", done=self._done)

    def part(self, part: Part) -> None:
        """Write which part is finished."""
        self._shown.part(part)
        self._write("part", done=self._done, **asdict(part))

    def failed(self, text: str) -> None:
        """Write which worker failed."""
        self._shown.failed(text)
        self._write("failed", text=text)

    def finish(self) -> None:
        """Write that the stage ends."""
        self._shown.finish()
        self._write("finish", done=self._done)

    def _write(self, event: str, **facts: Any) -> None:
        self._written = time.monotonic()
        line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}, ensure_ascii=False) + "\n"
        # a full disk stops what has to be written, not what is told about it
        with suppress(OSError), self._path.open("ab") as file:
            file.write(line.encode("utf-8", "backslashreplace"))
