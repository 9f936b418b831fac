"""What long work tells while it runs: the command line shows it, a notebook too, and elsewhere the API is silent."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """A finished part of a stage that workers share."""

    number: int
    size: int
    """In the stage's units, such as tokens."""
    n_rows: int
    """Texts of it; 0 where parts are no texts."""
    worker: str
    """Host and process that did it."""
    seconds: float
    """That it took."""


class Progress:
    """Takes messages; this one drops them."""

    def say(self, text: str) -> None:
        """Take a line of text."""

    def start(self, stage: str, total: int | None, unit: str, done: int = 0) -> None:
        """Begin a stage of ``total`` units (None: unknown), of which ``done`` were finished by an earlier run."""

    def advance(self, n: int) -> None:
        """Note that ``n`` more units are finished."""

    def share(self, n_workers: int) -> None:
        """Note that so many workers share the stage."""

    def part(self, part: Part) -> None:
        """Note that a part of the stage is finished, whose size `advance` is told besides."""

    def failed(self, text: str) -> None:
        """Take a sentence on a worker that failed while the stage goes on."""
        self.say(f"Note: {text}")

    def finish(self) -> None:
        """End the stage."""


class NotebookProgress(Progress):
    """Shows bars and messages in a notebook."""

    def __init__(self) -> None:
        """Show nothing yet."""
        self._bar: Any = None

    def say(self, text: str) -> None:
        """Print a line."""
        print(text)  # noqa: T201  # a notebook's output

    def start(self, stage: str, total: int | None, unit: str, done: int = 0) -> None:
        """Open a bar."""
        from tqdm.auto import tqdm

        self._bar = tqdm(desc=stage, total=total, unit=f" {unit}", initial=done)

    def advance(self, n: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(n)

    def finish(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def shown(progress: Progress | None) -> Progress:
    """Return where progress goes: to what was given, else into the notebook that this runs in, else nowhere."""
    if progress is not None:
        return progress
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return Progress() if shell is None or not hasattr(shell, "kernel") else NotebookProgress()


def counted(n: int, noun: str) -> str:
    """Return a number with its noun, such as ``1 prompt`` or ``1,466 prompts``."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def readable_size(n_bytes: float) -> str:
    """Return a size for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"
