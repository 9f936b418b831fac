"""`coreinfer-sim report`, and maps that `show` draws."""

from __future__ import annotations

import html
import shutil

import pytest
from commands import call, parsed, refused, succeeded
from index_folder import raw_manifest, rewrite


@pytest.fixture
def older(index, tmp_path):
    """The index as an earlier release would have written it."""
    folder = shutil.copytree(index, tmp_path / "older")
    (folder / "map.safetensors").unlink()
    raw = raw_manifest(folder)
    del raw["map"], raw["files"]["map.safetensors"]
    rewrite(folder, raw)
    return folder


def test_a_report_is_one_page(index, tmp_path):
    done = succeeded("report", index, "-o", tmp_path / "page.html")
    assert done.stdout == f"{tmp_path / 'page.html'} is written; open it in a browser.\n"
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"coreinfer-sim check {index}" in text and "45 prompts" in text and "3 topics" in text
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_comparison_and_its_command(index, tmp_path):
    other = shutil.copytree(index, tmp_path / "other one")
    succeeded("report", index, "--compare", other, "-o", tmp_path / "page.html")
    text = html.unescape((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert f"coreinfer-sim report {index} --compare '{other}' --out {tmp_path / 'page.html'}" in text


def test_results_that_are_none_are_refused(index, tmp_path):
    (tmp_path / "a.json").write_text("{}")
    refused(call("report", index, tmp_path / "a.json", "-o", tmp_path / "page.html"), "a.json holds no results")
    refused(call("report", index, "-o", tmp_path / "page.pdf"), "ends in .html")


def test_show_draws_the_map_and_a_prompt_on_it(index, tmp_path):
    plain = succeeded("show", index, "comets").stdout
    assert succeeded("show", index, "comets", "--plot", tmp_path / "a.svg").stdout == plain
    text = (tmp_path / "a.svg").read_text()
    assert "45 prompts by meaning; the cross: comets" in text and "space" in text
    parsed("show", index, "--plot", tmp_path / "b.html")
    assert "the cross" not in (tmp_path / "b.html").read_text()
    refused(call("show", index, "--plot", tmp_path / "a.pdf"), "ends in .html, .png or .svg")


def test_an_index_without_a_map_is_shown_but_not_drawn(older, tmp_path):
    assert "map " not in succeeded("show", older).stdout and "map" not in parsed("show", older, "comets")
    refused(call("show", older, "comets", "--plot", tmp_path / "a.svg"), "has no map of its prompts, .*build-index")
    assert not (tmp_path / "a.svg").exists()
    succeeded("report", older, "-o", tmp_path / "page.html")
