"""Quality at equal bytes, on rows that neither an index nor any choice has seen.

DATA is a folder of JSONL files with id, prompt and completion. An index is built over rows whose id hashes under 70, without
the sets in UNSEEN; choices may see rows at 70 to 84; figures come from rows at 85 and above.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from figures.record import RESULTS, Bar, at_least, at_most, record, write
from figures.table import DEMO_MODEL, REQUIRED, Given, figure
from figures.tools import UNSEEN, coreinfer, options, output_of, sets_of

FILE = "figures-quality.json"
WAYS = (
    *("dense", "random", "random-cluster/energy", "random-cluster/compensated", "global/energy", "global/compensated"),
    *("similarity/energy", "similarity/paper", "similarity/compensated", "similarity/compensated else global"),
    *("hybrid/energy", "stability", "griffin", "oracle"),
)
"""Of choosing neurons, compared at one keep ratio."""
KEEP_RATIOS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_BUILT_ON = re.compile("-(GPU|two-cores)$")
"""Ends the name of a model of which another index was built elsewhere; the bars are the model's."""


def _seen_rows(data: Path, rows: int, target: Path) -> Path:
    """Write ``rows`` rows of each indexed set, from those that an index may see."""
    from coreinfer_sim.evaluation.rows import joined, read_rows

    with target.open("w", encoding="utf-8") as out:
        for path in sets_of(data, seen_only=True):
            for row in read_rows(path, range(70), rows):
                prompt, completion = joined(row.prompt, row.completion)
                fields = {"id": row.id, "prompt": row.prompt, "asked": prompt, "completion": completion}
                out.write(json.dumps(fields) + "\n")
    return target


@figure(
    FILE, "DATA", "1 to 2 hours", passes_options_on=True,
    model=DEMO_MODEL, name=None, data=REQUIRED, out=REQUIRED, rows=200
)  # fmt: skip
@click.argument("further", nargs=-1, type=click.UNPROCESSED)
def build(given: Given, further: tuple[str, ...]) -> None:
    """Build a compensated index; FURTHER options go to build-index. Run again after an interruption, it goes on where it was."""
    resumed = given.out.with_name(f"{given.out.name}.build").exists()
    corpus = given.out.with_name(f"{given.out.name}.jsonl")  # a place that a second run finds again
    _seen_rows(given.data, given.rows, corpus)
    shared = ("--prompt-column", "prompt", "--template", "{asked}{completion}", "--out", given.out.absolute())
    command = coreinfer("build-index", corpus, "--model", given.model, *shared, *further)
    begin = time.monotonic()
    subprocess.run(command, check=True)
    minutes = round((time.monotonic() - begin) / 60, 1)
    if resumed:
        click.echo("this build went on from an earlier one, so its time is not recorded.", err=True)
        return
    bar = at_most(75) if given.name == "Qwen2.5-Coder-1.5B" else None
    record(f"{given.name}: building the compensated index", minutes, "minutes", bar)


def _evaluated(stem: str, given: Given, index: Path, *arguments: object) -> list[dict[str, Any]]:
    """Run `evaluate` on rows that nothing has seen, leave its summary in ``results/STEM.json``, and return that."""
    out, log = RESULTS / f"{stem}.json", RESULTS / f"{stem}.log.jsonl"
    shared = ("--model", given.model, "--index", index, "--limit", given.rows, "--max-tokens", given.max_tokens)
    more = (*options(dtype=given.dtype), "--part", "85:100", "--log", log, "--out", out)
    output_of(coreinfer("evaluate", *sets_of(given.data), *shared, *more, *arguments))
    found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["contenders"]
    write(out.name, {"rows_per_set": given.rows, "contenders": found})
    return found


@figure(
    FILE, "an index with compensated sets, DATA", "1 to 3 hours",
    model=DEMO_MODEL, name=None, index=REQUIRED, data=REQUIRED, keep_ratio=0.4, rows=40, max_tokens=512, dtype="auto"
)  # fmt: skip
def evaluate(given: Given) -> None:
    """Compare all ways of choosing neurons at one keep ratio; means are geometric, over the indexed sets."""
    from coreinfer_sim import SemanticIndex

    ways = [part for way in WAYS for part in ("--contender", way)]
    stem = f"quality-{given.name.lower()}-{given.keep_ratio:g}"
    found = _evaluated(stem, given, given.index, "--keep-ratio", given.keep_ratio, *ways)
    clustered = SemanticIndex.load(given.index).manifest.settings.n_clusters > 1
    _record_all({row["contender"]: row for row in found}, given, clustered)


