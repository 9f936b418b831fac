"""`coreinfer-sim tune`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from . import options
from .console import print_json, quiet_libraries, status

_D = {"show_default": True}


def _increase(_ctx: click.Context, _param: click.Parameter, value: str) -> float:
    number = value.strip().removesuffix("%")
    try:
        share = float(number) / (100 if value.strip().endswith("%") else 1)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is neither a share such as 0.05 nor a percentage such as 5%.") from error
    if not 0 < share < 100:
        raise click.BadParameter(f"{value!r} is not above 0 and below 10000%.")
    return share


@click.command()
@click.argument("sets", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--index", required=True, type=click.Path(), help="Index folder, which gets the profile.")
@click.option("--model", metavar="NAME", help="Hub id, checkpoint folder or GGUF file.  [default: the index's]")
@click.option(
    "--max-perplexity-increase",
    "max_increase",
    default="5%",
    callback=_increase,
    **_D,
    metavar="SHARE",
    help="The promise: the upper end of the 95 % interval stays below it.",
)
@click.option(
    "--keep-ratio",
    "keep_ratios",
    multiple=True,
    type=float,
    help="To try; may be repeated.  [default: those of compensated sets, and 0.5 to 0.95]",
)
@options.part("70:85")
@click.option("--limit", type=click.IntRange(1), default=40, **_D, help="Rows of each set.")
@options.max_tokens
@click.option("--seed", type=int, default=0, **_D, help="Of the bootstrap.")
@options.log
@options.model_options
@options.as_json
def tune(sets: tuple[Path, ...], index: str, model: str | None, as_json: bool, **given: Any) -> None:
    """Find the fewest bytes a token that keep a promise on SETS, and write them into the index as its default.

    SETS are JSONL files with id, prompt and completion, as for evaluate. Take other rows than those that you build on or
    report. Each keep ratio is tried with plain sets and, where the index has some, with compensated ones; what is hopeless
    on the first quarter of each set's rows is not tried on the others.
    """
    from coreinfer_sim.base.files import check_folder
    from coreinfer_sim.choosing.selection import NeuronSelection
    from coreinfer_sim.evaluation.contenders import bytes_per_token
    from coreinfer_sim.evaluation.evaluate import summarise
    from coreinfer_sim.evaluation.rows import read_sets
    from coreinfer_sim.evaluation.tune import candidates, check_rows, choose_profile, first_and_further, hopeful
    from coreinfer_sim.index.index import SemanticIndex
    from coreinfer_sim.models.loading import load_model

    from .evaluate import print_table, score_with_log

    quiet_libraries()
    if given["log"] is not None:
        check_folder(given["log"])
    loaded = SemanticIndex.load(index)
    contenders = candidates(loaded, given["keep_ratios"])
    rows = read_sets(sets, given["part"], given["limit"])
    check_rows(row.set_name for row in rows)
    with status("Loading the model"):
        language_model = load_model(model or loaded.manifest.model.name, given["dtype"], given["device"])
    first, further = first_and_further(rows)
    results = score_with_log(language_model, contenders, first, loaded, given)
    left = hopeful(contenders, summarise(results, given["seed"]), given["max_increase"])
    if left and further:
        if len(left) < len(contenders) and not as_json:
            click.echo(
                f"{len(contenders) - len(left)} of {len(contenders)} candidates are dropped after {len(first)} rows."
            )
        results += score_with_log(language_model, left, further, loaded, given)
    scored = {(result.set_name, result.row_id) for result in results}
    check_rows(set_name for set_name, _ in scored)  # some were too short
    summary = summarise(results, given["seed"])
    dense_bytes, _ = bytes_per_token(language_model, NeuronSelection("dense"), "16bit")
    profile = choose_profile(contenders, summary, given["max_increase"], dense_bytes)
    loaded.write_profile(profile)
    if as_json:
        print_json({"profile": asdict(profile), "contenders": summary})
        return
    print_table(summary)
    if profile.keep_ratio == 1.0:
        click.echo(
            f"No keep ratio keeps the promise of at most {profile.max_increase:.1%}: {index} decodes densely by default now."
        )
    else:
        click.echo(
            f"{index} decodes with {'compensated' if profile.compensated else 'plain'} sets at keep ratio "
            f"{profile.keep_ratio:g} by default now: perplexity {profile.ratio - 1:+.1%}, "
            f"{profile.mlp_bytes / 1e6:.1f} MB of MLP weights a token."
        )
