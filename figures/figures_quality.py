"""Measure quality at equal bytes; every command writes its figures into ``results/figures-quality.json``.

python figures/figures_quality.py build --model MODEL --data DATA --out INDEX
python figures/figures_quality.py evaluate --model MODEL --data DATA --index INDEX
python figures/figures_quality.py frontier --model MODEL --data DATA --index INDEX --index ANOTHER
python figures/figures_quality.py tuned --model MODEL --data DATA --index INDEX

DATA is a folder of JSONL files with "id", "prompt" and "completion". An index is built over rows whose id hashes under 70,
without the sets in UNSEEN; figures come from rows at 85 and above, which nothing has seen.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))
from figures import RESULTS, header, record, running_command

FILE = "figures-quality.json"
_COMMAND = (sys.executable, "-c", "from coreinfer_sim_cli.main import main; main()")
_BUILT_ON = re.compile("-(GPU|two-cores)$")
"""Ends the name of a model of which another index was built elsewhere; the bars are the model's."""
UNSEEN = ("dialogsum", "mbpp", "nq_open", "xsum")
data_option = click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
model_option = click.option("--model", default="models/smollm2-135m-instruct-q4_1.gguf", show_default=True)
name_option = click.option("--name", default="SmolLM2-135M", show_default=True, help="Of the model, in the figures.")


@click.group()
def main() -> None:
    """Measure quality at equal bytes."""


def _seen_rows(data: Path, rows: int, target: Path) -> Path:
    """Write ``rows`` rows of each indexed set, from those that an index may see."""
    from coreinfer_sim.evaluation.rows import joined, read_rows

    with target.open("w", encoding="utf-8") as out:
        for path in sorted(data.glob("*.jsonl")):
            if path.stem not in UNSEEN:
                for row in read_rows(path, range(70), rows):
                    prompt, completion = joined(row.prompt, row.completion)
                    fields = {"id": row.id, "prompt": row.prompt, "asked": prompt, "completion": completion}
                    out.write(json.dumps(fields) + "\n")
    return target


@main.command(context_settings={"ignore_unknown_options": True})
@model_option
@data_option
@name_option
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--rows", default=200, show_default=True, help="Of each indexed set.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def build(model: str, data: Path, name: str, out: Path, rows: int, options: tuple[str, ...]) -> None:
    """Build the compensated index; OPTIONS go to build-index. Run again after an interruption, it goes on where it was."""
    resumed = out.with_name(f"{out.name}.build").exists()
    corpus = _seen_rows(data, rows, out.with_name(f"{out.name}.jsonl"))  # a place that a second run finds again
    command = [
        *(*_COMMAND, "build-index", str(corpus), "--model", model),
        *("--out", str(out), "--prompt-column", "prompt", "--template", "{asked}{completion}", *options),
    ]
    begin = time.monotonic()
    subprocess.run(command, check=True)
    minutes = round((time.monotonic() - begin) / 60, 1)
    if resumed:
        click.echo("this build went on from an earlier one, so its time is not recorded.", err=True)
        return
    bar = 75 if name == "Qwen2.5-Coder-1.5B" else None
    record(
        FILE,
        f"{name}: building the compensated index",
        minutes,
        "minutes",
        "for comparison" if bar is None else f"at most {bar}",
        bar is None or minutes <= bar,
    )


WAYS = (
    *("dense", "random", "random-cluster/energy", "random-cluster/compensated", "global/energy", "global/compensated"),
    *("similarity/energy", "similarity/paper", "similarity/compensated", "similarity/compensated else global"),
    *("hybrid/energy", "stability", "griffin", "oracle"),
)
"""Of choosing neurons, compared at one keep ratio."""


