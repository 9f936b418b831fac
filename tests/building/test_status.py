"""What a build tells in its folder, and what another terminal makes of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builds import LANGUAGE_MODEL_STAGE, StopAt
from commands import call, parsed, refused, succeeded

from coreinfer_sim.base.errors import BuildError
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.stores import RemoteFile
from coreinfer_sim.building.log import LOG_FILE, LoggedProgress
from coreinfer_sim.building.status import build_status, status_at
from coreinfer_sim.index.manifest import MANIFEST_FILE
from coreinfer_sim.index.remote import place_for


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()]


def write(folder: Path, *lines: dict, pid: int = 0, host: str = os.uname().nodename) -> Path:
    """Write a log that a build on a host has begun."""
    folder.mkdir()
    begin = {"time": 1000.0, "event": "begin", "host": host, "pid": pid or os.getpid()}
    (folder / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in (begin, *lines)))
    return folder


def part(number: int, when: float, done: int) -> dict:
    facts = {"number": number, "size": 100, "n_rows": 4, "worker": "h:1", "seconds": 2.0}
    return {"time": when, "event": "part", "done": done, **facts}


def test_an_index_for_an_address(tmp_path, monkeypatch):
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path))
    address = f"memory://status-{tmp_path.name}"
    with pytest.raises(BuildError, match=f"no index at {address}, and no build of one on this machine"):
        status_at(address)
    refused(call("status", address), "no index at", "name the address")
    building = place_for(address).with_name(f"{place_for(address).name}.build")
    building.parent.mkdir(parents=True)
    write(building, STAGE, pid=2**22 + 1)
    assert status_at(address).state == "stopped" and "broken off" in succeeded("status", address).stdout
    shutil.rmtree(building)
    (RemoteFile(address) / MANIFEST_FILE).put(Path(__file__))
    assert (
        status_at(address).state == "finished"
        and f"{address}: the index is finished" in succeeded("status", address).stdout
    )


STAGE = {"time": 1010.0, "event": "stage", "stage": "Language model", "total": 1000, "unit": "tokens", "done": 200}
SHARE = {"time": 1010.5, "event": "share", "workers": 2}


def test_a_log_says_how_far_a_build_is(tmp_path):
    lost = {"time": 1012.0, "event": "failed", "text": "a worker was lost"}
    write(tmp_path / "index.build", STAGE, SHARE, lost, part(2, 1015.0, 300), part(3, 1020.0, 400), pid=2**22 - 1)
    found = build_status(tmp_path / "index")
    assert found.as_dict() | {"heard": 0} == build_status(tmp_path / "index.build").as_dict() | {"heard": 0}
    assert (found.state, found.stage, found.done, found.total, found.workers) == (
        "stopped",
        "Language model",
        400,
        1000,
        2,
    )
    assert found.units_per_second == 20.0 and found.rows_per_second == 0.8 and found.seconds_left == 30.0
    assert found.failures == ["a worker was lost"] and found.parts == 2


def test_a_log_of_another_machine_leaves_open_whether_it_runs(tmp_path):
    write(tmp_path / "index.build", STAGE, host="elsewhere")
    assert build_status(tmp_path / "index").state == "unknown"
    assert "on elsewhere, heard of " in succeeded("status", tmp_path / "index").stdout


def test_a_line_that_a_kill_cut_short_is_passed_over(tmp_path):
    folder = write(tmp_path / "index.build", STAGE, SHARE)
    with (folder / LOG_FILE).open("a") as file:
        file.write('{"time": 10')
    assert build_status(tmp_path / "index").workers == 2


def test_a_process_that_was_given_the_number_of_a_build_is_not_the_build(tmp_path):
    """Numbers of processes come again; this one began long after the log."""
    write(tmp_path / "index.build", STAGE)
    assert build_status(tmp_path / "index").state == "stopped"


def test_a_build_tells_what_it_does(build, tmp_path):
    out, folder = tmp_path / "index", tmp_path / "index.build"
    states = []

    class Asking(StopAt):
        def advance(self, n: int) -> None:
            states.append(build_status(out))

    with pytest.raises(KeyboardInterrupt):
        build(out, workers=1, progress=Asking(LANGUAGE_MODEL_STAGE, end=True))
    found = events(folder)
    assert [event["stage"] for event in found if event["event"] == "stage"][-1] == LANGUAGE_MODEL_STAGE
    parts = [event for event in found if event["event"] == "part"]
    assert sorted(each["number"] for each in parts) == list(range(8))
    assert sum(each["n_rows"] for each in parts) == 60
    assert any(event["event"] == "say" and event["text"].startswith("Plan: 60 prompts") for event in found)
    assert {state.state for state in states} == {"running"} and states[-1].stage == LANGUAGE_MODEL_STAGE
    n_lines = len(found)
    with pytest.raises(KeyboardInterrupt):
        build(out, workers=1, progress=StopAt("Drawing the map"))
    assert events(folder)[:n_lines] == found and events(folder)[n_lines]["event"] == "begin"


def test_the_command_shows_it(built, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write(tmp_path / "index.build", STAGE, SHARE, part(2, 1020.0, 400), pid=ended.pid)
    lines = succeeded("status", tmp_path / "index").stdout.splitlines()
    assert lines[0].endswith("index.build: broken off; the same command goes on.")
    assert lines[1:] == ["Language model: 400 of 1,000 tokens, 2 workers, 20.0 tokens/s, 0.4 rows/s", "0 failures"]
    assert parsed("status", tmp_path / "index")["done"] == 400
    assert succeeded("status", built).stdout.endswith("the index is finished.\n")
    refused(call("status", tmp_path / "nothing"), "there is neither an index nor a build at .*nothing, expected one")


def test_a_log_that_cannot_be_written_stops_no_build(tmp_path):
    logged = LoggedProgress(tmp_path / "nowhere", Progress())
    logged.start("A stage", 3, "rows")
    logged.advance(1)
    logged.finish()
    assert not (tmp_path / "nowhere").exists()


def test_how_far_a_stage_is_comes_once_a_second(tmp_path, monkeypatch):
    now = iter(range(0, 100))
    monkeypatch.setattr(time, "monotonic", lambda: next(now) / 10)
    logged = LoggedProgress(tmp_path, Progress())
    logged.start("A stage", 40, "rows")
    for _ in range(40):
        logged.advance(1)
    written = [event["done"] for event in events(tmp_path) if event["event"] == "progress"]
    assert 2 <= len(written) <= 5
