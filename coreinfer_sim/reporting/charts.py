"""The charts that only a report has: what topics have in common, by pair and by layer."""

from __future__ import annotations

from typing import Any

from coreinfer_sim.base.plots import COLORS, FONT_SIZE, HEIGHT, WIDTH, styled
from coreinfer_sim.reporting.overlap import Overlap

_MOST_WITH_NUMBERS = 12
"""Topics, of which a heat map shows the numbers, too."""


def topics_chart(found: Overlap) -> Any:
    """Return a heat map of what each pair of topics has in common."""
    import altair as alt

    n = len(found.of_topics)
    cells = [
        {"a": a, "b": b, "common": round(float(found.of_topics[a, b]), 3)} for a in range(n) for b in range(n) if a != b
    ]
    base = alt.Chart(alt.Data(values=cells)).encode(
        x=alt.X("a:O", title="topic", axis=alt.Axis(labelAngle=0, labelOverlap=True)), y=alt.Y("b:O", title="topic")
    )
    legend = alt.Legend(title="share in common", format=".0%", orient="bottom", gradientLength=WIDTH // 2)
    heat = base.mark_rect().encode(
        color=alt.Color("common:Q", scale=alt.Scale(scheme="viridis", domain=[found.share, 1]), legend=legend)
    )
    layers = [heat]
    if n <= _MOST_WITH_NUMBERS:
        bright = alt.datum.common > (1 + found.share) / 2
        color = alt.condition(bright, alt.value("black"), alt.value("white"))
        numbers = base.mark_text(fontSize=FONT_SIZE - 3).encode(text=alt.Text("common:Q", format=".0%"), color=color)
        layers.append(numbers)
    chart = alt.layer(*layers).properties(width=WIDTH, height=WIDTH)
    return styled(chart, "Core neurons that two topics have in common")


def layers_chart(found: Overlap) -> Any:
    """Return a line over the layers: what topics have in common, beside what chance gives."""
    import altair as alt

    points = [{"layer": layer, "common": round(common, 4)} for layer, common in found.of_layers.items()]
    line = (
        alt.Chart(alt.Data(values=points))
        .mark_line(point=True, color=COLORS[0])
        .encode(
            x=alt.X("layer:Q", title="layer", axis=alt.Axis(tickMinStep=1, format="d")),
            y=alt.Y("common:Q", title="share in common", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format=".0%")),
        )
    )
    chance = alt.Chart(alt.Data(values=[{"share": found.share}])).mark_rule(strokeDash=[6, 4]).encode(y="share:Q")
    text = (
        alt.Chart(alt.Data(values=[{"share": found.share, "text": "by chance"}]))
        .mark_text(align="left", dy=12, dx=4)
        .encode(x=alt.value(0), y="share:Q", text="text:N")
    )
    chart = alt.layer(line, chance, text).properties(width=WIDTH, height=HEIGHT // 2)
    return styled(chart, "Core neurons in common, mean over pairs of topics")