@main.command()
@model_option
@data_option
@name_option
@click.option("--index", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--rows", default=40, show_default=True, help="Of each set.")
@click.option("--keep-ratio", default=0.4, show_default=True)
@click.option("--max-tokens", default=512, show_default=True)
@click.option("--dtype", default="auto", show_default=True, help="That computes; bytes are counted in 16 bits.")
def evaluate(
    model: str, data: Path, name: str, index: Path, rows: int, keep_ratio: float, max_tokens: int, dtype: str
) -> None:
    """Compare all selections at one keep ratio on rows that nothing has seen."""
    from coreinfer_sim import SemanticIndex

    arguments = ["--keep-ratio", str(keep_ratio), "--max-tokens", str(max_tokens)]
    arguments += [part for way in WAYS for part in ("--contender", way)]
    contenders = _evaluated(f"quality-{name.lower()}-{keep_ratio:g}", model, data, index, rows, dtype, arguments)
    n_clusters = SemanticIndex.load(index).manifest.settings.n_clusters
    _record_all({row["contender"]: row for row in contenders}, name, keep_ratio, rows, n_clusters > 1)


def _evaluated(
    stem: str, model: str, data: Path, index: Path, rows: int, dtype: str, arguments: Sequence[str]
) -> list[dict[str, Any]]:
    """Run `evaluate` on rows that nothing has seen, leave its summary in ``results/STEM.json``, and return that."""
    out, log = RESULTS / f"{stem}.json", RESULTS / f"{stem}.log.jsonl"
    command = [
        *(*_COMMAND, "evaluate", *map(str, sorted(data.glob("*.jsonl"))), "--model", model, "--index", str(index)),
        *("--part", "85:100", "--limit", str(rows), "--dtype", dtype, "--log", str(log), "--out", str(out), *arguments),
    ]
    subprocess.run(command, check=True)
    content = json.loads(out.read_text(encoding="utf-8"))
    content = {**header(), "command": running_command(), "rows_per_set": rows, "contenders": content["contenders"]}
    out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    found: list[dict[str, Any]] = content["contenders"]
    return found


@main.command()
@model_option
@data_option
@name_option
@click.option(
    "--index",
    "indexes",
    required=True,
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="May be repeated: each keep ratio is taken from the first that has it compensated.",
)
@click.option("--rows", default=2, show_default=True, help="Of each set.")
@click.option("--keep-ratio", "keep_ratios", multiple=True, type=float, default=(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8))
@click.option("--max-tokens", default=512, show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option(
    "--stored",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="GGUF file that MODEL's weights came from: if they were quantised there, 16 bits are no better than it is.",
)
def frontier(
    model: str,
    data: Path,
    name: str,
    indexes: tuple[Path, ...],
    rows: int,
    keep_ratios: tuple[float, ...],
    max_tokens: int,
    dtype: str,
    stored: Path | None,
) -> None:
    """Plot quality over bytes a token: similarity mode at several keep ratios beside dense, each on 16 bits, int8, 4 bits.

    Sets are compensated where an index has them so, and ranked by plain energy otherwise.
    """
    from coreinfer_sim import SemanticIndex
    from coreinfer_sim.evaluation.contenders import parse_contenders
    from coreinfer_sim.evaluation.plot import plot

    stem, weights = f"frontier-{name.lower()}", ("16bit", "int8", "q4_0")
    shared = ["--contender", "similarity", "--max-tokens", str(max_tokens)]
    shared += [part for each in weights for part in ("--weights", each)]
    left, parts = list(keep_ratios), []
    for index in indexes:
        fitted = [ratio for ratio in left if SemanticIndex.load(index).manifest.holds_sets(ratio)]
        left = [ratio for ratio in left if ratio not in fitted]
        parts.append((index, fitted, "compensated"))
    parts.append((indexes[0], left, "energy"))
    summary: dict[str, dict[str, Any]] = {}
    drawn = {}
    for index, wanted, score in (part for part in parts if part[1]):
        names = ("similarity",) if summary else ("similarity", "dense")
        arguments = [part for ratio in wanted for part in ("--keep-ratio", str(ratio))]
        arguments += [part for each in names[1:] for part in ("--contender", each)]
        part_stem = f"{stem}-{index.name}-{score}"  # its log is of one index
        found = _evaluated(part_stem, model, data, index, rows, dtype, [*shared, *arguments, "--score", score])
        (RESULTS / f"{part_stem}.json").unlink()  # a part of what follows
        summary.update({row["contender"]: row for row in found})
        for each in parse_contenders(names, wanted, (score,), weights, (1,), ("none",)):
            drawn[str(each)] = each
    found = [summary[title] for title in drawn]
    marks = {}
    if stored is not None:
        row = _as_stored(stored)
        summary[row["contender"]] = row
        marks = {row["contender"]: (row["total_bytes_per_token"], row["ratio"])}
    plot(found, list(drawn.values()), RESULTS / f"{stem}.svg", marks)
    content = {
        **header(),
        "command": running_command(),
        "rows_per_set": rows,
        "points": sorted(summary.values(), key=lambda row: row["total_bytes_per_token"]),
    }
    (RESULTS / f"{stem}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    best = [
        title
        for title, row in summary.items()
        if not any(
            other["total_bytes_per_token"] < row["total_bytes_per_token"] and other["ratio"] <= row["ratio"]
            for other in summary.values()
        )
    ]
    sparse = [title for title in best if not title.startswith("dense")]
    n_sparse = sum(not title.startswith("dense") for title in summary)
    record(
        FILE,
        f"{name}: sparse contenders that no other one beats in both bytes a token and perplexity",
        len(sparse),
        f"of {n_sparse}",
        "at least 1",
        bool(sparse),
        frontier={
            title: [summary[title]["total_bytes_per_token"], round(summary[title]["ratio"], 3)] for title in best
        },
        rows_per_set=rows,
    )


def _as_stored(path: Path) -> dict[str, Any]:
    """Return the row of a GGUF file whose weights, as they come back, are the dense model's; bytes are its own."""
    from collections import Counter

    from gguf import GGUFReader

    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    mlp = [tensor for name, tensor in tensors.items() if ".ffn_" in name and "norm" not in name]
    if "output.weight" in tensors:
        del tensors["token_embd.weight"]  # a token reads one row of it
    ((kind, _),) = Counter(tensor.tensor_type.name for tensor in mlp).most_common(1)
    return {
        "contender": f"dense, the file that it came from ({kind})",
        "ratio": 1.0,
        "ratio_interval": [1.0, 1.0],
        "mlp_bytes_per_token": sum(int(tensor.n_bytes) for tensor in mlp),
        "total_bytes_per_token": sum(int(tensor.n_bytes) for tensor in tensors.values()),
    }


@main.command()
@model_option
@data_option
@name_option
@click.option("--index", required=True, type=click.Path(exists=True, path_type=Path), help="Gets the profile.")
@click.option("--increase", default=0.05, show_default=True, help="Of perplexity: the promise.")
@click.option("--rows", default=8, show_default=True, help="Of each set, to tune on and to check on.")
@click.option("--max-tokens", default=512, show_default=True)
@click.option("--dtype", default="auto", show_default=True)
def tuned(
    model: str, data: Path, name: str, index: Path, increase: float, rows: int, max_tokens: int, dtype: str
) -> None:
    """Tune an index on rows at 70 to 84, and check the promise on rows that nothing has seen."""
    sets = [str(path) for path in sorted(data.glob("*.jsonl"))]
    command = [
        *(*_COMMAND, "tune", *sets, "--index", str(index), "--model", model, "--json", "--limit", str(rows)),
        *("--max-tokens", str(max_tokens), "--dtype", dtype, "--max-perplexity-increase", str(increase)),
        *("--log", str(RESULTS / f"tuning-{name.lower()}.log.jsonl")),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    answer = json.loads(done.stdout)
    found = profile = answer["profile"]
    tried = {
        row["contender"]: {key: row[key] for key in ("ratio", "ratio_interval", "mlp_bytes_per_token", "n_rows")}
        for row in answer["contenders"]
    }
    ratio = profile["keep_ratio"]
    if ratio < 1:
        score, fallback = ("compensated", "global") if profile["compensated"] else ("energy", "hybrid")
        arguments = ["--contender", "similarity", "--keep-ratio", str(ratio), "--score", score, "--fallback", fallback]
        (found,) = _evaluated(
            f"tuned-{name.lower()}", model, data, index, rows, dtype, [*arguments, "--max-tokens", str(max_tokens)]
        )
    title = f"{name}, tuned for at most {increase:.0%} more perplexity"
    record(
        FILE, f"{title}: keep ratio", ratio, f"at {profile['mlp_bytes'] / 1e6:.1f} MB of MLP weights a token", "below 1",
        ratio < 1, rows_per_set=rows, profile=profile, tried=tried,
    )  # fmt: skip
    bar = f"at most {1 + increase:g}" if ratio < 1 else "for comparison"  # dense decode cannot miss it
    record(
        FILE, f"{title}: perplexity on rows that tuning has not seen", round(found["ratio"], 3), "× dense", bar,
        found["ratio"] <= 1 + increase, rows_per_set=rows,
    )  # fmt: skip


VARIANTS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "uniform layers": {"budget": "uniform"},
    "ranked by energy": {"ranking": "energy"},
    "no error taken back": {"carry": 0.0},
    "half of the error taken back": {"carry": 0.5},
    "prompt tokens left out": {"prompt_weight": 0.0},
    "prompt tokens count fully": {"prompt_weight": 1.0},
    "the least ridge everywhere": {"ridge": 0.02},
}
"""Changes of one setting at a time."""


@main.command()
@model_option
@data_option
@name_option
@click.option("--keep-ratio", default=0.4, show_default=True)
@click.option("--tokens", default=20_000, show_default=True, help="To fit each variant on.")
@click.option("--rows", default=4, show_default=True, help="Of each indexed set, to score on.")
@click.option("--only", multiple=True, type=click.Choice(list(VARIANTS)), help="May be repeated.  [default: all]")
def ablate(model: str, data: Path, name: str, keep_ratio: float, tokens: int, rows: int, only: tuple[str, ...]) -> None:
    """Fit one set for all texts in several ways; score on rows at 70 to 84, which choices may see."""
    from coreinfer_sim import load_model
    from coreinfer_sim.base.settings import Ranking
    from coreinfer_sim.engines.compact import installed
    from coreinfer_sim.evaluation.rows import joined, read_rows
    from coreinfer_sim.fitting.budgets import layer_costs, neurons_of
    from coreinfer_sim.fitting.calibration import CalibrationText, Fit, fit_layers

    language_model = load_model(model)
    layers, tokenizer = language_model.layers, language_model.tokenizer
    paths = [path for path in sorted(data.glob("*.jsonl")) if path.stem not in UNSEEN]
    texts: list[CalibrationText] = []
    for group in zip(*(read_rows(path, range(70), None) for path in paths), strict=False):
        for row in group if sum(len(text.ids) for text in texts) < tokens else ():
            prompt, completion = (
                tokenizer(part, add_special_tokens=False)["input_ids"] for part in joined(row.prompt, row.completion)
            )
            kept = prompt[-256:]
            texts.append(CalibrationText([*kept, *completion[:256]], len(kept)))
    cases = [case for path in paths for case in cases_of(language_model, path, rows)]
    costs = layer_costs(language_model, texts[::4], texts[1::16], Fit())
    path = RESULTS / f"ablation-{name.lower()}-{keep_ratio:g}.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = (earlier.get("tokens"), earlier.get("rows_per_set")) == (tokens, rows)  # else they cannot be compared
    known = earlier["ratios"] if same else {}
    for title in only or VARIANTS:
        settings = dict(VARIANTS[title])
        budget = settings.pop("budget", "sensitivity")
        fit = Fit(**{key: Ranking(value) if key == "ranking" else value for key, value in settings.items()})
        n_kept = neurons_of(layers, range(len(layers)), keep_ratio, None if budget == "uniform" else costs)
        selection = fit_layers(language_model, texts, n_kept, fit)
        gaps: dict[str, list[tuple[float, int]]] = {}
        for case in cases:
            with installed(layers, selection):
                score = case.score()
            gaps.setdefault(case.row.set_name, []).append((score.loss - case.reference_loss, score.n_tokens))
        logs = [sum(gap for gap, _ in group) / sum(n for _, n in group) for group in gaps.values()]
        known[title] = round(math.exp(sum(logs) / len(logs)), 3)
        print(f"{title:32s} {known[title]:.3f}")
        content = {
            **header(),
            "tokens": tokens,
            "rows_per_set": rows,
            "command": running_command(),
            "ratios": known,
        }
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def cases_of(language_model: Any, path: Path, n: int) -> list[Any]:
    """Return the first ``n`` rows of a set that have tokens to decode, from those that choices may see."""
    from coreinfer_sim.base.errors import CorpusError
    from coreinfer_sim.evaluation.rows import read_rows
    from coreinfer_sim.evaluation.scoring import Case

    found: list[Any] = []
    for row in read_rows(path, range(70, 85), None):
        try:
            found.append(Case(language_model, row, 512, 0.4))
        except CorpusError:  # too short
            continue
        if len(found) == n:
            break
    return found


def _record_all(summary: dict[str, Any], name: str, keep_ratio: float, rows: int, clustered: bool) -> None:
    """Record the figures that a summary of `evaluate` gives; without clusters, similarity mode is the corpus's set itself."""
    seen = [each for each in next(iter(summary.values()))["sets"] if each not in UNSEEN]

    def mean(contender: str, sets: Sequence[str]) -> float:
        found = summary[f"{contender} {keep_ratio:g}"]["sets"]
        return math.exp(sum(math.log(found[each]["ratio"]) for each in sets) / len(sets))

    def put(title: str, value: float, bar: float | None, unit: str = "× dense", **details: Any) -> None:
        value = round(value, 3)
        wanted = "for comparison" if bar is None else f"at most {bar}"
        title = f"{name}, keep ratio {keep_ratio:g}: {title}"
        record(FILE, title, value, unit, wanted, bar is None or value <= bar, rows_per_set=rows, **details)

    own, everywhere = "similarity/compensated", "global/compensated"
    bars = {"SmolLM2-135M": {0.4: 2.0, 0.6: 1.4}, "Qwen2.5-Coder-1.5B": {0.4: 1.3, 0.6: 1.08}}
    at_0_4 = {"SmolLM2-135M": 1.2, "Qwen2.5-Coder-1.5B": 1.08} if keep_ratio == 0.4 else {}
    interval = summary[f"{own} {keep_ratio:g}"]["ratio_interval"]
    of_model = _BUILT_ON.sub("", name)
    put(
        "similarity, compensated",
        mean(own, seen),
        bars.get(of_model, {}).get(keep_ratio),
        interval_of_all_sets=interval,
    )
    put("gsm8k, similarity, compensated", mean(own, ["gsm8k"]), at_0_4.get(of_model))
    for contender in (
        *("global/compensated", "random-cluster/compensated", "similarity/energy", "similarity/paper", "hybrid/energy"),
        *("global/energy", "random-cluster/energy", "griffin", "stability", "oracle", "random"),
    ):
        put(contender, mean(contender, seen), None)
    gap = math.log(mean(own, seen))
    gaps: tuple[float | None, float | None]
    gaps = (0.45, 0.85 if clustered else None) if of_model == "SmolLM2-135M" and keep_ratio == 0.4 else (None, None)
    put("log gap of similarity, compensated, over GRIFFIN's", gap / math.log(mean("griffin", seen)), gaps[0], "share")
    put(
        "log gap of similarity, compensated, over the compensated global set's",
        gap / math.log(mean(everywhere, seen)),
        gaps[1],
        "share",
    )
    routed = mean(f"{own} else global", UNSEEN)
    bar = round(mean(everywhere, UNSEEN), 3) if clustered else None
    put("unseen sets, compensated with routing by confidence", routed, bar)


if __name__ == "__main__":
    main()
