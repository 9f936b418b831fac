"""Plots: one definition for a page, a picture and a drawing, none of which executes what a text says."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import altair as alt
import pytest

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.plots import COLORS, check_plot, cycled, page, save_plot, styled, svg_of, wrapped

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def chart(text: str = "name"):
    rows = alt.Data(values=[{"x": number, "name": text} for number in range(3)])
    return styled(alt.Chart(rows).mark_point().encode(x="x:Q", color="name:N", tooltip="name:N"), text)


class Parts(HTMLParser):
    """What a browser would take for elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_one_definition_is_a_page_a_picture_and_a_drawing(tmp_path):
    for ending in ("html", "png", "svg"):
        save_plot(chart(), tmp_path / f"a.{ending}")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    text = (tmp_path / "a.html").read_text()
    assert '<div class="plot" id="plot"></div>' in text and "<title>name</title>" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.png", "a.svg"]


def test_a_page_has_its_own_scripts_alone_and_asks_for_nothing(tmp_path):
    save_plot(chart(HOSTILE), tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    parts = Parts(text).tags
    assert [attributes.get("type") for tag, attributes in parts if tag == "script"] == ["application/json", None]
    assert not [tag for tag, _ in parts if tag in {"img", "link", "iframe"}]
    assert not [a for _, attributes in parts for a in attributes if a.startswith("on") or a in {"src", "href"}]
    policy = next(a["content"] for tag, a in parts if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ") and re.search(r"script-src 'sha256-[^']+'$", policy)
    spec = json.loads(re.search(r'id="charts">(.*)</script>\n<script>', text)[1])["plot"]
    assert HOSTILE in {row["name"] for row in spec["data"]["values"]}  # it is shown, as the text that it is


def test_a_drawing_holds_texts_as_text():
    root = ET.fromstring(svg_of(chart(HOSTILE)))
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert "text" in tags and not tags & {"script", "img", "image", "foreignObject", "a"}
    assert any("alert(1)" in (element.text or "") for element in root.iter())
    assert not [name for element in root.iter() for name in element.attrib if name.startswith("on")]


@pytest.mark.parametrize(
    "text", ["\x1b[31mred\x00", "\uffff\U0001fffe", "\ud800", "\u202e\u2028", "\ufdd0 ☃ 👩\u200d🚀 ܀ ﷽"]
)
def test_no_character_ends_the_process(text, tmp_path):
    assert "<text" in svg_of(chart(f"a {text} b"))


def test_a_page_without_charts_has_no_script():
    text = page("a & b", "<p>text</p>", {})
    assert "<script" not in text and "<title>a &amp; b</title>" in text


def test_what_cannot_be_drawn_is_refused_before_the_work(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"expected a name that ends in .html, .png or .svg"):
        check_plot(tmp_path / "a.pdf")
    with pytest.raises(ConfigError, match="no folder"):
        check_plot(tmp_path / "none" / "a.svg")
    monkeypatch.setitem(sys.modules, "altair", None)  # as if it were not installed
    with pytest.raises(ConfigError, match="a plot needs altair, not found here; install the extra plots"):
        check_plot(tmp_path / "a.svg")


def test_titles_fit_and_values_go_round():
    assert max(map(len, wrapped("a word " * 30))) <= 55
    assert cycled(COLORS, 9)[7:] == list(COLORS[:2])
