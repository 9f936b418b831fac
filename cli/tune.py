"""`coreinfer-sim tune`."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from coreinfer_sim.base.decode_settings import DecodeConfig, ModelConfig
from coreinfer_sim.base.settings import CorpusConfig

from . import options
from .console import ConsoleProgress, print_json, quiet_libraries, status
from .evaluate import score_with_log
from .settings import Settings, set_option
from .tables import print_table

if TYPE_CHECKING:
    from coreinfer_sim.base.settings import Weights
    from coreinfer_sim.models.loading import LanguageModel


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
@click.argument("sets", nargs=-1, required=True, callback=options.existing)
@options.index_that_is_needed
@options.model
@click.option(
    "--max-perplexity-increase",
    "max_increase",
    default="5%",
    callback=_increase,
    show_default=True,
    metavar="SHARE",
    help="The promise: the upper end of the 95 % interval stays below it.",
)
@click.option(
    "--keep-ratio",
    "keep_ratios",
    multiple=True,
    type=float,
    help="Of held sets, to try; may be repeated.  [default: those of compensated sets, and 0.5 to 0.95]",
)
@click.option(
    "--read-ratio",
    "read_ratios",
    multiple=True,
    type=float,
    help="Share of neurons that each token reads, to try; may be repeated.  [default: 0.2 to 0.6]",
)
@click.option(
    "--weights",
    type=click.Choice(["stored", "int8", "int4", "any"]),
    default="stored",
    show_default=True,
    help="Type of weights to try, or any: each of them, also read as a whole.",
)
@options.part("70:85")
@click.option("--limit", type=click.IntRange(1), default=40, show_default=True, help="Rows of each set.")
@options.max_tokens
@click.option("--seed", type=int, default=0, show_default=True, help="Of the bootstrap.")
@options.log
@set_option("corpus", "decode", "model")
@options.as_json
def tune(
    sets: tuple[str, ...],
    index: str | None,
    model: str | None,
    max_increase: float,
    keep_ratios: tuple[float, ...],
    read_ratios: tuple[float, ...],
    weights: str,
    part: range,
    limit: int,
    max_tokens: int | None,
    seed: int,
    log: Path | None,
    settings: Settings,
    as_json: bool,
) -> None:
    """Find the fewest bytes a token that keep a promise on SETS, and write them into the index as its default.

    SETS hold prompts and completions, as for evaluate. Take other rows than those that you build on or
    report. Tokens that choose what they read are tried at each read ratio; held sets at each keep ratio, plain and, where the
    index has some, compensated. What is hopeless on the first quarter of each set's rows is not tried on the others.
    """
    from coreinfer_sim.base.files import check_folder
    from coreinfer_sim.engines.registry import check_engine
    from coreinfer_sim.evaluation.rows import read_sets
    from coreinfer_sim.evaluation.summary import summarise
    from coreinfer_sim.evaluation.tune import candidates, check_rows, choose_profile, first_and_further, hopeful
    from coreinfer_sim.generation.opening import open_model
    from coreinfer_sim.index.index import SemanticIndex
    from coreinfer_sim.models.mlps import dense_bytes

    # 1) candidates and rows
    quiet_libraries()
    if log is not None:
        check_folder(log)
    decode, loading = settings.make(DecodeConfig), settings.make(ModelConfig)
    loaded = SemanticIndex.load(options.needed_index(index))
    loaded.check_writable()
    rows = read_sets(sets, part, limit, settings.make(CorpusConfig, source=""), ConsoleProgress())
    check_rows((row.set_name for row in rows), part)
    with status("Loading the model"):
        language_model = open_model(loaded, model, loading, decode, ConsoleProgress())
    kinds = _kinds(language_model, weights)
    engine = check_engine(language_model.model, decode)[0][0]
    contenders = candidates(loaded, keep_ratios, read_ratios, list(kinds), engine.reads_by_token)
    # 2) all on the first rows, the hopeful ones on the others
    score = partial(
        score_with_log, language_model, index=loaded, decode=decode, seed=seed, max_tokens=max_tokens, log=log
    )
    first, further = first_and_further(rows)
    results = score(contenders, first)
    left = hopeful(contenders, summarise(results, seed), max_increase)
    if left and further:
        if len(left) < len(contenders) and not as_json:
            click.echo(
                f"{len(contenders) - len(left)} of {len(contenders)} candidates are dropped after {len(first)} rows."
            )
        results += score(left, further)
    scored = {(result.set_name, result.row_id) for result in results}
    check_rows((set_name for set_name, _ in scored), part)  # some were too short
    # 3) the profile
    summary = summarise(results, seed)
    layouts = {
        kind: engine.layout_by_token(language_model.model, language_model.layers, replace(decode, weights=named))
        for kind, named in kinds.items()
    }
    profile = choose_profile(contenders, summary, max_increase, dense_bytes(language_model.layers), layouts)
    loaded.write_profile(profile)
    if as_json:
        print_json({"profile": asdict(profile), "contenders": summary})
        return
    print_table(summary)
    of_weights = "" if profile.weights == "stored" else f" with {profile.weights} weights"
    if profile.read_ratio < 1:
        click.echo(
            f"{loaded.name} decodes{of_weights} at read ratio {profile.read_ratio:g} by default now: perplexity "
            f"{profile.ratio - 1:+.1%}, {profile.mlp_bytes / 1e6:.1f} MB of MLP weights a token."
        )
    elif profile.keep_ratio == 1.0 and of_weights:
        click.echo(
            f"{loaded.name} decodes densely{of_weights} by default now: perplexity {profile.ratio - 1:+.1%}, "
            f"{profile.mlp_bytes / 1e6:.1f} MB of MLP weights a token."
        )
    elif profile.keep_ratio == 1.0:
        click.echo(
            f"Nothing sparse keeps the promise of at most {profile.max_increase:.1%}: {loaded.name} decodes densely by "
            "default now."
        )
    else:
        click.echo(
            f"{loaded.name} decodes{of_weights} with {'compensated' if profile.compensated else 'plain'} sets at keep ratio "
            f"{profile.keep_ratio:g} by default now: perplexity {profile.ratio - 1:+.1%}, "
            f"{profile.mlp_bytes / 1e6:.1f} MB of MLP weights a token."
        )


def _kinds(language_model: LanguageModel, weights: str) -> dict[str, Weights]:
    """Return the types of weights to try, by the names that contenders have for them."""
    from coreinfer_sim.base.settings import Weights

    own = "stored" if getattr(language_model.model, "own_codes", {}) else "16bit"
    every = {own: Weights.STORED, "int8": Weights.INT8, "int4": Weights.INT4}
    return every if weights == "any" else {name: each for name, each in every.items() if each.value == weights}
