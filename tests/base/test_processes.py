"""Processes that share work fail in one sentence and leave Ctrl-C to their parent."""

from __future__ import annotations

import errno
import math
import multiprocessing.process
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from coreinfer_sim.base.processes import Finished, Watch, interrupts_held, run_shards, this_worker


def told() -> tuple[Watch, list[int], list[Finished], list[str]]:
    """Return who is told what happens, and what was."""
    done, finished, failed = [], [], []
    return Watch(done.append, finished.append, failed.append), done, finished, failed


@pytest.mark.parametrize(
    ("make_run", "message"),
    [
        (partial(os._exit, 3), r"a worker process ended with exit code 3; the others do its share"),
        (partial(math.sqrt, -1), r"a worker process failed \(ValueError: .*\); the others do its share"),
    ],
    ids=["dies", "raises"],
)
def test_a_process_that_fails_is_reported(make_run, message):
    watch, done, finished, failed = told()
    run_shards([0, 1, 2], lambda number, report: report(number), [make_run], watch)
    assert done == [0, 1, 2] == [each.number for each in finished]
    (line,) = failed
    assert re.match(message, line)


def breaks(how: str, folder: Path) -> Callable[[int, Callable[[int], None]], None]:
    """Return what leaves a file for each shard, but breaks down at the first one in this process."""

    def run(number: int, report: Callable[[int], None]) -> None:
        (folder / f"{number} begun").touch()
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (64 << 20),) * 2)
        np.ones(1 << 30)

    return run


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("killed", "a worker process was killed, as systems do where memory is short; the others"),
        ("full", "a worker process failed (.*MemoryError: .*); the others"),
    ],
    ids=["killed", "out of memory"],
)
def test_a_shard_in_whose_middle_a_process_breaks_down_runs_again(how, message, tmp_path):
    def run(number: int, report: Callable[[int], None]) -> None:
        while number == 0 and not list(tmp_path.glob("* begun")):  # until the other one has begun with a shard
            time.sleep(0.01)
        report(1)

    watch, done, finished, failed = told()
    run_shards(range(4), run, [partial(breaks, how, tmp_path)], watch)
    (begun,) = tmp_path.glob("* begun")
    numbers = [each.number for each in finished]
    assert sorted(numbers) == [0, 1, 2, 3] and f"{numbers[-1]} begun" == begun.name
    assert {each.worker for each in finished} == {this_worker()} and len(done) == 4
    (line,) = failed
    assert re.match(message, line)


def carries(content: bytes) -> Callable[[int, Callable[[int], None]], None]:
    raise AssertionError(f"nothing with {len(content)} bytes should get so far")


def test_a_process_that_is_killed_while_it_starts_holds_nobody_up():
    """What it is to run may be larger than a pipe holds, which it has not read then."""
    was_killed = threading.Event()

    def kill() -> None:
        while not was_killed.is_set():
            for child in psutil.Process().children():
                with suppress(psutil.NoSuchProcess):
                    if any("spawn_main" in word for word in child.cmdline()):
                        child.kill()
                        was_killed.set()

    watch, done, _, failed = told()
    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    run_shards(range(3), lambda number, report: report(was_killed.wait(60)), [partial(carries, bytes(1 << 20))], watch)
    thread.join()
    assert len(done) == 3
    assert failed == ["a worker process was killed, as systems do where memory is short; the others do its share."]


def leaves_files(folder: Path) -> Callable[[int, Callable[[int], None]], None]:
    def run(number: int, report: Callable[[int], None]) -> None:
        with (folder / str(number)).open("x"):  # which fails the second time
            time.sleep(0.02)

    return run


def test_every_shard_runs_once_whoever_takes_it(tmp_path):
    watch, _, finished, failed = told()

    def run(number: int, report: Callable[[int], None]) -> None:
        if number == 0:
            while len(list(tmp_path.iterdir())) < 3:  # until the other one takes part
                time.sleep(0.01)
        leaves_files(tmp_path)(number, report)

    run_shards(range(30), run, [partial(leaves_files, tmp_path)], watch)
    assert sorted(each.number for each in finished) == list(range(30)) and failed == []
    assert len({each.worker for each in finished}) > 1 and len(list(tmp_path.iterdir())) == 30


def test_this_process_raises_its_own_failure():
    watch, _, _, failed = told()
    with pytest.raises(ValueError, match="expected a nonneg|math domain"):
        run_shards([0], lambda number, report: math.sqrt(-1), [], watch)
    assert failed == []


def test_a_process_that_cannot_start_is_reported(monkeypatch):
    def start(self):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)
    with pytest.raises(OSError, match="Resource temporarily unavailable"):
        run_shards([0, 1, 2], lambda number, report: report(number), [partial(math.sqrt, 1)] * 2, told()[0])


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no signal masks here")
def test_a_process_that_is_only_starting_leaves_ctrl_c_to_its_parent():
    asks = [sys.executable, "-c", "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"]
    with interrupts_held():
        assert subprocess.run(asks, capture_output=True, text=True, check=True).stdout.strip() == "True"
    assert subprocess.run(asks, capture_output=True, text=True, check=True).stdout.strip() == "False"
