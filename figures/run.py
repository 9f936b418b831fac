"""Measure figures for the README and the documentation: `python figures/run.py list` shows them all."""

from __future__ import annotations

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from figures import (  # noqa: F401 - each enters its figures into the table
    clusters,
    engines,
    findings,
    house,
    inputs,
    living,
    loops,
    maps,
    memory,
    models,
    page,
    path,
    problems,
    quality,
    reading,
    relu,
    replicas,
    scale,
    serving,
    speed,
    terminal,
    use,
)
from figures.table import TABLE


@click.group(context_settings={"max_content_width": 110})
def main() -> None:
    """Measure figures; each command writes its own into figures/results."""


@main.command("list")
def list_entries() -> None:
    """Print the table: name, file under figures/results, what the entry needs, and about how long it takes."""
    rows = [(entry.name or "", entry.file, entry.takes, entry.needs) for entry in TABLE.values() if not entry.hidden]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        click.echo("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))


for _entry in TABLE.values():
    main.add_command(_entry)

if __name__ == "__main__":
    main()