def _record_all(summary: dict[str, Any], given: Given, clustered: bool) -> None:
    """Record the figures that a summary of `evaluate` gives; without clusters, similarity mode is the corpus's set itself."""
    seen = [each for each in next(iter(summary.values()))["sets"] if each not in UNSEEN]
    model, ratio = _BUILT_ON.sub("", given.name), given.keep_ratio

    def mean(way: str, sets: Sequence[str]) -> float:
        found = summary[f"{way} {ratio:g}"]["sets"]
        return math.exp(sum(math.log(found[each]["ratio"]) for each in sets) / len(sets))

    def put(title: str, value: float, bar: float | None = None, unit: str = "× dense", **details: Any) -> None:
        title = f"{given.name}, keep ratio {ratio:g}: {title}"
        record(title, round(value, 3), unit, None if bar is None else at_most(bar), rows_per_set=given.rows, **details)

    own, everywhere = "similarity/compensated", "global/compensated"
    bars = {("SmolLM2-135M", 0.4): 2.0, ("SmolLM2-135M", 0.6): 1.4}
    bars |= {("Qwen2.5-Coder-1.5B", 0.4): 1.3, ("Qwen2.5-Coder-1.5B", 0.6): 1.08}
    of_gsm8k = {("SmolLM2-135M", 0.4): 1.2, ("Qwen2.5-Coder-1.5B", 0.4): 1.08}
    interval = summary[f"{own} {ratio:g}"]["ratio_interval"]
    put("similarity, compensated", mean(own, seen), bars.get((model, ratio)), interval_of_all_sets=interval)
    put("gsm8k, similarity, compensated", mean(own, ["gsm8k"]), of_gsm8k.get((model, ratio)))
    for way in WAYS:
        if way not in ("dense", own, f"{own} else global"):
            put(way, mean(way, seen))
    gap, held = math.log(mean(own, seen)), (model, ratio) == ("SmolLM2-135M", 0.4)
    title = "log gap of similarity, compensated, over"
    put(f"{title} GRIFFIN's", gap / math.log(mean("griffin", seen)), 0.45 if held else None, "share")
    bar = 0.85 if held and clustered else None
    put(f"{title} the compensated global set's", gap / math.log(mean(everywhere, seen)), bar, "share")
    bar = round(mean(everywhere, UNSEEN), 3) if clustered else None
    put("unseen sets, compensated with routing by confidence", mean(f"{own} else global", UNSEEN), bar)


@figure(
    FILE, "one index or several, DATA, altair", "1 to 3 hours",
    model=DEMO_MODEL, name=None, data=REQUIRED, rows=2, max_tokens=512, dtype="auto"
)  # fmt: skip
@click.option(
    "--index", "indexes", required=True, multiple=True, type=click.Path(exists=True, path_type=Path),
    help="May be repeated: each keep ratio is taken from the first that has it compensated."
)  # fmt: skip
@click.option("--keep-ratio", "keep_ratios", multiple=True, type=float, default=KEEP_RATIOS)
@click.option(
    "--stored",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="GGUF file that MODEL's weights came from: if they were quantised there, 16 bits are no better than it is.",
)
def frontier(given: Given, indexes: tuple[Path, ...], keep_ratios: tuple[float, ...], stored: Path | None) -> None:
    """Plot quality over bytes a token: similarity mode at several keep ratios beside dense, each on 16 bits, int8, 4 bits.

    Sets are compensated where an index has them so, and ranked by plain energy otherwise.
    """
    from coreinfer_sim import SemanticIndex
    from coreinfer_sim.evaluation.contenders import parse_contenders
    from coreinfer_sim.evaluation.plot import plot

    # 1) which index scores which keep ratios
    stem, left, parts = f"frontier-{given.name.lower()}", list(keep_ratios), []
    weights = ("16bit", "int8", "q4_0", *(() if stored is None else (str(stored),)))
    for index in indexes:
        fitted = [ratio for ratio in left if SemanticIndex.load(index).manifest.holds_sets(ratio)]
        left = [ratio for ratio in left if ratio not in fitted]
        parts.append((index, fitted, "compensated"))
    parts.append((indexes[0], left, "energy"))
    # 2) score them, dense beside the first
    summary: dict[str, dict[str, Any]] = {}
    drawn: dict[str, Any] = {}
    for index, ratios, score in (part for part in parts if part[1]):
        names = ("similarity",) if summary else ("similarity", "dense")
        crossed = (("--contender", names), ("--keep-ratio", ratios), ("--weights", weights), ("--score", (score,)))
        arguments = [part for option, values in crossed for value in values for part in (option, value)]
        part_stem = f"{stem}-{index.name}-{score}"  # its log is of one index
        summary.update({row["contender"]: row for row in _evaluated(part_stem, given, index, *arguments)})
        (RESULTS / f"{part_stem}.json").unlink()  # a part of what follows
        drawn.update({str(each): each for each in parse_contenders(names, ratios, (score,), weights)})
    # 3) draw and write
    plot([summary[title] for title in drawn], list(drawn.values()), RESULTS / f"{stem}.svg")
    points = sorted(summary.values(), key=lambda row: row["total_bytes_per_token"])
    write(f"{stem}.json", {"rows_per_set": given.rows, "points": points})
    best = {
        row["contender"]: [row["total_bytes_per_token"], round(row["ratio"], 3)]
        for number, row in enumerate(points)
        if all(row["ratio"] < fewer["ratio"] for fewer in points[:number])
    }
    of_sparse = [sum(not title.startswith("dense") for title in titles) for titles in (best, summary)]
    title = f"{given.name}: sparse contenders that no other one beats in both bytes a token and perplexity"
    record(title, of_sparse[0], f"of {of_sparse[1]}", at_least(1), frontier=best, rows_per_set=given.rows)


