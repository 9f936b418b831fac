"""Quality against the bytes that a decoded token reads, as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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


def plot(
    summary: Sequence[dict[str, Any]],
    contenders: Sequence[Contender],
    path: Path,
    marks: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Draw a line a family: perplexity ratio to dense with its 95 % interval over MB of weights read a token.

    Args:
        summary: rows of `summarise`.
        contenders: those that the rows are of.
        path: a .png or .svg file; replaced in one step.
        marks: further points by their names, bytes a token and ratio.
    """
    with drawing(path) as (figure, axes):
        _draw(families(summary, contenders), axes)
        for name, (n_bytes, ratio) in (marks or {}).items():
            axes.plot(n_bytes / 1e6, ratio, "*", color="black", markersize=9, linestyle="", label=name)
        figure.legend(loc="outside right upper", fontsize=8)


def _draw(grouped: dict[str, list[tuple[Contender, dict[str, Any]]]], axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    ways = list(dict.fromkeys(points[0][0].way for points in grouped.values()))
    for family, points in grouped.items():
        contender = points[0][0]
        marker, line = _STYLES["16bit" if family == "dense" else contender.weights]
        x = [row["total_bytes_per_token"] / 1e6 for _, row in points]
        y = [row["ratio"] for _, row in points]
        intervals = [row["ratio_interval"] or [row["ratio"]] * 2 for _, row in points]
        bars = [
            [max(0.0, at - low) for at, (low, _) in zip(y, intervals, strict=True)],
            [max(0.0, high - at) for at, (_, high) in zip(y, intervals, strict=True)],
        ]
        axes.errorbar(
            x,
            y,
            bars,
            label=family,
            marker=marker,
            linestyle=line,
            color="black" if family == "dense" else f"C{ways.index(contender.way) % 10}",
            capsize=3,
        )
        for (contender, _), at in zip(points, zip(x, y, strict=True), strict=True):
            text = contender.weights if contender.name == "dense" else f"{contender.keep_ratio:g}"
            axes.annotate(text, at, xytext=(5, 4), textcoords="offset points", fontsize=7)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.axhline(1.0, color="grey", linewidth=0.8, zorder=0)
    axes.set_xlabel("weights read per decoded token (MB)")
    axes.set_ylabel("perplexity ratio to dense (95 % bootstrap interval)")
    axes.grid(alpha=0.3)
