"""Shards as tasks of a Ray cluster, which starts them, starts them again where a worker is lost, and shares out CPUs and GPUs."""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from coreinfer_sim.base.errors import BuildError, ConfigError, CoreInferSimError
from coreinfer_sim.base.extra import require
from coreinfer_sim.base.processes import AGAIN, Finished, RunShard, Watch, in_words, timed
from coreinfer_sim.base.progress import readable_size

_OBJECT_STORE = 100 << 20
"""Bytes for what tasks share by Ray on this machine: descriptions, as results go to the build folder."""
_RETRIES = 3
_ANSWERS_WITHIN = 10.0  # seconds
_BY_NAME = ("auto", "local")
_LAST_PORT = 65535
_LOADED: dict[str, RunShard] = {}
"""In a worker process: what the stage at work has loaded, by the stage's name."""


@dataclass(frozen=True)
class Needs:
    """What one task takes of a machine."""

    n_cpus: int
    n_gpus: float
    n_bytes: int
    """Memory beside what all workers of a machine share."""

    def describe(self) -> str:
        """Return it for people."""
        gpus = f", {self.n_gpus:g} of a GPU" if self.n_gpus else ""
        return f"{self.n_cpus} CPU{'s' * (self.n_cpus > 1)}{gpus} and {readable_size(self.n_bytes)} of memory"


def check_ray(address: str | None) -> str | None:
    """Return the address of a cluster that runs, by default the variable RAY_ADDRESS; None: a new one on this machine.

    Raises:
        ConfigError: Ray is not installed, or the address is none.
        BuildError: nothing answers at the address, or something else than Ray; Ray itself would look for it for minutes.
    """
    require("the executor ray", "scale", "ray", "grpc")
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address is None or address in _BY_NAME or "://" in address:
        return address
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) <= _LAST_PORT):
        raise ConfigError(f"the Ray address is {address!r}, expected HOST:PORT, such as 10.0.0.5:6379; name one.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWERS_WITHIN).close()
    except OSError as error:
        raise _no_cluster(address, error) from error
    if os.environ.get("RAY_USE_TLS", "0") == "0":
        _check_grpc(address)
    return address


def _check_grpc(address: str) -> None:
    """Raise BuildError unless what answers at an address speaks gRPC, as the head of a Ray cluster does."""
    import grpc

    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(_ANSWERS_WITHIN)
        except grpc.FutureTimeoutError as error:
            raise _no_cluster(address, OSError("what answers there is something else")) from error


def _no_cluster(place: str, error: Exception) -> BuildError:
    return BuildError(
        f"no Ray cluster answers at {place} ({in_words(error)}), expected one; start it with 'ray start' or name another address."
    )


class RayCluster:
    """A cluster that runs, or one on this machine for as long as this object is open."""

    def __init__(self, address: str | None, n_cpus: int) -> None:
        """Connect.

        Args:
            address: of a cluster that runs; None: the variable RAY_ADDRESS, else a new one on this machine.
            n_cpus: of a new one.

        Raises:
            CoreInferSimError: as `check_ray`.
        """
        address = check_ray(address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody was asked whether use may be reported
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "100")  # seconds in which a cluster starts on a busy machine
        import ray

        self._ray: Any = ray
        self._is_ours = not ray.is_initialized()
        new: dict[str, Any] = {"num_cpus": n_cpus, "object_store_memory": _OBJECT_STORE, "include_dashboard": False}
        if not self._is_ours:
            return
        try:
            ray.init(address or "local", logging_level=logging.ERROR, log_to_driver=False, **({} if address else new))
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise _no_cluster(address or "this machine", error) from error

    def close(self) -> None:
        """Disconnect; a cluster of our own ends."""
        if self._is_ours:
            self._ray.shutdown()

    def run(
        self, shards: Sequence[int], make_run: Callable[[], RunShard], needs: Needs, limit: int | None, watch: Watch
    ) -> None:
        """Run shards as tasks.

        Args:
            shards: numbers of the shards to run.
            make_run: makes what runs a shard in a worker process, once in each; picklable.
            needs: of one task.
            limit: tasks at a time; None: as many as the cluster has room for.
            watch: is told of what is finished.

        Raises:
            BuildError: no machine has room for a task, or Ray gave one up.
            CoreInferSimError: any kind that a task raised.
            OSError: a task could not read or write.
        """
        ray = self._ray
        if not self.room(needs):
            raise BuildError(
                f"no machine of the Ray cluster has {needs.describe()}, which a task takes; add such a machine, or use fewer "
                "threads."
            )
        task = ray.remote(
            num_cpus=needs.n_cpus,
            num_gpus=needs.n_gpus,
            memory=needs.n_bytes,
            max_retries=_RETRIES,
            max_calls=0,  # a process keeps the model for the next task, on GPUs too
        )(_run)
        stage, made = uuid.uuid4().hex, [ray.put(make_run)]  # in a list, so that Ray does not open it for every task
        left, at_work = list(reversed(shards)), set[Any]()
        try:
            while left or at_work:
                while left and (limit is None or len(at_work) < limit):
                    at_work.add(task.remote(stage, made, left.pop()))
                ready, _ = ray.wait(list(at_work), num_returns=1)
                for each in ready:
                    at_work.remove(each)
                    finished, attempt = ray.get(each)
                    for _ in range(attempt):
                        watch.failed(f"a Ray worker was lost; Ray ran part {finished.number} again.")
                    watch.finished(finished)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, CoreInferSimError | OSError | MemoryError):
                raise cause from None
            raise BuildError(f"a Ray task failed ({in_words(cause or error)}); {AGAIN}") from error
        except ray.exceptions.RayError as error:
            raise BuildError(f"Ray gave a task up after {_RETRIES} more tries ({in_words(error)}); {AGAIN}") from error
        finally:
            for each in at_work:
                ray.cancel(each, force=True)

    def room(self, needs: Needs) -> int:
        """Return how many tasks all machines of the cluster have room for, were nothing else at work there."""
        wanted = {"CPU": needs.n_cpus, "GPU": needs.n_gpus, "memory": needs.n_bytes}
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return sum(min(int(has.get(name, 0) / n) for name, n in wanted.items() if n) for has in machines)


def _run(stage: str, made: list[Any], number: int) -> tuple[Finished, int]:
    """Run a shard in a worker process, which loads what a stage needs before its first one; return also the tries before."""
    import ray

    if stage not in _LOADED:
        _LOADED.clear()
        _LOADED[stage] = ray.get(made[0])()
    worker = getattr(ray._private.worker.global_worker, "core_worker", None)
    attempt = getattr(worker, "get_current_task_attempt_number", lambda: 0)()  # which no public call tells
    return timed(_LOADED[stage], number), attempt
