"""Counting topics while serving: off unless asked for, without texts, and added up over processes."""

from __future__ import annotations

import json
import logging
from collections import Counter

import pytest
from click.testing import CliRunner
from coreinfer_sim_cli.main import main
from served import NAME, Served, backend_of, chat
from tiny_index import PROMPTS

from coreinfer_sim.base.errors import IndexFormatError
from coreinfer_sim.index.asked import add_asked, asked_file, read_asked
from coreinfer_sim.serving.app import make_app


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data"


def ask(language_model, index, *prompts, **settings):
    with Served(make_app(backend_of(language_model, index), NAME, **settings)) as server:
        for prompt in prompts:
            chat(server.client(), prompt)


def test_nothing_is_counted_unless_asked_for(language_model, wide_index, data):
    ask(language_model, wide_index, PROMPTS[0])
    assert read_asked(wide_index.manifest) is None and not data.exists()


def test_topics_are_counted_without_texts(language_model, wide_index, data):
    strange = "Zebras gallop over the savannah"
    ask(language_model, wide_index, PROMPTS[0], PROMPTS[0], strange, log_topics=True)
    ask(language_model, wide_index, PROMPTS[1], log_topics=True)
    found = read_asked(wide_index.manifest)
    topics = [wide_index.lookup(prompt)[0] for prompt in (PROMPTS[0], PROMPTS[0], strange, PROMPTS[1])]
    assert found.prompts == Counter(match.cluster for match in topics)
    assert found.unfamiliar == Counter(match.cluster for match in topics if not match.confident) and found.unfamiliar
    content = asked_file(wide_index.manifest).read_text(encoding="utf-8")
    assert "stars" not in content and "Zebras" not in content and sorted(json.loads(content)) == [
        "prompts", "since", "unfamiliar",
    ]  # fmt: skip


def test_info_shows_what_is_asked(wide_index, data):
    add_asked(wide_index.manifest, Counter({0: 5, 2: 3}), Counter({2: 2}))
    run = CliRunner().invoke(main, ["info", wide_index.name])
    assert run.exit_code == 0, run.output
    assert "asked     8 prompts since 20" in run.output and "2 of them unfamiliar; texts like those" in run.output
    lines = [line.split()[:5] for line in run.output.splitlines() if " asked, " in line]
    assert lines == [["2", "3", "asked,", "2", "unfamiliar"], ["0", "5", "asked,", "0", "unfamiliar"]]
    run = CliRunner().invoke(main, ["info", wide_index.name, "--json"])
    assert json.loads(run.output)["asked"]["unfamiliar"] == {"2": 2}


def test_counts_that_cannot_be_written_fail_no_request(language_model, wide_index, data, caplog):
    path = asked_file(wide_index.manifest)
    path.parent.mkdir(parents=True)
    path.write_text("{", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        ask(language_model, wide_index, PROMPTS[0], log_topics=True)
    assert "topics cannot be counted: " in caplog.text and "remove it to count anew" in caplog.text
    with pytest.raises(IndexFormatError, match="is damaged .*; remove it to count anew"):
        read_asked(wide_index.manifest)
