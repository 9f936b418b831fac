"""One worker that answers requests in turn, and what waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from coreinfer_sim.serving.backends import Answered, Asked, Backend

GRACE = 8.0
"""Seconds that answers under way have left when the server is told to stop; less than uvicorn waits for connections."""


class Busy(Exception):
    """The queue is full."""


class Stopping(Exception):
    """The server is shutting down."""


class TimedOut(Exception):
    """A request took too long, waiting included."""


class _BrokenOff(Exception):
    """Nobody waits for this answer any more."""


@dataclass(eq=False)
class _Task:
    asked: Asked
    loop: asyncio.AbstractEventLoop
    deadline: float
    events: asyncio.Queue[str | Answered | Exception] = field(default_factory=asyncio.Queue)
    broken_off: threading.Event = field(default_factory=threading.Event)

    def tell(self, event: str | Answered | Exception) -> None:
        """Hand an event from the worker to whoever waits; a loop that has been closed waits no more."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Metrics:
    """What Prometheus reads."""

    def __init__(self, engine: Engine) -> None:
        """Count for one engine, in a registry of its own."""
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"coreinfer_{name}", text, labels, registry=self.registry)

        self.requests = counter("requests", "Requests by how they ended.", "outcome")
        self.new_tokens = counter("new_tokens", "Tokens generated.")
        self.prompt_tokens = counter("prompt_tokens", "Tokens read as prompts.")
        self.clusters = counter("cluster_hits", "Answers by cluster.", "cluster")
        self.modes = counter("answers", "Answers by the mode that made them.", "mode")
        self.swaps = counter("swaps", "Answers whose neurons were not those of the answer before.")
        self.fallbacks = counter("fallbacks", "Prompts that were unfamiliar to their cluster.")
        self.seconds = Histogram(
            "coreinfer_answer_seconds", "Time of an answer, waiting left out.", registry=self.registry
        )
        speed = Gauge("coreinfer_tokens_per_second", "Decode speed of the latest answer.", registry=self.registry)
        self.speed = speed
        waiting = Gauge("coreinfer_queue", "Requests that wait or are being answered.", registry=self.registry)
        waiting.set_function(lambda: engine.n_open)


class Engine:
    """Answers requests one after the other: decode is bound by memory, and so is every other request meanwhile."""

    def __init__(self, backend: Backend, *, queue_limit: int = 64, timeout: float = 300.0) -> None:
        """Start the worker.

        Args:
            backend: answers.
            queue_limit: requests that may wait or be answered at a time.
            timeout: seconds that a request may take, waiting included.
        """
        self.backend, self._limit, self._timeout = backend, queue_limit, timeout
        self._open: set[_Task] = set()
        self.metrics = Metrics(self)
        self._tasks: queue.Queue[_Task | None] = queue.Queue()
        self._closing = False
        self._latest: tuple[object, object] | None = None
        self._worker = threading.Thread(target=self._work, name="coreinfer-sim-engine", daemon=True)
        self._worker.start()

    async def answer(self, asked: Asked) -> AsyncIterator[str | Answered]:
        """Yield the text as it comes, then what it cost.

        Raises:
            Busy: too many wait.
            Stopping: the server is shutting down.
            TimedOut: the time is up.
            CoreInferSimError: what the backend says.
        """
        if self._closing or self.n_open >= self._limit:
            self.metrics.requests.labels("refused").inc()
            raise Stopping if self._closing else Busy
        task = _Task(asked, asyncio.get_running_loop(), time.monotonic() + self._timeout)
        self._open.add(task)
        outcome = "hung up"
        self._tasks.put(task)
        try:
            while True:
                try:
                    event = await asyncio.wait_for(task.events.get(), max(0.0, task.deadline - time.monotonic()))
                except asyncio.TimeoutError:
                    outcome = "timed out"
                    raise TimedOut from None
                if isinstance(event, Exception):
                    outcome = "failed"
                    raise event
                if isinstance(event, Answered):
                    outcome = "answered"
                yield event
                if isinstance(event, Answered):
                    return
        finally:
            task.broken_off.set()
            self._open.remove(task)
            self.metrics.requests.labels(outcome).inc()

    @property
    def n_open(self) -> int:
        """Requests that wait or are being answered."""
        return len(self._open)

    def stop(self, grace: float = GRACE) -> None:
        """Answer no further requests, and tell those that are still open after ``grace`` seconds that it is over."""
        self._closing = True

        def tell_all() -> None:
            for task in list(self._open):
                task.tell(Stopping())

        timer = threading.Timer(grace, tell_all)
        timer.daemon = True
        timer.start()

    def close(self, grace: float = 10.0) -> None:
        """Answer no further requests; what is being answered may take ``grace`` seconds more."""
        self._closing = True
        self._tasks.put(None)
        self._worker.join(grace)
        if not self._worker.is_alive():
            self.backend.close()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            if task.broken_off.is_set():
                continue
            if self._closing:
                task.tell(Stopping())
                continue
            begin = time.perf_counter()

            def write(text: str, task: _Task = task) -> None:
                if task.broken_off.is_set() or time.monotonic() > task.deadline:
                    raise _BrokenOff
                task.tell(text)

            try:
                answered = self.backend.answer(task.asked, write)
            except _BrokenOff:
                continue
            except Exception as error:  # the server goes on; whoever asked is told
                task.tell(error)
                continue
            self._count(answered, time.perf_counter() - begin)
            task.tell(answered)

    def _count(self, answered: Answered, seconds: float) -> None:
        facts, metrics = answered.facts, self.metrics
        metrics.seconds.observe(seconds)
        metrics.new_tokens.inc(answered.n_new_tokens)
        metrics.prompt_tokens.inc(answered.n_prompt_tokens)
        metrics.modes.labels(facts["mode"]).inc()
        if facts.get("cluster") is not None:
            metrics.clusters.labels(str(facts["cluster"])).inc()
            if facts.get("confident") is False:
                metrics.fallbacks.inc()
        if facts.get("tokens_per_second"):
            metrics.speed.set(facts["tokens_per_second"])
        now = facts["mode"], facts.get("cluster")
        if self._latest is not None and now != self._latest:
            metrics.swaps.inc()
        self._latest = now
