"""Our loops against llama.cpp built for the same processor, type by type, on a quiet machine.

`coreinfer-sim bench --build-llamacpp` makes such a llama-bench.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from figures.record import at_least, at_most, record
from figures.table import REQUIRED, Given, figure
from figures.tools import (
    FILES,
    benched,
    coreinfer,
    demo_prompts,
    exactly_new,
    in_turns,
    output_of,
    python,
    sets_of,
    spread,
)

FILE = "figures-loops.json"
_OURS = {"bf16": "ours-dense:weights=bf16", "int8": "ours-dense:int8", "int4": "ours-dense:int4"}
_PEERS = {"bf16": "llamacpp:bf16", "int8": "llamacpp:q8_0", "int4": "llamacpp:q4_0"}


@figure(
    FILE, "a checkpoint or a GGUF file, llama-bench built here", "10 minutes for 1.5 billion weights", timed=True,
    model=REQUIRED, name=None, prompt_tokens=128, new_tokens=32, rounds=3,
)  # fmt: skip
@click.option("--llama-bench", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option(
    "--weights", "kinds", multiple=True, type=click.Choice(list(_PEERS)), help="Of a checkpoint; each by default."
)
@FILES
def dense(given: Given, llama_bench: Path, kinds: tuple[str, ...], files: Path | None) -> None:
    """Dense decode, first token and memory over those of llama.cpp; of a GGUF file, on that same file."""
    of_file = given.model.endswith(".gguf")
    pairs = {"ours-dense": "llamacpp:file"} if of_file else {_OURS[kind]: _PEERS[kind] for kind in kinds or _PEERS}
    result = benched(given, [each for pair in pairs.items() for each in pair], llama_bench, files)
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
    crashed = {"crashed": theirs["crashed"]} if "crashed" in theirs else {}
    facts = {
        "share_of_bandwidth": share,
        "bytes_per_token": of_both("bytes_per_token"),
        "bandwidth_gb_per_s": bandwidth,
        **crashed,
    }
    record(f"{title}: decode", ratio, "×, of medians", at_least(0.95), tokens_per_second=speeds, **facts)
    seconds = of_both("first_token_seconds")
    first = theirs["first_token_seconds"] / ours["first_token_seconds"]
    record(f"{title}: speed of the first token", first, "×, of medians", at_least(1), seconds=seconds, **crashed)
    memory = of_both("peak_bytes")
    record(f"{title}: peak memory", ours["peak_bytes"] / theirs["peak_bytes"], "×", at_most(1.2), bytes=memory)


@figure(
    FILE, "a checkpoint or a GGUF file", "2 minutes for 1.5 billion weights", timed=True,
    model=REQUIRED, name=None, prompt_tokens=128, new_tokens=33, rounds=5,
)  # fmt: skip
@click.option("--weights", default="stored", show_default=True)
def batch(given: Given, weights: str) -> None:
    """Dense decode of eight rows in one batch over one at a time."""
    import torch

    import coreinfer_sim
    from coreinfer_sim.generation.in_process import TextGenerator

    torch.set_num_threads(2)
    generator = coreinfer_sim.load(None, given.model, mode="dense", weights=weights)
    assert isinstance(generator, TextGenerator)
    sparse = generator.sparse_model()
    ids = torch.randint(100, 10_000, (8, given.prompt_tokens), generator=torch.Generator().manual_seed(0))

    def seconds(n_rows: int, n_new: int) -> float:
        begin = time.perf_counter()
        sparse.generate(ids[:n_rows], max_new_tokens=n_new, do_sample=False, eos_token_id=None, pad_token_id=0)
        return time.perf_counter() - begin

    def measure(n_rows: int, _: int) -> float:
        """Return tokens a second, over the new tokens after the first."""
        first = seconds(n_rows, 1)
        return n_rows * (given.new_tokens - 1) / (seconds(n_rows, given.new_tokens) - first)

    found = in_turns({1: 1, 8: 8}, given.rounds, measure)
    middle = {n_rows: statistics.median(each) for n_rows, each in found.items()}
    speeds = {f"{n_rows} at a time": spread(each, 3) for n_rows, each in found.items()}
    title = f"{given.name}, {weights} weights: eight rows in one batch over one at a time"
    record(title, middle[8] / middle[1], "×, of median tokens/s", at_least(2), tokens_per_second=speeds)


_START = (
    "import time; begin = time.time(); import coreinfer_sim; "
    "generator = coreinfer_sim.load(None, sys.argv[1], mode='dense', weights=sys.argv[2]); "
    "ready = time.time() - begin; generator.generate('Hello', max_new_tokens=1); "
    "from coreinfer_sim.base.memory import peak_bytes; "
    "import json; print(json.dumps({'ready': ready, 'first token': time.time() - begin, 'peak': peak_bytes()}))"
)


@figure(
    FILE, "a checkpoint or a GGUF file", "2 minutes for 1.5 billion weights", timed=True,
    model=REQUIRED, name=None, rounds=5,
)  # fmt: skip
@click.option("--weights", default="stored", show_default=True)
def start(given: Given, weights: str) -> None:
    """Seconds of the first start, which compiles the loops and lays weights out, and of later ones."""
    with tempfile.TemporaryDirectory() as folder:
        env = {"COREINFER_SIM_CACHE": folder, "NUMBA_CACHE_DIR": str(Path(folder, "loops"))}
        found = [
            json.loads(output_of(python(Path(__file__).parents[1], _START, given.model, weights), **env))
            for _ in range(1 + given.rounds)
        ]
    first, later = found[0], found[1:]
    title = f"{given.name}, {weights} weights"
    record(f"{title}: first start, until the model is ready", first["ready"], "s", of_start=first)
    ready = [each["ready"] for each in later]
    record(f"{title}: later start, until the model is ready", statistics.median(ready), "s, median", at_most(3),
           spread=spread(ready, 2), first_token=spread([each["first token"] for each in later], 2))  # fmt: skip


@figure(
    FILE, "DATA", "1 hour for 135 million weights",
    model=REQUIRED, name=None, data=REQUIRED, rows=6, max_tokens=512,
)  # fmt: skip
def rounding(given: Given) -> None:
    """KL per token of int8 and int4 to the stored weights, over those of llama.cpp's Q8_0 and Q4_0."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "evaluated.json")
        kinds = [part for kind in ("int8", "q8_0", "int4", "q4_0") for part in ("--weights", kind)]
        shared = ("--model", given.model, "--limit", given.rows, "--max-tokens", given.max_tokens, "--part", "85:100")
        seen = sets_of(given.data, seen_only=True)
        output_of(coreinfer("evaluate", *seen, *shared, *kinds, "--contender", "dense", "--out", out))
        rows = {row["contender"]: row for row in json.loads(out.read_text(encoding="utf-8"))["contenders"]}
    for ours, theirs in (("int8", "q8_0"), ("int4", "q4_0")):
        kl = {kind: rows[f"dense {kind}"]["kl"] for kind in (ours, theirs)}
        title = f"{given.name}: KL per token of {ours} over that of {theirs}"
        record(title, kl[ours] / kl[theirs], "×", at_most(1), kl=kl, rows_per_set=given.rows, n_sets=len(seen))


