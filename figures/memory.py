"""Decode under a memory limit that the system enforces, page cache included; control groups are Linux's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from figures.record import Bar, at_least, exactly, record
from figures.table import ROOT, Given, figure
from figures.tools import coreinfer, medians, options, python

FILE = "figures-speed.json"
GROUPS = Path("/sys/fs/cgroup")
PROMPT = "Write a function that returns the n-th Fibonacci number, and explain how it works."
_ROOM = 1_000_000_000
"""What disk offload is left of the limit for everything but weights."""
_SAVE_SHAPE = """
from coreinfer_sim.bench.shapes import parse_shape, random_model
made = random_model(parse_shape(sys.argv[1]), "bfloat16", "cpu")
made.model.save_pretrained(sys.argv[2], max_shard_size="2GB")
made.tokenizer.save_pretrained(sys.argv[2])
"""
_OFFLOAD = """
import json, sys, tempfile, time
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer
model, room, n, times = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), []
class Clock(BaseStreamer):
    def put(self, value):  # first the prompt
        times.append(time.perf_counter())
    def end(self):
        pass
tokenizer = AutoTokenizer.from_pretrained(model)
encoded = tokenizer(sys.argv[4], return_tensors="pt")
with tempfile.TemporaryDirectory() as folder:
    memory = {"max_memory": {"cpu": room}, "offload_folder": folder}
    lm = AutoModelForCausalLM.from_pretrained(model, dtype="auto", device_map="auto", **memory)
    begin = time.perf_counter()
    lm.generate(**encoded, max_new_tokens=n, min_new_tokens=n, do_sample=False, streamer=Clock())
print(json.dumps({"tokens_per_second": (n - 1) / (times[-1] - times[1]), "prefill_seconds": times[1] - begin}))
"""
"""Programs for processes of their own: one that saves random weights, and one that leaves on disk what has no room."""


@contextmanager
def control_group(limit: int | None) -> Iterator[Path | None]:
    """Yield a memory control group of version 1 or 2 with a limit, page cache included; None: no group."""
    if limit is None:
        yield None
        return
    first = (GROUPS / "memory" / "memory.limit_in_bytes").exists()
    group = (GROUPS / "memory" if first else GROUPS) / f"coreinfer-sim-{os.getpid()}-{time.monotonic_ns()}"
    if not first:
        (GROUPS / "cgroup.subtree_control").write_text("+memory")
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
        if not first:
            (group / "memory.swap.max").write_text("0")
        yield group
    finally:
        group.rmdir()


def peak_of(group: Path) -> int:
    """Return the most bytes that a group has held."""
    names = ("memory.max_usage_in_bytes", "memory.peak")
    return int(next(group / name for name in names if (group / name).exists()).read_text())


def forget(*places: Path) -> None:
    """Let the system forget what it has cached of files and folders."""
    for path in (file for place in places for file in ([place] if place.is_file() else place.rglob("*"))):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def run_in_group(command: list[str], limit: int | None, *files: Path) -> dict[str, Any]:
    """Run a command that prints JSON in a group of its own, and return that with the group's peak."""
    forget(*files)
    with control_group(limit) as group:

        def join() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, preexec_fn=join)
        peak = None if group is None else peak_of(group)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} ended with {done.returncode} at a peak of {peak} bytes.")
    return {**json.loads(done.stdout), "peak": peak}


@figure(
    FILE, "root on Linux; a checkpoint folder in safetensors format, or --shape and twice its size on disk", "1 hour",
    model=None, name=None, index=None, keep_ratio=0.4, new_tokens=64, rounds=3
)  # fmt: skip
@click.option("--shape", help="In place of a model, for speed and memory only: an architecture with random weights.")
@click.option("--limit", "limit_text", default="2600MB")
@click.option("--prefill", type=click.Choice(["dense", "sparse"]), default="dense")
@click.option("--offload-tokens", default=8, help="New tokens of disk offload, which is slow.")
@click.option("--least", default=15.0, help="The bar for decode over disk offload's.")
def limit(given: Given, shape: str | None, limit_text: str, prefill: str, offload_tokens: int, least: float) -> None:
    """Decode speed under the limit beside accelerate's disk offload, the peak, and whether the text is the unlimited run's.

    Contenders alternate: ours with a memory budget and transformers with disk offload, each in a control group with this
    limit, and ours without any. Before each run the system is told to forget the model's files, so that all read the disk.
    """
    from coreinfer_sim.base.settings import parse_size

    if (given.model is None) is (shape is None):
        raise click.UsageError("give either --model or --shape.")
    n_bytes = parse_size(limit_text)
    with tempfile.TemporaryDirectory(prefix="coreinfer-sim-") as folder:
        os.environ["COREINFER_SIM_CACHE"] = folder
        if given.model is None:
            model, title = Path(folder, str(shape)), f"{shape} (random weights)"
            subprocess.run(python(ROOT, _SAVE_SHAPE, shape, model), check=True)
        else:
            model, title = Path(given.model), given.name
        settings: dict[str, Any] = {
            "keep_ratio": given.keep_ratio,
            "prefill": prefill,
            "max_new_tokens": given.new_tokens,
        }
        settings |= {"min_new_tokens": given.new_tokens}
        settings |= {"mode": "random"} if given.index is None else {"index": given.index}
        ours = coreinfer("generate", PROMPT, "--json", "--model", model, *options(**settings))
        budgeted = [*ours, *options(memory_budget=n_bytes)]
        offload = [sys.executable, "-c", _OFFLOAD, str(model), str(n_bytes - _ROOM), str(offload_tokens), PROMPT]
        run_in_group(budgeted, n_bytes)  # makes the store, inside the limit too
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "offload": [], "unlimited": []}
        for _ in range(given.rounds):
            runs["ours"].append(run_in_group(budgeted, n_bytes, model, Path(folder)))
            runs["offload"].append(run_in_group(offload, n_bytes, model, Path(folder)))
            runs["unlimited"].append(run_in_group([*ours, "--dtype", _stored(model)], None, model))
    what = f"{title}, keep ratio {given.keep_ratio:g}, {prefill} prefill, limit {n_bytes / 1e6:,.0f} MB"
    _record(what, runs, n_bytes, given.new_tokens, least)


def _stored(model: Path) -> str:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _record(what: str, runs: dict[str, list[dict[str, Any]]], n_bytes: int, n_tokens: int, least: float) -> None:
    speeds = {name: [run["tokens_per_second"] for run in group] for name, group in runs.items()}
    found, peaks = medians(speeds), [run["peak"] for run in runs["ours"]]
    record(
        f"{what}: decode over that of accelerate's disk offload",
        found["ours"] / found["offload"],
        "×, of medians",
        at_least(least),
        tokens_per_second=speeds,
        mode=runs["ours"][0]["mode"],
        offload_peak_bytes=max(run["peak"] for run in runs["offload"]),
        prefill_seconds={name: [run["prefill_seconds"] for run in group] for name, group in runs.items()},
    )
    bar = Bar(f"at most {n_bytes / 1e6:,.0f}", lambda _peak: max(peaks) <= n_bytes)
    title = f"{what}: peak of the control group, page cache included"
    record(title, round(max(peaks) / 1e6, 1), "MB", bar, peak_bytes=peaks)
    n_same = sum(a["text"] == b["text"] for a, b in zip(runs["ours"], runs["unlimited"], strict=True))
    unit = f"of {len(peaks)} runs × {n_tokens} tokens"
    record(f"{what}: runs whose text is the unlimited run's", n_same, unit, exactly(len(peaks)))
