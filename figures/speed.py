"""Decode speed, on a quiet machine.

The index must be the model's; where it holds compensated sets of the keep ratio, those decode.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from figures.record import RESULTS, at_least, at_most, record, slug, write
from figures.table import REQUIRED, Given, figure
from figures.tools import Clock, coreinfer, decode_speeds, exactly_new, generated, in_turns, medians, output_of

FILE = "figures-speed.json"
_NEEDS = "an index"
_COMMON: dict[str, Any] = {
    "model": REQUIRED, "name": None, "index": REQUIRED, "keep_ratio": 0.4, "new_tokens": 128, "rounds": 5
}  # fmt: skip
_MEDIANS = "×, of medians"


def _bench(given: Given, what: str, *contenders: str) -> dict[str, dict[str, Any]]:
    """Run `coreinfer-sim bench`, keep its result as ``bench-NAME-WHAT.json``, and return the measured rows by contender."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "bench.json")
        shared = ("--model", given.model, "--index", given.index, "--prompt-tokens", given.prompt_tokens)
        more = ("--new-tokens", given.new_tokens, "--rounds", given.rounds, "--out", out)
        named = (part for each in contenders for part in ("--contender", each))
        output_of(coreinfer("bench", *shared, *more, *named))
        result = json.loads(out.read_text(encoding="utf-8"))
    result |= {"model": Path(given.model).name, "index": given.index.name}  # a result names no folder of this machine
    del result["machine"]  # ours says more
    write(f"bench-{slug(given.name)}-{what}.json", result)
    return {row["contender"]: row for row in result["contenders"] if "error" not in row}


def _row(rows: dict[str, dict[str, Any]], *names: str) -> dict[str, Any]:
    """Return the fastest of the contenders that were measured."""
    found = [rows[name] for name in names if name in rows]
    if not found:
        raise click.ClickException(f"{' and '.join(names)} could not be measured, so there is no figure.")
    return max(found, key=lambda row: row["tokens_per_second"])


def _compare(title: str, mine: dict[str, Any], other: dict[str, Any], least: float) -> None:
    """Record one contender's decode speed over another's."""
    measured = {
        row["contender"]: [row[f"tokens_per_second{what}"] for what in ("", "_lowest", "_highest")]
        for row in (mine, other)
    }
    ratio = mine["tokens_per_second"] / other["tokens_per_second"]
    record(title, ratio, _MEDIANS, at_least(least), tokens_per_second=measured)


@figure(FILE, f"{_NEEDS}, xllamacpp", "20 minutes", timed=True, **_COMMON, prompt_tokens=128)
def decode(given: Given) -> None:
    """Sparse decode beside dense transformers and llama.cpp, alternating, in bfloat16."""
    ours, dense = f"sparse:{given.keep_ratio:g}:bfloat16:fallback=none", ("dense:bfloat16", "dense:float32")
    rows = _bench(given, "bf16", ours, "ours-dense:bfloat16", *dense, "llamacpp:bf16")
    title, mine, best = f"{given.name}, keep ratio {given.keep_ratio:g}, bf16", _row(rows, ours), _row(rows, *dense)
    _compare(f"{title}: decode over dense transformers, the better of bf16 and f32", mine, best, 2.4)
    n_bytes = mine["bytes_per_token"]
    record(
        f"{title}: share of the bandwidth limit",
        mine["share_of_bandwidth"],
        "share",
        at_least(0.85),
        bytes_per_token=n_bytes,
    )
    of_dense = f"{given.name}, bf16: dense mode through our loop over transformers, the better of bf16 and f32"
    _compare(of_dense, _row(rows, "ours-dense:bfloat16"), best, 1.0)
    if mine["lookup_seconds"] > 0:
        of_lookup = f"{given.name}: lookup beside a dense prefill of {given.prompt_tokens} tokens"
        record(of_lookup, mine["lookup_seconds"] / best["prefill_seconds"], "share", at_most(0.05))
    else:  # no figure, rather than a perfect one
        click.echo("the lookup took no time, so it was not reported; no figure of it is recorded.", err=True)
    _compare(f"{title}: decode over llama.cpp BF16", mine, _row(rows, "llamacpp:bf16"), 2.1)


