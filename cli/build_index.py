"""`coreinfer-sim build-index`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from coreinfer_sim.base.progress import counted

from . import options
from .console import ConsoleProgress, print_json, quiet_libraries

_D = {"show_default": True}
_OF_COMPENSATION = ("keep_ratios", "budget", "ranking", "compensate_tokens", "distil_tokens", "distil_from")


def _clusters(_ctx: click.Context, _param: click.Parameter, value: str) -> int | str:
    if value == "auto":
        return value
    if not value.isdecimal():
        raise click.BadParameter(f"{value!r} is neither a number nor 'auto'.")
    return int(value)


def _refuse_compensation_options(ctx: click.Context) -> None:
    """Raise UsageError for an option that says how to compensate where nothing is to be compensated."""
    for parameter in ctx.command.params:
        given = ctx.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
        if parameter.name in _OF_COMPENSATION and given:
            raise click.UsageError(f"{parameter.opts[0]} does nothing without --compensate; add that or leave it out.")


@click.command("build-index")
@click.argument("corpus")
@click.option("--model", required=True, metavar="NAME", help="Hub id, checkpoint folder or GGUF file.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Index folder to make.")
@click.option("--name", help="Configuration of a hub data set.")
@click.option("--split", default="train", **_D, help="Split of a hub data set or save_to_disk folder.")
@click.option(
    "--prompt-column", metavar="COLUMN", help="Column to embed.  [default: prompt, text, the only one, or the template]"
)
@click.option(
    "--template",
    callback=options.template_text,
    metavar="TEXT",
    help="What the language model reads, such as 'Question: {question}\\nAnswer: {answer}'.  [default: the prompt]",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Use at most N prompts.")
@click.option(
    "--max-tokens", type=click.IntRange(2), default=512, **_D, help="Cut longer texts; the report counts them."
)
@click.option("--deduplicate/--keep-duplicates", default=True, **_D, help="Drop rows whose text has been seen.")
@click.option("--clusters", default="auto", callback=_clusters, metavar="N|auto", **_D, help="Semantic clusters.")
@click.option("--alpha", type=float, default=0.4, **_D, help="Share of positive activations: token-wise core.")
@click.option("--beta", type=float, default=0.4, **_D, help="Share of d_ff: sentence-wise core.")
@click.option("--gamma", type=float, default=0.8, **_D, help="Default keep ratio of the index; free to change later.")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, **_D, help="Of clustering and of the texts' order."
)
@click.option("--layers", default=":", **_D, metavar="SLICE", help="Layers to record, such as '4:'.")
@click.option("--batch-size", type=click.IntRange(1), default=16, **_D, help="Texts in one forward pass.")
@click.option("--shard-size", type=click.IntRange(1), default=64, **_D, help="Texts in one shard.")
@click.option(
    "--compensate",
    is_flag=True,
    help="Fit each cluster's kept neurons so that they make up for the dropped ones.",
)
@click.option(
    "--keep-ratio",
    "keep_ratios",
    type=float,
    multiple=True,
    default=(0.4,),
    **_D,
    help="For --compensate: share of the MLP bytes that decode reads; may be repeated.",
)
@click.option(
    "--budget",
    type=click.Choice(["uniform", "sensitivity"]),
    default="sensitivity",
    **_D,
    help="For --compensate: the same share of every layer, or more where it was measured to matter.",
)
@click.option(
    "--ranking",
    type=click.Choice(["surgeon", "energy"]),
    default="surgeon",
    **_D,
    help="For --compensate: rank neurons by what compensation cannot repair, or by energy.",
)
@click.option(
    "--compensate-tokens",
    type=click.IntRange(1),
    default=20_000,
    **_D,
    metavar="N",
    help="For --compensate: tokens to fit each cluster's set on.",
)
@click.option(
    "--distil-tokens",
    type=click.IntRange(0),
    default=0,
    **_D,
    metavar="N",
    help="For --compensate: tokens to train each cluster's set on afterwards, to predict what the dense model does.",
)
@click.option(
    "--distil-from",
    type=click.Choice(["cluster", "corpus", "joint"]),
    default="cluster",
    **_D,
    help="For --distil-tokens: begin with the set fitted to the cluster; with the whole corpus's trained set; or with "
    "the sets fitted to the clusters, all of which share what they learn.",
)
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Processes.  [default: fill the cores]")
@click.option(
    "--threads", type=click.IntRange(1), metavar="N", help="Threads of each process.  [default: a quarter of the cores]"
)
@options.encoder
@options.model_options
@click.option("--force", is_flag=True, help="Replace an index; start a broken-off build of other settings anew.")
@click.option("--quiet", is_flag=True, help="No plan and no progress.")
@options.as_json
@click.pass_context
def build_index(
    ctx: click.Context, corpus: str, out: Path, model: str, as_json: bool, quiet: bool, **given: Any
) -> None:
    """Build an index over CORPUS: a hub id, a .jsonl, .json, .csv, .parquet or .txt file, or a save_to_disk folder.

    A build that was broken off is continued by the same command.

    \b
    coreinfer-sim build-index prompts.jsonl --model ./my-model --out my-index
    coreinfer-sim build-index rajpurkar/squad --prompt-column question \\
        --template 'Question: {question}\\nContext: {context}' --limit 2000 --model ./my-model --out squad-index
    """
    from coreinfer_sim.base.settings import Budget, BuildConfig, CompensationConfig, CorpusConfig, Ranking, Start
    from coreinfer_sim.building.build import build_index as build
    from coreinfer_sim.index.encoder import DEFAULT_ENCODER

    quiet_libraries()
    of_corpus = ("name", "split", "prompt_column", "template", "limit", "max_tokens", "deduplicate")
    of_build = ("clusters", "alpha", "beta", "gamma", "seed", "layers", "batch_size", "shard_size")
    compensation = None
    if not given["compensate"]:
        _refuse_compensation_options(ctx)
    else:
        if not given["distil_tokens"] and ctx.get_parameter_source("distil_from") is not ParameterSource.DEFAULT:
            raise click.UsageError("--distil-from does nothing without --distil-tokens.")
        compensation = CompensationConfig(
            keep_ratios=given["keep_ratios"],
            ranking=Ranking(given["ranking"]),
            budget=Budget(given["budget"]),
            tokens=given["compensate_tokens"],
            distil_tokens=given["distil_tokens"],
            distil_from=Start(given["distil_from"]),
        )
    index = build(
        model,
        CorpusConfig(corpus, **{name: given[name] for name in of_corpus}),
        out,
        BuildConfig(**{name: given[name] for name in of_build}, compensation=compensation),
        encoder=given["encoder"] or DEFAULT_ENCODER,
        dtype=given["dtype"],
        device=given["device"],
        workers=given["workers"],
        threads=given["threads"],
        force=given["force"],
        progress=ConsoleProgress(quiet),
    )
    if as_json:
        from .inspect import index_summary

        print_json(index_summary(index))
        return
    from .inspect import print_clusters

    click.echo(f"{out}: {counted(len(index), 'cluster')} over {counted(index.manifest.corpus.n_sentences, 'prompt')}")
    print_clusters(index)
