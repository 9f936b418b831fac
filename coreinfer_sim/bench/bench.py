"""One benchmark: contenders take turns round by round, and medians with spread are what is reported."""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coreinfer_sim.base.errors import BenchmarkError, ConfigError, GenerationError
from coreinfer_sim.base.processes import n_cores
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.bench.files import ProgramFile, write_files
from coreinfer_sim.bench.machine import ReadBandwidth, header
from coreinfer_sim.bench.native import quantiser_beside
from coreinfer_sim.bench.programs import BenchJob, Prompt, Subject, Timing
from coreinfer_sim.bench.prompts import make_prompts
from coreinfer_sim.bench.specs import DENSE, Spec
from coreinfer_sim.bench.worker import Worker, in_process

_FRESH_WARM_UP = 8
"""New tokens that a worker started for one round warms up on."""
SECONDS = ("lookup", "swap", "prefill", "first_token")


@dataclass(frozen=True)
class BenchSettings:
    """What is measured, and how often."""

    n_prompt: int = 128
    """Tokens of each prompt."""
    n_new: int = 128
    """New tokens of each run."""
    rounds: int = 5
    """Measured turns of each contender, after one to warm up."""
    n_threads: int | None = None
    """Of each contender; None: one for each core."""
    device: str = "auto"
    fresh: bool = False
    """Start every contender anew in each round, so that only one is in memory at a time."""
    seed: int = 0
    llama_bench: Path | None = None
    """llama.cpp's own program, built for this processor, which runs the contenders llamacpp; None: the ready-made package."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, value, least in (
            ("n_prompt", self.n_prompt, 1),
            ("n_new", self.n_new, 2),
            ("rounds", self.rounds, 1),
        ):
            if value < least:
                raise ConfigError(f"{name} is {value}, expected {least} or more.")


@dataclass
class _Entry:
    """A contender of a run, and what came of it."""

    job: BenchJob
    worker: Worker | None = None
    facts: dict[str, Any] | None = None
    start_seconds: float | None = None
    runs: list[Timing] = field(default_factory=list)
    peak_bytes: int = 0
    error: str | None = None


def default_specs(subject: Subject, native: bool = False) -> list[str]:
    """Return sensible contenders: dense, ours and, if it is installed or ``native``, llama.cpp in the same type."""
    ours = "sparse:0.4" if subject.index is not None else "random:0.4"
    return ["dense", ours, *(["llamacpp:bf16"] if native or importlib.util.find_spec("xllamacpp") else [])]


def bench(
    subject: Subject,
    specs: Sequence[Spec],
    settings: BenchSettings | None = None,
    *,
    text: str | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure contenders that take turns.

    Args:
        subject: the model, or a shape.
        specs: the contenders; see `parse_spec`.
        settings: lengths, rounds, threads.
        text: what prompts are cut from.
        folder: for GGUF files and checkpoints of the model, kept there; None: a temporary one.
        progress: receives messages and progress.

    Returns:
        Plain JSON types: machine, versions, bandwidth, and for each contender medians, spread and all runs, or ``error``.

    Raises:
        BenchmarkError: no contender could be measured.
        ConfigError: a contender needs an index and none was given.
        PromptError: the prompt and the new tokens do not fit.
    """
    # 1) What all contenders share: prompts, and the bandwidth that bounds them.
    settings, progress = settings or BenchSettings(), progress or Progress()
    _check(subject, specs)
    n_threads = settings.n_threads or n_cores()
    prompts = make_prompts(subject, text, settings.n_prompt, settings.n_new, settings.rounds + 1, settings.seed)
    device = _device(settings.device)
    bandwidth = ReadBandwidth(n_threads=n_threads, device=device)
    # 2) Files of the same weights for those that read files.
    with tempfile.TemporaryDirectory(prefix="coreinfer-sim-") as scratch:
        written: dict[str, ProgramFile] = {}
        if any(spec.kind != DENSE for spec in specs):
            progress.say("Writing the files that contenders need")
            place = folder or Path(scratch)
            place.mkdir(parents=True, exist_ok=True)
            quantiser = quantiser_beside(settings.llama_bench)
            written = in_process(write_files, subject, list(specs), place, quantiser, n_threads=n_threads)
        # 3) The rounds.
        entries = [_entry(spec, subject, settings, n_threads, written, Path(scratch)) for spec in specs]
        try:
            _take_turns(entries, prompts, settings, bandwidth, progress)
        finally:
            for entry in entries:
                _stop(entry)
    # 4) Medians and spread.
    rows = [_summary(entry, bandwidth.highest) for entry in entries]
    if all("error" in row for row in rows):
        reasons = "; ".join(f"{row['contender']}: {row['error']}" for row in rows)
        raise BenchmarkError(f"no contender could be measured ({reasons})")
    return {
        **header("xllamacpp", "accelerate"),
        "model": subject.title,
        "index": subject.index,
        "prompt_tokens": settings.n_prompt,
        "new_tokens": settings.n_new,
        "rounds": settings.rounds,
        "threads": n_threads,
        "device": device,
        "fresh": settings.fresh,
        "bandwidth_gb_per_s": bandwidth.as_dict(),
        "contenders": rows,
    }


