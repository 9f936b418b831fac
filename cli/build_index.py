"""`coreinfer-sim build-index`."""

from __future__ import annotations

from pathlib import Path

import click

from coreinfer_sim.base.decode_settings import ModelConfig
from coreinfer_sim.base.scale_settings import ScaleConfig
from coreinfer_sim.base.settings import BuildConfig, CompensationConfig, CorpusConfig

from . import options
from .console import ConsoleProgress, quiet_libraries
from .living import place_of, print_index
from .settings import Settings, set_option


def _clusters(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == "auto":
        return value
    if not value.isdecimal():
        raise click.BadParameter(f"{value!r} is neither a number nor 'auto'.")
    return int(value)


@click.command("build-index")
@click.argument("corpus")
@click.option(
    "--model",
    required=True,
    callback=options.reachable,
    metavar="NAME",
    help="Hub id, checkpoint folder or GGUF file.",
)
@click.option(
    "--out",
    metavar="NAME",
    help="A name, under which the index goes into your data folder, or a path with a separator.  [default: named after CORPUS]",
)
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
@click.option("--clusters", callback=_clusters, metavar="N|auto", help="Semantic clusters.  [default: auto]")
@click.option(
    "--compensate", is_flag=True, help="Fit each cluster's held neurons so that they make up for the dropped ones."
)
@click.option(
    "--keep-ratio",
    "keep_ratios",
    type=float,
    multiple=True,
    help="For --compensate: share of the MLP bytes that decode reads; may be repeated.  [default: 0.4]",
)
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Processes.  [default: fill the cores]")
@click.option(
    "--threads", type=click.IntRange(1), metavar="N", help="Threads of each process.  [default: a quarter of the cores]"
)
@click.option("--force", is_flag=True, help="Replace an index; start a broken-off build of other settings anew.")
@click.option("--quiet", is_flag=True, help="No plan and no progress.")
@set_option("corpus", "build", "compensate", "model", "scale")
@options.as_json
def build_index(
    corpus: str,
    model: str,
    out: str | None,
    prompt_column: str | None,
    template: str | None,
    limit: int | None,
    clusters: int | str | None,
    compensate: bool,
    keep_ratios: tuple[float, ...],
    workers: int | None,
    threads: int | None,
    force: bool,
    quiet: bool,
    settings: Settings,
    as_json: bool,
) -> None:
    """Build an index over a corpus.

    CORPUS is a .jsonl, .json, .csv, .parquet or .txt file, a folder of these, or a hub id. A build that was broken off is
    continued by the same command.

    \b
    coreinfer-sim build-index prompts.jsonl --model ./my-model
    coreinfer-sim build-index rajpurkar/squad --prompt-column question \\
        --template 'Question: {question}\\nContext: {context}' --limit 2000 --model ./my-model --out ./squad-index
    """
    if not compensate and (keep_ratios or settings.given("compensate")):
        named = "--keep-ratio" if keep_ratios else f"compensate.{settings.given('compensate')[0]}"
        raise click.UsageError(f"{named} does nothing without --compensate; add that or leave it out.")
    of_corpus = settings.make(
        CorpusConfig,
        source=corpus,
        prompt_column=prompt_column,
        template=template,
        limit=limit,
    )
    compensation = settings.make(CompensationConfig, keep_ratios=keep_ratios or None) if compensate else None
    config = settings.make(BuildConfig, clusters=clusters, compensation=compensation)
    loading = settings.make(ModelConfig)

    from coreinfer_sim.base.corpus_files import check_there
    from coreinfer_sim.base.files import is_vacant
    from coreinfer_sim.base.rows import describe_corpus
    from coreinfer_sim.base.stores import is_address
    from coreinfer_sim.index.names import indexes_folder, name_for

    quiet_libraries()
    progress = ConsoleProgress(quiet)
    with place_of(name_for(corpus) if out is None else out, force, named=out is None) as place:
        # what is wrong with a corpus is said before torch is imported, which takes seconds; of a place that is taken the build
        # says more, and first
        if is_vacant(place) and Path(corpus).exists():
            describe_corpus(of_corpus)
        elif is_vacant(place):
            check_there(corpus)
        from coreinfer_sim.building.build import build_index as build
        from coreinfer_sim.index.encoder import DEFAULT_ENCODER

        is_named = place.parent == indexes_folder()
        if is_named:
            progress.say(f"The index is called {place.name}, and goes to {place}.")
        index = build(
            model,
            of_corpus,
            place,
            config,
            encoder=loading.encoder or DEFAULT_ENCODER,
            dtype=loading.dtype,
            device=loading.device,
            workers=workers,
            threads=threads,
            scale=settings.make(ScaleConfig),
            force=force,
            progress=progress,
        )
    shown = out if out is not None and is_address(out) else place.name if is_named else str(place)
    print_index(index, shown, as_json)
