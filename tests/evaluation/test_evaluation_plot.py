"""The picture of quality over bytes."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from coreinfer_sim.evaluation.contenders import parse_contenders
from coreinfer_sim.evaluation.plot import families, plot, quality_chart

CONTENDERS = parse_contenders(["dense", "griffin", "similarity"], [0.8, 0.4], ["energy"], ["16bit", "q4_0"])
BITS = {"16bit": 16, "q4_0": 4.5}


def _summary() -> list[dict]:
    """Rows as `summarise` makes them: the fewer bytes, the worse."""
    return [
        {
            "contender": str(c),
            "ratio": 1 / (c.keep_ratio * BITS[c.weights] / 16),
            "kl": 16 / (c.keep_ratio * BITS[c.weights]) - 1,
            "total_bytes_per_token": 1e8 * c.keep_ratio * BITS[c.weights] / 16,
        }
        for c in CONTENDERS
    ]


def test_a_plot_has_a_line_a_family():
    found = families(_summary(), CONTENDERS)
    assert list(found) == [
        "dense",
        "griffin 16bit",
        "griffin q4_0",
        "similarity/energy 16bit",
        "similarity/energy q4_0",
    ]
    assert [c.weights for c, _ in found["dense"]] == ["q4_0", "16bit"]
    assert [c.keep_ratio for c, _ in found["griffin 16bit"]] == [0.4, 0.8]


def test_a_plot_is_written_whole_and_names_what_it_shows(tmp_path):
    for ending in ("html", "png", "svg"):
        plot(_summary(), CONTENDERS, tmp_path / f"a.{ending}")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    shown = {
        "".join(element.itertext()) for element in ET.parse(tmp_path / "a.svg").iter() if element.tag.endswith("text")
    }
    for text in ("dense", "similarity/energy q4_0", "16bit", "0.4", "weights read per decoded token (MB)"):
        assert text in shown and text in (tmp_path / "a.html").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "a.png", "a.svg"]


def test_a_line_is_told_by_colour_how_and_by_shape_with_what_weights():
    spec = quality_chart(_summary(), CONTENDERS).to_dict()
    dots = next(layer for layer in spec["layer"] if layer["mark"]["type"] == "point")["encoding"]
    names = dots["color"]["scale"]["domain"]
    colors, shapes = (dict(zip(names, dots[each]["scale"]["range"], strict=True)) for each in ("color", "shape"))
    assert colors["griffin 16bit"] == colors["griffin q4_0"] != colors["similarity/energy 16bit"]
    assert shapes["griffin q4_0"] == shapes["similarity/energy q4_0"] != shapes["griffin 16bit"]
