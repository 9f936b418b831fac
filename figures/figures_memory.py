"""Measure decode under a memory limit that the system enforces, page cache included; needs root and Linux.

python figures/figures_memory.py limit --model MODEL --index INDEX --limit 2600MB
python figures/figures_memory.py limit --shape opt-6.7b --limit 10GB --at-least 5 --rounds 2

MODEL is a checkpoint folder in safetensors format, INDEX an index of it; a shape is a real architecture that gets random
weights and neurons, and takes twice its size on disk. Contenders, alternating in one run: ours with
--memory-budget and transformers with accelerate's disk offload, each in a control group with this limit, and ours without
any limit. Before each run the system is told to forget the model's files, so that all of them read from the disk.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))
from coreinfer_sim.base.progress import readable_size
from coreinfer_sim.base.settings import parse_size
from figures import record

FILE = "figures-speed.json"
GROUPS = Path("/sys/fs/cgroup")
PROMPT = "Write a function that returns the n-th Fibonacci number, and explain how it works."
_ROOM = 1_000_000_000
"""What disk offload is left of the limit for everything but weights."""


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

        begin = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, preexec_fn=join)
        seconds = time.monotonic() - begin
        peak = None if group is None else peak_of(group)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} ended with {done.returncode} at a peak of {peak} bytes.")
    return {**json.loads(done.stdout), "peak": peak, "seconds": seconds}


@click.group()
def main() -> None:
    """Measure decode under a memory limit."""


@main.command()
@click.option("--model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--name", help="Of the model, in the figures.  [default: its folder's]")
@click.option("--shape", help="In place of a model, for speed and memory only.")
@click.option("--index", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Without: random neurons.")
@click.option("--limit", "limit_text", default="2600MB", show_default=True)
@click.option("--keep-ratio", default=0.4, show_default=True)
@click.option("--prefill", type=click.Choice(["dense", "sparse"]), default="dense", show_default=True)
@click.option("--tokens", default=64, show_default=True, help="New tokens of ours.")
@click.option("--offload-tokens", default=8, show_default=True, help="New tokens of disk offload, which is slow.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--at-least", default=15.0, show_default=True, help="The bar for decode over disk offload's.")
def limit(
    model: Path | None,
    name: str | None,
    shape: str | None,
    index: Path | None,
    limit_text: str,
    keep_ratio: float,
    prefill: str,
    tokens: int,
    offload_tokens: int,
    rounds: int,
    at_least: float,
) -> None:
    """Decode speed under the limit beside disk offload's, the peak, and whether the output is the unlimited run's."""
    if (model is None) is (shape is None):
        raise click.UsageError("give either --model or --shape.")
    n_bytes = parse_size(limit_text)
    with tempfile.TemporaryDirectory(prefix="coreinfer-sim-") as folder:
        os.environ["COREINFER_SIM_CACHE"] = folder
        if model is None:
            model = Path(folder, str(shape))
            subprocess.run([sys.executable, __file__, "save-shape", str(shape), str(model)], check=True)
        ours = [
            *(
                str(Path(sys.executable).with_name("coreinfer-sim")),
                "generate",
                PROMPT,
                "--json",
                "--model",
                str(model),
            ),
            *("--keep-ratio", str(keep_ratio), "--prefill", prefill, "--max-new-tokens", str(tokens)),
            *("--min-new-tokens", str(tokens)),
            *(("--index", str(index)) if index is not None else ("--mode", "random")),
        ]
        budgeted = [*ours, "--memory-budget", str(n_bytes)]
        offload = [sys.executable, __file__, "offload", "--model", str(model), "--room", str(n_bytes - _ROOM)]
        offload += ["--tokens", str(offload_tokens)]
        run_in_group(budgeted, n_bytes)  # makes the store, inside the limit too
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "offload": [], "unlimited": []}
        for _ in range(rounds):
            runs["ours"].append(run_in_group(budgeted, n_bytes, model, Path(folder)))
            runs["offload"].append(run_in_group(offload, n_bytes, model, Path(folder)))
            runs["unlimited"].append(run_in_group([*ours, "--dtype", _stored(model)], None, model))
        _record(
            runs,
            name or model.name if shape is None else f"{shape} (random weights)",
            n_bytes,
            keep_ratio,
            prefill,
            tokens,
            at_least,
        )


def _stored(model: Path) -> str:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _record(
    runs: dict[str, list[dict[str, Any]]],
    title: str,
    n_bytes: int,
    keep_ratio: float,
    prefill: str,
    tokens: int,
    at_least: float,
) -> None:
    speeds = {name: [run["tokens_per_second"] for run in group] for name, group in runs.items()}
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    peak = max(run["peak"] for run in runs["ours"])
    n_same = sum(a["text"] == b["text"] for a, b in zip(runs["ours"], runs["unlimited"], strict=True))
    what = f"{title}, keep ratio {keep_ratio:g}, {prefill} prefill, limit {n_bytes / 1e6:,.0f} MB"
    ratio = round(medians["ours"] / medians["offload"], 2)
    record(
        FILE,
        f"{what}: decode over that of accelerate's disk offload",
        ratio,
        "×, of medians",
        f"at least {at_least:g}",
        ratio >= at_least,
        tokens_per_second=speeds,
        mode=runs["ours"][0]["mode"],
        offload_peak_bytes=max(run["peak"] for run in runs["offload"]),
        prefill_seconds={name: [run["prefill_seconds"] for run in group] for name, group in runs.items()},
    )
    record(
        FILE,
        f"{what}: peak of the control group, page cache included",
        round(peak / 1e6, 1),
        "MB",
        f"at most {n_bytes / 1e6:,.0f}",
        peak <= n_bytes,
        readable=readable_size(peak),
        peak_bytes=[run["peak"] for run in runs["ours"]],
    )
    record(
        FILE,
        f"{what}: runs whose text is the unlimited run's",
        n_same,
        f"of {len(runs['ours'])} runs × {tokens} tokens",
        str(len(runs["ours"])),
        n_same == len(runs["ours"]),
    )


@main.command(hidden=True)
@click.argument("shape")
@click.argument("target")
def save_shape(shape: str, target: str) -> None:
    """Save a checkpoint of an architecture with random weights, in bfloat16."""
    from coreinfer_sim.bench.shapes import parse_shape, random_model

    made = random_model(parse_shape(shape), "bfloat16", "cpu")
    made.model.save_pretrained(target, max_shard_size="2GB")
    made.tokenizer.save_pretrained(target)


@main.command(hidden=True)
@click.option("--model", required=True)
@click.option("--room", type=int, required=True)
@click.option("--tokens", type=int, required=True)
def offload(model: str, room: int, tokens: int) -> None:
    """Decode with transformers and accelerate, which leaves on disk what does not fit into ``room`` bytes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        """Notes when each token came."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    with tempfile.TemporaryDirectory(prefix="coreinfer-sim-") as folder:
        lm: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype="auto", device_map="auto", max_memory={"cpu": room}, offload_folder=folder
        )
        encoded, clock = tokenizer(PROMPT, return_tensors="pt"), Clock()
        begin = time.perf_counter()
        out = lm.generate(
            **encoded, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=clock,
            temperature=None, top_k=None, top_p=None,
        )  # fmt: skip
    first, last = clock.times[1], clock.times[-1]  # the first put is the prompt
    n_prompt = encoded["input_ids"].shape[1]
    on_disk = sum(place == "disk" for place in lm.hf_device_map.values())
    print(
        json.dumps(
            {
                "text": tokenizer.decode(out[0, n_prompt:], skip_special_tokens=True),
                "tokens_per_second": (tokens - 1) / (last - first),
                "prefill_seconds": first - begin,
                "modules_on_disk": on_disk,
            }
        )
    )


if __name__ == "__main__":
    main()
