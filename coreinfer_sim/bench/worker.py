"""A process a program: its peak memory is its own, its threads rest while others work, and it may die alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from coreinfer_sim.base.errors import CoreInferSimError, GenerationError
from coreinfer_sim.base.memory import peak_bytes
from coreinfer_sim.bench.programs import BenchJob, Prompt, Timing
from coreinfer_sim.bench.registry import make_program

_STOP_SECONDS = 5.0


def one_sentence(error: BaseException) -> str:
    """Return what an error says, on one line; errors that are not ours with their type."""
    said = " ".join(str(error).split())[:400]
    return said if isinstance(error, CoreInferSimError) else f"{type(error).__name__}: {said}"


def in_process(function: Callable[..., Any], *arguments: Any, n_threads: int) -> Any:
    """Return what a function gives in a process of its own, which ends with it and frees its memory.

    Raises:
        GenerationError: it failed; the message is its own.
    """
    process = _Process(_run_function, function, arguments, n_threads, n_threads=n_threads)
    try:
        return process.receive()
    finally:
        process.end()


class Worker:
    """A program in a process of its own."""

    def __init__(self, job: BenchJob) -> None:
        """Start the process; it begins to load at once."""
        self._process = _Process(_run_program, job, n_threads=job.n_threads)
        begin = time.perf_counter()
        try:
            self.facts: dict[str, Any] = self._process.receive()
        except BaseException:
            self._process.end()
            raise
        self.start_seconds = time.perf_counter() - begin

    def run(self, prompt: Prompt, n_new: int) -> tuple[Timing, int]:
        """Return what a prompt cost, and the process's peak memory in bytes.

        Raises:
            GenerationError: the program failed; the message says why.
        """
        self._process.send((prompt, n_new))
        timing, peak = self._process.receive()
        return timing, peak

    def stop(self) -> None:
        """End the process."""
        self._process.end()


class _Process:
    """A spawned process and a pipe to it; answers are (worked, what)."""

    def __init__(self, target: Callable[..., None], *arguments: Any, n_threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_begin, args=(theirs, n_threads, target, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, what: Any) -> None:
        """Send something; a process that died is noticed by `receive`."""
        with contextlib.suppress(OSError):
            self._pipe.send(what)

    def receive(self) -> Any:
        """Wait for an answer."""
        try:
            worked, what = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(_STOP_SECONDS)
            code = self._process.exitcode
            hint = ", perhaps for want of memory" if code == -9 else ""
            raise GenerationError(f"its process died with exit code {code}{hint}.") from error
        if not worked:
            raise GenerationError(what)
        return what

    def end(self) -> None:
        """Ask the process to end, and see to it that it does."""
        self.send(None)
        self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()


def _begin(pipe: Any, n_threads: int, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Run in the new process: set threads, keep libraries quiet, then do the work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    os.environ["OMP_NUM_THREADS"] = str(n_threads)  # before torch is imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with contextlib.suppress(EOFError, OSError, BrokenPipeError):
        target(pipe, *arguments)


def _quiet(n_threads: int) -> None:
    """Set torch's threads, and keep the libraries from talking."""
    import logging

    import torch
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(n_threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def _run_function(pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...], n_threads: int) -> None:
    try:
        if "torch" in sys.modules:  # unpickling the function imported what it needs
            _quiet(n_threads)
        pipe.send((True, function(*arguments)))
    except Exception as error:
        pipe.send((False, one_sentence(error)))


def _run_program(pipe: Any, job: BenchJob) -> None:
    """Start the program, then run prompts until None comes."""
    try:
        program = make_program(job)
        if "torch" in sys.modules:
            _quiet(job.n_threads)
        pipe.send((True, program.start()))
    except Exception as error:
        pipe.send((False, one_sentence(error)))
        return
    while (request := pipe.recv()) is not None:
        prompt, n_new = request
        try:
            timing = program.run(prompt, n_new)
            pipe.send((True, (timing, getattr(program, "peak_bytes", peak_bytes)())))
        except Exception as error:
            pipe.send((False, one_sentence(error)))
    program.stop()
