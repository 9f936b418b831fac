"""A recording of the command line, as one moving picture: what a terminal shows when the commands of the first run are typed."""

from __future__ import annotations

import fcntl
import html
import os
import pty
import select
import shlex
import shutil
import struct
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from figures.table import ROOT, Given, figure

_COLUMNS, _LINES = 96, 26
_WIDTH, _HEIGHT, _MARGIN = 8.4, 18.0, 14.0
"""Of a character, and around the screen, in pixels."""
_LONGEST_WAIT = 1.5
"""Seconds that a pause is shown for at most."""
_PER_SECOND = 8
"""Pictures of the screen."""
_AT_END = 4.0
_TYPED = 0.04  # seconds a character
_COLOURS = {
    "red": "#ff7b72",
    "green": "#7ee787",
    "brown": "#e3b341",
    "blue": "#79c0ff",
    "magenta": "#d2a8ff",
    "cyan": "#76e3ea",
}
_PLAIN, _BACK = "#e6edf3", "#0d1117"
_COMMANDS = (
    "coreinfer-sim demo",
    'coreinfer-sim show demo "How do stars form?"',
    'coreinfer-sim run --read-ratio 0.6 --max-new-tokens 60 "How do stars form?"',
)
Row = tuple[tuple[str, str, bool], ...]
"""Runs of characters of one look: text, colour, bold."""


@figure("docs/images", "the demo's model; pip install pyte", "2 minutes")
@click.option(
    "--picture", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "docs" / "images" / "first-run.svg"
)
@click.argument("commands", nargs=-1)
def recording(_given: Given, picture: Path, commands: tuple[str, ...]) -> None:
    """Run COMMANDS in a terminal, by default those of the first run, and write what it shows as a picture that moves."""
    screens: list[tuple[float, list[Row]]] = []
    now = 0.0
    for command in commands or _COMMANDS:
        for seconds, rows in _shown(command):
            screens.append((now + seconds, rows))
        now = screens[-1][0] + _LONGEST_WAIT
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_text(_picture(_spans(screens, now + _AT_END), now + _AT_END), encoding="utf-8")
    click.echo(f"{picture.name}: {now + _AT_END:.0f} s, {picture.stat().st_size / 1000:.0f} kB")


def _shown(command: str) -> Iterator[tuple[float, list[Row]]]:
    """Type and run a command in a terminal of its own; yield what it shows, with the time, pauses cut short."""
    import pyte

    screen = pyte.Screen(_COLUMNS, _LINES)
    stream, now = pyte.ByteStream(screen), 0.0
    for n in range(len(command) + 1):
        screen.reset()
        screen.draw(f"$ {command[:n]}")
        yield now, _rows(screen)
        now += _TYPED
    screen.draw("\r")
    screen.linefeed()
    screen.carriage_return()
    last, due = time.perf_counter(), 0.0
    for data in _output(command):
        passed = time.perf_counter() - last
        last += passed
        now += min(passed, _LONGEST_WAIT)
        stream.feed(data)
        if now >= due:
            yield now, _rows(screen)
            due = now + 1 / _PER_SECOND
    yield now + 1 / _PER_SECOND, _rows(screen)


def _output(command: str) -> Iterator[bytes]:
    """Run a command and yield what it writes to its terminal."""
    words = shlex.split(command)
    program = shutil.which(words[0], path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        raise click.ClickException(f"{words[0]} is not installed; run: pip install --editable .")
    process, terminal = pty.fork()
    if process == 0:
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(_COLUMNS), "LINES": str(_LINES)}
        os.execv(program, [program, *words[1:]])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", _LINES, _COLUMNS, 0, 0))
    try:
        while True:
            select.select([terminal], [], [])
            try:
                data = os.read(terminal, 1 << 14)
            except OSError:  # the other side was closed
                break
            if not data:
                break
            yield data
    finally:
        os.close(terminal)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status:
        raise click.ClickException(f"{command} ended with exit code {status}, expected 0.")


def _rows(screen: Any) -> list[Row]:
    """Return what a screen shows."""
    found = []
    for number in range(screen.lines):
        runs: list[list[Any]] = []
        for column in range(screen.columns):
            each = screen.buffer[number][column]
            look = [_COLOURS.get(each.fg, _PLAIN), each.bold]
            if runs and runs[-1][1:] == look:
                runs[-1][0] += each.data
            else:
                runs.append([each.data, *look])
        if runs:
            runs[-1][0] = runs[-1][0].rstrip()
        found.append(tuple((text, colour, bold) for text, colour, bold in runs if text))
    return found


@dataclass(frozen=True)
class _Span:
    """A line that stands there for a time."""

    line: int
    begin: float
    end: float
    row: Row


def _spans(screens: Sequence[tuple[float, list[Row]]], end: float) -> list[_Span]:
    """Return how long each line stands as it is: most of a screen stays from one picture to the next."""
    found = []
    for line in range(_LINES):
        begin, row = 0.0, ()
        for seconds, rows in [*screens, (end, [()] * _LINES)]:
            if rows[line] != row or seconds == end:
                if row and seconds > begin:
                    found.append(_Span(line, begin, seconds, row))
                begin, row = seconds, rows[line]
    return found


def _picture(spans: Sequence[_Span], end: float) -> str:
    """Return an SVG that plays the lines, again and again."""
    width, height = _COLUMNS * _WIDTH + 2 * _MARGIN, _LINES * _HEIGHT + 2 * _MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        'aria-label="A terminal in which the commands of the first run are typed" '
        'font-family="ui-monospace,SFMono-Regular,Menlo,Consolas,DejaVu Sans Mono,monospace" font-size="14">',
        f'<rect width="100%" height="100%" rx="8" fill="{_BACK}">',
        f'<animate id="play" attributeName="opacity" from="1" to="1" begin="0s;play.end" dur="{end:.2f}s"/></rect>',
    ]
    for each in spans:
        y = _MARGIN + (each.line + 0.75) * _HEIGHT
        parts, column = [], 0
        for text, colour, bold in each.row:
            if text.strip():
                look = f'fill="{colour}"' + ' font-weight="bold"' * bold
                x = _MARGIN + column * _WIDTH
                parts.append(
                    f'<tspan x="{x:.1f}" textLength="{len(text) * _WIDTH:.1f}" {look}>{html.escape(text)}</tspan>'
                )
            column += len(text)
        lines.append(
            f'<text y="{y:.1f}" xml:space="preserve" visibility="hidden">{"".join(parts)}<set attributeName="visibility" '
            f'to="visible" begin="play.begin+{each.begin:.2f}s" dur="{each.end - each.begin:.2f}s"/></text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"
