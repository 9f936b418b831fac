"""What long work tells while it runs; the command line shows it, the API is silent unless given one."""

from __future__ import annotations


class Progress:
    """Takes messages; this one drops them."""

    def say(self, text: str) -> None:
        """Take a line of text."""

    def start(self, stage: str, total: int | None, unit: str, done: int = 0) -> None:
        """Begin a stage of ``total`` units (None: unknown), of which ``done`` were finished by an earlier run."""

    def advance(self, n: int) -> None:
        """Note that ``n`` more units are finished."""

    def finish(self) -> None:
        """End the stage."""


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
