"""What an experiment has found, as a picture: a line for each series, with bars for the intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coreinfer_sim.analysis.analyze import Analysis
from coreinfer_sim.base.plots import COLORS, HEIGHT, SHAPES, WIDTH, check_plot, cycled, save_plot, styled
from coreinfer_sim.base.progress import counted


def plot(found: Analysis, path: Path) -> None:
    """Draw what an experiment has found.

    Args:
        found: of `analyze`.
        path: an .html, .png or .svg file; replaced in one step.
    """
    check_plot(path)
    save_plot(analysis_chart(found), path)


def analysis_chart(found: Analysis) -> Any:
    """Return the chart that `plot` draws."""
    import altair as alt

    picture = found.picture
    points = [
        {
            "at": row[picture.x],
            "series": ", ".join(str(row[name]) for name in picture.series if row.get(name) is not None),
            **{name: row["value"] if row[name] is None else row[name] for name in ("value", "low", "high")},
        }
        for row in found.rows
        if row["value"] is not None
        and row.get(picture.x) is not None
        and all(row.get(name) in values for name, values in picture.where.items())
    ]
    names = list(dict.fromkeys(point["series"] for point in points))
    x = alt.X(
        "at:Q",
        title=picture.x_title,
        scale=alt.Scale(nice=False, zero=False),
        axis=alt.Axis(tickCount=6, tickMinStep=0.1 if picture.x == "share" else 1, format="~r"),
    )
    y = alt.Y(
        "value:Q",
        title=picture.y_title,
        scale=alt.Scale(type="log", nice=False) if picture.is_log else alt.Scale(zero=False),
        axis=alt.Axis(tickCount=6, format="~r"),
    )
    color = alt.Color("series:N", scale=alt.Scale(domain=names, range=cycled(COLORS, len(names))), title=None)
    shape = alt.Shape("series:N", scale=alt.Scale(domain=names, range=cycled(SHAPES, len(names))), title=None)
    base = alt.Chart(alt.Data(values=points)).encode(x=x, color=color)
    bars = base.mark_rule(strokeWidth=2).encode(y=alt.Y("low:Q", title=picture.y_title), y2="high:Q")
    lines = base.mark_line().encode(y=y)
    dots = base.mark_point(size=45).encode(y=y, shape=shape)
    chart = alt.layer(lines, bars, dots).properties(width=WIDTH, height=HEIGHT)
    intervals = ", 95\u00a0% intervals" if found.has_intervals else ""
    return styled(chart, f"{picture.title}: {Path(found.model).name}, {counted(found.n_texts, 'text')}{intervals}")
