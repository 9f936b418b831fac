"""`coreinfer-sim tune`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from coreinfer_sim.base.decode_settings import DecodeConfig, ModelConfig
from coreinfer_sim.base.settings import MAX_INCREASES, CorpusConfig, Profile

from . import options
from .console import ConsoleProgress, print_json, quiet_libraries, status
from .profiles import profile_lines, profiles_summary
from .settings import Settings, set_option
from .tables import print_table

if TYPE_CHECKING:
    from coreinfer_sim.base.settings import Weights


def _increases(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> dict[Profile, float]:
    """Read what profiles may lose; a share without a name is balanced's."""
    found = dict(MAX_INCREASES)
    for value in values:
        name, _, share = value.rpartition("=")
        try:
            profile = Profile(name.strip() or Profile.BALANCED)
            found[profile] = _share(share.strip())
        except ValueError as error:
            raise click.BadParameter(
                f"{value!r} is neither a share such as 0.05 nor a percentage such as 5%, nor balanced=5% or fast=15%."
            ) from error
        if profile is Profile.EXACT:
            raise click.BadParameter(f"{value!r} is of exact, which loses nothing; name balanced or fast.")
        if not 0 < found[profile] < 100:
            raise click.BadParameter(f"{value!r} is not above 0 and below 10000%.")
    if found[Profile.BALANCED] > found[Profile.FAST]:
        raise click.BadParameter(
            f"balanced may lose {found[Profile.BALANCED]:.4g} and fast {found[Profile.FAST]:.4g}, expected fast to be allowed no "
            "less; give fast=SHARE too."
        )
    return found


def _share(text: str) -> float:
    return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)


@click.command()
@click.argument("sets", nargs=-1, required=True, callback=options.existing)
@options.index_that_is_needed
@options.model
@click.option(
    "--max-perplexity-increase",
    "max_increases",
    multiple=True,
    callback=_increases,
    metavar="[NAME=]SHARE",
    help="What a profile may lose: the upper end of the 95 % interval stays below it; without a name, balanced.  "
    "[default: balanced=3%, fast=10%]",
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
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw KL over the bytes a token into this .html, .png or .svg file.",
)
@set_option("corpus", "decode", "model")
@options.as_json
def tune(
    sets: tuple[str, ...],
    index: str | None,
    model: str | None,
    max_increases: dict[Profile, float],
    keep_ratios: tuple[float, ...],
    read_ratios: tuple[float, ...],
    weights: str,
    part: range,
    limit: int,
    max_tokens: int | None,
    seed: int,
    log: Path | None,
    plot_path: Path | None,
    settings: Settings,
    as_json: bool,
) -> None:
    """Measure an index's profiles on texts of your own.

    Each profile gets what reads the fewest bytes a token at the loss that it allows. SETS hold prompts and completions, as for
    evaluate. Take other rows than those that you build on or report. Tokens that choose what they read are tried at each read
    ratio. Held sets are tried at each keep ratio, plain and, where the index has some, compensated. What is hopeless on the first
    quarter of each set's rows is not tried on the others.
    """
    from coreinfer_sim.base.files import check_folder
    from coreinfer_sim.base.plots import check_plot
    from coreinfer_sim.engines.registry import check_engine
    from coreinfer_sim.evaluation.compare import score_with_log
    from coreinfer_sim.evaluation.plot import plot
    from coreinfer_sim.evaluation.rows import read_sets
    from coreinfer_sim.evaluation.summary import summarise
    from coreinfer_sim.evaluation.tune import candidates, check_rows, choose_profiles, first_and_further, hopeful
    from coreinfer_sim.generation.opening import open_model
    from coreinfer_sim.index.index import SemanticIndex

    # 1) candidates and rows
    quiet_libraries()
    if log is not None:
        check_folder(log)
    if plot_path is not None:
        check_plot(plot_path)
    decode, loading = settings.make(DecodeConfig), settings.make(ModelConfig)
    loaded = SemanticIndex.load(options.needed_index(index))
    loaded.check_writable()
    rows = read_sets(sets, part, limit, settings.make(CorpusConfig, source=""), ConsoleProgress())
    check_rows((row.set_name for row in rows), part)
    with status("Loading the model"):
        language_model = open_model(loaded, model, loading, decode, ConsoleProgress())
    engine = check_engine(language_model.model, decode)[0][0]
    stored = "stored" if getattr(language_model.model, "own_codes", {}) else "16bit"
    kinds = _kinds(stored, weights)
    contenders = candidates(loaded, keep_ratios, read_ratios, list(kinds), stored, engine.reads_by_token)
    # 2) all on the first rows, the hopeful ones on the others
    score = partial(
        score_with_log,
        language_model,
        index=loaded,
        decode=decode,
        seed=seed,
        max_tokens=max_tokens,
        log=log,
        progress=ConsoleProgress(),
    )
    first, further = first_and_further(rows)
    results = score(contenders, first)
    left = hopeful(contenders, summarise(results, seed), max(max_increases.values()))
    if left and further:
        if len(left) < len(contenders) and not as_json:
            click.echo(
                f"{len(contenders) - len(left)} of {len(contenders)} candidates are dropped after {len(first)} rows."
            )
        results += score(left, further)
    scored = {(result.set_name, result.row_id) for result in results}
    check_rows((set_name for set_name, _ in scored), part)  # some were too short
    # 3) the profiles
    summary = summarise(results, seed)
    layouts = {
        kind: engine.layout_by_token(language_model.model, language_model.layers, replace(decode, weights=named))
        for kind, named in kinds.items()
    }
    profiles, before = choose_profiles(contenders, summary, layouts, max_increases), loaded.folder
    loaded.write_profiles(profiles)
    if loaded.folder != before:
        click.echo(
            f"The index of the package stays as it is; {loaded.name} is a copy of yours now, in {loaded.folder}.",
            err=True,
        )
    if plot_path is not None:
        plot(summary, contenders, plot_path)
    manifest = loaded.manifest
    if as_json:
        of_index = {"profiles": profiles_summary(manifest), "default_profile": manifest.default_profile.value}
        print_json({**of_index, "contenders": summary})
        return
    print_table(summary)
    click.echo(f"Profiles of {loaded.name}; the star is the default:")
    for line in profile_lines(manifest, manifest.default_profile):
        click.echo(line)


def _kinds(stored: str, weights: str) -> dict[str, Weights]:
    """Return the types of weights to try, by the names that contenders have for them; ``stored`` is that of the stored ones."""
    from coreinfer_sim.base.settings import Weights

    every = {stored: Weights.STORED, "int8": Weights.INT8, "int4": Weights.INT4}
    return every if weights == "any" else {name: each for name, each in every.items() if each.value == weights}
