"""The map of a corpus as a picture, with a prompt on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from coreinfer_sim.base.plain import excerpt
from coreinfer_sim.base.plots import COLORS, INK, SHAPES, WIDTH, styled
from coreinfer_sim.index.clusters import Cluster
from coreinfer_sim.index.prompt_map import Place, PromptMap

_MOST_IN_LEGEND = 24
"""Topics; of more the numbers on the map are read in the table of `show`."""


def map_chart(
    prompt_map: PromptMap, clusters: Sequence[Cluster], prompt: str | None = None, place: Place | None = None
) -> Any:
    """Return the chart of a map: a dot a prompt, by colour and shape its topic, whose number stands in its middle."""
    import altair as alt

    names = [f"{cluster.id}  {cluster.label}" for cluster in clusters]
    found = sorted(set(prompt_map.clusters.tolist()))
    coordinates = prompt_map.coordinates.round(4).tolist()
    dots = [
        {"x": x, "y": y, "topic": names[number], **({"prompt": text} if text else {})}
        for (x, y), number, text in zip(
            coordinates, prompt_map.clusters.tolist(), prompt_map.excerpts or [""] * len(prompt_map), strict=True
        )
    ]
    middles = [
        {"x": x, "y": y, "number": str(number)}
        for number in found
        for x, y in [np.median(prompt_map.coordinates[prompt_map.clusters == number], axis=0).tolist()]
    ]
    # 1) one legend tells both colour and shape
    legend = alt.Legend() if len(found) <= _MOST_IN_LEGEND else None
    domain = [names[number] for number in found]
    color = alt.Scale(domain=domain, range=[COLORS[number % len(COLORS)] for number in found])
    shape = alt.Scale(domain=domain, range=[SHAPES[number // len(COLORS) % len(SHAPES)] for number in found])
    x = alt.X("x:Q", axis=None, scale=alt.Scale(domain=[-1.08, 1.08]))
    y = alt.Y("y:Q", axis=None, scale=alt.Scale(domain=[-1.08, 1.08]))
    layers = [
        alt.Chart(alt.Data(values=dots))
        .mark_point(size=36, aria=False)  # a thousand dots are read out by nobody; the topics are listed
        .encode(
            x=x,
            y=y,
            color=alt.Color("topic:N", scale=color, legend=legend, title=None),
            shape=alt.Shape("topic:N", scale=shape, legend=legend, title=None),
            tooltip=[alt.Tooltip("topic:N"), *([alt.Tooltip("prompt:N")] if prompt_map.excerpts else [])],
        ),
        alt.Chart(alt.Data(values=middles)).mark_text(fontWeight="bold", fontSize=17).encode(x=x, y=y, text="number:N"),
    ]
    # 2) the prompt, and the dots that it stands among
    if prompt is not None and place is not None:
        ends = [
            {"x": place.x, "y": place.y, "x2": coordinates[number][0], "y2": coordinates[number][1]}
            for number in place.nearest
        ]
        here = alt.Data(values=[{"x": place.x, "y": place.y, "prompt": excerpt(prompt)}])
        mark = alt.Chart(here).mark_point(shape="cross", size=320, color=INK, stroke="white", strokeWidth=1)
        layers += [
            alt.Chart(alt.Data(values=ends)).mark_rule(strokeWidth=1).encode(x=x, y=y, x2="x2:Q", y2="y2:Q"),
            mark.encode(x=x, y=y, tooltip=["prompt:N"]),
        ]
    chart = alt.layer(*layers).properties(width=WIDTH, height=WIDTH)
    shown = f"{len(prompt_map):,} prompts by meaning"
    return styled(chart, shown if prompt is None else f"{shown}; the cross: {excerpt(prompt)}")
