"""`coreinfer-sim generate`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from coreinfer_sim.base.rows import CorpusReport, Row, check_no_build, describe_corpus, read_prompts
from coreinfer_sim.base.settings import CorpusConfig

from . import options
from .answering import Asking, answer, decoding_options, typed_prompts
from .settings import Settings


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "--file", metavar="CORPUS", callback=options.existing, help="Prompts: one a line, or whatever build-index reads."
)
@click.option("--chat", is_flag=True, help="Put each prompt into the model's chat template.")
@decoding_options
def generate(prompt: str | None, file: str | None, chat: bool, **given: Any) -> None:
    """Continue a prompt, or each of a file or of stdin.

    Prefill is dense, unless decode.prefill says otherwise; decode reads only the held neurons.

    \b
    coreinfer-sim generate --index my-index --model ./my-model "How do stars form?"
    coreinfer-sim generate --index my-index --chat --compare --profile fast "How do stars form?"
    coreinfer-sim generate --index my-index --set sample.top_k=40 --set sample.seed=7 "How do stars form?"
    coreinfer-sim generate --index my-index --engine llamacpp --set decode.exported=my-ggufs "How do stars form?"
    """
    asking, report = Asking(**given), CorpusReport()
    _ = asking.selection, asking.decode, asking.sampling  # what is wrong with them is said before anything is read
    prompts = _prompts(prompt, file, asking.settings, report)
    answer(asking, prompts, report, file or "stdin", chat=chat, alone=prompt is not None, headed=True)


def _prompts(prompt: str | None, file: str | None, settings: Settings, report: CorpusReport) -> Iterator[Row]:
    if prompt is not None and file is not None:
        raise click.UsageError("give PROMPT or --file, not both.")
    if file is None and settings.given("corpus"):
        raise click.UsageError(f"corpus.{settings.given('corpus')[0]} does nothing without --file; leave it out.")
    if file is None:
        yield from typed_prompts(prompt, report)
        return
    config = settings.make(CorpusConfig, source=file)
    check_no_build(settings.given_alone().make(CorpusConfig, source=file))
    click.echo(f"Reading {describe_corpus(config)}.", err=True)
    yield from read_prompts(config, report)
