"""Builds of many workers: killed and gone on with, by Ray beside local processes, and beside a plain forward pass."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import psutil

from figures.record import at_least, at_most, exactly, record
from figures.table import DEMO_MODEL, ROOT, Given, figure
from figures.tools import coreinfer, in_turns, medians, output_of, python, spread

FILE = "figures-scale.json"
_MOST_KILLS = 6
"""Of one build, which is then left to finish."""
_TO_WARM_UP = 40  # prompts
_executor = click.option("--executor", type=click.Choice(["local", "ray"]), default="local")
_corpus = click.option(
    "--corpus", type=click.Path(exists=True, path_type=Path), default=ROOT / "demo" / "corpus.jsonl", help="JSONL file."
)
_limit = click.option("--limit", type=click.IntRange(1), default=200, help="Prompts of it.")


def _command(given: Given, corpus: Path, limit: int, out: Path, executor: str, workers: int = 2) -> list[str]:
    """Return a build of two workers, of one thread each."""
    return coreinfer(
        *("build-index", corpus, "--model", given.model, "--out", out, "--limit", limit, "--clusters", 4),
        *("--template", "{prompt} {completion}", "--prompt-column", "prompt", "--workers", workers, "--threads", 1),
        *("--set", "build.shard_size=8", "--set", f"scale.executor={executor}"),
    )


@contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a build in a session of its own; what is left of it at the end is ended."""
    with tempfile.TemporaryFile() as said, subprocess.Popen(command, stdout=said, stderr=said) as process:
        try:
            yield process
        finally:
            process.kill()
            process.wait()
        if process.returncode not in (0, -signal.SIGKILL):
            said.seek(0)
            raise click.ClickException(said.read().decode(errors="replace")[-2000:])


def _workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the worker processes of a build."""
    found = []
    with suppress(psutil.Error):
        for each in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                words = " ".join(each.cmdline())
                # an agent of Ray is its machine's, which ends with it
                of_ray = words.startswith("ray::") and "Agent" not in words
                if of_ray or "spawn_main" in words:
                    found.append(each)
    return found


class _Files(threading.Thread):
    """Watches the results of shards, and notes each that is there as more than one file after the other."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._folder, self._stopped = folder, threading.Event()
        self.seen: dict[str, set[int]] = {}

    def run(self) -> None:
        while not self._stopped.wait(0.02):
            with suppress(OSError):
                for entry in os.scandir(self._folder):
                    if not entry.name.startswith("."):
                        self.seen.setdefault(entry.name, set()).add(entry.inode())

    def stop(self) -> list[str]:
        """Return the names of results that were written twice."""
        self._stopped.set()
        self.join()
        return [name for name, files in self.seen.items() if len(files) > 1]


def _built(command: list[str]) -> float:
    """Run a build to its end and return the seconds that it took."""
    begin = time.monotonic()
    with _running(command) as process:
        process.wait()
    return time.monotonic() - begin


def _contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


@figure(FILE, "the demo's model", "1 minute a build", model=DEMO_MODEL, rounds=20)
@_executor
@_corpus
@_limit
@click.option("--seed", type=int, default=0, help="Of the moments.")
def kill(given: Given, executor: str, corpus: Path, limit: int, seed: int) -> None:
    """Builds whose process, or one of whose workers, is killed at random moments, each restarted until it is done."""
    choose = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        reference = Path(name, "reference", "index")
        seconds = _built(_command(given, corpus, limit, reference, executor))
        same, n_twice = 0, 0
        killed = {"build": 0, "worker": 0}
        for number in range(given.rounds):
            out = Path(name, f"trial-{number}", "index")
            out.parent.mkdir()
            files = _Files(out.with_name("index.build") / "shards")
            files.start()
            n_kills = 0
            while not (out / "manifest.json").exists():
                with _running(_command(given, corpus, limit, out, executor)) as process:
                    victim = choose.choice(["build", "worker"]) if n_kills < _MOST_KILLS else None
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(choose.uniform(0, seconds) if victim else None)
                    if process.poll() is None:
                        workers = _workers(process) if victim == "worker" else []
                        if workers:
                            choose.choice(workers).kill()
                            killed["worker"] += 1
                            process.wait()
                        else:
                            killed["build"] += 1
                        n_kills += 1
            n_twice += len(files.stop())
            same += _contents(out) == _contents(reference)
            print(f"build {number}: {n_kills} kills, {len(files.seen)} shards seen", flush=True)
        title = f"builds by two workers, {executor}, killed at random moments and restarted: identical to an undisturbed one"
        record(title, same, f"of {given.rounds} builds", exactly(given.rounds), kills=killed, seed=seed)
        record(f"finished shards that ran twice in these, {executor}", n_twice, "shards", exactly(0))


