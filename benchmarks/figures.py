"""Figure files: a list of objects that commands write themselves, with machine, versions and date at the top."""

from __future__ import annotations

import datetime
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"
_LIBRARIES = ("torch", "transformers", "sentence-transformers", "faiss-cpu", "numpy", "numba", "datasets")


def machine() -> dict[str, Any]:
    """Describe the machine: processor, cores, memory."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return {
        "processor": model,
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def header() -> dict[str, Any]:
    """Say where, with what and when something is measured."""
    return {
        "machine": machine(),
        "versions": {library: version(library) for library in _LIBRARIES},
        "date": datetime.date.today().isoformat(),
    }


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