@figure(FILE, f"{_NEEDS}, xllamacpp", "10 minutes", timed=True, **_COMMON, prompt_tokens=128)
def int8(given: Given) -> None:
    """Sparse decode with int8 weights beside llama.cpp Q8_0, alternating."""
    ours, theirs = f"sparse:{given.keep_ratio:g}:bfloat16:int8:fallback=none", "llamacpp:q8_0"
    rows = _bench(given, "int8", ours, theirs)
    title = f"{given.name}, keep ratio {given.keep_ratio:g}, int8: decode over llama.cpp Q8_0"
    _compare(title, _row(rows, ours), _row(rows, theirs), 1.5)


def _opened(given: Given, mode: str, **settings: Any) -> Any:
    """Open index and model in a mode."""
    import coreinfer_sim

    return coreinfer_sim.load(
        given.index, given.model, mode=mode, keep_ratio=given.keep_ratio, dtype=given.dtype, **settings
    )


def _prompts(language_model: Any, n_tokens: int, n_prompts: int) -> list[Any]:
    from coreinfer_sim.bench.prompts import cut_prompts

    return cut_prompts(language_model.tokenizer, None, n_tokens, n_prompts)


def _without(*names: str) -> dict[str, Any]:
    return {name: default for name, default in _COMMON.items() if name not in names}


@figure(
    FILE,
    f"{_NEEDS}; at least two clusters",
    "5 minutes",
    timed=True,
    **_without("new_tokens"),
    prompt_tokens=128,
    dtype="bfloat16",
)
def swap(given: Given) -> None:
    """A change of cluster, to one whose compact weights are there and to one whose are not, beside a dense prefill."""
    from coreinfer_sim import SemanticIndex, load_model

    texts = [prompt.text for prompt in _prompts(load_model(given.model), given.prompt_tokens, 12)]
    found = SemanticIndex.load(given.index).lookup(texts)
    by_cluster = {match[0].cluster: text for match, text in zip(found, texts, strict=True)}
    if len(by_cluster) < 2:
        raise click.ClickException("all prompts fall into one cluster, so nothing is swapped; take a larger index.")
    pair = list(by_cluster.values())[:2]
    settings: dict[str, Any] = {"index": given.index, "keep_ratio": given.keep_ratio}
    settings |= {"fallback": "none", "dtype": given.dtype, "max_new_tokens": 2}
    times: dict[str, list[float]] = {"not cached": [], "cached": [], "prefill": []}
    for _ in range(given.rounds):
        _, second, *again = generated(given, [*pair, *pair], **settings)  # the first run warms up
        times["not cached"].append(second["prepare_seconds"])
        times["cached"] += [run["prepare_seconds"] for run in again]
        times["prefill"] += [run["prefill_seconds"] - run["lookup_seconds"] for run in again]
    middle = medians(times)
    for what, bar in (("cached", 0.01), ("not cached", 1.0)):
        title = f"a change of cluster, {what}, beside a dense prefill of {given.prompt_tokens} tokens"
        title = f"{given.name}, keep ratio {given.keep_ratio:g}: {title}"
        share, milliseconds = middle[what] / middle["prefill"], round(1000 * middle[what], 3)
        record(title, share, "share, of medians", at_most(bar), milliseconds=milliseconds)


@figure(FILE, f"{_NEEDS}; several clusters", "15 minutes", timed=True, **_COMMON, prompt_tokens=128, dtype="bfloat16")
@click.option("--prompts", "n_prompts", default=8)
@click.option("--clusters", "n_clusters", default=4)
def batch(given: Given, n_prompts: int, n_clusters: int) -> None:
    """Prompts of several clusters in one batch beside the same prompts one at a time, alternating."""
    import torch

    opened = _opened(given, "similarity", fallback="none")
    sparse, clusters = opened.sparse_model(), opened.index.clusters[:n_clusters]
    ids = torch.tensor([prompt.ids for prompt in _prompts(opened.language_model, given.prompt_tokens, 12)][:n_prompts])
    # One text a cluster routes its rows; the tokens that are read are each row's own.
    routed = [clusters[number % len(clusters)].exemplars[0] for number in range(len(ids))]

    def run(rows: Any, texts: list[str]) -> float:
        clock = Clock()
        options = {"prompts": texts, "attention_mask": torch.ones_like(rows), "logits_processor": [clock]}
        sparse.generate(rows, **options, **exactly_new(given.new_tokens))
        return clock.decode_seconds

    def measure(how: str, _number: int) -> float:
        if how == "together":
            return run(ids, routed)
        return sum(run(row[None], [text]) for row, text in zip(ids, routed, strict=True))

    found = medians(in_turns(("together", "alone"), given.rounds, measure))
    record(
        f"{given.name}, keep ratio {given.keep_ratio:g}: decode of {len(ids)} prompts in one batch over one at a time",
        found["alone"] / found["together"],
        _MEDIANS,
        at_least(2.5),
        clusters=len(clusters),
        seconds={what: round(seconds, 3) for what, seconds in found.items()},
    )


