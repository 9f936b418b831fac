"""Our loops against llama.cpp built for the same processor, type by type, on a quiet machine.

`coreinfer-sim bench --build-llamacpp` makes such a llama-bench.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from figures.record import at_least, at_most, record
from figures.table import REQUIRED, Given, figure
from figures.tools import coreinfer, output_of

FILE = "figures-loops.json"
_PEERS = {
    "ours-dense:weights=bf16": "llamacpp:bf16",
    "ours-dense:int8": "llamacpp:q8_0",
    "ours-dense:int4": "llamacpp:q4_0",
}


@figure(
    FILE, "a checkpoint or a GGUF file, llama-bench built here; a quiet machine", "10 minutes for 1.5 billion weights",
    model=REQUIRED, name=None, prompt_tokens=128, new_tokens=32, rounds=3,
)  # fmt: skip
@click.option("--llama-bench", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
def dense(given: Given, llama_bench: Path) -> None:
    """Dense decode, first token and memory over those of llama.cpp; of a GGUF file, on that same file."""
    of_file = given.model.endswith(".gguf")
    pairs = {"ours-dense": "llamacpp:file"} if of_file else _PEERS
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "bench.json")
        sizes = ("--prompt-tokens", given.prompt_tokens, "--new-tokens", given.new_tokens, "--rounds", given.rounds)
        named = (part for pair in pairs.items() for each in pair for part in ("--contender", each))
        peer = ("--llama-bench", llama_bench, "--threads", 2, "--out", out, "--folder", folder)
        output_of(coreinfer("bench", "--model", given.model, *sizes, *peer, *named))
        result = json.loads(out.read_text(encoding="utf-8"))
    rows = {row["contender"]: row for row in result["contenders"]}
    bandwidth = result["bandwidth_gb_per_s"]
    for ours, theirs in pairs.items():
        _compare(given, rows[ours], rows[theirs], bandwidth)


def _compare(given: Given, ours: dict[str, Any], theirs: dict[str, Any], bandwidth: dict[str, Any]) -> None:
    """Record what one of ours does beside its peer."""
    missing = [f"{row['contender']}: {row['error']}" for row in (ours, theirs) if "error" in row]
    if missing:
        raise click.ClickException(f"there is no figure, as {'; '.join(missing)}")
    title = f"{given.name}, {given.prompt_tokens} tokens of context, {ours['contender']} over {theirs['contender']}"

    def of_both(key: str) -> dict[str, Any]:
        return {row["contender"]: row[key] for row in (ours, theirs)}

    speeds = {
        row["contender"]: [row[f"tokens_per_second{what}"] for what in ("", "_lowest", "_highest")]
        for row in (ours, theirs)
    }
    ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
    share = of_both("share_of_bandwidth")
    facts = {
        "share_of_bandwidth": share,
        "bytes_per_token": of_both("bytes_per_token"),
        "bandwidth_gb_per_s": bandwidth,
    }
    record(f"{title}: decode", ratio, "×, of medians", at_least(0.95), tokens_per_second=speeds, **facts)
    seconds = of_both("first_token_seconds")
    first = theirs["first_token_seconds"] / ours["first_token_seconds"]
    record(f"{title}: speed of the first token", first, "×, of medians", at_least(1), seconds=seconds)
    memory = of_both("peak_bytes")
    record(f"{title}: peak memory", ours["peak_bytes"] / theirs["peak_bytes"], "×", at_most(1.2), bytes=memory)
