"""What every plot shares: one style, and writing it as a page or a picture, from one definition, by the file's ending."""

from __future__ import annotations

import base64
import hashlib
import json
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.extra import require
from coreinfer_sim.base.files import check_folder, write_atomic
from coreinfer_sim.base.plain import plain

_FORMATS = (".html", ".png", ".svg")
WIDTH = 460
"""Of what axes span, in pixels: with labels of `FONT_SIZE` a plot is legible where it is scaled to a phone's 390."""
HEIGHT = 360
FONT_SIZE = 15
INK = "currentColor"
"""Black, and on a dark page what its text is."""
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C")
"""Told apart by the colour-blind (Okabe and Ito, 2008), and seen on white and on black."""
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
_PIXELS = 2
"""Of a .png file, for each of the plot's."""
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>{body}</main>
{scripts}
</body>
</html>
"""
_STYLE = """:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 46rem; margin: 0 auto; padding: 1rem; }
.plot, .plot svg { max-width: 100%; height: auto; }
"""


def check_plot(path: Path) -> None:
    """Raise ConfigError unless a plot can be written to ``path``, before the work that it would show."""
    if path.suffix not in _FORMATS:
        raise ConfigError(
            f"the plot is to be {path.name}, expected a name that ends in {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}."
        )
    check_folder(path)
    require("a plot", "plots", "altair", "vl_convert")


def styled(chart: Any, title: str) -> Any:
    """Return an Altair chart in the style of all plots.

    Args:
        chart: whole, as only that can be configured.
        title: read out where the chart cannot be seen.
    """
    lines = wrapped(title)
    return chart.properties(
        title={"text": lines, "anchor": "start"}, description=title, background="transparent"
    ).configure(
        font="Arial, sans-serif",
        view={"stroke": None},
        title={"fontSize": FONT_SIZE + 1, "color": INK},
        text={"fontSize": FONT_SIZE - 2, "color": INK},
        point={"size": 70, "filled": True, "opacity": 1},
        rule={"color": INK},
        axis={
            **{"labelFontSize": FONT_SIZE - 1, "titleFontSize": FONT_SIZE, "labelColor": INK, "titleColor": INK},
            **{"titleFontWeight": "normal", "gridColor": INK, "gridOpacity": 0.12, "domainOpacity": 0.4},
            **{"domainColor": INK, "tickColor": INK, "tickOpacity": 0.4},
        },
        legend={
            **{"labelFontSize": FONT_SIZE - 1, "titleFontSize": FONT_SIZE, "labelColor": INK, "titleColor": INK},
            **{"orient": "bottom", "columns": 1, "labelLimit": 0, "symbolSize": 90},
        },
    )


def wrapped(text: str, width: int = 46) -> list[str]:
    """Cut a text into lines that fit a plot."""
    return textwrap.wrap(text, width)


def cycled(values: Sequence[str], n: int) -> list[str]:
    """Return ``n`` values, from the first on again where they run out."""
    return [values[number % len(values)] for number in range(n)]


def save_plot(chart: Any, path: Path) -> None:
    """Write a chart of `styled` as a page that needs no network, a picture or a drawing, in one step.

    Args:
        chart: of Altair.
        path: an .html, .png or .svg file; replaced.

    Raises:
        ConfigError: see `check_plot`.
    """
    check_plot(path)
    if path.suffix == ".svg":
        content = svg_of(chart, "white").encode()
    elif path.suffix == ".png":
        content = _png_of(chart)
    else:
        title = str(chart.description)
        content = page(title, '<div class="plot" id="plot"></div>', {"plot": chart}).encode()
    write_atomic(path, lambda part: part.write_bytes(content))


def svg_of(chart: Any, background: str = "transparent") -> str:
    """Return a chart as a drawing, whose texts are text and escaped."""
    import vl_convert

    drawing: str = vl_convert.vegalite_to_svg({**_spec(chart), "background": background}, allowed_base_urls=[])
    return drawing


def _png_of(chart: Any) -> bytes:
    import vl_convert

    spec = {**_spec(chart), "background": "white"}
    picture: bytes = vl_convert.vegalite_to_png(spec, scale=_PIXELS, allowed_base_urls=[])
    return picture


def _spec(chart: Any) -> dict[str, Any]:
    """Return a chart's definition with plain texts: of a control character vl-convert would end the process."""

    def of(value: Any) -> Any:
        if isinstance(value, dict):
            return {of(name): of(each) for name, each in value.items()}
        if isinstance(value, list):
            return [of(each) for each in value]
        return plain(value) if isinstance(value, str) else value

    found: dict[str, Any] = of(chart.to_dict())
    return found


def page(title: str, body: str, charts: Mapping[str, Any], style: str = "") -> str:
    """Return a page of HTML that asks for nothing from elsewhere, and executes nothing but its own scripts.

    A policy within the page says so to the browser: by their checksums it allows the script of plots, and no other.

    Args:
        title: plain text.
        body: HTML, in which texts of others are escaped.
        charts: of Altair, by the id of the element that each is drawn into.
        style: CSS beside that of every page.
    """
    from markupsafe import escape

    specs = _safe_json({name: _spec(chart) for name, chart in charts.items()})
    script = _drawing_script() if charts else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    scripts = f'<script type="application/json" id="charts">{specs}</script>\n<script>{script}</script>'
    return _PAGE.format(
        policy=policy, title=escape(title), style=_STYLE + style, body=body, scripts=scripts if charts else ""
    )


def _safe_json(value: Any) -> str:
    """Return JSON in which nothing ends the script that holds it."""
    text = json.dumps(value)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _drawing_script() -> str:
    """Return the script that draws the charts of a page, with the libraries that it needs."""
    import vl_convert

    script: str = vl_convert.javascript_bundle(
        "const charts = JSON.parse(document.getElementById('charts').textContent);\n"
        "for (const name of Object.keys(charts)) {\n"
        "  vegaEmbed('#' + name, charts[name], {actions: false, ast: true, renderer: 'svg'});\n"
        "}\n"
    )
    return script.replace("</script", "<\\/script")
