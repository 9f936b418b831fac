"""Calls of one model at the same time, each in a thread of its own: they take turns, and decode their tokens together.

One call at a time has the model. It keeps it while it reads its prompt, and between its decode steps while it chooses its token;
at each step it lets go. Once all calls wait for a step, one of them does it for all. A new call comes in between two steps.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from coreinfer_sim.engines.steps import SharesSteps, Step

_MOMENT = 0.05  # seconds after which a call that waits looks whether anybody still wants it


class _Waiting:
    """A call that waits for the model, or for its step."""

    def __init__(self, engine: SharesSteps | None = None, step: Step | None = None) -> None:
        self.engine, self.step = engine, step
        self.go = threading.Event()
        self.output: Any = None
        self.error: BaseException | None = None
        self.is_done = False


class Turns:
    """Who has a model."""

    def __init__(self) -> None:
        """Let nobody have it yet."""
        self._lock = threading.Lock()
        self._taken = False
        self._n_calls = 0
        self._coming: deque[_Waiting] = deque()
        self._asking: list[_Waiting] = []
        """Calls that wait for a step."""
        self._done: deque[_Waiting] = deque()
        """Calls whose step is done, and which wait for the model."""
        self._came = False
        """Whether a call has come in since the latest step."""

    @property
    def is_wanted(self) -> bool:
        """Whether a call waits to begin."""
        return bool(self._coming)

    @contextmanager
    def call(self, check: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Have the model within the block, but for steps.

        Args:
            check: raises if nobody wants the call any more; asked while it waits to begin.
        """
        waiting = _Waiting()
        with self._lock:
            self._coming.append(waiting)
            self._pass_on()
        try:
            while not waiting.go.wait(_MOMENT):
                check()
        except BaseException:
            with self._lock:
                if waiting in self._coming:
                    self._coming.remove(waiting)
                else:
                    self._leave()
            raise
        try:
            yield
        finally:
            with self._lock:
                self._leave()

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Have the model within the block if no call is there; yield whether that is so."""
        with self._lock:
            free = not self._taken and not self._n_calls
            if free:
                self._taken, self._n_calls = True, 1
        try:
            yield free
        finally:
            if free:
                with self._lock:
                    self._leave()

    def step(self, engine: SharesSteps, step: Step) -> Any:
        """Return what a step of the call that has the model gives; meanwhile others have it."""
        own = _Waiting(engine, step)
        with self._lock:
            self._asking.append(own)
            self._taken = False
            self._pass_on()
        try:
            own.go.wait()
        except BaseException as error:  # such as Ctrl-C; the call ends when it has the model again
            own.go.wait()
            own.error = error
        if not own.is_done:  # it has fallen to this call to do the step for all
            self._step_all()
        if own.error is not None:
            raise own.error
        return own.output

    def _step_all(self) -> None:
        together, self._asking, self._came = self._asking, [], False
        for engine in {id(each.engine): each.engine for each in together}.values():
            assert engine is not None
            own = [each for each in together if each.engine is engine]
            try:
                outputs: Sequence[Any] = engine.steps([each.step for each in own if each.step is not None])
                for each, output in zip(own, outputs, strict=True):
                    each.output = output
            except BaseException as error:
                for each in own:
                    each.error = error
        for each in together:
            each.is_done = True
        with self._lock:
            self._done.extend(each for each in together if not each.go.is_set())

    def _leave(self) -> None:
        self._taken = False
        self._n_calls -= 1
        self._pass_on()

    def _pass_on(self) -> None:
        """Give the model to who comes next: calls with a token to choose, one new call, and then the next step."""
        if self._taken:
            return
        if self._done:
            following = self._done.popleft()
        elif self._coming and not (self._asking and self._came):
            following, self._came = self._coming.popleft(), True
            self._n_calls += 1
        elif self._asking:
            following = self._asking[0]
        else:
            return
        self._taken = True
        following.go.set()
