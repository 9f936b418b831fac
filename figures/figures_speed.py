"""Measure decode speed; commands write their figures into ``results/figures-speed.json``.

python figures/figures_speed.py decode --model MODEL --index INDEX --name NAME
python figures/figures_speed.py int8 --model MODEL --index INDEX --name NAME
python figures/figures_speed.py swap --model MODEL --index INDEX --name NAME
python figures/figures_speed.py batch --model MODEL --index INDEX --name NAME
python figures/figures_speed.py growth --model MODEL --index INDEX --name NAME
python figures/figures_speed.py prefill --model MODEL --index INDEX --name NAME
python figures/figures_speed.py quality --model MODEL --index INDEX --data DATA --name NAME

The index must be the model's; where it holds compensated sets of the keep ratio, those decode. Run them on a quiet machine.
"""

from __future__ import annotations

import copy
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))
from figures import RESULTS, record

FILE = "figures-speed.json"


def _common(function: Any) -> Any:
    for option in (
        click.option("--model", required=True, metavar="NAME", help="Hub id, checkpoint folder or GGUF file."),
        click.option("--index", required=True, type=click.Path(exists=True, file_okay=False)),
        click.option("--name", required=True, help="Of the model, in figures and files."),
        click.option("--keep-ratio", default=0.4, show_default=True),
        click.option("--new-tokens", default=128, show_default=True),
        click.option("--rounds", default=5, show_default=True),
    ):
        function = option(function)
    return function


_prompt_tokens = click.option("--prompt-tokens", default=128, show_default=True)
_options = click.option(
    "--options", default="", metavar="OPTION=VALUE[:…]", help="Of our own contenders, such as engine=lean."
)
_dtype = click.option("--dtype", default="bfloat16", show_default=True, help="Of the weights in our runtime.")


@click.group()
def main() -> None:
    """Measure decode speed."""


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _bench(
    model: str, index: str, contenders: list[str], prompt_tokens: int, new_tokens: int, rounds: int, file: str | None
) -> dict[str, dict[str, Any]]:
    """Run `coreinfer-sim bench`'s function, keep its result in ``file``, and return rows that were measured by contender."""
    from coreinfer_sim.base.files import write_json
    from coreinfer_sim.bench.bench import Setup, bench
    from coreinfer_sim.bench.contenders import Subject
    from coreinfer_sim.bench.specs import parse_specs

    setup = Setup(n_prompt=prompt_tokens, n_new=new_tokens, rounds=rounds)
    result = bench(Subject(model, None, index), parse_specs(contenders), setup)
    if file is not None:
        kept = {
            **result,
            "model": Path(model).name,
            "index": Path(index).name,
        }  # a result names no folder of this machine
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_json(RESULTS / file, kept)
    for row in result["contenders"]:
        if "error" in row:
            click.echo(f"{row['contender']} was not measured: {row['error']}", err=True)
    return {row["contender"]: row for row in result["contenders"] if "error" not in row}


def _row(rows: dict[str, dict[str, Any]], *names: str) -> dict[str, Any]:
    """Return the fastest of the contenders that were measured."""
    found = [rows[name] for name in names if name in rows]
    if not found:
        raise click.ClickException(f"{' and '.join(names)} could not be measured, so there is no figure.")
    return max(found, key=lambda row: row["tokens_per_second"])


def _spread(*rows: dict[str, Any]) -> dict[str, list[float]]:
    return {row["contender"]: [row[f"tokens_per_second{what}"] for what in ("", "_lowest", "_highest")] for row in rows}


def _at_least(name: str, value: float, unit: str, bar: float, *, file: str = FILE, **details: Any) -> None:
    value = float(f"{value:.3g}")
    record(file, name, value, unit, f"at least {bar:g}", value >= bar, **details)


def _at_most(name: str, value: float, unit: str, bar: float, **details: Any) -> None:
    value = float(f"{value:.3g}")
    record(FILE, name, value, unit, f"at most {bar:g}", value <= bar, **details)


