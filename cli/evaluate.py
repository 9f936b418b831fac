"""`coreinfer-sim evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from coreinfer_sim.base.decode_settings import DecodeConfig, ModelConfig, Prefill
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import CorpusConfig

from . import options
from .console import ConsoleProgress, print_json, quiet_libraries, status
from .settings import Settings, set_option
from .tables import print_set_table, print_table, print_text_table

if TYPE_CHECKING:
    from coreinfer_sim.base.rows import Row
    from coreinfer_sim.evaluation.contenders import Contender
    from coreinfer_sim.evaluation.results import Result
    from coreinfer_sim.index.index import SemanticIndex
    from coreinfer_sim.models.loading import LanguageModel

_NAMES = [
    "dense",
    "all",
    "random",
    "random-cluster",
    "global",
    "similarity",
    "hybrid",
    "stability",
    "griffin",
    "oracle",
]


@click.command()
@click.argument("sets", nargs=-1, required=True, callback=options.existing)
@options.model
@options.index
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
    help="Precision of all weights: 16bit, stored, int8, int4, q8_0, q4_0, or a GGUF file of the same model, which stands in the "
    "table densely; may be repeated.  [default: 16bit; unless contenders are named, dense in int8 and q4_0 too]",
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
    """Score ways of choosing neurons on SETS: whatever build-index reads, with prompts and completions, or conversations.

    Ids, where there are some, decide which rows --part takes. Prefill is dense unless decode.prefill says otherwise, decode
    forced sparse, by the engine that decodes; the completion's tokens from the second on are scored. With --generate, texts
    are generated in place of the completions and compared with them: exact match, F1, ROUGE-L, BLEU and chrF.

    \b
    coreinfer-sim evaluate gsm8k.jsonl squad.jsonl --model ./my-model --index my-index --part 85:100 \\
        --contender dense --contender similarity --contender griffin --keep-ratio 0.4 --keep-ratio 0.6
    """
    from coreinfer_sim.base.files import check_folder, write_json
    from coreinfer_sim.base.plots import check_plot
    from coreinfer_sim.evaluation.plot import plot
    from coreinfer_sim.evaluation.results import check_scored
    from coreinfer_sim.evaluation.rows import read_sets
    from coreinfer_sim.evaluation.summary import summarise
    from coreinfer_sim.evaluation.text_scores import check_text_scores
    from coreinfer_sim.generation.opening import model_name, open_index, open_model

    # 1) what would fail at the end is looked at first
    quiet_libraries()
    if plot_path is not None:
        check_plot(plot_path)
    for path in (out, log):
        if path is not None:
            check_folder(path)
    if generate:
        check_text_scores()
    decode, loading = settings.make(DecodeConfig), settings.make(ModelConfig)
    rows = read_sets(sets, part, limit, settings.make(CorpusConfig, source=""), ConsoleProgress())
    index = options.index_of(index, model)
    opened = open_index(index, loading.encoder)
    name = model_name(opened, model)
    # 2) who is compared
    chosen = _contenders(opened, contenders, keep_ratios, read_ratios, scores, weights, fallbacks, decode)
    with status("Loading the model"):
        language_model = open_model(opened, name, loading, decode, ConsoleProgress())
    chosen = _able(language_model, chosen, decode, named=bool(contenders or weights))
    # 3) scores, and what they add up to
    most = max_new_tokens if generate else None
    results = score_with_log(
        language_model, chosen, rows, opened, decode, seed=seed, max_tokens=max_tokens, log=log, max_new_tokens=most
    )
    check_scored(results, len(rows))
    summary = summarise(results, seed, generated=generate)
    if out is not None:
        write_json(out, {"model": name, "index": index, "contenders": summary})
    if plot_path is not None:
        plot(summary, chosen, plot_path)
    if as_json:
        print_json(summary)
        return
    print_table(summary)
    if per_set:
        print_set_table(summary)
    if generate:
        print_text_table(summary)


def _contenders(
    index: SemanticIndex | None,
    contenders: tuple[str, ...],
    keep_ratios: tuple[float, ...],
    read_ratios: tuple[float, ...],
    scores: tuple[str, ...],
    weights: tuple[str, ...],
    fallbacks: tuple[str, ...],
    decode: DecodeConfig,
) -> list[Contender]:
    """Return the contenders that were named, or those that are worth comparing."""
    from coreinfer_sim.evaluation.contenders import (
        FITTED,
        NEED_INDEX,
        READS_PROMPT,
        check_known_before,
        parse_contenders,
    )

    sparse_prefill = decode.prefill is Prefill.SPARSE
    excluded = (*(NEED_INDEX if index is None else ()), *(READS_PROMPT if sparse_prefill else ()))
    if not read_ratios:
        excluded = (*excluded, "all")  # which is then dense
    names = contenders or [name for name in _NAMES if name not in excluded]
    fitted = [] if index is None else [info.keep_ratio for info in index.manifest.compensation]
    ratios, kinds = keep_ratios or fitted or [0.4], weights or ["16bit"]
    found = parse_contenders(names, ratios, scores or ["energy"], kinds, fallbacks, read_ratios)
    if index is not None and not contenders and not scores:
        there = [ratio for ratio in ratios if index.manifest.holds_sets(ratio)]
        found += parse_contenders([name for name in FITTED if there], there, ["compensated"], kinds, fallbacks)
    if not contenders and not weights:  # what one would take instead of any of them
        found += parse_contenders(["dense"], [1.0], ["energy"], ["int8", "q4_0"])
    if sparse_prefill:
        check_known_before(found)
    return found


def _able(
    language_model: LanguageModel, contenders: list[Contender], decode: DecodeConfig, *, named: bool
) -> list[Contender]:
    """Leave out int8 weights where no engine has them, unless they were named."""
    from coreinfer_sim.base.settings import Weights
    from coreinfer_sim.engines.registry import check_engine

    if named or not any(contender.weights == "int8" for contender in contenders):
        return contenders
    try:
        check_engine(language_model.model, replace(decode, weights=Weights.INT8))
    except ConfigError as error:
        click.echo(f"Note: int8 weights are left out, as {error}", err=True)
        return [contender for contender in contenders if contender.weights != "int8"]
    return contenders


def score_with_log(
    language_model: LanguageModel,
    contenders: Sequence[Contender],
    rows: Sequence[Row],
    index: SemanticIndex | None,
    decode: DecodeConfig,
    *,
    seed: int,
    max_tokens: int | None,
    log: Path | None,
    max_new_tokens: int | None = None,
) -> list[Result]:
    """Score contenders on rows; a ``log`` keeps what is finished, and a later run goes on from it.

    Returns:
        The results in the order of the contenders.
    """
    from coreinfer_sim.evaluation.results import open_log, read_results
    from coreinfer_sim.evaluation.run import evaluate as run
    from coreinfer_sim.evaluation.run import most_tokens
    from coreinfer_sim.models.fingerprint import weights_checksum

    most = most_tokens(language_model, max_tokens)
    setup = {
        "model": weights_checksum(language_model.layers),
        "dtype": language_model.dtype_name,
        "index": index.manifest.identity() if index is not None else None,  # no score's business
        "max_tokens": most,
        "seed": seed,
        "engine": decode.engine,
        "prefill": "sparse" if decode.prefill is Prefill.SPARSE else None,
    }
    wanted = {(str(c), row.set_name, row.id) for c in contenders for row in rows}
    with open_log(log, setup) if log else nullcontext() as file:
        known = [r for r in (read_results(log) if log else []) if (r.contender, r.set_name, r.row_id) in wanted]
        results = run(
            language_model,
            contenders,
            rows,
            index,
            decode=decode,
            max_tokens=most,
            max_new_tokens=max_new_tokens,
            seed=seed,
            finished=known,
            log=file,
            progress=ConsoleProgress(),
        )
    order = [str(contender) for contender in contenders]
    return sorted(results, key=lambda result: order.index(result.contender))  # a log may hold them in another
