"""Who runs the shards: this process, helped by further ones that load the same model."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from multiprocessing.reduction import ForkingPickler
from typing import Any

import faiss
import psutil
import torch

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


@dataclass(frozen=True)
class Finished:
    """A shard whose result is on disk."""

    number: int
    worker: str
    """Host and process that ran it."""
    seconds: float
    """That it took, without loading."""


@dataclass(frozen=True)
class Watch:
    """Who is told what happens to shards; always in the thread that runs them."""

    advance: Report
    """Takes what this process does of its own shards, bit by bit."""
    finished: Callable[[Finished], None]
    """Takes each shard that is finished; shards of other processes were not reported bit by bit."""
    failed: Callable[[str], None]
    """Takes a sentence on each worker that failed."""


def this_worker() -> str:
    """Return how this process is named among workers."""
    return f"{socket.gethostname()}:{os.getpid()}"


def run_shards(shards: Sequence[int], run: RunShard, helpers: Sequence[Callable[[], RunShard]], watch: Watch) -> None:
    """Run shards here and in further processes; every process takes the next open shard.

    A process that fails ends, and the shard that it had begun runs again in one of the others, at the latest in this one, whose
    own failure is raised.

    Args:
        shards: numbers of the shards to run.
        run: runs one shard in this process.
        helpers: makes such a function in each further process; picklable.
        watch: is told what happens.
    """
    context = multiprocessing.get_context("spawn")
    left, told = deque(shards), queue.SimpleQueue[Finished | str]()
    started = [_Helper(context, make_run, left, told) for make_run in helpers[: max(0, len(shards) - 1)]]
    try:
        with interrupts_held():
            for helper in started:
                helper.start()
        while True:
            at_work = any(
                helper.is_alive() for helper in started
            )  # before the look for shards, which one may give back
            _tell(told, watch)
            if (number := _next(left)) is not None:
                begin = time.monotonic()
                run(number, watch.advance)
                watch.finished(Finished(number, this_worker(), time.monotonic() - begin))
            elif at_work:
                _tell(told, watch, wait=0.2)
            else:
                break
    finally:
        for helper in started:
            helper.end()


AGAIN = "finished shards are kept – run the same command again, with fewer workers if memory was short."


def _next(left: deque[int]) -> int | None:
    try:
        return left.popleft()
    except IndexError:
        return None


def _tell(told: queue.SimpleQueue[Finished | str], watch: Watch, wait: float = 0.0) -> None:
    """Tell what helpers have said, after a wait for the first word of at most ``wait`` seconds."""
    while True:
        try:
            word = told.get(timeout=wait) if wait else told.get_nowait()
        except queue.Empty:
            return
        wait = 0.0
        if isinstance(word, str):
            watch.failed(word)
        else:
            watch.finished(word)


class _Helper(threading.Thread):
    """Gives a further process one shard after the other; nothing else is shared with it, so that its death holds nobody up."""

    def __init__(
        self,
        context: SpawnContext,
        make_run: Callable[[], RunShard],
        left: deque[int],
        told: queue.SimpleQueue[Finished | str],
    ) -> None:
        super().__init__(daemon=True)
        self._ours, self._theirs = context.Pipe()
        self._process = context.Process(target=_help, args=(self._theirs,), daemon=True)
        self._make_run = ForkingPickler.dumps(make_run)
        self._left, self._told = left, told

    def start(self) -> None:
        self._process.start()
        self._theirs.close()
        super().start()

    def run(self) -> None:
        number = None
        try:
            # Not as an argument of the process: `multiprocessing` writes those into a pipe of which this process holds the other
            # end, too, and would wait without end for a process that was killed before it has read what the pipe does not hold.
            self._ours.send_bytes(self._make_run)
            self._answer()  # it has loaded what it needs
            while (number := _next(self._left)) is not None:
                self._ours.send(number)
                self._told.put(self._answer())
            self._ours.send(None)
            return
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            how = "was killed, as systems do where memory is short" if code == -9 else f"ended with exit code {code}"
        except _HelperFailedError as error:
            how = f"failed ({error})"
        if number is not None:
            self._left.append(number)
        self._told.put(f"a worker process {how}; the others do its share.")

    def _answer(self) -> Any:
        answer = self._ours.recv()
        if isinstance(answer, str):
            raise _HelperFailedError(answer)
        return answer

    def end(self) -> None:
        """End the process, whatever it is doing."""
        if self._process.pid is not None:  # it was started
            self._process.terminate()
            self._process.join()


class _HelperFailedError(Exception):
    """What another process says of its failure."""


def _help(parent: Connection) -> None:
    """Run shards in a further process until none is left, or until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        make_run: Callable[[], RunShard] = parent.recv()
        run = make_run()
        parent.send(None)
        while (number := parent.recv()) is not None:
            parent.send(timed(run, number))
    except EOFError:  # the parent is gone
        return
    except Exception as error:  # anything at all is the parent's to report
        with suppress(OSError):
            parent.send(in_words(error))


def timed(run: RunShard, number: int) -> Finished:
    """Run a shard in a process that reports nothing until it is finished."""
    begin = time.monotonic()
    run(number, lambda _: None)
    return Finished(number, this_worker(), time.monotonic() - begin)


def in_words(error: BaseException) -> str:
    """Return an error's kind and text on one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


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
