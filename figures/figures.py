"""Figure files: a list of objects that commands write themselves, with machine, versions and date at the top."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from coreinfer_sim.bench.machine import header

RESULTS = Path(__file__).parent / "results"
_PLACES = ("model", "index", "data", "out", "name", "stored")
"""Options that name something of whoever repeats the command."""


def running_command(**instead: tuple[str, ...]) -> str:
    """Return the command that is running as another machine would repeat it, with all that it was given.

    Args:
        **instead: by parameter, values that stand in place of those given.
    """
    running = click.get_current_context()
    words, arguments = ["python", f"figures/{Path(sys.argv[0]).name}", str(running.info_name)], []
    for parameter in running.command.params:
        name = str(parameter.name)
        if name not in instead and running.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = instead.get(name, running.params[name])
        values = [str(each) for each in (value if isinstance(value, tuple) else (value,))]
        if isinstance(parameter, click.Argument):
            arguments += values
        elif (option := parameter.opts[0].removeprefix("--")) in _PLACES:
            words += [word for _ in values for word in (parameter.opts[0], option.upper())]
        else:
            words += [word for each in values for word in (parameter.opts[0], each)]
    return shlex.join([*words, *arguments])


def record(file: str, name: str, value: Any, unit: str, bar: str, holds: bool, **details: Any) -> dict[str, Any]:
    """Put one figure of the running command into a file, in place of an earlier one of that name, and print it.

    Args:
        file: file name under ``figures/results``.
        name: of the figure.
        value: what was measured.
        unit: of the value.
        bar: what it is held against.
        holds: whether it passes.
        **details: further facts.
    """
    path = RESULTS / file
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"figures": []}
    figure = {
        "name": name,
        "value": value,
        "unit": unit,
        "bar": bar,
        "holds": holds,
        "command": running_command(),
        **details,
    }
    top = header()
    others = [known for known in content.pop("figures") if known["name"] != name]
    if content and content != top:  # a figure keeps where and when it was measured
        others = [{**known, "measured": known.get("measured", content)} for known in others]
    content = {**top, "figures": sorted([*others, figure], key=lambda known: known["name"])}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{'holds ' if holds else 'MISSED'}  {name}: {value} {unit} (bar: {bar})")
    return figure
