"""Shards as tasks of a Ray cluster on this machine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from coreinfer_sim.base.errors import BuildError, ConfigError
from coreinfer_sim.base.processes import Finished, Watch, this_worker
from coreinfer_sim.base.ray_tasks import Needs, RayCluster

LITTLE = Needs(1, 0.0, 10 << 20)


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two CPUs, whose workers import this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        found = RayCluster(None, 2)
        yield found
        found.close()


def files_in(folder: Path, how: str = "sound") -> Callable[[int, Callable[[int], None]], None]:
    """Return what leaves a file for each shard, once, and breaks down at the second, when the first is done."""

    def run(number: int, report: Callable[[int], None]) -> None:
        begin = time.monotonic()
        while number == 1 and not (folder / "0").exists() and time.monotonic() < begin + 60:
            time.sleep(0.01)  # what is at work is cancelled when another task fails
        if number == 1 and how == "killed" and not (folder / "killed").exists():
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 1 and how == "refuses":
            raise ConfigError("this cannot be, expected something else.")
        if number == 1 and how == "fails":
            raise ValueError("a fault")
        if number == 1 and how == "full":
            raise OSError(28, "No space left on device")
        with (folder / str(number)).open("x"):
            pass

    return run


def run_in(cluster: RayCluster, folder: Path, how: str, needs: Needs = LITTLE) -> tuple[list[Finished], list[str]]:
    finished: list[Finished] = []
    failed: list[str] = []
    make_run = partial(files_in, folder, how)
    cluster.run(range(6), make_run, needs, 2, Watch(lambda _: None, finished.append, failed.append))
    return finished, failed


def test_every_shard_runs_once_in_another_process(cluster, tmp_path):
    finished, failed = run_in(cluster, tmp_path, "sound")
    assert sorted(each.number for each in finished) == list(range(6)) == sorted(int(p.name) for p in tmp_path.iterdir())
    assert this_worker() not in {each.worker for each in finished} and failed == []


def test_a_shard_whose_worker_is_killed_runs_again(cluster, tmp_path):
    finished, failed = run_in(cluster, tmp_path, "killed")
    assert sorted(each.number for each in finished) == list(range(6)) and (tmp_path / "1").exists()
    assert failed == ["a Ray worker was lost; Ray ran part 1 again."]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("refuses", ConfigError, "this cannot be, expected something else"),
        ("full", OSError, "No space left on device"),
        ("fails", BuildError, r"a Ray task failed \(ValueError: a fault\); finished shards are kept"),
    ],
)
def test_what_a_task_raises_is_raised_here(cluster, tmp_path, how, error, message):
    with pytest.raises(error, match=message):
        run_in(cluster, tmp_path, how)
    assert (tmp_path / "0").exists() and not (tmp_path / "1").exists()


def test_a_task_that_fits_nowhere_is_refused(cluster, tmp_path):
    for needs, said in ((Needs(64, 0.0, 1), "64 CPUs and 1 B"), (Needs(1, 1.0, 1), "1 CPU, 1 of a GPU and 1 B")):
        with pytest.raises(BuildError, match=f"no machine of the Ray cluster has {said} of memory, which a task takes"):
            run_in(cluster, tmp_path, "sound", needs)
