"""Decode under a memory limit that the system enforces, page cache included; control groups are Linux's."""

from __future__ import annotations

import json
import mmap
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

from figures.record import at_least, exactly, record
from figures.table import REQUIRED, ROOT, Given, figure
from figures.tools import coreinfer, medians, options, python

FILE, BY_TOKEN = "figures-speed.json", "figures-token.json"
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
_SAVE_GGUF = """
from pathlib import Path
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.export.gguf import export_gguf
from coreinfer_sim.export.weights import Source, compact_weights
from coreinfer_sim.models.loading import load_model
loaded = load_model(sys.argv[1], "stored", "cpu")
weights = compact_weights(loaded, NeuronSelection("dense"), one_width=False)
source = Source(loaded.name, "none", "none", "dense", 1.0, False, "bf16")
export_gguf(loaded, weights, source, Path(sys.argv[2]), "bf16")
"""
_LLAMA_BENCH = """
import json, subprocess, sys
(test,) = json.loads(subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, check=True).stdout)
print(json.dumps({"tokens_per_second": test["avg_ts"]}))
"""
"""Programs for processes of their own: they save random weights or a GGUF file, leave on disk what has no room, run llama.cpp."""


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


@figure(
    BY_TOKEN, "root on Linux; a checkpoint folder in safetensors format; llama-bench built here", "1 hour", timed=True,
    model=REQUIRED, name=None, new_tokens=64, rounds=3
)  # fmt: skip
@click.option("--llama-bench", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--read-ratio", type=float, required=True, help="Such as what an index promises for 5 %.")
@click.option("--limit", "limit_text", default="2300MB", show_default=True)
@click.option("--budget", "budget_text", help="Of our process.  [default: the limit]")
@click.option("--offload-tokens", default=8, show_default=True, help="New tokens of disk offload, which is slow.")
@click.option(
    "--offload-room", default=1_000_000_000, show_default=True, help="Bytes that offload has for all but weights."
)
def by_token(
    given: Given, llama_bench: Path, read_ratio: float, limit_text: str, budget_text: str | None, offload_tokens: int,
    offload_room: int,
) -> None:  # fmt: skip
    """Decode that reads by token from the disk under a limit, beside llama.cpp's memory map and accelerate's disk offload.

    All alternate, each in a control group with the limit; before each run the system is told to forget their files. Ours without
    any limit tells whether the text is the same.
    """
    from coreinfer_sim.base.settings import parse_size

    limit, model = parse_size(limit_text), Path(given.model)
    with tempfile.TemporaryDirectory(prefix="coreinfer-sim-") as folder:
        os.environ["COREINFER_SIM_CACHE"] = folder
        file = Path(folder, "dense.gguf")
        subprocess.run(python(ROOT, _SAVE_GGUF, model, file), check=True)
        settings: dict[str, Any] = {"read_ratio": read_ratio, "max_new_tokens": given.new_tokens, "mode": "all"}
        settings |= {"min_new_tokens": given.new_tokens}
        ours = coreinfer("generate", PROMPT, "--json", "--model", model, *options(**settings))
        budgeted = [*ours, *options(memory_budget=parse_size(budget_text) if budget_text else limit)]
        offload = [sys.executable, "-c", _OFFLOAD, str(model), str(limit - offload_room), str(offload_tokens), PROMPT]
        bench = [llama_bench, "-m", file, "-t", 2, "-p", 0, "-n", given.new_tokens, "-r", 1, "-o", "json"]
        mapped = [sys.executable, "-c", _LLAMA_BENCH, *map(str, bench)]
        whole = run_in_group(ours, None)  # lays the weights out, and measures what tokens need
        disk = _disk_speed(file)
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "llama.cpp": [], "offload": []}
        for _ in range(given.rounds):
            runs["ours"].append(run_in_group(budgeted, limit, model, Path(folder)))
            runs["llama.cpp"].append(run_in_group(mapped, limit, model, Path(folder)))
            runs["offload"].append(run_in_group(offload, limit, model, Path(folder)))
    what = f"{given.name}, read ratio {read_ratio:g}, limit {limit / 1e6:,.0f} MB"
    speeds = {name: [run["tokens_per_second"] for run in group] for name, group in runs.items()}
    found, first = medians(speeds), runs["ours"][0]
    facts = {name: first[name] for name in ("found_ratio", "disk_bytes_per_token", "mlp_bytes_per_token")}
    facts |= {"tokens_per_second": speeds, "disk_mb_per_second": disk}
    for peer, called, least in (
        ("llama.cpp", "llama.cpp's memory map", 3),
        ("offload", "accelerate's disk offload", 10),
    ):
        record(f"{what}: decode over {called}", found["ours"] / found[peer], "×, of medians", at_least(least), **facts)
    peaks = {name: [run["peak"] for run in group] for name, group in runs.items()}
    title = f"{what}: peak of the control group, page cache included"
    record(title, round(max(peaks["ours"]) / 1e6, 1), "MB", peak_bytes=peaks)  # no bar: the system sees to the limit
    n_same = sum(run["text"] == whole["text"] for run in runs["ours"])
    unit = f"of {given.rounds} runs × {given.new_tokens} tokens"
    record(f"{what}: runs whose text is the unlimited run's", n_same, unit, exactly(given.rounds))


def _disk_speed(file: Path) -> dict[str, float]:
    """Return how fast the file's disk reads, past the system's cache, in MB/s: by 4 MiB in order, one after the other."""
    block, n_bytes = mmap.mmap(-1, 4 << 20), 0
    handle = os.open(file, os.O_RDONLY | os.O_DIRECT)
    begin = time.perf_counter()
    while time.perf_counter() - begin < 2 and (n := os.preadv(handle, [block], n_bytes)) == len(block):
        n_bytes += n
    seconds = time.perf_counter() - begin
    os.close(handle)
    return {"in_order": round(n_bytes / seconds / 1e6, 1)}


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
    title = f"{what}: peak of the control group, page cache included"
    record(title, round(max(peaks) / 1e6, 1), "MB", peak_bytes=peaks)  # no bar: the system sees to the limit
    n_same = sum(a["text"] == b["text"] for a, b in zip(runs["ours"], runs["unlimited"], strict=True))
    unit = f"of {len(peaks)} runs × {n_tokens} tokens"
    record(f"{what}: runs whose text is the unlimited run's", n_same, unit, exactly(len(peaks)))
