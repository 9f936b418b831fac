"""Result files: a list of figures that commands write themselves, with machine, versions and date at the top."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
from click.core import ParameterSource

from figures.table import Entry

RESULTS = Path(__file__).parent / "results"
NO_BAR = "for comparison"


class Bar(NamedTuple):
    """What a value is held against."""

    text: str
    passes: Callable[[Any], bool]


def at_least(least: float) -> Bar:
    """Return a lower bar."""
    return Bar(f"at least {least:,g}", lambda value: bool(value >= least))


def at_most(most: float) -> Bar:
    """Return an upper bar."""
    return Bar(f"at most {most:,g}", lambda value: bool(value <= most))


def exactly(wanted: Any) -> Bar:
    """Return a bar that one value alone passes."""
    return Bar(str(wanted), lambda value: bool(value == wanted))


def slug(name: str) -> str:
    """Return a model's name as it stands in names of files."""
    return "".join(each if each.isalnum() or each == "." else "-" for each in name.lower()).strip("-")


def top() -> dict[str, Any]:
    """Say where, with what and when something is measured."""
    from coreinfer_sim.bench.machine import header

    return header()


def running_command() -> str:
    """Return the command that is running as another machine would repeat it: places are named by their options."""
    running = click.get_current_context()
    words, arguments = ["python", "figures/run.py", str(running.info_name)], []
    for parameter in running.command.params:
        name = str(parameter.name)
        if running.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = running.params[name]
        values = [str(each) for each in (value if isinstance(value, tuple) else (value,))]
        is_place = isinstance(parameter.type, click.Path) or name in ("model", "name")
        if isinstance(parameter, click.Argument):
            arguments += [name.upper()] if is_place else values
            continue
        for each in values:
            words += [parameter.opts[0], parameter.opts[0].removeprefix("--").upper() if is_place else each]
    return shlex.join([*words, *(["--"] if arguments else []), *arguments])


def write(file: str, content: dict[str, Any]) -> None:
    """Write a result file that is no list of figures, with machine, versions, date and the running command at the top."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    whole = {**top(), "command": running_command(), **content}
    (RESULTS / file).write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _processor(measured: dict[str, Any]) -> tuple[Any, ...]:
    """Return the kind of processor of a figure: one name stands for several sets of instructions."""
    machine = measured["machine"]
    return machine.get("gpu"), machine["processor"], tuple(machine.get("instructions", ()))


def record(name: str, value: Any, unit: str, bar: Bar | None = None, **details: Any) -> dict[str, Any]:
    """Put one figure of the running entry into the entry's file, in place of an earlier one of that name, and print it.

    Of an entry that measures speed, what another kind of processor measured stays beside it.

    Args:
        name: of the figure.
        value: what was measured; written with four digits, and held against the bar as it is.
        unit: of the value.
        bar: what it is held against; None: the figure is there for comparison.
        **details: further facts.
    """
    entry = click.get_current_context().command
    assert isinstance(entry, Entry)
    path = RESULTS / entry.file
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"figures": []}
    holds = bar is None or bar.passes(value)
    figure = {
        "name": name,
        "value": float(f"{value:.4g}") if isinstance(value, float) else value,
        "unit": unit,
        "bar": NO_BAR if bar is None else bar.text,
        "holds": holds,
        "command": running_command(),
        **details,
    }
    head = top()
    others = content.pop("figures")
    if content and content != head:  # a figure keeps where and when it was measured
        others = [{**known, "measured": known.get("measured", content)} for known in others]
    kind = _processor(head)
    others = [
        each
        for each in others
        if each["name"] != name or (entry.timed and _processor(each.get("measured", head)) != kind)
    ]
    content = {**head, "figures": sorted([figure, *others], key=lambda known: known["name"])}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{'holds ' if holds else 'MISSED'}  {name}: {figure['value']} {unit} (bar: {figure['bar']})", flush=True)
    return figure