@figure(
    FILE, "a checkpoint", "10 minutes for 1.5 billion weights",
    model=REQUIRED, name=None, new_tokens=64,
)  # fmt: skip
def tokens(given: Given) -> None:
    """Greedy tokens of dense decode in bfloat16, and KL, to transformers in float32; beside transformers in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import coreinfer_sim
    from coreinfer_sim.generation.in_process import TextGenerator

    torch.set_num_threads(2)
    wanted = {"return_dict_in_generate": True, "output_logits": True, **exactly_new(given.new_tokens)}
    found: dict[str, list[Any]] = {}
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    prompts = [tokenizer(each, return_tensors="pt")["input_ids"] for each in demo_prompts()[:3]]
    for dtype in ("float32", "bfloat16"):
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype)
        found[dtype] = [model.generate(ids, pad_token_id=0, **wanted) for ids in prompts]
        del model
    with coreinfer_sim.load(None, given.model, mode="dense", weights="bf16") as generator:
        assert isinstance(generator, TextGenerator)
        sparse = generator.sparse_model()
        found["ours"] = [sparse.generate(ids, pad_token_id=0, **wanted) for ids in prompts]
    kl, n_same = {}, {}
    for who in ("bfloat16", "ours"):
        parts, n_same[who] = [], 0
        for own, reference in zip(found[who], found["float32"], strict=True):
            same = (own.sequences == reference.sequences)[0, -given.new_tokens :]
            n = int(same.long().cumprod(0).sum())  # behind the first other token the texts are not the same
            n_same[who] += n
            one, two = (torch.cat(each.logits)[: n + 1].float().log_softmax(-1) for each in (reference, own))
            parts.append((one.exp() * (one - two)).sum(-1))
        kl[who] = float(torch.cat(parts).mean())
    title, n_all = f"{given.name}, dense decode in bfloat16 beside transformers in float32", 3 * given.new_tokens
    record(
        f"{title}: greedy tokens until another one",
        n_same["ours"],
        f"of {n_all}",
        None,
        transformers_bfloat16=n_same["bfloat16"],
    )
    record(
        f"{title}: KL per token over that of transformers in bfloat16",
        kl["ours"] / kl["bfloat16"],
        "×",
        at_most(1),
        kl=kl,
    )