@main.command()
@_common
@_prompt_tokens
@_options
def decode(
    model: str, index: str, name: str, keep_ratio: float, new_tokens: int, rounds: int, prompt_tokens: int, options: str
) -> None:
    """Sparse decode beside dense transformers and llama.cpp, alternating, in bfloat16."""
    more = f":{options}" if options else ""
    ours, ours_dense = f"sparse:{keep_ratio:g}:bfloat16:fallback=none{more}", f"ours-dense:bfloat16{more}"
    dense = ("dense:bfloat16", "dense:float32")
    rows = _bench(
        model,
        index,
        [ours, ours_dense, *dense, "llamacpp:bf16"],
        prompt_tokens,
        new_tokens,
        rounds,
        f"bench-{_slug(name)}-bf16.json",
    )
    title = f"{name}, keep ratio {keep_ratio:g}, bf16"
    mine, best = _row(rows, ours), _row(rows, *dense)
    speed = mine["tokens_per_second"]
    _at_least(
        f"{title}: decode over dense transformers, the better of bf16 and f32",
        speed / best["tokens_per_second"],
        "×, of medians",
        2.4,
        tokens_per_second=_spread(mine, best),
    )
    _at_least(
        f"{title}: share of the bandwidth limit",
        mine["share_of_bandwidth"],
        "share",
        0.85,
        bytes_per_token=mine["bytes_per_token"],
    )
    whole = _row(rows, ours_dense)
    _at_least(
        f"{name}, bf16: dense mode through our loop over transformers, the better of bf16 and f32",
        whole["tokens_per_second"] / best["tokens_per_second"],
        "×, of medians",
        1.0,
        tokens_per_second=_spread(whole, best),
    )
    if mine["lookup_seconds"] > 0:
        _at_most(
            f"{name}: lookup beside a dense prefill of {prompt_tokens} tokens",
            mine["lookup_seconds"] / best["prefill_seconds"],
            "share",
            0.05,
        )
    else:  # no figure, rather than a perfect one
        click.echo("the lookup took no time, so it was not reported; no figure of it is recorded.", err=True)
    theirs = _row(rows, "llamacpp:bf16")
    _at_least(
        f"{title}: decode over llama.cpp BF16",
        speed / theirs["tokens_per_second"],
        "×, of medians",
        2.1,
        tokens_per_second=_spread(mine, theirs),
    )


@main.command()
@_common
@_prompt_tokens
@_options
def int8(
    model: str, index: str, name: str, keep_ratio: float, new_tokens: int, rounds: int, prompt_tokens: int, options: str
) -> None:
    """Sparse decode with int8 weights beside llama.cpp Q8_0, alternating."""
    ours = f"sparse:{keep_ratio:g}:bfloat16:int8:fallback=none" + (f":{options}" if options else "")
    file = f"bench-{_slug(name)}-int8.json"
    rows = _bench(model, index, [ours, "llamacpp:q8_0"], prompt_tokens, new_tokens, rounds, file)
    mine, theirs = _row(rows, ours), _row(rows, "llamacpp:q8_0")
    _at_least(
        f"{name}, keep ratio {keep_ratio:g}, int8: decode over llama.cpp Q8_0",
        mine["tokens_per_second"] / theirs["tokens_per_second"],
        "×, of medians",
        1.5,
        tokens_per_second=_spread(mine, theirs),
    )


def _load(model: str, index: str, dtype: str) -> tuple[Any, Any]:
    from coreinfer_sim import SemanticIndex, load_model

    return load_model(model, dtype), SemanticIndex.load(index)


def _prompts(language_model: Any, n_tokens: int, n_prompts: int) -> list[Any]:
    from coreinfer_sim.bench.prompts import cut_prompts

    return cut_prompts(language_model.tokenizer, None, n_tokens, n_prompts)


def _given(options: str) -> dict[str, Any]:
    from coreinfer_sim.bench.specs import parse_spec

    return dict(parse_spec(f"sparse:{options}" if options else "sparse").options)


def _exactly(n_new: int) -> dict[str, Any]:
    # No end token rather than a least length, which costs a pass over all logits that no user pays.
    return {"max_new_tokens": n_new, "eos_token_id": None, "do_sample": False}


def _timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


