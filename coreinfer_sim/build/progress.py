"""What a build tells while it runs; the command line shows it, the API is silent unless given one."""

from __future__ import annotations


class Progress:
    """Takes a build's messages; this one drops them."""

    def say(self, text: str) -> None:
        """Take a line of text."""

    def start(self, stage: str, total: int | None, unit: str, done: int = 0) -> None:
        """Begin a stage of ``total`` units (None: unknown), of which ``done`` were finished by an earlier run."""

    def advance(self, n: int) -> None:
        """Note that ``n`` more units are finished."""

    def finish(self) -> None:
        """End the stage."""
