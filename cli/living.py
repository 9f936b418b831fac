"""`coreinfer-sim extend`, `merge`, `recluster` and `diff`: indexes that grow, and what that changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from coreinfer_sim.base.decode_settings import ModelConfig
from coreinfer_sim.base.progress import counted
from coreinfer_sim.base.settings import CorpusConfig

from . import options
from .console import ConsoleProgress, print_json, quiet_libraries
from .inspect import index_summary, print_clusters
from .settings import Settings, set_option

if TYPE_CHECKING:
    from coreinfer_sim.index.index import SemanticIndex

_out = click.option(
    "-o", "--out", required=True, metavar="NAME", help="A name in your data folder, or a path with a separator."
)
_model = click.option(
    "--model", metavar="NAME", help="Where the index's model lies now.  [default: where the index says]"
)
_prompt_column = click.option("--prompt-column", metavar="COLUMN", help="As for build-index.")
_template = click.option("--template", callback=options.template_text, metavar="TEXT", help="As for build-index.")
_limit = click.option("--limit", type=click.IntRange(1), metavar="N", help="Use at most N prompts.")
_workers = click.option("--workers", type=click.IntRange(1), metavar="N", help="Processes.  [default: fill the cores]")
_force = click.option("--force", is_flag=True, help="Replace an index that is there.")
_quiet = click.option("--quiet", is_flag=True, help="No messages and no progress.")


@contextmanager
def place_of(out: str, force: bool, named: bool = False) -> Iterator[Path]:
    """Yield where a new index goes, in a folder that is there; what is made for an address is put there when the block ends.

    Args:
        out: a name, a path or an address.
        force: whether an index at that address may be replaced.
        named: whether it is a name, even if there is such a folder here.
    """
    from coreinfer_sim.base.stores import is_address
    from coreinfer_sim.index.names import indexes_folder, place_of_new
    from coreinfer_sim.index.remote import put_at

    if is_address(out):
        if out.startswith("memory://"):
            click.echo(f"Note: {out} is memory of this process, and is gone when the command ends.", err=True)
        with put_at(out, force) as place:
            yield place
        return
    place = indexes_folder() / out if named else place_of_new(out)
    if place.parent == indexes_folder():
        place.parent.mkdir(parents=True, exist_ok=True)
    yield place


def print_index(index: SemanticIndex, name: str, as_json: bool) -> None:
    """Print what a command has made: how many clusters over how many prompts, and which."""
    if as_json:
        print_json(index_summary(index))
        return
    click.echo(f"{name}: {counted(len(index), 'cluster')} over {counted(index.manifest.corpus.n_sentences, 'prompt')}")
    print_clusters(index)


@click.command()
@click.argument("index", type=options.INDEX)
@click.argument("corpus")
@click.option("-o", "--out", metavar="NAME", help="Leave INDEX as it is, and write the new one here.")
@_model
@_prompt_column
@_template
@_limit
@_workers
@_force
@_quiet
@set_option("corpus", "model")
@options.as_json
def extend(
    index: str,
    corpus: str,
    out: str | None,
    model: str | None,
    prompt_column: str | None,
    template: str | None,
    limit: int | None,
    workers: int | None,
    force: bool,
    quiet: bool,
    settings: Settings,
    as_json: bool,
) -> None:
    """Add CORPUS to INDEX. Only its own texts pass through the model; their sums are added to those that are there.

    Clusters and settings stay those of INDEX. Broken off, it is continued by the same command.

    \b
    coreinfer-sim extend my-index new-prompts.jsonl
    """
    of_corpus = settings.make(CorpusConfig, source=corpus, prompt_column=prompt_column, template=template, limit=limit)
    loading = settings.make(ModelConfig)
    from coreinfer_sim.base.stores import is_address
    from coreinfer_sim.building.extending import extend as extended
    from coreinfer_sim.index.index import SemanticIndex

    quiet_libraries()
    loaded = SemanticIndex.load(index)
    if out is None and is_address(index):
        out, force = index, True
    with nullcontext() if out is None else place_of(out, force) as place:
        found = extended(
            loaded,
            of_corpus,
            place,
            model=model,
            device=loading.device,
            workers=workers,
            force=force,
            progress=ConsoleProgress(quiet),
        )
    print_index(found, out or index, as_json)


@click.command()
@click.argument("indexes", nargs=-1, required=True, type=options.INDEX, metavar="INDEX...")
@_out
@_force
@_quiet
@options.as_json
def merge(indexes: tuple[str, ...], out: str, force: bool, quiet: bool, as_json: bool) -> None:
    """Add indexes up that were built over other texts by the same model and centroids (build.centroids).

    \b
    coreinfer-sim build-index march.jsonl --model ./my-model --set build.centroids=my-index --out march
    coreinfer-sim merge my-index march -o both
    """
    from coreinfer_sim.building.merging import merge as merged
    from coreinfer_sim.index.index import SemanticIndex

    loaded = [SemanticIndex.load(each) for each in indexes]
    with place_of(out, force) as place:
        found = merged(loaded, place, force, ConsoleProgress(quiet))
    print_index(found, out, as_json)


@click.command()
@click.argument("index", type=options.INDEX)
@click.option("--clusters", required=True, type=click.IntRange(1), metavar="N", help="Fewer than INDEX has, or more.")
@_out
@click.option("--corpus", help="For more: the corpus that INDEX was built over, read as it was.")
@_model
@_prompt_column
@_template
@_limit
@_workers
@_force
@_quiet
@set_option("corpus", "model")
@options.as_json
def recluster(
    index: str,
    clusters: int,
    out: str,
    corpus: str | None,
    model: str | None,
    prompt_column: str | None,
    template: str | None,
    limit: int | None,
    workers: int | None,
    force: bool,
    quiet: bool,
    settings: Settings,
    as_json: bool,
) -> None:
    """Join clusters of INDEX until there are N, without texts and model: their sums are added up. Or split them with its corpus.

    \b
    coreinfer-sim recluster my-index --clusters 8 -o coarse
    coreinfer-sim recluster my-index --clusters 32 --corpus prompts.jsonl -o fine
    """
    of_corpus = None
    if corpus is not None:
        of_corpus = settings.make(
            CorpusConfig, source=corpus, prompt_column=prompt_column, template=template, limit=limit
        )
    loading = settings.make(ModelConfig)
    from coreinfer_sim.building.joining import recluster as joined
    from coreinfer_sim.building.splitting import split
    from coreinfer_sim.index.index import SemanticIndex

    quiet_libraries()
    loaded, progress = SemanticIndex.load(index), ConsoleProgress(quiet)
    with place_of(out, force) as place:
        if of_corpus is not None and clusters > len(loaded):
            found = split(
                loaded,
                clusters,
                of_corpus,
                place,
                model=model,
                device=loading.device,
                workers=workers,
                force=force,
                progress=progress,
            )
        else:
            found = joined(loaded, clusters, place, force, progress)
    print_index(found, out, as_json)


@click.command()
@click.argument("before", type=options.INDEX)
@click.argument("now", type=options.INDEX)
@options.as_json
def diff(before: str, now: str, as_json: bool) -> None:
    """Show what changed from the index BEFORE to the index NOW: parts, texts of each topic, and its neurons.

    \b
    coreinfer-sim diff my-index both
    """
    from coreinfer_sim.index.index import SemanticIndex
    from coreinfer_sim.reporting.differences import differences

    found = differences(SemanticIndex.load(before), SemanticIndex.load(now))
    if as_json:
        print_json({"before": before, "now": now, **asdict(found)})
        return
    for name, was, is_now in found.facts:
        click.echo(f"{name}: {was} → {is_now}")
    changed = [topic for topic in found.topics if not topic.is_same]
    if found.topics:
        click.echo(f"{counted(len(found.topics), 'topic')}, {len(changed)} changed:")
    for topic in changed:
        kept = "" if topic.in_common is None else f"  {topic.in_common:.0%} of its neurons as before"
        old = "" if topic.id == topic.was else f", topic {topic.was} before"
        click.echo(f"  {topic.id:4d}  {topic.size_was:,d} → {topic.size:,d} prompts{old}{kept}  {topic.label}")
    if found.gone:
        click.echo(f"Topics before that none is now: {', '.join(map(str, found.gone))}.")
    if found.note:
        click.echo(found.note)
