"""`coreinfer-sim evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options
from .console import ConsoleProgress, print_json, quiet_libraries, status

if TYPE_CHECKING:
    from coreinfer_sim.evaluation.contenders import Contender
    from coreinfer_sim.evaluation.evaluate import Result
    from coreinfer_sim.evaluation.rows import Row
    from coreinfer_sim.index.index import SemanticIndex
    from coreinfer_sim.models.loading import LanguageModel

_D = {"show_default": True}
_NAMES = ["dense", "random", "random-cluster", "global", "similarity", "hybrid", "stability", "griffin", "oracle"]


@click.command()
@click.argument("sets", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", required=True, metavar="NAME", help="Hub id, checkpoint folder or GGUF file.")
@click.option("--index", type=click.Path(), help="Index folder; similarity, hybrid, global and random-cluster need it.")
@click.option(
    "--contender",
    "contenders",
    multiple=True,
    metavar="NAME",
    help=f"{', '.join(_NAMES)}; or a way as the table names it, without keep ratio and weights, such as "
    "'similarity/compensated else global', for which --score and --fallback do not count. May be "
    "repeated.  [default: all names]",
)
@click.option(
    "--keep-ratio",
    "keep_ratios",
    multiple=True,
    type=float,
    help="May be repeated.  [default: those that the index compensates; else 0.4]",
)
@click.option(
    "--score",
    "scores",
    multiple=True,
    type=click.Choice(["energy", "paper", "compensated"]),
    help="What ranks a cluster's neurons, or the sets that the index compensates; may be repeated.  [default: energy; unless "
    "contenders are named, also compensated where the index has that]",
)
@click.option(
    "--fallback",
    "fallbacks",
    multiple=True,
    type=click.Choice(["hybrid", "dense", "global", "none"]),
    default=("none",),
    **_D,
    help="What similarity does for unfamiliar prompts; may be repeated.",
)
@click.option(
    "--weights",
    multiple=True,
    type=click.Choice(["16bit", "int8", "q8_0", "q4_0"]),
    help="Precision of all weights; may be repeated.  [default: 16bit; unless contenders are named, dense in int8 and q4_0 too]",
)
@options.part("0:100")
@click.option("--limit", type=click.IntRange(1), default=40, **_D, help="Rows of each set.")
@options.max_tokens
@click.option("--generate", is_flag=True, help="Also generate texts and score them against the completions.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, **_D, help="Most tokens of a generated text.")
@click.option("--seed", type=int, default=0, **_D, help="Of random choices and of the bootstrap.")
@options.log
@click.option("--per-set", is_flag=True, help="Also print a line for each contender and set.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the summary as JSON.")
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw quality over bytes a token into this .png or .svg file.",
)
@options.prefill
@options.encoder
@options.model_options
@options.as_json
def evaluate(sets: tuple[Path, ...], model: str, as_json: bool, **given: Any) -> None:
    """Score ways of choosing neurons on SETS: JSONL files with id, prompt and completion.

    Prefill is dense unless --prefill says otherwise, decode forced sparse; the completion's tokens from the second on
    are scored. With --generate, texts are generated in place of the completions and compared with them: exact match, F1,
    ROUGE-L, BLEU and chrF.

    \b
    coreinfer-sim evaluate gsm8k.jsonl squad.jsonl --model ./my-model --index my-index --part 85:100 \\
        --contender dense --contender similarity --contender griffin --keep-ratio 0.4 --keep-ratio 0.6
    """
    from coreinfer_sim.base.files import check_folder, write_json
    from coreinfer_sim.base.plots import check_plot
    from coreinfer_sim.evaluation.contenders import (
        FITTED,
        NEED_INDEX,
        READS_PROMPT,
        check_known_before,
        parse_contenders,
    )
    from coreinfer_sim.evaluation.evaluate import check_scored, summarise
    from coreinfer_sim.evaluation.plot import plot
    from coreinfer_sim.evaluation.rows import read_sets
    from coreinfer_sim.evaluation.text_scores import check_text_scores
    from coreinfer_sim.index.encoder import SentenceEncoder
    from coreinfer_sim.index.index import SemanticIndex
    from coreinfer_sim.models.loading import load_model

    quiet_libraries()
    plot_path: Path | None = given["plot_path"]
    if plot_path is not None:
        check_plot(plot_path)
    for path in (given["out"], given["log"]):
        if path is not None:
            check_folder(path)
    if given["generate"]:
        check_text_scores()
    rows = read_sets(sets, given["part"], given["limit"])
    index = None
    if given["index"] is not None:
        index = SemanticIndex.load(given["index"], SentenceEncoder(given["encoder"]) if given["encoder"] else None)
    sparse_prefill = given["prefill"] == "sparse"
    excluded = (*(NEED_INDEX if index is None else ()), *(READS_PROMPT if sparse_prefill else ()))
    names = given["contenders"] or [name for name in _NAMES if name not in excluded]
    fitted = [] if index is None else [info.keep_ratio for info in index.manifest.compensation]
    ratios, weights = given["keep_ratios"] or fitted or [0.4], given["weights"] or ["16bit"]
    contenders = parse_contenders(names, ratios, given["scores"] or ["energy"], weights, given["fallbacks"])
    if index is not None and not given["contenders"] and not given["scores"]:
        there = [ratio for ratio in ratios if index.manifest.holds_sets(ratio)]
        contenders += parse_contenders(
            [name for name in FITTED if there], there, ["compensated"], weights, given["fallbacks"]
        )
    if not given["contenders"] and not given["weights"]:  # what one would take instead of any of them
        contenders += parse_contenders(["dense"], [1.0], ["energy"], ["int8", "q4_0"])
    if sparse_prefill:
        check_known_before(contenders)
    with status("Loading the model"):
        language_model = load_model(model, given["dtype"], given["device"])
    max_new_tokens = given["max_new_tokens"] if given["generate"] else None
    results = score_with_log(language_model, contenders, rows, index, given, max_new_tokens, sparse_prefill)
    check_scored(results, len(rows))
    summary = summarise(results, given["seed"], generated=given["generate"])
    if given["out"] is not None:
        write_json(given["out"], {"model": model, "index": given["index"], "contenders": summary})
    if plot_path is not None:
        plot(summary, contenders, plot_path)
    if as_json:
        print_json(summary)
    else:
        print_table(summary)
        if given["per_set"]:
            print_set_table(summary)
        if given["generate"]:
            print_text_table(summary)


def score_with_log(
    language_model: LanguageModel,
    contenders: Sequence[Contender],
    rows: Sequence[Row],
    index: SemanticIndex | None,
    given: dict[str, Any],
    max_new_tokens: int | None = None,
    sparse_prefill: bool = False,
) -> list[Result]:
    """Score contenders on rows; of options ``given``, a ``log`` keeps what is finished, and is gone on with.

    Returns:
        The results in the order of the contenders.
    """
    from coreinfer_sim.evaluation.evaluate import evaluate as run
    from coreinfer_sim.evaluation.evaluate import most_tokens, open_log, read_results
    from coreinfer_sim.models.fingerprint import weights_checksum

    log: Path | None = given["log"]
    setup = {
        "model": weights_checksum(language_model.layers),
        "dtype": language_model.dtype_name,
        "index": replace(index.manifest, profile=None).checksum() if index is not None else None,  # no score's business
        "max_tokens": most_tokens(language_model, given["max_tokens"]),
        "seed": given["seed"],
        "prefill": "sparse" if sparse_prefill else None,
    }
    wanted = {(str(c), row.set_name, row.id) for c in contenders for row in rows}
    with open_log(log, setup) if log else nullcontext() as file:
        known = [r for r in (read_results(log) if log else []) if (r.contender, r.set_name, r.row_id) in wanted]
        results = run(
            language_model,
            contenders,
            rows,
            index,
            max_tokens=setup["max_tokens"],
            max_new_tokens=max_new_tokens,
            seed=given["seed"],
            sparse_prefill=sparse_prefill,
            finished=known,
            log=file,
            progress=ConsoleProgress(),
        )
    order = [str(contender) for contender in contenders]
    return sorted(results, key=lambda result: order.index(result.contender))  # a log may hold them in another


def _width(summary: list[dict[str, Any]]) -> int:
    """Return the characters that the longest contender's name takes."""
    return max([28, *(len(row["contender"]) for row in summary)])


