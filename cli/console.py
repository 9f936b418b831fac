"""What people see while a command runs: on stderr, and bars only on a terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from coreinfer_sim.base.progress import Part, Progress, counted

if TYPE_CHECKING:  # rich is imported where something is shown, as --help needs none of it
    from rich.progress import Progress as Bars
    from rich.progress import ProgressColumn, Task
    from rich.status import Status
    from rich.text import Text

    from coreinfer_sim.index.index import SemanticIndex


def _rate() -> ProgressColumn:
    """Return a column with the units per second since the stage began, as ``1,234 tokens/s``."""
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """Units per second."""

        def render(self, task: Task) -> Text:
            """Render one bar's."""
            done = task.completed - task.fields["before"]
            rate = done / task.elapsed if task.elapsed and done else None
            return Text("" if rate is None else f"{rate:,.0f} {task.fields['unit']}/s")

    return Rate()


class ConsoleProgress(Progress):
    """Shows a build's stages on a terminal; elsewhere only its lines of text, unless quiet."""

    def __init__(self, quiet: bool = False) -> None:
        """Write to stderr; ``quiet`` writes nothing."""
        from rich.console import Console

        self._console = Console(stderr=True, quiet=quiet, soft_wrap=True, highlight=False, markup=False)
        self._progress: Bars | None = None
        self._task: Any = None
        self._spinner: Status | None = None
        self._n_workers = self._n_failures = self._n_rows = 0
        self._begun = 0.0

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show a spinner on a terminal within the block, for a wait without a count; bars take its place meanwhile."""
        if self._console.is_terminal:
            self._spinner = self._console.status(text)
            self._spinner.start()
        try:
            yield
        finally:
            if self._spinner is not None:
                self._spinner.stop()
                self._spinner = None

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text)

    def start(self, stage: str, total: int | None, unit: str, done: int = 0) -> None:
        """Open a bar."""
        if not self._console.is_terminal:
            return
        from rich import progress

        if self._spinner is not None:
            self._spinner.stop()
        columns = (
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            _rate(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[shared]}"),
        )
        self._progress = progress.Progress(*columns, console=self._console)
        self._task = self._progress.add_task(stage, total=total, completed=done, before=done, unit=unit, shared="")
        self._n_workers = self._n_failures = self._n_rows = 0
        self._begun = time.monotonic()
        self._progress.start()

    def share(self, n_workers: int) -> None:
        """Show how many workers there are."""
        self._n_workers = n_workers
        self._show_shared()

    def part(self, part: Part) -> None:
        """Show how many texts a second all workers read."""
        self._n_rows += part.n_rows
        self._show_shared()

    def failed(self, text: str) -> None:
        """Print a line, and show how many failed."""
        super().failed(text)
        self._n_failures += 1
        self._show_shared()

    def _show_shared(self) -> None:
        if self._progress is None:
            return
        facts = [counted(self._n_workers, "worker")]
        if self._n_rows:
            facts.append(f"{self._n_rows / max(time.monotonic() - self._begun, 1e-3):,.1f} rows/s")
        if self._n_failures:
            facts.append(counted(self._n_failures, "failure"))
        self._progress.update(self._task, shared=", ".join(facts))

    def advance(self, n: int) -> None:
        """Move the bar."""
        if self._progress is not None:
            self._progress.advance(self._task, n)

    def finish(self) -> None:
        """Close the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            if self._spinner is not None:
                self._spinner.start()


def status(text: str) -> Any:
    """Return a context manager that shows a spinner on a terminal, for a wait without a count."""
    if not sys.stderr.isatty():
        return _Nothing()
    from rich.console import Console

    return Console(stderr=True).status(text)


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def print_json(value: Any) -> None:
    """Print a result for machines, on stdout."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def quiet_libraries() -> None:
    """Keep the libraries' own bars and notices off the terminal; errors still come through."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def size_text(n_bytes: float) -> str:
    """Return megabytes for people."""
    return f"{n_bytes / 1e6:,.1f} MB"


def note_plain_sets(index: SemanticIndex, keep_ratio: float | None) -> None:
    """Say that an index with compensated sets has none of the keep ratio that was asked for; None: its own was taken."""
    fitted = [info.keep_ratio for info in index.manifest.compensation]
    if fitted and keep_ratio is not None and not index.manifest.holds_sets(keep_ratio):
        there = ", ".join(f"{ratio:g}" for ratio in fitted)
        click.echo(
            f"Note: the index has compensated sets at {there}, not at {keep_ratio:g}, which takes plain ones.", err=True
        )
