"""Builds that several workers share, here and as tasks of Ray, whatever befalls them."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil
import pytest
from builds import AS_OPTIONS, LANGUAGE_MODEL_STAGE, StopAt, command, contents

from coreinfer_sim.base.errors import BuildError, ConfigError
from coreinfer_sim.base.processes import this_worker
from coreinfer_sim.base.progress import Part, Progress
from coreinfer_sim.base.scale_settings import Executor, ScaleConfig
from coreinfer_sim.building.shards import PartialSums
from coreinfer_sim.models.loading import load_model

RAY = ScaleConfig(executor=Executor.RAY)


class Told(Progress):
    """Remembers which worker did which part of the pass over the language model, and what failed."""

    def __init__(self, begun: Any = None) -> None:
        self.parts: list[Part] = []
        self.failures: list[str] = []
        self._stage, self._begun = "", begun

    def start(self, stage: str, total: int | None, unit: str, done: int = 0) -> None:
        self._stage = stage

    def share(self, n_workers: int) -> None:
        if self._stage == LANGUAGE_MODEL_STAGE and self._begun is not None:
            self._begun()

    def part(self, part: Part) -> None:
        if self._stage == LANGUAGE_MODEL_STAGE:
            self.parts.append(part)

    def failed(self, text: str) -> None:
        self.failures.append(text)


def workers(of: int) -> list[psutil.Process]:
    """Return the worker processes of a build."""
    found = []
    with suppress(psutil.Error):
        for each in psutil.Process(of).children(recursive=True):
            with suppress(psutil.Error):
                words = " ".join(each.cmdline())
                if "spawn_main" in words or words.startswith("ray::_run"):
                    found.append(each)
    return found


@contextmanager
def killing_the_first_worker() -> Iterator[Any]:
    """Give what begins to look for a worker of this process, which is killed as soon as it is there."""
    before = {each.pid for each in workers(os.getpid())}
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.005):
            new = [each for each in workers(os.getpid()) if each.pid not in before]
            if new:
                new[0].kill()
                return

    thread = threading.Thread(target=look)
    try:
        yield thread.start
    finally:
        over.set()
        if thread.ident is not None:
            thread.join()


def test_a_worker_that_is_killed_costs_no_shard(build, built, tmp_path):
    with killing_the_first_worker() as begun:
        told = Told(begun)
        build(tmp_path / "index", workers=2, progress=told)
    assert told.failures == [
        "a worker process was killed, as systems do where memory is short; the others do its share."
    ]
    assert sorted(part.number for part in told.parts) == list(range(8))
    assert contents(tmp_path / "index") == contents(built)


@pytest.mark.slow  # Ray takes longer to start on two cores than the build
def test_ray_gives_the_same_files(build, built, tmp_path):
    told = Told()
    build(tmp_path / "index", workers=2, scale=RAY, progress=told)
    assert (
        sorted(part.number for part in told.parts) == list(range(8)) and sum(part.n_rows for part in told.parts) == 60
    )
    assert not {part.worker for part in told.parts} & {this_worker()} and told.failures == []
    assert contents(tmp_path / "index") == contents(built)


def test_what_cannot_share_is_refused_before_anything_is_loaded(build, tiny_checkpoint, tmp_path):
    devices = ScaleConfig(devices=("cpu", "cpu"))
    with pytest.raises(ConfigError, match="workers is 3, but 2 devices are named, one for each; expected 2"):
        build(tmp_path / "index", model="nowhere", workers=3, scale=devices)
    with pytest.raises(ConfigError, match="device is 'cpu', but 2 devices are named for workers; leave device out"):
        build(tmp_path / "index", model="nowhere", device="cpu", workers=2, scale=devices)
    with pytest.raises(ConfigError, match="a loaded model cannot be shared among processes"):
        build(tmp_path / "index", model=load_model(tiny_checkpoint), scale=RAY)
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_that_does_not_answer_is_named_at_once(build, tmp_path):
    with socket.socket() as taken:  # a port at which nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            BuildError, match=rf"no Ray cluster answers at {address} \(.*\), expected one; start it with"
        ):
            build(tmp_path / "index", model="nowhere", scale=ScaleConfig(executor=Executor.RAY, ray_address=address))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["somewhere", "somewhere:", ":6379", "somewhere:port", "somewhere:99999"])
def test_what_is_no_address_of_a_cluster_is_refused_at_once(build, tmp_path, address):
    with pytest.raises(ConfigError, match=f"the Ray address is '{address}', expected HOST:PORT"):
        build(tmp_path / "index", model="nowhere", scale=ScaleConfig(executor=Executor.RAY, ray_address=address))


def test_what_answers_at_a_port_may_be_something_else(build, tmp_path, monkeypatch):
    monkeypatch.setattr("coreinfer_sim.base.ray_tasks._ANSWERS_WITHIN", 1.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        with pytest.raises(BuildError, match=rf"no Ray cluster answers at {address} \(.*something else"):
            build(tmp_path / "index", model="nowhere", scale=ScaleConfig(executor=Executor.RAY, ray_address=address))
        server.shutdown()


def test_without_ray_the_extra_is_named(build, tmp_path, monkeypatch):
    monkeypatch.setattr("coreinfer_sim.base.extra.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"the executor ray needs ray, grpc, not found here; install the extra scale"):
        build(tmp_path / "index", scale=RAY)


def test_a_damaged_shard_is_named(build, built, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "index", progress=StopAt(LANGUAGE_MODEL_STAGE, end=True))
    path = tmp_path / "index.build" / "shards" / "000003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        BuildError, match=r"000003\.safetensors is damaged .*; delete it and run the same command again"
    ):
        build(tmp_path / "index")
    path.unlink()
    build(tmp_path / "index")
    assert contents(tmp_path / "index") == contents(built)


def test_sums_are_read_as_they_were_written(tmp_path):
    import numpy as np

    sums = PartialSums.zeros(np.array([1, 4]), 2, 3)
    sums.counts[1] = 7
    sums.save(tmp_path / "a")
    assert (PartialSums.load(tmp_path / "a").counts == sums.counts).all()


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_builds_that_are_killed_at_random_moments(executor, corpus, tiny_checkpoint, tmp_path):
    """The build or one of its workers, until it is done; `figures/run.py scale-kill` does it with a real model."""
    reference = tmp_path / "reference" / "index"
    assert command(corpus, tiny_checkpoint, reference).exit_code == 0
    out = tmp_path / "killed" / "index"
    arguments = ["build-index", corpus, "--model", tiny_checkpoint, "--out", str(out), *AS_OPTIONS, "--workers", "2"]
    arguments += ["--set", "build.shard_size=8", "--set", f"scale.executor={executor}"]
    choose, seen = random.Random(1), {}

    def watch(build: subprocess.Popen, seconds: float) -> None:
        """Note which file each finished shard is, until the build or the time is over."""
        deadline = time.monotonic() + seconds
        while build.poll() is None and time.monotonic() < deadline:
            for path in out.with_name("index.build").glob("shards/[0-9]*"):
                with suppress(OSError):
                    seen.setdefault(path.name, set()).add(path.stat().st_ino)
            time.sleep(0.02)

    for _ in range(6):
        running = subprocess.Popen(
            [sys.executable, "-c", "from coreinfer_sim_cli.main import main; main()", *arguments]
        )
        watch(running, choose.uniform(3, 25))
        if others := workers(running.pid):
            choose.choice(others).send_signal(signal.SIGKILL)
            watch(running, choose.uniform(0, 5))
        running.kill()
        if running.wait() == 0:
            break
    else:
        run = subprocess.Popen([sys.executable, "-c", "from coreinfer_sim_cli.main import main; main()", *arguments])
        watch(run, 600)
        assert run.wait() == 0
    assert contents(out) == contents(reference)
    assert len(seen) == 8 and all(len(files) == 1 for files in seen.values())  # none was written twice
    assert [path.name for path in out.parent.iterdir()] == ["index"]