@figure(FILE, "the demo's model", "20 minutes a round", timed=True, model=DEMO_MODEL, rounds=1)
@_corpus
@_limit
def ray(given: Given, corpus: Path, limit: int) -> None:
    """Builds by two Ray workers beside builds by two local ones, in turns, and one with a Ray worker killed on the way."""
    with tempfile.TemporaryDirectory() as name:

        def measure(executor: str, number: int) -> float:
            n_prompts = limit if number else min(limit, _TO_WARM_UP)
            return _built(_command(given, corpus, n_prompts, Path(name, f"{executor}-{number}", "index"), executor))

        for each in ("local", "ray"):
            for number in range(given.rounds + 1):
                Path(name, f"{each}-{number}").mkdir()
        seconds = in_turns(("local", "ray"), given.rounds, measure)
        same = _contents(Path(name, "local-1", "index")) == _contents(Path(name, "ray-1", "index"))
        record("two Ray workers beside two local ones: identical files", same, "", exactly(True))
        middle = medians(seconds)
        record(
            "wall time of a build by two Ray workers over that by two local ones",
            middle["ray"] / middle["local"],
            "×, of medians",
            at_most(1.15),
            seconds={each: spread(values, 1) for each, values in seconds.items()},
        )
        out = Path(name, "lost", "index")
        out.parent.mkdir()
        with _running(_command(given, corpus, limit, out, "ray")) as process:
            shards = out.with_name("index.build") / "shards"
            while process.poll() is None and len(list(shards.glob("[0-9]*"))) < 3:
                time.sleep(0.01)
            workers = _workers(process)
            workers[0].kill()
            process.wait()
        same = _contents(out) == _contents(Path(name, "local-1", "index"))
        record("a Ray worker killed in the middle of a shard: identical files", same, "", exactly(True))


_PLAIN = """
import json, time, torch, sys
from coreinfer_sim import load_model
folder, model, threads = sys.argv[1:]
from pathlib import Path
from coreinfer_sim.base.rows import load_rows
from coreinfer_sim.base.settings import BuildConfig
from coreinfer_sim.building.shards import batches, forward
from coreinfer_sim.building.stages import RecordShards
from coreinfer_sim.fitting.clustered_corpus import ClusteredCorpus
from coreinfer_sim.fitting.workers import read_clustering
torch.set_num_threads(int(threads))
folder = Path(folder)
corpus = ClusteredCorpus(load_model(model), load_rows(folder / "corpus.jsonl"), read_clustering(folder),
    BuildConfig(clusters=4, shard_size=8), 512, folder)
shards = RecordShards(corpus).shards
for batch in batches(corpus, shards[0]):
    forward(corpus.language_model, batch)
begin = time.perf_counter()
n = 0
for shard in shards:
    for batch in batches(corpus, shard):
        forward(corpus.language_model, batch)
        n += batch.n_tokens
print(n / (time.perf_counter() - begin))
"""


def _pass_rate(command: list[str], folder: Path, kept: Path) -> float:
    """Run a build, keep what its language-model pass read, and return that pass's tokens a second, its start included."""
    with _running(command) as process:
        while process.poll() is None:
            with suppress(OSError):
                os.link(folder / "log.jsonl", kept / "log.jsonl")
            for name in ("corpus.jsonl", "clustering.npz"):
                with suppress(OSError):
                    os.link(folder / name, kept / name)
            time.sleep(0.05)
    events: list[dict[str, Any]] = [json.loads(line) for line in (kept / "log.jsonl").read_text().splitlines()]
    begin = next(place for place, event in enumerate(events) if event.get("stage") == "Language model")
    end = next(place for place, event in enumerate(events) if event["event"] == "finish" and place > begin)
    return float(events[begin]["total"] / (events[end]["time"] - events[begin]["time"]))


@figure(FILE, "the demo's model", "10 minutes a round", timed=True, model=DEMO_MODEL, rounds=3)
@_corpus
@_limit
def passes(given: Given, corpus: Path, limit: int) -> None:
    """The language-model pass by two workers beside the best plain forward of one process over the same texts, in turns."""
    n_cores = psutil.cpu_count(logical=True) or 1
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for number in range(given.rounds):
            out, kept = Path(name, str(number), "index"), Path(name, f"kept-{number}")
            out.parent.mkdir()
            kept.mkdir()
            command = _command(given, corpus, limit, out, "local")
            rates.setdefault("two workers", []).append(_pass_rate(command, out.with_name("index.build"), kept))
            for threads in sorted({1, n_cores}):
                plain = output_of(python(ROOT, _PLAIN, kept, given.model, threads), TQDM_DISABLE="1")
                rates.setdefault(f"plain, {threads} threads", []).append(float(plain.split()[-1]))
    middle = medians(rates)
    best = max(rate for each, rate in middle.items() if each != "two workers")
    record(
        "language-model pass by two workers, their start included, over the best plain forward of one process",
        middle["two workers"] / best,
        "of its tokens/s, median",
        at_least(0.9),
        tokens_per_second={each: spread(values, 0) for each, values in rates.items()},
    )