class _Clock:
    """A logits processor that notes when each token's logits came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, _ids: Any, scores: Any) -> Any:
        self.times.append(time.perf_counter())
        return scores

    @property
    def decode_seconds(self) -> float:
        """From the first token, which is prefill's, to the last."""
        return self.times[-1] - self.times[0]


def _alternating(calls: dict[str, Callable[[], Any]], rounds: int) -> Iterator[dict[str, float]]:
    """Draw the seconds of every call, round by round, after one round to warm up."""
    for number in range(rounds + 1):
        seconds = {name: _timed(call) for name, call in calls.items()}
        if number:
            yield seconds


def _medians(rounds: Iterator[dict[str, float]]) -> dict[str, float]:
    found = list(rounds)
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


@main.command()
@_common
@_prompt_tokens
@_options
@_dtype
def swap(
    model: str,
    index: str,
    name: str,
    keep_ratio: float,
    new_tokens: int,
    rounds: int,
    prompt_tokens: int,
    options: str,
    dtype: str,
) -> None:
    """A change of cluster, to one whose compact weights are there and to one whose are not, beside a dense prefill."""
    from coreinfer_sim import make_predictor
    from coreinfer_sim.generation.text import TextGenerator

    loaded, semantic = _load(model, index, dtype)
    predictor = make_predictor("similarity", loaded.layers, semantic, keep_ratio=keep_ratio, fallback="none")
    generator = TextGenerator(loaded, predictor, **_given(options))
    prompts = _prompts(loaded, prompt_tokens, 12)
    by_cluster = {
        match[0].cluster: p for match, p in zip(semantic.lookup([p.text for p in prompts]), prompts, strict=True)
    }
    if len(by_cluster) < 2:
        raise click.ClickException(
            "all prompts fall into one cluster, so that nothing is swapped; take a larger index."
        )
    first, second = list(by_cluster.values())[:2]

    def swapped(prompt: Any) -> Any:
        return generator.generate(prompt.text, **_exactly(2))

    uncached, cached, prefill = [], [], []
    for number in range(rounds + 1):
        generator.sparse.close()  # lets go of all compact weights
        runs = [swapped(first), swapped(second), swapped(first), swapped(second)]
        if number:
            uncached += [run.swap_seconds for run in runs[:2]]
            cached += [run.swap_seconds for run in runs[2:]]
            prefill += [run.prefill_seconds - run.lookup_seconds for run in runs[2:]]
    reference = statistics.median(prefill)
    for what, seconds, bar in (("cached", cached, 0.01), ("not cached", uncached, 1.0)):
        _at_most(
            f"{name}, keep ratio {keep_ratio:g}: a change of cluster, {what}, beside a dense prefill of {prompt_tokens} tokens",
            statistics.median(seconds) / reference,
            "share, of medians",
            bar,
            milliseconds=round(1000 * statistics.median(seconds), 3),
        )


@main.command()
@_common
@_prompt_tokens
@_options
@_dtype
@click.option("--prompts", "n_prompts", default=8, show_default=True)
@click.option("--clusters", "n_clusters", default=4, show_default=True)
def batch(
    model: str,
    index: str,
    name: str,
    keep_ratio: float,
    new_tokens: int,
    rounds: int,
    prompt_tokens: int,
    options: str,
    dtype: str,
    n_prompts: int,
    n_clusters: int,
) -> None:
    """Prompts of several clusters in one batch beside the same prompts one at a time, alternating."""
    import torch

    from coreinfer_sim import SparseModel, make_predictor

    loaded, semantic = _load(model, index, dtype)
    predictor = make_predictor("similarity", loaded.layers, semantic, keep_ratio=keep_ratio, fallback="none")
    sparse = SparseModel(loaded.model, predictor, loaded.tokenizer, **_given(options))
    candidates = _prompts(loaded, prompt_tokens, 12)
    ids = torch.tensor([prompt.ids for prompt in candidates][:n_prompts])
    # One text a cluster routes its rows; the tokens that are read are each row's own.
    n_found = min(n_clusters, len(semantic.clusters))
    routed = [semantic.clusters[number % n_found].exemplars[0] for number in range(len(ids))]
    decoding: dict[str, list[float]] = {"together": [], "alone": []}

    def run(rows: Any, texts: list[str]) -> float:
        clock = _Clock()
        options = {"prompts": texts, "attention_mask": torch.ones_like(rows), "logits_processor": [clock]}
        sparse.generate(rows, **options, **_exactly(new_tokens))
        return clock.decode_seconds

    def together() -> None:
        decoding["together"].append(run(ids, routed))

    def alone() -> None:
        decoding["alone"].append(sum(run(row[None], [text]) for row, text in zip(ids, routed, strict=True)))

    whole = _medians(_alternating({"together": together, "alone": alone}, rounds))
    found = {what: statistics.median(seconds[1:]) for what, seconds in decoding.items()}  # the first round warms up
    used = len({selection.cluster for selection in predictor.select(routed, None, len(routed)) or []})
    _at_least(
        f"{name}, keep ratio {keep_ratio:g}: decode of {len(ids)} prompts in one batch over one at a time",
        found["alone"] / found["together"],
        "×, of medians",
        2.5,
        clusters=used,
        seconds={what: round(seconds, 3) for what, seconds in found.items()},
        with_prefill=round(whole["alone"] / whole["together"], 2),
    )


