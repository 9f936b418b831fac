"""The figures' runner: its table, the shared options, and what it writes into result files."""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from figures import house, record
from figures.run import main
from figures.table import REQUIRED, SHARED, TABLE, figure
from figures.tools import in_turns


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "top", lambda: {"machine": {"processor": "P"}, "versions": {}, "date": "2026-01-01"})
    return tmp_path


@pytest.fixture
def entry():
    """An entry that records what it was given; out of the table afterwards."""

    @figure(
        "made-up.json", "nothing", "no time", timed=True, model="M", name=None, index=REQUIRED, keep_ratio=0.4, rows=3
    )
    def made_up(given):
        """Record two figures."""
        record.record("kept", given.keep_ratio, "share", record.at_most(0.5), model=given.name, rows=given.rows)
        record.record("counted", 3, "of 3", record.exactly(3))

    yield TABLE["test-figures-made-up"]
    del TABLE["test-figures-made-up"]


def run(command, *arguments):
    done = CliRunner().invoke(command, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_list_names_every_entry_with_its_file_and_time():
    lines = run(main, "list").splitlines()
    assert len(lines) == len(TABLE) == len({entry.callback for entry in TABLE.values()})
    for line, (name, entry) in zip(lines, TABLE.items(), strict=True):
        assert line.split()[:2] == [name, entry.file] and entry.takes in line and entry.help


def test_shared_options_mean_the_same_in_every_entry():
    for entry in TABLE.values():
        for parameter in entry.params:
            if parameter.name in SHARED and not parameter.multiple:
                assert parameter.help == SHARED[parameter.name].get("help"), (entry.name, parameter.name)


def test_a_figure_says_what_was_measured_and_how_to_repeat_it(results, entry, tmp_path):
    output = run(entry, "--index", tmp_path, "--model", "/somewhere/my model.gguf", "--rows", 2)
    assert "holds   kept: 0.4 share (bar: at most 0.5)" in output
    content = json.loads((results / "made-up.json").read_text(encoding="utf-8"))
    assert list(content) == ["machine", "versions", "date", "figures"]
    counted, kept = content["figures"]
    command = "python figures/run.py test-figures-made-up --model MODEL --index INDEX --rows 2"
    assert counted == {
        "name": "counted", "value": 3, "unit": "of 3", "bar": "3", "holds": True, "command": command,
    }  # fmt: skip
    assert (kept["model"], kept["rows"]) == ("my model.gguf", 2)


def test_a_missed_bar_is_said(results, entry, tmp_path):
    assert "MISSED  kept: 0.6" in run(entry, "--index", tmp_path, "--keep-ratio", 0.6)


def test_a_figure_replaces_its_earlier_self_and_others_keep_where_they_were_measured(results, entry, tmp_path):
    earlier = {"machine": {"processor": "P"}, "versions": {}, "date": "2025-01-01"}
    figures = [{"name": "kept", "value": 1}, {"name": "other", "value": 2}]
    (results / "made-up.json").write_text(json.dumps({**earlier, "figures": figures}), encoding="utf-8")
    run(entry, "--index", tmp_path)
    found = json.loads((results / "made-up.json").read_text(encoding="utf-8"))["figures"]
    assert [(each["name"], each.get("measured")) for each in found] == [
        ("counted", None), ("kept", None), ("other", earlier),
    ]  # fmt: skip


def test_a_speed_of_another_processor_stays_beside_and_is_named(results, entry, tmp_path):
    where = {"processor": "P", "cores": 2, "memory_gib": 8}
    wider = {"machine": {**where, "instructions": ["avx2", "avx512f"]}, "versions": {}, "date": "2025-01-01"}
    (results / "made-up.json").write_text(
        json.dumps({**wider, "figures": [{"name": "kept", "value": 1}]}), encoding="utf-8"
    )
    run(entry, "--index", tmp_path)
    run(entry, "--index", tmp_path)
    figures = json.loads((results / "made-up.json").read_text(encoding="utf-8"))["figures"]
    assert [(each["name"], each.get("measured")) for each in figures] == [
        ("counted", None), ("kept", None), ("kept", wider),
    ]  # fmt: skip
    entry.timed = False
    run(entry, "--index", tmp_path)
    assert len(json.loads((results / "made-up.json").read_text(encoding="utf-8"))["figures"]) == 2


def test_values_are_held_against_the_bar_as_they_are():
    assert record.at_least(2.4).passes(2.4) and not record.at_least(2.4).passes(2.39999)
    assert not record.at_most(1.0).passes(float("nan"))


def test_contenders_take_turns_and_the_first_round_warms_up():
    seen = []
    found = in_turns("ab", 2, lambda name, number: seen.append(name) or float(number))
    assert (seen, found) == ([*"abbaab"], {"a": [1.0, 2.0], "b": [1.0, 2.0]})


def test_the_last_line_of_pytest_is_read():
    found = house.outcome("....\n1 failed, 671 passed, 12 deselected in 423.21s (0:07:03)\n")
    assert found == {"failed": 1.0, "passed": 671.0, "deselected": 12.0, "seconds": 423.21}


def test_what_entries_import_when_they_run_is_there():
    for path in Path(house.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("coreinfer_sim"):
                for alias in node.names:
                    assert hasattr(importlib.import_module(str(node.module)), alias.name), (path.name, alias.name)
