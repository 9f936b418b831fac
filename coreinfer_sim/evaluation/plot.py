"""Quality against the bytes that a decoded token reads, as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from coreinfer_sim.base.plots import COLORS, HEIGHT, INK, WIDTH, check_plot, save_plot, styled
from coreinfer_sim.evaluation.contenders import Contender

_DENSE = "dense"
_STYLES: dict[str, tuple[str, list[int]]] = {
    "16bit": ("circle", [1, 0]),
    "stored": ("cross", [1, 0]),
    "int8": ("diamond", [8, 3, 2, 3]),
    "int4": ("triangle-down", [8, 3, 2, 3]),
    "q8_0": ("square", [6, 4]),
    "q4_0": ("triangle-up", [2, 3]),
}
"""Shape and dashes by the weights' precision; the colour tells how the neurons were chosen."""
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
    return dict(sorted(grouped.items(), key=lambda item: (item[0] != _DENSE, item[0])))


def plot(summary: Sequence[dict[str, Any]], contenders: Sequence[Contender], path: Path) -> None:
    """Draw a line a family: KL per token to dense over MB of weights read a token.

    Args:
        summary: rows of `summarise`.
        contenders: those that the rows are of.
        path: an .html, .png or .svg file; replaced in one step.
    """
    check_plot(path)
    save_plot(quality_chart(summary, contenders), path)


def quality_chart(summary: Sequence[dict[str, Any]], contenders: Sequence[Contender]) -> Any:
    """Return the chart that `plot` draws."""
    import altair as alt

    grouped = families(summary, contenders)
    ways = list(dict.fromkeys(points[0][0].way for name, points in grouped.items() if name != _DENSE))
    styles = [_style(name, points[0][0], ways) for name, points in grouped.items()]
    colors, shapes, dashes = (list(each) for each in zip(*styles, strict=True))
    points = [
        {
            "family": family,
            "megabytes": row["total_bytes_per_token"] / 1e6,
            "kl": max(_LEAST, row["kl"]),
            "text": _text(contender),
        }
        for family, rows in grouped.items()
        for contender, row in rows
    ]

    def by_family(values: list[Any]) -> Any:
        return alt.Scale(domain=list(grouped), range=values)

    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("megabytes:Q", title="weights read per decoded token (MB)", scale=alt.Scale(zero=False, nice=True)),
        y=alt.Y(
            "kl:Q",
            title=["KL per token to dense", f"(nats; up to {_LEAST:g} drawn there)"],
            scale=alt.Scale(type="log"),
            axis=alt.Axis(tickCount=6, format="~g"),
        ),
        color=alt.Color("family:N", scale=by_family(colors), title=None),
    )
    lines = (
        base.mark_line()
        .encode(strokeDash=alt.StrokeDash("family:N", scale=by_family(dashes), title=None))
        .transform_filter(alt.datum.family != _DENSE)  # whose points differ in more than one number
    )
    dots = base.mark_point().encode(shape=alt.Shape("family:N", scale=by_family(shapes), title=None))
    texts = base.mark_text(align="left", dx=7, dy=-7).encode(text="text:N", color=alt.value(INK))
    chart = alt.layer(lines, dots, texts).properties(width=WIDTH, height=HEIGHT)
    return styled(chart, "Quality over the bytes that a token reads")


def _style(family: str, contender: Contender, ways: list[str]) -> tuple[str, str, list[int]]:
    """Return a family's colour, shape and dashes."""
    if family == _DENSE:
        return INK, "circle", [1, 0]
    return (COLORS[ways.index(contender.way) % len(COLORS)], *_STYLES[contender.weights])


def _text(contender: Contender) -> str:
    """Return what stands beside a point: the weights of a dense one, or the ratio that its line varies."""
    if contender.name == _DENSE:
        return Path(contender.weights).stem if contender.of_file else contender.weights
    return f"{contender.read_ratio if contender.read_ratio < 1 else contender.keep_ratio:g}"