def _decode_speeds(contenders: dict[str, Any], ids: Any, new_tokens: int, rounds: int) -> dict[str, float]:
    """Return median decode tokens/s by contender, alternating, each after a copy of the first one's prefill.

    Args:
        contenders: a `SparseModel`, then others or models of transformers, which may be of another type.
        ids: prompts, [n_rows, n_positions].
        new_tokens: that each decodes.
        rounds: after one to warm up.
    """
    import torch

    reader = next(iter(contenders.values()))
    read = reader.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **_exactly(1))
    texts, mask = read.sequences, torch.ones_like(read.sequences)  # with one token that is not in the cache yet
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, each in contenders.items():
            cache, clock = copy.deepcopy(read.past_key_values), _Clock()
            dtype = getattr(each, "model", each).dtype
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
            more = {"past_key_values": cache, "logits_processor": [clock]}
            each.generate(texts, attention_mask=mask, **more, **_exactly(new_tokens))
            if number:  # the first token is prefill's
                found[name].append(len(ids) * (new_tokens - 1) / clock.decode_seconds)
    return {name: round(statistics.median(values), 2) for name, values in found.items()}


@main.command()
@_common
@_options
@_dtype
@click.option("--lengths", default="64,256,1024,4096", show_default=True, help="Of prompts, in tokens.")
@click.option(
    "--rows", default="1,2,4,8,16", show_default=True, help="Sizes of a batch of prompts of the first length."
)
def growth(
    model: str,
    index: str,
    name: str,
    keep_ratio: float,
    new_tokens: int,
    rounds: int,
    options: str,
    dtype: str,
    lengths: str,
    rows: str,
) -> None:
    """Decode speed over the length of the prompt and over the size of the batch, ours beside dense, alternating.

    A prompt is read once; every contender decodes from a copy of its cache.
    """
    import torch

    from coreinfer_sim import SparseModel, load_model, make_predictor
    from coreinfer_sim.base.files import write_json
    from coreinfer_sim.bench.machine import header
    from coreinfer_sim.bench.plot import plot_growth
    from coreinfer_sim.models.loading import usable

    loaded, semantic = _load(model, index, dtype)
    predictor = make_predictor("global", loaded.layers, semantic, keep_ratio=keep_ratio)
    sparse = SparseModel(loaded.model, predictor, loaded.tokenizer, **_given(options))
    contenders = {"ours": sparse, f"dense transformers, {loaded.dtype_name}": loaded.model}
    if usable(loaded.model.dtype, "cpu") is not loaded.model.dtype:  # then float32 may be what is faster
        contenders["dense transformers, float32"] = load_model(model, "float32").model

    of_length, of_rows = [int(n) for n in lengths.split(",")], [int(n) for n in rows.split(",")]
    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    measured: dict[tuple[int, int], dict[str, float]] = {}
    points = [("tokens of the prompt", n, n, 1) for n in of_length] + [
        ("rows of a batch", n, of_length[0], n) for n in of_rows
    ]
    for what, at, n_tokens, n_rows in points:
        ids = torch.tensor([prompt.ids for prompt in _prompts(loaded, n_tokens, n_rows)])
        if (n_tokens, n_rows) not in measured:
            measured[n_tokens, n_rows] = _decode_speeds(contenders, ids, new_tokens, rounds)
        for contender, speed in measured[n_tokens, n_rows].items():
            series.setdefault(what, {}).setdefault(contender, []).append((at, speed))
            print(f"{what} {at}: {contender} {speed} tokens/s")
    title = f"{name}, keep ratio {keep_ratio:g}, {loaded.dtype_name}"
    facts = {
        "model": name,
        "keep_ratio": keep_ratio,
        "dtype": loaded.dtype_name,
        "new_tokens": new_tokens,
        "rounds": rounds,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(RESULTS / f"growth-{_slug(name)}.json", {**header(), **facts, "tokens_per_second": series})
    plot_growth(series, title, RESULTS / f"growth-{_slug(name)}.svg")


@main.command()
@_common
@_options
@_dtype
@click.option("--prompt-tokens", default=512, show_default=True)
def prefill(
    model: str,
    index: str,
    name: str,
    keep_ratio: float,
    new_tokens: int,
    rounds: int,
    options: str,
    dtype: str,
    prompt_tokens: int,
) -> None:
    """Sparse prefill beside our own dense prefill, alternating; --new-tokens plays no part."""
    import torch

    from coreinfer_sim import SparseModel, make_predictor

    loaded, semantic = _load(model, index, dtype)
    predictor = make_predictor("global", loaded.layers, semantic, keep_ratio=keep_ratio)
    given = _given(options)
    models = {
        how: SparseModel(loaded.model, predictor, loaded.tokenizer, prefill=how, **given) for how in ("sparse", "dense")
    }
    ids = torch.tensor([_prompts(loaded, prompt_tokens, 1)[0].ids])
    mask = torch.ones_like(ids)
    calls: dict[str, Callable[[], Any]] = {
        how: lambda each=each: each.generate(ids, attention_mask=mask, **_exactly(1)) for how, each in models.items()
    }
    found = _medians(_alternating(calls, rounds))
    _at_least(
        f"{name}, keep ratio {keep_ratio:g}: sparse prefill of {prompt_tokens} tokens over dense",
        found["dense"] / found["sparse"],
        "×, of medians",
        1.5,
        milliseconds={what: round(1000 * seconds, 1) for what, seconds in found.items()},
    )


@main.command()
@click.option("--model", required=True, metavar="NAME", help="Hub id, checkpoint folder or GGUF file.")
@click.option("--index", required=True, type=click.Path(exists=True, file_okay=False))
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--name", required=True, help="Of the model, in figures.")
@click.option("--keep-ratio", default=0.8, show_default=True)
@click.option("--rows", default=4, show_default=True, help="Of each set.")
def quality(model: str, index: str, data: Path, name: str, keep_ratio: float, rows: int) -> None:
    """What int8 weights and sparse prefill cost in quality: perplexity ratios to dense, each with forced sparse decode."""
    from coreinfer_sim.evaluation.contenders import parse_contenders
    from coreinfer_sim.evaluation.evaluate import evaluate, summarise
    from coreinfer_sim.evaluation.rows import read_rows

    loaded, semantic = _load(model, index, "auto")
    cases = [row for path in sorted(data.glob("*.jsonl")) for row in read_rows(path, range(85, 100), rows)]
    for prefill, weights in (("dense", ["16bit", "int8"]), ("sparse", ["16bit"])):
        contenders = parse_contenders(["dense", "similarity"], [keep_ratio], ["energy"], weights, [1], ["none"])
        found = evaluate(loaded, contenders, cases, semantic, max_tokens=512, sparse_prefill=prefill == "sparse")
        for row in summarise(found, 0):
            if row["contender"] != "dense 16bit":
                record(
                    FILE,
                    f"{name}, {prefill} prefill: {row['contender']}",
                    round(row["ratio"], 3),
                    "× the dense model's perplexity, mean over sets",
                    "for comparison",
                    True,
                    interval=row["ratio_interval"],
                    rows_per_set=rows,
                    total_bytes_per_token=row["total_bytes_per_token"],
                )


if __name__ == "__main__":
    main()
