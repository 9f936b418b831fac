"""`coreinfer-sim status`."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

import click

from coreinfer_sim.base.progress import counted

from . import options
from .console import print_json

if TYPE_CHECKING:
    from coreinfer_sim.building.status import BuildStatus


@click.command()
@click.argument("name", metavar="NAME")
@options.as_json
def status(name: str, as_json: bool) -> None:
    """Show how far the build of the index NAME is; NAME is what build-index was given as --out.

    It reads the log of the build, log.jsonl in the folder NAME.build, and may be asked from another terminal. An index for an
    address is built in the cache folder; ask on the machine that builds it.
    """
    from coreinfer_sim.base.stores import is_address
    from coreinfer_sim.building.status import build_status, status_at
    from coreinfer_sim.index.names import place_of_new

    found = status_at(name) if is_address(name) else build_status(place_of_new(name))
    if as_json:
        print_json(found.as_dict())
        return
    for line in _lines(found):
        click.echo(line)


def _lines(found: BuildStatus) -> list[str]:
    """Return what people read of a build."""
    if found.state == "finished":
        return [f"{found.folder}: the index is finished."]
    states = {
        "running": f"at work, as process {found.pid}",
        "stopped": "broken off; the same command goes on",
        "unknown": f"on {found.host}, heard of {found.heard or 0:,.0f} seconds ago",
    }
    lines = [f"{found.folder}: {states[found.state]}."]
    if found.stage is not None:
        of = "" if found.total is None else f" of {found.total:,}"
        facts = [f"{found.stage}: {found.done:,}{of} {found.unit}", counted(found.workers, "worker")]
        if found.units_per_second:
            facts.append(f"{found.units_per_second:,.1f} {found.unit}/s")
        if found.rows_per_second:
            facts.append(f"{found.rows_per_second:,.1f} rows/s")
        if found.seconds_left is not None and found.state != "stopped":
            facts.append(f"{datetime.timedelta(seconds=round(found.seconds_left))} left")
        lines.append(", ".join(facts))
    lines.append(counted(len(found.failures), "failure") + (":" if found.failures else ""))
    return [*lines, *(f"  {text}" for text in found.failures[-5:])]
