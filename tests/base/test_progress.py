"""Who sees progress where none was asked for."""

from __future__ import annotations

import sys
import types

from coreinfer_sim.base.progress import NotebookProgress, Progress, shown


def in_shell(monkeypatch, **attributes):
    """Pretend to run in a shell of IPython."""
    shell = types.SimpleNamespace(**attributes)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))


def test_a_notebook_shows_bars_and_nothing_else_does(monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert type(shown(None)) is Progress
    in_shell(monkeypatch)  # a terminal's
    assert type(shown(None)) is Progress
    in_shell(monkeypatch, kernel=object())
    assert type(shown(None)) is NotebookProgress
    silent = Progress()
    assert shown(silent) is silent


def test_a_bar_of_a_notebook(capsys):
    bars = NotebookProgress()
    bars.advance(1)  # no stage yet
    bars.say("Reading prompts.jsonl.")
    bars.start("Recording", 10, "rows", done=4)
    bars.advance(3)
    bars.finish()
    bars.finish()
    captured = capsys.readouterr()
    assert captured.out == "Reading prompts.jsonl.\n"
    assert "Recording" in captured.err and "7/10" in captured.err
