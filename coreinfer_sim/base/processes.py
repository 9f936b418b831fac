"""Who runs the shards: this process, helped by further ones that load the same model."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import faiss
import psutil
import torch

from coreinfer_sim.base.errors import BuildError

LIBRARY_BYTES = 900 << 20
"""What Python, torch, the encoder and a batch take of a process, roughly."""
Report = Callable[[int], None]
"""Takes how much more has been done."""
RunShard = Callable[[int, Report], None]
"""Runs one shard by number, leaves its result on disk, and reports what it does."""


def n_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads(device: str) -> int:
    """Return the threads of one process: a quarter of the cores.

    On few cores, processes of one thread each finish more tokens than one process of many threads. The number must
    not depend on how many processes there are, as the last bits of a product depend on it.
    """
    return max(1, n_cores() // 4) if device == "cpu" else n_cores()


def default_workers(device: str, n_threads: int, worker_bytes: int, own_bytes: int = 0) -> int:
    """Return how many processes fill the cores and fit into memory, this one, which will take ``own_bytes`` more, among them."""
    if device != "cpu":
        return 1
    by_memory = (psutil.virtual_memory().available - own_bytes) // worker_bytes + 1
    return int(max(1, min(n_cores() // n_threads, by_memory)))


def run_shards(
    shards: Sequence[int],
    run: RunShard,
    n_workers: int,
    make_run: Callable[[], RunShard],
    report: Report,
) -> None:
    """Run shards here and in ``n_workers - 1`` further processes; every process takes the next open shard.

    Args:
        shards: numbers of the shards to run.
        run: runs one shard in this process.
        n_workers: processes in all.
        make_run: makes such a function in another process; it must pickle.
        report: receives what all processes report.

    Raises:
        BuildError: a process failed; finished shards stay on disk.
    """
    context = multiprocessing.get_context("spawn")
    taken = context.Value("q", 0)
    results = context.Queue()
    helpers = [
        context.Process(target=_help, args=(make_run, list(shards), taken, results), daemon=True)
        for _ in range(min(n_workers, len(shards)) - 1)
    ]
    try:
        with interrupts_held():
            for helper in helpers:
                helper.start()
        while (shard := _take(taken, shards)) is not None:
            run(shard, report)
            _drain(results, report)
        while any(helper.is_alive() for helper in helpers):
            _drain(results, report, wait=0.2)
        _drain(results, report, wait=0.2)
        failed = [helper.exitcode for helper in helpers if helper.exitcode]
        if failed:
            raise BuildError(f"a worker process ended with exit code {failed[0]}; {_AGAIN}")
    finally:
        for helper in helpers:
            if helper.pid is not None:  # it was started
                helper.terminate()
                helper.join()


_AGAIN = "finished shards are kept – run the same command again, with fewer workers if memory was short."


def _take(taken: Any, shards: Sequence[int]) -> int | None:
    with taken.get_lock():
        place: int = taken.value
        if place >= len(shards):
            return None
        taken.value = place + 1
        return shards[place]


def _drain(results: Any, report: Report, wait: float = 0.0) -> None:
    while True:
        try:
            result = results.get(timeout=wait) if wait else results.get_nowait()
        except queue.Empty:
            return
        if isinstance(result, str):
            raise BuildError(f"a worker process failed ({result}); {_AGAIN}")
        report(result)


def _help(make_run: Callable[[], RunShard], shards: list[int], taken: Any, results: Any) -> None:
    """Run shards in a further process until none is left, or until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        run = make_run()
        while (shard := _take(taken, shards)) is not None:
            run(shard, results.put)
    except Exception as error:  # anything at all is the parent's to report
        results.put(" ".join(f"{type(error).__name__}: {error}".split())[:300])


def _end_with_parent() -> None:
    """End this process when its parent is gone: a shard may take an hour and gigabytes that the next build wants."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back within the block, and for good in processes that start in it: the parent decides what it means.

    A process that only ignored it once it runs could still be interrupted while it imports, with a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """Run the block with ``n`` threads, whatever the caller had set: the last bits of a product depend on it."""
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(n)
    faiss.omp_set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        faiss.omp_set_num_threads(before[1])
