"""A report holds what the index holds, asks for nothing from elsewhere, and executes nothing that a text says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from index_folder import STATISTICS, clusters, save

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.evaluation.contenders import parse_contenders
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import CorpusInfo, SettingsInfo
from coreinfer_sim.index.prompt_map import PromptMap
from coreinfer_sim.reporting.comparing import compare
from coreinfer_sim.reporting.notices import notices_of
from coreinfer_sim.reporting.overlap import overlap
from coreinfer_sim.reporting.report import write_report
from coreinfer_sim.reporting.results import read_measured

HOSTILE = "</td></script><script>alert(1)</script><img src=x onerror=alert(2)> [link](javascript:alert(3)) \x1b[31mred"
SIZES = (20, 30, 40)
TITLES = [str(c) for c in parse_contenders(["dense", "all"], [1.0], ["energy"], ["16bit", "int8"], read_ratios=[0.3])]


def dots(n: int, far: int = 0, text: str = "a prompt") -> PromptMap:
    """A map of n prompts at the centroids of three topics, and some far from all."""
    numbers = np.arange(n) % 3
    embeddings = np.eye(4, dtype=np.float16)[numbers]
    embeddings[n - far :] = np.eye(4, dtype=np.float16)[3]
    places = np.random.default_rng(0).uniform(-1, 1, (n, 2)).astype(np.float32)
    return PromptMap(places, numbers.astype(np.int32), embeddings, [f"{text} {number}" for number in range(n)])


@pytest.fixture
def index(tmp_path):
    """Make an index of three topics on disk; every part may be another."""

    def make(sizes=SIZES, text="a prompt", prompt_map=None, **sections) -> SemanticIndex:
        named = [
            replace(c, size=n, label=f"{text} {c.id}", exemplars=[text]) for c, n in zip(clusters(), sizes, strict=True)
        ]
        return SemanticIndex.load(save(tmp_path / "index", of_clusters=named, prompt_map=prompt_map, **sections))

    return make


def quality_file(path: Path, titles: list[str]) -> Path:
    rows = [
        {
            "contender": title,
            "ratio": 1 + number / 50,
            "ratio_interval": None if number else [1.0, 1.0],
            "kl": number / 100,
            "same_top": 0.9,
            "total_bytes_per_token": 1e8 / (1 + number),
        }
        for number, title in enumerate(titles)
    ]
    path.write_text(json.dumps({"model": "m", "index": "i", "contenders": rows}))
    return path


def speed_file(path: Path) -> Path:
    row = {
        "contender": "sparse:0.4",
        "tokens_per_second": 23.5,
        "tokens_per_second_lowest": 20.0,
        "tokens_per_second_highest": 25.0,
        "first_token_seconds": 0.05,
        "bytes_per_token": 5e7,
        "peak_bytes": 9e8,
    }
    content = {
        **{"model": HOSTILE, "prompt_tokens": 16, "new_tokens": 8, "rounds": 5, "threads": 2},
        **{"bandwidth_gb_per_s": {"highest": 9.0}, "machine": {"processor": "some processor"}},
        "contenders": [row, {"contender": HOSTILE, "error": HOSTILE}],
    }
    path.write_text(json.dumps(content))
    return path


class Parts(HTMLParser):
    """What a browser would take for elements, and for text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def written(index: SemanticIndex, tmp_path: Path, *results: Path, **more) -> Parts:
    write_report(index, results, tmp_path / "report.html", **more)
    return Parts((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_a_report_holds_what_the_index_and_the_results_hold(index, tmp_path):
    results = [quality_file(tmp_path / "quality.json", TITLES), speed_file(tmp_path / "speed.json")]
    found = written(index(prompt_map=dots(90)), tmp_path, *results, commands=[("Check", "coreinfer-sim check it")])
    for text in (
        "some-model (Llama, 3 layers, d_ff 6, float32)",
        "prompts.jsonl: 27 prompts",
        "3 topics over 27 prompts",
        "a prompt 2",
        "By PCA, 90 of 27 prompts",
        "by chance it would be 40%",
        *TITLES,
        "sparse:0.4",
        "23.5",
        "some processor",
        "coreinfer-sim check it",
    ):
        assert text in found.text, text
    assert found.tags.count(("h1", {})) == 1
    places = {attributes["id"] for _, attributes in found.tags if "id" in attributes}
    links = [attributes["href"] for tag, attributes in found.tags if tag == "a"]
    assert len(links) == 9 and all(link[0] == "#" and link[1:] in places for link in links)
    assert (tmp_path / "report.html").stat().st_size < 5e6


def test_nothing_of_a_stranger_is_executed(index, tmp_path):
    hostile = index(text=HOSTILE, prompt_map=dots(90, text=HOSTILE), corpus=CorpusInfo(HOSTILE, HOSTILE, 27, 300))
    found = written(hostile, tmp_path, speed_file(tmp_path / "<img src=x>.json"), commands=[(HOSTILE, HOSTILE)])
    scripts = [attributes for tag, attributes in found.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "charts"}, {}]
    assert not {tag for tag, _ in found.tags} & {"img", "image", "iframe", "link", "object", "foreignobject"}
    for _, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on") or name in {"src", "xlink:href"}]
        assert not (attributes.get("href") or "#").startswith("javascript")
    assert "[link](javascript:alert(3))" in found.text and "\x1b" not in (tmp_path / "report.html").read_text()


def test_an_index_without_a_map_is_reported_with_the_command_that_helps(index, tmp_path):
    found = written(index(), tmp_path)
    assert "has no map of its prompts" in found.text and "coreinfer-sim build-index" in found.text
    assert not [tag for tag, _ in found.tags if tag == "script"]
    assert "No results of quality were given." in found.text and "No results of speed were given." in found.text


def test_another_index_is_put_beside(index, tmp_path):
    """Its third topic is this one's first, of the same neurons; its first is another's."""
    order = [2, 1, 0]
    named = [replace(clusters()[c], id=place, label=f"there {c}") for place, c in enumerate(order)]
    there = save(
        tmp_path / "there",
        centroids=np.eye(4, dtype=np.float32)[order],
        of_clusters=named,
        statistics={name: values[order] for name, values in STATISTICS.items()},
        corpus=CorpusInfo("others.jsonl", "2" * 64, 27, 300),
    )
    other = SemanticIndex.load(there)
    found = compare(
        index(), other, [["corpus", "a"], ["model", "m"]], [["corpus", "b"], ["model", "m"], ["promise", "p"]]
    )
    assert found.facts == [["corpus", "a", "b"], ["promise", "none", "p"]] and found.note == ""
    assert [row[1:] for row in found.topics] == [[f"{2 - c}  there {c}", "1.00", "100%"] for c in range(3)]
    text = written(SemanticIndex.load(tmp_path / "index"), tmp_path, other=other).text
    assert "Beside another index" in text and "others.jsonl" in text and "0 there 2" in text


@pytest.mark.parametrize(("part", "note"), [("encoder", "The encoders differ"), ("model", "The models differ")])
def test_what_cannot_be_compared_is_said(index, tmp_path, part, note):
    ours = index()
    sections = {
        "encoder": {"probe": [0.5] * 8},
        "model": {"weight_sketch": [[0.25] * 32] * 3},
    }
    changed = replace(getattr(ours.manifest, part), **sections[part])
    other = SemanticIndex.load(save(tmp_path / "there", **{part: changed}))
    found = compare(ours, other, [], [])
    assert found.note.startswith(note) and bool(found.topics) is (part == "model")
    assert all(row[3] == "" for row in found.topics)


# The numbers


def test_overlap_is_the_share_of_neurons_in_common(index):
    found = overlap(index(settings=SettingsInfo(3, 0.4, 0.5, 0.5, 0, [1, 2], 16, 64, 1)))
    # of six neurons three by energy, then activation, then the lower id: {0, 3, 2}, {5, 1, 0} and {0, 1, 2} in layer 1,
    # {3, 4, 5}, {0, 1, 2} and {0, 1, 2} in layer 2
    assert found.share == 0.5
    assert found.of_layers == pytest.approx({1: (1 + 2 + 2) / 9, 2: (0 + 0 + 3) / 9})
    np.testing.assert_allclose(found.of_topics, [[1, 1 / 6, 1 / 3], [1 / 6, 1, 5 / 6], [1 / 3, 5 / 6, 1]], atol=1e-6)


def test_one_topic_has_nothing_in_common(index, tmp_path):
    one = save(
        tmp_path / "one",
        centroids=np.eye(4, dtype=np.float32)[:1],
        of_clusters=clusters(1),
        statistics={name: values[:1] for name, values in STATISTICS.items()},
        settings=SettingsInfo(1, 0.4, 0.4, 0.5, 0, [1, 2], 16, 64, 1),
    )
    assert overlap(SemanticIndex.load(one)).of_layers == {}
    assert "There is one topic" in written(SemanticIndex.load(one), tmp_path).text


def test_small_and_large_topics_are_noticed(index):
    small, large, _ = notices_of(index(sizes=(200, 20, 7)))
    assert small.text.startswith("1 topic of 3 have fewer than 8") and "7 prompts" in small.examples[0]
    assert large.text.startswith("1 topic of 3 have more than 5 times") and "200 prompts" in large.examples[0]


def test_prompts_far_from_all_are_noticed(index):
    far, _ = notices_of(index(prompt_map=dots(90, far=2)))
    assert far.text.startswith("2 prompts of 90 on the map are far")
    assert far.examples == ["similarity 0.00: a prompt 88", "similarity 0.00: a prompt 89"]


def test_a_sound_index_needs_no_notice_but_its_missing_promise(index):
    (only,) = notices_of(index(prompt_map=dots(90)))
    assert only.text.startswith("Nothing was promised")


# Results


def test_names_of_contenders_are_read_as_they_are_written(tmp_path):
    given = parse_contenders(
        ["dense", "all", "griffin", "similarity", "global"],
        [0.4, 0.00001],
        ["energy", "paper", "compensated"],
        ["16bit", "int8", "q4_0"],
        ["none", "hybrid"],
        [0.25],
    )
    found = read_measured(quality_file(tmp_path / "a.json", [*map(str, given), "dense some-file.gguf"]))
    families = found.chart.to_dict()["layer"][1]["encoding"]["color"]["scale"]["domain"]
    assert sorted(families) == sorted({contender.family for contender in given})


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"contenders": 3}', '{"contenders": [{"contender": "nonsense"}]}', '{"contenders": [{}]}'],
)
def test_what_is_no_result_is_refused_by_name(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(
        ConfigError, match=r"other.json holds no results .*, expected JSON that evaluate, tune or bench"
    ):
        read_measured(tmp_path / "other.json")


def test_a_report_that_cannot_be_written_is_refused(index, tmp_path):
    for name, says in (("report.pdf", "ends in .html"), ("none/report.html", "no folder")):
        with pytest.raises(ConfigError, match=says):
            write_report(index(), [], tmp_path / name)
        (tmp_path / "index").rename(tmp_path / re.sub(r"\W", "", name))


# In a browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page_on_a_phone(browser, index, tmp_path, scheme):
    results = [quality_file(tmp_path / "quality.json", TITLES), speed_file(tmp_path / "speed.json")]
    write_report(index(text=HOSTILE, prompt_map=dots(90, text=HOSTILE)), results, tmp_path / "report.html")
    page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    said, asked = [], []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "report.html").as_uri())
    page.wait_for_selector("#plot-map svg .mark-symbol path")
    assert said == [] and len(asked) == 1  # the page itself
    assert page.locator("#plot-map .mark-symbol path").count() >= 90
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    ink = page.evaluate("getComputedStyle(document.querySelector('#plot-map svg text')).fill")
    assert ink == {"light": "rgb(0, 0, 0)", "dark": "rgb(255, 255, 255)"}[scheme]
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.close()
