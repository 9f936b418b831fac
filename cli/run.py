"""`coreinfer-sim run`, the command that is meant where none is named."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import click

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.rows import CorpusReport

from .answering import Asking, answer, decoding_options, typed_prompts

MOST = 512
"""New tokens of an answer where the user names no number."""


@click.command()
@click.argument("prompt", required=False)
@click.option("--raw", is_flag=True, help="Continue the text as it is, without the model's chat template.")
@decoding_options
def run(prompt: str | None, raw: bool, **given: Any) -> None:
    """Answer a prompt, or each line of stdin, or chat.

    Without PROMPT it chats on a terminal.

    Prompts go through the model's chat template where it has one.

    \b
    coreinfer-sim run "How do stars form?"
    coreinfer-sim "How do stars form?"
    coreinfer-sim run --profile fast "How do stars form?"
    coreinfer-sim run --index my-index --compare "How do stars form?"
    coreinfer-sim
    """
    asking, report = Asking(**given, most=MOST, shorten=True), CorpusReport()
    if raw and asking.system is not None:
        raise click.UsageError("--system needs the chat template, which --raw leaves out; give one of them.")
    if asking.settings.given("corpus"):
        raise click.UsageError(
            f"corpus.{asking.settings.given('corpus')[0]} is of files, which 'generate --file' reads."
        )
    _ = asking.selection, asking.decode, asking.sampling  # what is wrong with them is said before anything is read
    if prompt is None and sys.stdin.isatty():
        _chat(asking, raw)
    else:
        prompts = typed_prompts(prompt, report)
        answer(
            asking,
            prompts,
            report,
            "stdin",
            chat=False if raw else None,
            alone=prompt is not None,
            headed=prompt is None,
        )


def _chat(asking: Asking, raw: bool) -> None:
    """Chat on the terminal."""
    if asking.as_json or asking.compare:
        raise click.UsageError("--json and --compare are of single prompts; in a chat, /dense answers again densely.")
    if asking.memory_budget is not None:
        raise ConfigError("a memory budget is planned for one text, but a chat grows; give a prompt, or leave it out.")
    from .chat import Chat, typed_lines

    asking.note_ineffective()
    with Chat(asking.open(), asking.sampling, asking.system, raw=raw, reopen=partial(asking.open, "", False)) as chat:
        click.echo(f"{chat.name} · /help lists the commands, /exit or Ctrl-D ends.", err=True)
        chat.talk(typed_lines())