@figure("growth-NAME.json", f"{_NEEDS}, altair", "1 hour", timed=True, **_COMMON, dtype="bfloat16")
@click.option("--length", "lengths", multiple=True, default=(64, 256, 1024, 4096), help="Of prompts, in tokens.")
@click.option("--batch", "sizes", multiple=True, default=(1, 2, 4, 8, 16), help="Prompts of the first length.")
def growth(given: Given, lengths: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """Decode speed over the length of the prompt and over the size of the batch, ours beside dense, alternating.

    A prompt is read once; every contender decodes from a copy of its cache.
    """
    import torch

    from coreinfer_sim import load_model
    from coreinfer_sim.bench.plot import plot_growth
    from coreinfer_sim.models.loading import usable

    opened = _opened(given, "global")
    loaded = opened.language_model
    contenders = {"ours": opened.sparse_model(), f"dense transformers, {loaded.dtype_name}": loaded.model}
    if usable(loaded.model.dtype, "cpu") is not loaded.model.dtype:  # then float32 may be what is faster
        contenders["dense transformers, float32"] = load_model(given.model, "float32").model
    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    measured: dict[tuple[int, int], dict[str, float]] = {}
    points = [("tokens of the prompt", n, n, 1) for n in lengths]
    points += [("rows of a batch", n, lengths[0], n) for n in sizes]
    for what, at, n_tokens, n_rows in points:
        if (n_tokens, n_rows) not in measured:
            ids = torch.tensor([prompt.ids for prompt in _prompts(loaded, n_tokens, n_rows)])
            found = medians(decode_speeds(contenders, ids, given))
            measured[n_tokens, n_rows] = {name: round(value, 2) for name, value in found.items()}
        for contender, speed in measured[n_tokens, n_rows].items():
            series.setdefault(what, {}).setdefault(contender, []).append((at, speed))
            print(f"{what} {at}: {contender} {speed} tokens/s", flush=True)
    title = f"{given.name}, keep ratio {given.keep_ratio:g}, {loaded.dtype_name}"
    facts = {"model": given.name, "keep_ratio": given.keep_ratio, "dtype": loaded.dtype_name}
    facts |= {"new_tokens": given.new_tokens, "rounds": given.rounds, "tokens_per_second": series}
    write(f"growth-{slug(given.name)}.json", facts)
    plot_growth(series, title, RESULTS / f"growth-{slug(given.name)}.svg")


@figure(FILE, _NEEDS, "5 minutes", timed=True, **_without("new_tokens"), prompt_tokens=512, dtype="bfloat16")
def prefill(given: Given) -> None:
    """Sparse prefill beside our own dense prefill: processes that take turns."""
    from coreinfer_sim import load_model

    prompt = _prompts(load_model(given.model), given.prompt_tokens, 1)[0].text
    settings: dict[str, Any] = {"index": given.index, "mode": "global", "keep_ratio": given.keep_ratio}
    settings |= {"dtype": given.dtype, "max_new_tokens": 1}

    def measure(how: str, _number: int) -> float:
        runs = generated(given, [prompt, prompt], prefill=how, **settings)
        return float(runs[1]["prefill_seconds"])

    found = medians(in_turns(("sparse", "dense"), given.rounds, measure))
    title = f"{given.name}, keep ratio {given.keep_ratio:g}: sparse prefill of {given.prompt_tokens} tokens over dense"
    milliseconds = {what: round(1000 * seconds, 1) for what, seconds in found.items()}
    record(title, found["dense"] / found["sparse"], _MEDIANS, at_least(1.5), milliseconds=milliseconds)
