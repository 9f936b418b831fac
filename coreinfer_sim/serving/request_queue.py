"""The workers that answer requests, and the queue before them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from coreinfer_sim.base.errors import GenerationCancelledError
from coreinfer_sim.serving.backends import Backend, Completion, TextRequest
from coreinfer_sim.serving.errors import QueueFullError, RequestTimeoutError, ShutdownError
from coreinfer_sim.serving.metrics import Metrics
from coreinfer_sim.serving.topic_log import TopicLog

_log = logging.getLogger(__name__)
GRACE = 8.0
"""Seconds that open requests have left when the server is stopped; less than uvicorn waits for connections."""


@dataclass(eq=False)
class _Task:
    """A request, and the event loop that waits for its text."""

    request: TextRequest
    loop: asyncio.AbstractEventLoop
    deadline: float
    events: asyncio.Queue[str | Completion | Exception] = field(default_factory=asyncio.Queue)
    left: threading.Event = field(default_factory=threading.Event)
    """Set when nobody waits for the text any more."""

    def cancelled(self) -> bool:
        """Say whether nobody waits for the text any more, or its time is up."""
        return self.left.is_set() or time.monotonic() > self.deadline

    def put(self, event: str | Completion | Exception) -> None:
        """Hand an event from the worker to the loop; a loop that has been closed waits no more."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class RequestQueue:
    """Answers requests as they come, so many at a time as share decode steps."""

    def __init__(
        self,
        backend: Backend,
        *,
        parallel: int = 1,
        queue_limit: int = 64,
        timeout: float = 300.0,
        topics: TopicLog | None = None,
    ) -> None:
        """Start the workers.

        Args:
            backend: generates the texts.
            parallel: requests that are answered at a time, if the backend lets them share decode steps; otherwise one.
            queue_limit: requests that may wait or be answered at a time.
            timeout: seconds that a request may take, waiting included.
            topics: counts what is asked; None: nothing does.
        """
        self._topics = topics
        self.backend, self._limit, self._timeout = backend, queue_limit, timeout
        self._open: set[_Task] = set()
        self.metrics = Metrics(lambda: self.n_open)
        self._tasks: queue.Queue[_Task | None] = queue.Queue()
        self._closing = False
        self._workers = [
            threading.Thread(target=self._work, name=f"coreinfer-sim-worker-{number}", daemon=True)
            for number in range(parallel if backend.takes_turns else 1)
        ]
        for worker in self._workers:
            worker.start()

    async def generate(self, request: TextRequest) -> AsyncIterator[str | Completion]:
        """Yield the text as it comes, then what it cost.

        Raises:
            QueueFullError: too many wait.
            ShutdownError: the server is shutting down.
            RequestTimeoutError: the time is up.
            CoreInferSimError: what the backend raises.
        """
        if self._closing or self.n_open >= self._limit:
            self.metrics.requests.labels("refused").inc()
            raise ShutdownError() if self._closing else QueueFullError()
        task = _Task(request, asyncio.get_running_loop(), time.monotonic() + self._timeout)
        self._open.add(task)
        outcome = "hung up"
        self._tasks.put(task)
        try:
            while True:
                try:
                    event = await asyncio.wait_for(task.events.get(), max(0.0, task.deadline - time.monotonic()))
                except asyncio.TimeoutError:
                    outcome = "timed out"
                    raise RequestTimeoutError() from None
                if isinstance(event, Exception):
                    outcome = "failed"
                    raise event
                if isinstance(event, Completion):
                    outcome = "answered"
                yield event
                if isinstance(event, Completion):
                    return
        finally:
            task.left.set()
            self._open.remove(task)
            self.metrics.requests.labels(outcome).inc()

    @property
    def n_open(self) -> int:
        """Requests that wait or are being answered."""
        return len(self._open)

    def stop(self, grace: float = GRACE) -> None:
        """Answer no further requests, and end those that are still open after ``grace`` seconds."""
        self._closing = True

        def end_all() -> None:
            for task in list(self._open):
                task.put(ShutdownError())

        timer = threading.Timer(grace, end_all)
        timer.daemon = True
        timer.start()

    def close(self, grace: float = 10.0) -> None:
        """Answer no further requests; those being answered have ``grace`` seconds left."""
        self._closing, end = True, time.monotonic() + grace
        for _ in self._workers:
            self._tasks.put(None)
        for worker in self._workers:
            worker.join(max(0.0, end - time.monotonic()))
        if self._topics is not None:
            self._topics.write()
        if not any(worker.is_alive() for worker in self._workers):
            self.backend.close()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            if task.cancelled():
                continue
            if self._closing:
                task.put(ShutdownError())
                continue
            begin = time.perf_counter()
            try:
                completion = self.backend.complete(task.request, task.put, task.cancelled)
            except GenerationCancelledError:
                continue
            except Exception as error:  # the server goes on; the client gets the error
                task.put(error)
                continue
            self.metrics.count(completion, time.perf_counter() - begin)
            task.put(completion)
            if self._topics is not None:
                try:
                    self._topics.count(task.request, completion)
                except Exception as error:  # the answer has gone out
                    _log.error("counting topics failed", exc_info=error)
            try:
                self.backend.read_ahead(lambda: self._closing or not self._tasks.empty())
            except Exception as error:  # no request fails by it
                _log.error("reading ahead failed", exc_info=error)