@figure(
    FILE, "an index, which gets the profile; DATA", "1 hour",
    model=DEMO_MODEL, name=None, index=REQUIRED, data=REQUIRED, rows=8, max_tokens=512, dtype="auto"
)  # fmt: skip
@click.option("--increase", default=0.05, help="Of perplexity: the promise.")
def tune(given: Given, increase: float) -> None:
    """Tune an index on rows at 70 to 84, and check the promise on rows that nothing has seen."""
    shared = ("--model", given.model, "--index", given.index, "--limit", given.rows, "--max-tokens", given.max_tokens)
    log = RESULTS / f"tuning-{given.name.lower()}.log.jsonl"
    more = (*options(dtype=given.dtype), "--max-perplexity-increase", increase, "--log", log, "--json")
    answer = json.loads(output_of(coreinfer("tune", *sets_of(given.data), *shared, *more)))
    found = profile = answer["profiles"]["balanced"]
    kept = ("ratio", "ratio_interval", "mlp_bytes_per_token", "n_rows")
    tried = {row["contender"]: {key: row[key] for key in kept} for row in answer["contenders"]}
    ratio = profile["keep_ratio"]
    if ratio < 1:
        (found,) = _evaluated(f"tuned-{given.name.lower()}", given, given.index, "--contender", "balanced")
    title = f"{given.name}, tuned for at most {increase:.0%} more perplexity"
    unit, facts = f"at {profile['mlp_bytes'] / 1e6:.1f} MB of MLP weights a token", {"rows_per_set": given.rows}
    below_1 = Bar("below 1", lambda found: found < 1)
    record(f"{title}: keep ratio", ratio, unit, below_1, profile=profile, tried=tried, **facts)
    bar = at_most(1 + increase) if ratio < 1 else None  # dense decode cannot miss it
    record(f"{title}: perplexity on rows that tuning has not seen", found["ratio"], "× dense", bar, **facts)


@figure(
    "figures-speed.json", "an index, DATA", "30 minutes",
    model=DEMO_MODEL, name=None, index=REQUIRED, data=REQUIRED, keep_ratio=0.8, rows=4, max_tokens=512, dtype="auto"
)  # fmt: skip
def cheaper(given: Given) -> None:
    """What int8 weights and sparse prefill cost in quality: perplexity ratios to dense, each with forced sparse decode."""
    shared = ("--contender", "dense", "--contender", "similarity", "--keep-ratio", given.keep_ratio)
    for prefill, weights in (("dense", ("16bit", "int8")), ("sparse", ("16bit",))):
        stem = f"cheaper-{given.name.lower()}-{prefill}"
        arguments = [*shared, *options(prefill=prefill), *(part for each in weights for part in ("--weights", each))]
        rows = _evaluated(stem, given, given.index, *arguments)
        (RESULTS / f"{stem}.json").unlink()  # the figures say it all
        for row in rows:
            if row["contender"] != "dense 16bit":
                record(
                    f"{given.name}, {prefill} prefill: {row['contender']}",
                    round(row["ratio"], 3),
                    "× the dense model's perplexity, mean over sets",
                    interval=row["ratio_interval"],
                    rows_per_set=given.rows,
                    total_bytes_per_token=row["total_bytes_per_token"],
                )
