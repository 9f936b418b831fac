"""Quality against the bytes that a decoded token reads, as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from coreinfer_sim.base.plots import drawing
from coreinfer_sim.evaluation.contenders import Contender

_STYLES = {
    "16bit": ("o", "-"),
    "stored": ("P", "-"),
    "int8": ("D", "-."),
    "int4": ("v", "-."),
    "q8_0": ("s", "--"),
    "q4_0": ("^", ":"),
}
"""Marker and line by the weights' precision; the colour tells how the neurons were chosen."""
_LEAST = 0.001
"""KL that is drawn; the reference itself has 0, which no logarithmic axis shows."""


def families(
    summary: Sequence[dict[str, Any]], contenders: Iterable[Contender]
) -> dict[str, list[tuple[Contender, dict[str, Any]]]]:
    """Group the rows of a summary by `Contender.family`, each by rising bytes a token."""
    known = {str(contender): contender for contender in contenders}
    grouped: dict[str, list[tuple[Contender, dict[str, Any]]]] = {}
    for row in sorted(summary, key=lambda row: row["total_bytes_per_token"]):
        contender = known[row["contender"]]
        grouped.setdefault(contender.family, []).append((contender, row))
    return dict(sorted(grouped.items(), key=lambda item: (item[0] != "dense", item[0])))


def plot(summary: Sequence[dict[str, Any]], contenders: Sequence[Contender], path: Path) -> None:
    """Draw a line a family: KL per token to dense over MB of weights read a token.

    Args:
        summary: rows of `summarise`.
        contenders: those that the rows are of.
        path: a .png or .svg file; replaced in one step.
    """
    with drawing(path) as (figure, axes):
        _draw(families(summary, contenders), axes)
        figure.legend(loc="outside right upper", fontsize=8)


def _text(contender: Contender) -> str:
    """Return what stands beside a point: the weights of a dense one, or the ratio that its line varies."""
    if contender.name == "dense":
        return Path(contender.weights).stem if contender.of_file else contender.weights
    return f"{contender.read_ratio if contender.read_ratio < 1 else contender.keep_ratio:g}"


def _draw(grouped: dict[str, list[tuple[Contender, dict[str, Any]]]], axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    ways = list(dict.fromkeys(points[0][0].way for points in grouped.values()))
    for family, points in grouped.items():
        contender = points[0][0]
        marker, line = _STYLES["16bit" if family == "dense" else contender.weights]
        x = [row["total_bytes_per_token"] / 1e6 for _, row in points]
        y = [max(_LEAST, row["kl"]) for _, row in points]
        color = "black" if family == "dense" else f"C{ways.index(contender.way) % 10}"
        line = "" if family == "dense" else line  # which differ in more than one number
        axes.plot(x, y, label=family, marker=marker, linestyle=line, color=color)
        for (contender, _), at in zip(points, zip(x, y, strict=True), strict=True):
            axes.annotate(_text(contender), at, xytext=(5, 4), textcoords="offset points", fontsize=7)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("weights read per decoded token (MB)")
    axes.set_ylabel(f"KL per token to dense (nats; up to {_LEAST:g} drawn there)")
    axes.grid(alpha=0.3)