def _check(subject: Subject, specs: Sequence[Spec]) -> None:
    """Raise ConfigError for contenders that cannot be had for this subject."""
    if (subject.model is None) == (subject.shape is None):
        raise ConfigError("give a model or a shape, one of them.")
    if not specs:
        raise ConfigError("no contender was given, expected one or more.")
    for spec in specs:
        if spec.needs_index and subject.index is None:
            instead = "random" if subject.shape is not None else "random, stability, or give an index"
            raise ConfigError(f"the contender {spec.text!r} needs an index, and none was given; use {instead}.")


def _device(device: str) -> str:
    import torch

    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _entry(
    spec: Spec,
    subject: Subject,
    settings: BenchSettings,
    n_threads: int,
    written: dict[str, ProgramFile],
    scratch: Path,
) -> _Entry:
    file = written.get(spec.text, ProgramFile())
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=scratch))
    job = BenchJob(
        spec,
        subject,
        n_threads,
        settings.device,
        context=settings.n_prompt + settings.n_new + 8,
        seed=settings.seed,
        file=file.path,
        folder=folder,
        bytes_per_token=file.bytes_per_token,
        llama_bench=settings.llama_bench,
    )
    return _Entry(job, error=file.error)


def _take_turns(
    entries: list[_Entry], prompts: list[Prompt], settings: BenchSettings, bandwidth: ReadBandwidth, progress: Progress
) -> None:
    """Let every contender run in every round, each round beginning with another; the first round warms up."""
    if not settings.fresh:
        for entry in entries:
            if entry.error is None:
                progress.say(f"Loading {entry.job.spec.text}")
                _start(entry)
    progress.start("Measuring", (settings.rounds + 1) * len(entries), "runs")
    try:
        for number in range(settings.rounds + 1):
            bandwidth.measure()
            first = number % len(entries)
            for entry in entries[first:] + entries[:first]:
                _turn(entry, prompts, number, settings)
                progress.advance(1)
    finally:
        progress.finish()


def _turn(entry: _Entry, prompts: list[Prompt], number: int, settings: BenchSettings) -> None:
    """Run one contender once; what goes wrong is its own."""
    if entry.error is not None or (settings.fresh and number == 0):
        return
    try:
        if settings.fresh:
            _start(entry)
            if entry.worker is not None:
                entry.worker.run(prompts[0], min(settings.n_new, _FRESH_WARM_UP))
        if entry.worker is None:
            return
        timing, entry.peak_bytes = entry.worker.run(prompts[number], settings.n_new)
        if number:
            entry.runs.append(timing)
    except GenerationError as error:
        entry.error = str(error)
    finally:
        if settings.fresh or entry.error is not None:
            _stop(entry)


def _start(entry: _Entry) -> None:
    try:
        entry.worker = Worker(entry.job)
    except GenerationError as error:
        entry.error = str(error)
    else:
        entry.facts, entry.start_seconds = entry.worker.facts, entry.worker.start_seconds


def _stop(entry: _Entry) -> None:
    if entry.worker is not None:
        entry.worker.stop()
        entry.worker = None


def _summary(entry: _Entry, bandwidth: float) -> dict[str, Any]:
    """Return a contender's row; ``bandwidth`` in GB/s."""
    name = {"contender": entry.job.spec.text}
    if entry.error is not None or not entry.runs:
        return {**name, "error": entry.error or "it was not measured."}
    runs = entry.runs
    speeds = [run.tokens_per_second for run in runs]
    median = statistics.median(speeds)
    n_bytes = round(statistics.median(run.bytes_per_token for run in runs))
    return {
        **name,
        **(entry.facts or {}),
        **{what: said for what, said in runs[-1].facts.items() if what == "crashed"},
        "tokens_per_second": round(median, 3),
        "tokens_per_second_lowest": round(min(speeds), 3),
        "tokens_per_second_highest": round(max(speeds), 3),
        **{
            f"{what}_seconds": round(statistics.median(getattr(run, f"{what}_seconds") for run in runs), 6)
            for what in SECONDS
        },
        "start_seconds": round(entry.start_seconds or 0.0, 2),
        "peak_bytes": entry.peak_bytes,
        "bytes_per_token": n_bytes,
        "share_of_bandwidth": round(n_bytes * median / (bandwidth * 1e9), 4),
        "runs": [run.as_dict() for run in runs],
    }
