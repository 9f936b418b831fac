"""Processes that share work fail in one sentence and leave Ctrl-C to their parent."""

from __future__ import annotations

import errno
import math
import multiprocessing.process
import os
import signal
import subprocess
import sys
from functools import partial

import pytest

from coreinfer_sim.base.errors import BuildError
from coreinfer_sim.base.processes import interrupts_held, run_shards


@pytest.mark.parametrize(
    ("make_run", "message"),
    [
        (partial(os._exit, 3), r"a worker process ended with exit code 3; finished shards are kept"),
        (partial(math.sqrt, -1), r"a worker process failed \(ValueError: .*\); finished shards are kept"),
    ],
    ids=["dies", "raises"],
)
def test_a_process_that_fails_is_reported(make_run, message):
    done: list[int] = []
    with pytest.raises(BuildError, match=message):
        run_shards([0, 1, 2], lambda number, report: report(number), 2, make_run, done.append)
    assert done == [0, 1, 2]  # this process has done the others' share as well


def test_a_process_that_cannot_start_is_reported(monkeypatch):
    def start(self):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)
    with pytest.raises(OSError, match="Resource temporarily unavailable"):
        run_shards([0, 1, 2], lambda number, report: report(number), 3, partial(math.sqrt, 1), lambda _: None)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no signal masks here")
def test_a_process_that_is_only_starting_leaves_ctrl_c_to_its_parent():
    asks = [sys.executable, "-c", "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"]
    with interrupts_held():
        assert subprocess.run(asks, capture_output=True, text=True, check=True).stdout.strip() == "True"
    assert subprocess.run(asks, capture_output=True, text=True, check=True).stdout.strip() == "False"
