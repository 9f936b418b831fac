"""`coreinfer-sim generate`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from coreinfer_sim.base.decode_settings import DecodeConfig, ModelConfig, SamplingConfig, SelectionConfig
from coreinfer_sim.base.errors import ConfigError, PromptError
from coreinfer_sim.base.progress import counted
from coreinfer_sim.base.rows import CorpusReport, Row, check_no_build, describe_corpus, read_lines, read_prompts
from coreinfer_sim.base.settings import CorpusConfig

from . import options
from .console import ConsoleProgress, note_plain_sets, print_json, quiet_libraries, size_text
from .settings import Settings, set_option

if TYPE_CHECKING:
    from coreinfer_sim.generation.text import Generation, Generator

_EFFECTIVE = {
    "score": ("similarity", "hybrid", "stability", "global"),
    "fallback": ("similarity",),
    "keep_ratio": ("similarity", "hybrid", "stability", "global", "random"),
    "read_ratio": ("similarity", "hybrid", "stability", "global", "random", "all"),
}
"""Modes in which a setting does something."""


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "--file", metavar="CORPUS", callback=options.existing, help="Prompts: one a line, or whatever build-index reads."
)
@options.index
@options.model
@options.mode
@options.keep_ratio
@options.read_ratio
@click.option("--chat", is_flag=True, help="Put each prompt into the model's chat template.")
@click.option("--system", metavar="TEXT", help="System message, with --chat.")
@click.option("--compare", is_flag=True, help="Decode densely too, and show both.")
@click.option("--max-new-tokens", type=click.IntRange(1), help="Most new tokens.  [default: 128]")
@click.option("--temperature", type=click.FloatRange(0.0), help="Sample; greedy without a sampling setting.")
@click.option(
    "--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be given several times."
)
@options.engine
@options.weights
@options.exported
@click.option(
    "--memory-budget",
    callback=options.size,
    metavar="SIZE",
    help="Keep to this much memory, such as 2GiB: dense MLP weights stay on disk; on a GPU, whose memory is then counted, "
    "in host memory.  [default: no limit]",
)
@set_option("corpus", "select", "decode", "sample", "model")
@options.as_json
def generate(
    prompt: str | None,
    file: str | None,
    index: str | None,
    model: str | None,
    mode: str | None,
    keep_ratio: float | None,
    read_ratio: float | None,
    chat: bool,
    system: str | None,
    compare: bool,
    max_new_tokens: int | None,
    temperature: float | None,
    stop: tuple[str, ...],
    engine: str | None,
    weights: str | None,
    exported: Path | None,
    memory_budget: int | None,
    settings: Settings,
    as_json: bool,
) -> None:
    """Generate from PROMPT, from the rows of --file, or from the lines of stdin.

    Prefill is dense, unless decode.prefill says otherwise; decode reads only the held neurons.

    \b
    coreinfer-sim generate --index my-index --model ./my-model "How do stars form?"
    coreinfer-sim generate --index my-index --chat --compare --keep-ratio 0.6 "How do stars form?"
    coreinfer-sim generate --index my-index --set sample.top_k=40 --set sample.seed=7 "How do stars form?"
    coreinfer-sim generate --index my-index --engine llamacpp --exported my-ggufs "How do stars form?"
    """
    # 1) settings, and the first prompt
    folder = None if exported is None else str(exported)
    selection = settings.make(SelectionConfig, mode=mode, keep_ratio=keep_ratio, read_ratio=read_ratio)
    selection = selection.resolved(index is not None)
    decode = settings.make(DecodeConfig, engine=engine, weights=weights, exported=folder, memory_budget=memory_budget)
    sampling = settings.make(
        SamplingConfig,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop=stop or None,
        seed=None if "seed" in settings.given("sample") else 0,
    )
    report = CorpusReport()
    prompts = _prompts(prompt, file, settings, report)
    first = next(prompts, None)
    if first is None:
        raise PromptError("no prompt was given, expected an argument, --file with rows, or lines on stdin.")
    ratios = {"keep_ratio": keep_ratio, "read_ratio": read_ratio}
    _note_ineffective(settings, selection, [name for name, ratio in ratios.items() if ratio is not None])
    modes = list(dict.fromkeys([selection.mode.value, *(["dense"] if compare else [])]))
    quiet_libraries()
    # 2) index, model and engine
    from coreinfer_sim.generation.budget import Longest
    from coreinfer_sim.generation.opening import load

    longest = Longest(
        _asked(first, chat, system),
        chat,
        sampling.max_new_tokens,
        sampling.num_beams,
        tuple(modes),
    )
    with ExitStack() as stack:
        progress = ConsoleProgress()
        with progress.waiting("Loading the model; the first time this compiles the decode loops"):
            generator = load(
                index,
                model,
                selection=selection,
                decode=decode,
                loading=settings.make(ModelConfig),
                longest=longest,
                progress=progress,
            )
        stack.enter_context(generator)
        if generator.index is not None and modes[0] in ("similarity", "global") and selection.compensated:
            note_plain_sets(generator.index, selection.keep_ratio)
        # 3) one prompt after the other
        alone = memory_budget is not None and len(modes) > 1
        run = _Runner(generator, sampling, modes, chat, system, shown=not as_json, titled=compare, alone=alone)
        results, n_failed = [], 0
        for number, row in enumerate(itertools.chain([first], prompts)):
            try:
                results.append([each.as_dict() for each in run(row, number)])
            except PromptError as error:  # the other lines are still worth an answer
                if prompt is not None:
                    raise
                click.echo(f"Error: line {number + 1}: {error}", err=True)
                n_failed += 1
    if report.remarks():
        click.echo(f"Note: {file or 'stdin'}: {'; '.join(report.remarks())}.", err=True)
    if as_json:
        flat = results if compare else [runs[0] for runs in results]
        print_json(flat[0] if prompt is not None else flat)
    if n_failed:
        raise PromptError(f"{n_failed} of {n_failed + len(results)} prompts failed; the messages above say why.")


def _note_ineffective(settings: Settings, selection: SelectionConfig, ratios: list[str]) -> None:
    """Say which settings were given that this mode does not look at."""
    for name in (*settings.given("select"), *ratios):
        if selection.mode.value not in _EFFECTIVE.get(name, (selection.mode.value,)):
            click.echo(f"Note: {name} has no effect in mode {selection.mode.value}.", err=True)


def _prompts(prompt: str | None, file: str | None, settings: Settings, report: CorpusReport) -> Iterator[Row]:
    if prompt is not None and file is not None:
        raise click.UsageError("give PROMPT or --file, not both.")
    if file is None and settings.given("corpus"):
        raise click.UsageError(f"corpus.{settings.given('corpus')[0]} does nothing without --file; leave it out.")
    if prompt is not None:
        yield Row("0", options.readable(prompt))
    elif file is not None:
        config = settings.make(CorpusConfig, source=file)
        check_no_build(config)
        click.echo(f"Reading {describe_corpus(config)}.", err=True)
        yield from read_prompts(config, report)
    elif not sys.stdin.isatty():
        yield from read_lines(cast(BufferedIOBase, sys.stdin.buffer), "stdin", report)


def _asked(row: Row, chat: bool, system: str | None) -> Any:
    """Return what a generator takes: a text, or a conversation up to the user's last message."""
    if not row.history:
        return options.messages(options.readable(row.prompt), chat, system)
    if system is not None:
        raise ConfigError("--system was given, but the rows are conversations, which have their own; leave it out.")
    return [turn._asdict() for turn in row.history]


