"""Decode speed as a picture: a bar a contender, with spread, beside what the machine's bandwidth would allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coreinfer_sim.base.plots import (
    COLORS,
    HEIGHT,
    SHAPES,
    WIDTH,
    check_plot,
    cycled,
    save_plot,
    styled,
    wrapped,
)

_ROW = 64  # pixels of a contender: a line of text above its bar
_BAR = 22


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw tokens/s of what `bench` returned; contenders that failed are left out.

    Args:
        result: of `bench`.
        path: an .html, .png or .svg file; replaced in one step.
    """
    check_plot(path)
    save_plot(speed_chart(result), path)


def speed_chart(result: dict[str, Any]) -> Any:
    """Return the chart that `plot` draws."""
    import altair as alt

    rows = [
        {
            "name": f"{row['contender']}, {row['bytes_per_token'] / 1e6:,.0f} MB a token",
            "speed": row["tokens_per_second"],
            "lowest": row["tokens_per_second_lowest"],
            "highest": row["tokens_per_second_highest"],
            "limit": 1e9 * result["bandwidth_gb_per_s"]["highest"] / max(1, row["bytes_per_token"]),
        }
        for row in result["contenders"]
        if "error" not in row
    ]
    title = "decoded tokens per second (median, lowest and highest; a tick where memory bandwidth would allow)"
    base = alt.Chart(alt.Data(values=rows)).encode(y=alt.Y("name:N", sort=None, axis=None))
    bars = base.mark_bar(height=_BAR, color=COLORS[0]).encode(
        x=alt.X("speed:Q", title=wrapped(title), scale=alt.Scale(zero=True))
    )
    spread = base.mark_rule(strokeWidth=2).encode(x="lowest:Q", x2="highest:Q")
    limits = base.mark_tick(thickness=3, size=_BAR + 8, color=COLORS[5]).encode(x="limit:Q")
    names = base.mark_text(align="left", dy=-_BAR).encode(x=alt.datum(0), text="name:N")
    chart = alt.layer(bars, limits, spread, names).properties(width=WIDTH, height=_ROW * max(1, len(rows)))
    return styled(chart, f"{result['model']}, {result['prompt_tokens']} + {result['new_tokens']} tokens")


def plot_growth(series: dict[str, dict[str, list[tuple[int, float]]]], title: str, path: Path) -> None:
    """Draw tokens/s over something that grows, a line a contender.

    Args:
        series: by what grows, then by contender: (how much, tokens/s).
        title: of the picture.
        path: an .html, .png or .svg file; replaced in one step.
    """
    check_plot(path)
    import altair as alt

    parts = []
    for what, lines in series.items():
        rows = [{"name": name, "at": x, "speed": y} for name, points in lines.items() for x, y in points]
        names = list(lines)
        part = (
            alt.Chart(alt.Data(values=rows), width=WIDTH, height=HEIGHT // 2)
            .mark_line(point=True)
            .encode(
                x=alt.X("at:Q", title=what, scale=alt.Scale(type="log", base=2)),
                y=alt.Y("speed:Q", title="decoded tokens per second", scale=alt.Scale(zero=True)),
                color=alt.Color("name:N", scale=alt.Scale(domain=names, range=cycled(COLORS, len(names))), title=None),
                shape=alt.Shape("name:N", scale=alt.Scale(domain=names, range=cycled(SHAPES, len(names))), title=None),
            )
        )
        parts.append(part)
    save_plot(styled(alt.vconcat(*parts), title), path)
