"""The log of scores: what it goes on from, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.evaluation.results import Result, open_log, read_results


def test_a_log_goes_on_only_with_the_same_setup(tmp_path):
    path = tmp_path / "log.jsonl"
    with open_log(path, {"model": "a", "max_tokens": 8}) as file:
        file.write("{}\n")
    with open_log(path, {"model": "a", "max_tokens": 8}):
        pass
    assert len(path.read_text().splitlines()) == 2
    with pytest.raises(ConfigError, match=r"scores of other settings – max_tokens \(8 there, 9 here\) –"):
        open_log(path, {"model": "a", "max_tokens": 9})
    path.write_text("something else\n")
    with pytest.raises(ConfigError, match="no log of evaluate"):
        open_log(path, {})


def test_a_log_goes_on_after_a_line_that_was_cut_short(tmp_path):
    log = tmp_path / "log.jsonl"
    with open_log(log, {"seed": 0}) as file:
        file.write('{"half')
    result = Result("dense 16bit", "s", "1", 2, 1.0, 1.0, 0.0, 2, None, 1, 1)
    with open_log(log, {"seed": 0}) as file:
        file.write(json.dumps(asdict(result)) + "\n")
    assert read_results(log) == [result]
