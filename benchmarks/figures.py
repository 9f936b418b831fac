"""Figure files: a list of objects that commands write themselves, with machine, versions and date at the top."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coreinfer_sim.benchmark.machine import header

RESULTS = Path(__file__).parent / "results"


def record(
    file: str, name: str, value: Any, unit: str, bar: str, holds: bool, command: str, **details: Any
) -> dict[str, Any]:
    """Put one figure into a file, in place of an earlier one of that name, and print it.

    Args:
        file: file name under ``benchmarks/results``.
        name: of the figure.
        value: what was measured.
        unit: of the value.
        bar: what it is held against.
        holds: whether it passes.
        command: what repeats it.
        **details: further facts.
    """
    path = RESULTS / file
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"figures": []}
    figure = {"name": name, "value": value, "unit": unit, "bar": bar, "holds": holds, "command": command, **details}
    top = header()
    others = [known for known in content.pop("figures") if known["name"] != name]
    if content and content != top:  # a figure keeps where and when it was measured
        others = [{**known, "measured": known.get("measured", content)} for known in others]
    content = {**top, "figures": sorted([*others, figure], key=lambda known: known["name"])}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{'holds ' if holds else 'MISSED'}  {name}: {value} {unit} (bar: {bar})")
    return figure
