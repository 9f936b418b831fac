"""`coreinfer-sim evaluate`."""

from __future__ import annotations

from pathlib import Path

import click

from coreinfer_sim.base.decode_settings import DecodeConfig, ModelConfig
from coreinfer_sim.base.settings import CorpusConfig

from . import options
from .console import ConsoleProgress, print_json, quiet_libraries
from .settings import Settings, set_option
from .tables import print_set_table, print_table, print_text_table

_NAMES = (
    *("dense", "all", "random", "random-cluster", "global", "similarity", "hybrid", "stability", "griffin", "oracle"),
    *("balanced", "fast"),
)


@click.command()
@click.argument("sets", nargs=-1, required=True, callback=options.existing)
@options.model
@options.index
@click.option(
    "--contender",
    "contenders",
    multiple=True,
    metavar="NAME",
    help=f"{', '.join(_NAMES[:-2])}; the profiles {' and '.join(_NAMES[-2:])}; or a way as the table names it, such as "
    "'similarity/compensated else global'. May be repeated.  [default: all but the profiles]",
)
@click.option(
    "--keep-ratio",
    "keep_ratios",
    multiple=True,
    type=float,
    help="May be repeated.  [default: those that the index compensates; else 0.4]",
)
@click.option(
    "--read-ratio",
    "read_ratios",
    multiple=True,
    type=float,
    help="Share of neurons that each token reads, of all contenders but dense; may be repeated.  [default: 1]",
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
    show_default=True,
    help="What similarity does for unfamiliar prompts; may be repeated.",
)
@click.option(
    "--weights",
    multiple=True,
    metavar="TYPE",
    help="Precision of all weights: 16bit, stored, int8, int4, q8_0 or q4_0. A GGUF file of the same model stands in the table "
    "densely. May be repeated.  [default: 16bit; unless contenders are named, dense in int8 and q4_0 too]",
)
@options.part("0:100")
@click.option("--limit", type=click.IntRange(1), default=40, show_default=True, help="Rows of each set.")
@options.max_tokens
@click.option("--generate", is_flag=True, help="Also generate texts and score them against the completions.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=64, show_default=True, help="Most tokens of a generated text."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of random choices and of the bootstrap.")
@options.log
@click.option("--per-set", is_flag=True, help="Also print a line for each contender and set.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the summary as JSON.")
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw quality over bytes a token into this .html, .png or .svg file.",
)
@set_option("corpus", "decode", "model")
@options.as_json
def evaluate(
    sets: tuple[str, ...],
    model: str | None,
    index: str | None,
    contenders: tuple[str, ...],
    keep_ratios: tuple[float, ...],
    read_ratios: tuple[float, ...],
    scores: tuple[str, ...],
    fallbacks: tuple[str, ...],
    weights: tuple[str, ...],
    part: range,
    limit: int,
    max_tokens: int | None,
    generate: bool,
    max_new_tokens: int,
    seed: int,
    log: Path | None,
    per_set: bool,
    out: Path | None,
    plot_path: Path | None,
    settings: Settings,
    as_json: bool,
) -> None:
    """Score ways of choosing neurons, on texts.

    SETS are whatever build-index reads, with prompts and completions, or conversations. Ids, where there are some, decide which
    rows --part takes. Prefill is dense unless decode.prefill says otherwise. The completion's tokens are scored from the second
    on, by the engine that decodes. With --generate, texts are also generated and compared with the completions. Scores are exact
    match, F1, ROUGE-L, BLEU and chrF.

    \b
    coreinfer-sim evaluate gsm8k.jsonl squad.jsonl --model ./my-model --index my-index --part 85:100 \\
        --contender dense --contender similarity --contender griffin --keep-ratio 0.4 --keep-ratio 0.6
    """
    from coreinfer_sim.base.files import check_folder, write_json
    from coreinfer_sim.base.plots import check_plot
    from coreinfer_sim.evaluation.compare import evaluate as run
    from coreinfer_sim.evaluation.plot import plot

    quiet_libraries()
    if plot_path is not None:
        check_plot(plot_path)
    for path in (out, log):
        if path is not None:
            check_folder(path)
    index = options.index_of(index, model)
    found = run(
        sets,
        index,
        model,
        contenders=contenders,
        keep_ratios=keep_ratios,
        read_ratios=read_ratios,
        scores=scores,
        weights=weights,
        fallbacks=fallbacks,
        part=part,
        limit=limit,
        max_tokens=max_tokens,
        max_new_tokens=max_new_tokens if generate else None,
        seed=seed,
        log=log,
        corpus=settings.make(CorpusConfig, source=""),
        decode=settings.make(DecodeConfig),
        loading=settings.make(ModelConfig),
        progress=ConsoleProgress(),
    )
    if out is not None:
        write_json(out, {"model": found.model, "index": index, "contenders": found.summary})
    if plot_path is not None:
        plot(found.summary, found.contenders, plot_path)
    if as_json:
        print_json(found.summary)
        return
    print_table(found.summary)
    if per_set:
        print_set_table(found.summary)
    if generate:
        print_text_table(found.summary)