def print_table(summary: list[dict[str, Any]]) -> None:
    """Print a line a contender."""
    width = _width(summary)
    click.echo(
        f"{'contender':{width}s} {'ratio to dense (95 %)':26s} {'KL':>7s} {'top-1':>6s} {'MLP MB':>8s} {'all MB':>8s}"
    )
    for row in summary:
        interval = row["ratio_interval"]
        spread = "" if interval is None else f"({interval[0]:.3f}-{interval[1]:.3f})"
        click.echo(
            f"{row['contender']:{width}s} {row['ratio']:9.3f} {spread:16s} {row['kl']:7.3f} "
            f"{row['same_top']:6.3f} {row['mlp_bytes_per_token'] / 1e6:8.1f} {row['total_bytes_per_token'] / 1e6:8.1f}"
        )


def print_set_table(summary: list[dict[str, Any]]) -> None:
    """Print a line for each contender and set."""
    width = _width(summary)
    click.echo(
        f"\n{'contender':{width}s} {'set':18s} {'perplexity':>10s} {'ratio to dense':>14s} {'KL':>7s} {'top-1':>6s} {'rows':>5s}"
    )
    for row in summary:
        for name, group in row["sets"].items():
            click.echo(
                f"{row['contender']:{width}s} {name:18.18s} {group['perplexity']:10.2f} {group['ratio']:14.3f} "
                f"{group['kl']:7.3f} {group['same_top']:6.3f} {group['n_rows']:5d}"
            )


def print_text_table(summary: list[dict[str, Any]]) -> None:
    """Print what generated texts score, 0 to 100: a line a contender and set, and one for the mean over sets."""
    titles = {"exact_match": "exact", "f1": "F1", "rouge_l": "ROUGE-L", "bleu": "BLEU", "chrf": "chrF"}
    width = _width(summary)
    click.echo(
        f"\n{'contender':{width}s} {'generated texts':18s}" + "".join(f" {title:>7s}" for title in titles.values())
    )
    for row in summary:
        for name, group in [*row["sets"].items(), ("mean over sets", row)]:
            scores = "".join(f" {group['text'][metric]:7.2f}" for metric in titles)
            click.echo(f"{row['contender']:{width}s} {name:18.18s}{scores}")