class _Runner:
    """Generates for one prompt in each mode, shown as it comes."""

    def __init__(
        self,
        generator: Generator,
        sampling: SamplingConfig,
        modes: list[str],
        chat: bool,
        system: str | None,
        *,
        shown: bool,
        titled: bool,
        alone: bool,
    ) -> None:
        self._generator, self._sampling, self._modes = generator, sampling, modes
        self._chat, self._system, self._shown = chat, system, shown
        self._titled = titled
        self._alone = alone
        """Whether there is room for the weights of one mode only."""
        self._reported: set[str] = set()

    def __call__(self, row: Row, number: int) -> list[Generation]:
        """Generate; ``number`` of the prompt."""
        asked = _asked(row, self._chat, self._system)
        if self._shown:
            click.echo(("\n" if number else "") + f"> {row.prompt}")
        runs = []
        for mode in self._modes:
            runs.append(self._one(asked, mode))
            if self._alone:
                self._generator.close()
        return runs

    def _one(self, asked: Any, mode: str) -> Generation:
        if self._shown and self._titled:
            click.echo(f"[{mode}]")
        run = self._generator.generate(
            asked,
            self._sampling,
            chat=self._chat,
            mode=mode,
            write=(lambda piece: click.echo(piece, nl=False)) if self._shown else None,
        )
        if self._shown:
            click.echo("")
            click.echo(f"  {_facts(run)}", err=not self._titled)
        if run.not_first is not None and run.not_first not in self._reported:
            self._reported.add(run.not_first)
            click.echo(f"Note: the engine {run.engine} decodes, as {run.not_first}.", err=True)
        return run


def _facts(run: Generation) -> str:
    """Say in one line where the neurons came from, what decoded and what the tokens cost."""
    selection, speed = run.selection, run.tokens_per_second
    parts = [selection.mode]
    if selection.cluster is not None:
        parts.append(f"cluster {selection.cluster} ({selection.label}), similarity {selection.similarity:.3f}")
        if selection.confident is False:
            parts.append("unfamiliar prompt")
    if run.keep_ratio is not None:
        parts.append(f"holds {run.keep_ratio:.2f}")
    if run.read_ratio is not None and selection.read_ratio < 1:
        parts.append(f"reads {run.read_ratio:.2f}")
    elif run.read_ratio is not None and run.skips_zeros:
        parts.append(f"reads {run.read_ratio:.2f}, as the others are zero: nothing is left out")
    parts.append(f"engine {run.engine}" + ("" if run.file is None else f", {run.file}"))
    parts.append(counted(run.n_new_tokens, "token") + ("" if speed is None else f" at {speed:.1f} tokens/s"))
    if run.mlp_bytes_per_token is not None and run.dense_mlp_bytes_per_token is not None:
        read, dense = size_text(run.mlp_bytes_per_token), size_text(run.dense_mlp_bytes_per_token)
        parts.append(f"reads {read} of {dense} MLP weights a token")
    return " · ".join(parts)
