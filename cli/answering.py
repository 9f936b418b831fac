"""What `run` and `generate` share: their options, what they open, and how answers are shown."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BufferedIOBase
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from coreinfer_sim.base.decode_settings import DecodeConfig, ModelConfig, SamplingConfig, SelectionConfig
from coreinfer_sim.base.errors import ConfigError, PromptError
from coreinfer_sim.base.progress import counted
from coreinfer_sim.base.rows import CorpusReport, Row, read_lines
from coreinfer_sim.base.settings import Profile

from . import options
from .console import ConsoleProgress, note_plain_sets, print_json, quiet_libraries, size_text
from .profiles import chosen_profile, profile_option
from .settings import Settings, set_option

if TYPE_CHECKING:
    from coreinfer_sim.generation.text import Generation, Generator

F = TypeVar("F", bound=Callable[..., Any])

_EFFECTIVE = {
    "score": ("similarity", "hybrid", "stability", "global"),
    "fallback": ("similarity",),
    "keep_ratio": ("similarity", "hybrid", "stability", "global", "random"),
    "read_ratio": ("similarity", "hybrid", "stability", "global", "random", "all"),
}
"""Modes in which a setting does something."""

_OPTIONS = (
    options.index,
    options.model,
    profile_option,
    options.mode,
    options.keep_ratio,
    options.read_ratio,
    click.option("--system", metavar="TEXT", help="System message of a chat."),
    click.option("--compare", is_flag=True, help="Decode densely too, and show both."),
    click.option("--max-new-tokens", type=click.IntRange(1), help="Most new tokens.  [default: run 512, generate 128]"),
    click.option("--temperature", type=click.FloatRange(0.0), help="Sample; greedy without a sampling setting."),
    click.option(
        "--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be given several times."
    ),
    options.engine,
    options.weights,
    click.option(
        "--memory-budget",
        callback=options.size,
        metavar="SIZE",
        help="Keep to this much memory, such as 2GiB: dense MLP weights stay on disk. On a GPU its memory counts, and they stay "
        "in host memory.  [default: no limit]",
    ),
    set_option("corpus", "select", "decode", "sample", "model"),
    options.as_json,
)


def decoding_options(command: F) -> F:
    """Add the options that `Asking` holds."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class Asking:
    """The options that both commands have, as they were given."""

    index: str | None
    model: str | None
    profile: Profile | None
    mode: str | None
    keep_ratio: float | None
    read_ratio: float | None
    system: str | None
    compare: bool
    max_new_tokens: int | None
    temperature: float | None
    stop: tuple[str, ...]
    engine: str | None
    weights: str | None
    memory_budget: int | None
    settings: Settings
    as_json: bool
    most: int = 128
    """New tokens where the user names no number."""
    shorten: bool = False
    """Where the context has no room for as many, generate fewer, rather than refuse."""

    @cached_property
    def index_name(self) -> str | None:
        """The index that is used; None: none."""
        return options.index_of(self.index, self.model)

    @cached_property
    def asked(self) -> SelectionConfig:
        """Which neurons decode holds, as far as that was said."""
        given = {"mode": self.mode, "keep_ratio": self.keep_ratio, "read_ratio": self.read_ratio}
        return self.settings.make(SelectionConfig, None, **given)

    @cached_property
    def selection(self) -> SelectionConfig:
        """The same with a mode."""
        return self.asked.resolved(self.index_name is not None)

    @cached_property
    def chosen_profile(self) -> Profile | None:
        """The profile that decodes; None: the index's default, unless a mode or a ratio is given."""
        return chosen_profile(self.profile, self.index_name, self.asked, self.decode)

    @cached_property
    def decode(self) -> DecodeConfig:
        """What decodes."""
        return self.settings.make(
            DecodeConfig, engine=self.engine, weights=self.weights, memory_budget=self.memory_budget
        )

    @cached_property
    def sampling(self) -> SamplingConfig:
        """How tokens are chosen; draws repeat unless a seed is set."""
        return self.settings.make(
            SamplingConfig,
            {"seed": 0, "max_new_tokens": self.most},
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            stop=self.stop or None,
        )

    @property
    def modes(self) -> list[str]:
        """The modes to decode in, in turn."""
        return list(dict.fromkeys([self.selection.named_mode.value, *(["dense"] if self.compare else [])]))

    def note_ineffective(self) -> None:
        """Say which settings were given that this mode does not look at."""
        ratios = [name for name in ("keep_ratio", "read_ratio") if getattr(self, name) is not None]
        for name in (*self.settings.given("select"), *ratios):
            mode = self.selection.named_mode.value
            if mode not in _EFFECTIVE.get(name, (mode,)):
                click.echo(f"Note: {name} has no effect in mode {mode}.", err=True)

    def open(self, longest: Any = "", chat: bool = False, profile: Profile | None = None) -> Generator:
        """Load index, model and engine; to be closed by the caller.

        Args:
            longest: the prompt that a memory budget is planned for.
            chat: whether it goes through the chat template.
            profile: in place of all that was asked of neurons; None: what was asked.
        """
        if self.index_name is not None:
            from coreinfer_sim.index.names import folder_of

            folder_of(self.index_name)  # one that is missing is said before torch is imported, which takes seconds
        from coreinfer_sim.generation.budget import Longest
        from coreinfer_sim.generation.opening import load

        quiet_libraries()
        sampling, progress = self.sampling, ConsoleProgress()
        with progress.waiting("Loading the model; the first time this compiles the decode loops"):
            generator = load(
                self.index_name,
                self.model,
                profile=profile or self.chosen_profile,
                selection=self.asked if profile is None else SelectionConfig(fallback=self.asked.fallback),
                decode=self.decode,
                loading=self.settings.make(ModelConfig),
                longest=Longest(longest, chat, sampling.max_new_tokens, sampling.num_beams, tuple(self.modes)),
                progress=progress,
            )
        index, selection = generator.index, self.selection
        if index is not None and self.modes[0] in ("similarity", "global") and selection.compensated:
            note_plain_sets(index, selection.keep_ratio)
        return generator


def answer(
    asking: Asking,
    prompts: Iterator[Row],
    report: CorpusReport,
    source: str,
    *,
    chat: bool | None,
    alone: bool,
    headed: bool,
) -> None:
    """Answer prompts one by one, and print texts or JSON.

    Args:
        asking: the options.
        prompts: at least one.
        report: of reading them.
        source: what they are read from, for messages.
        chat: put each into the model's chat template; None: where it has one.
        alone: there is one prompt, given as an argument.
        headed: show each prompt above its answer.
    """
    first = next(prompts, None)
    if first is None:
        raise PromptError(
            "no prompt was given, expected an argument, lines on stdin, or of generate --file with rows; 'coreinfer-sim run "
            "--help' shows how."
        )
    asking.note_ineffective()
    with asking.open(_asked(first, chat is not False, asking.system), chat is not False) as generator:
        use_template = generator.has_chat_template or asking.system is not None if chat is None else chat
        run = _Runner(generator, asking, use_template, headed=headed)
        results, n_failed = [], 0
        for number, row in enumerate(itertools.chain([first], prompts)):
            try:
                results.append([each.as_dict() for each in run(row, number)])
            except PromptError as error:  # the other lines are still worth an answer
                if alone:
                    raise
                click.echo(f"Error: line {number + 1}: {error}", err=True)
                n_failed += 1
    if report.remarks():
        click.echo(f"Note: {source}: {'; '.join(report.remarks())}.", err=True)
    if asking.as_json:
        flat = results if asking.compare else [runs[0] for runs in results]
        print_json(flat[0] if alone else flat)
    if n_failed:
        raise PromptError(f"{n_failed} of {n_failed + len(results)} prompts failed; the messages above say why.")


def typed_prompts(prompt: str | None, report: CorpusReport) -> Iterator[Row]:
    """Yield the prompt that was given as an argument, or the lines that are piped to stdin."""
    if prompt is not None:
        text = options.readable(prompt)
        if not text.strip():
            raise PromptError("the prompt is empty, expected some text.")
        yield Row("0", text)
    elif not sys.stdin.isatty():
        from .chat import is_command

        for row in read_lines(cast(BufferedIOBase, sys.stdin.buffer), "stdin", report):
            if is_command(row.prompt):
                click.echo(
                    f"Note: {row.prompt!r} is a prompt like any other; commands are of a chat on a terminal.", err=True
                )
            yield row


def _asked(row: Row, chat: bool, system: str | None) -> Any:
    """Return what a generator takes: a text, or a conversation up to the user's last message."""
    if not row.history:
        return options.messages(options.readable(row.prompt), chat, system)
    if system is not None:
        raise ConfigError("--system was given, but the rows are conversations, which have their own; leave it out.")
    return [turn._asdict() for turn in row.history]


class _Runner:
    """Generates for one prompt in each mode, shown as it comes."""

    def __init__(self, generator: Generator, asking: Asking, chat: bool, *, headed: bool) -> None:
        self._generator, self._asking, self._chat = generator, asking, chat
        self._headed = headed
        """Whether the prompt stands above its answer."""
        self._shown = not asking.as_json
        self._alone = asking.memory_budget is not None and len(asking.modes) > 1
        """Whether there is room for the weights of one mode only."""
        self._reported: set[str] = set()

    def __call__(self, row: Row, number: int) -> list[Generation]:
        """Generate; ``number`` of the prompt."""
        asked = _asked(row, self._chat, self._asking.system)
        if self._shown and self._headed:
            click.echo(("\n" if number else "") + f"> {row.prompt}")
        runs = []
        for mode in self._asking.modes:
            runs.append(self._one(asked, mode))
            if self._alone:
                self._generator.close()
        return runs

    def _one(self, asked: Any, mode: str) -> Generation:
        titled = self._asking.compare
        if self._shown and titled:
            click.echo(f"[{mode}]")
        run = self._generator.generate(
            asked,
            self._asking.sampling,
            chat=self._chat,
            mode=mode,
            shorten=self._asking.shorten,
            write=(lambda piece: click.echo(piece, nl=False)) if self._shown else None,
        )
        if self._shown:
            click.echo("")
            click.echo(f"  {facts(run)}", err=not titled)
        if run.not_first is not None and run.not_first not in self._reported:
            self._reported.add(run.not_first)
            click.echo(f"Note: the engine {run.engine} decodes, as {run.not_first}.", err=True)
        return run


def facts(run: Generation) -> str:
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
    if run.disk_bytes_per_token is not None and run.found_ratio is not None:
        found = f"{run.found_ratio:.0%} of the chosen neurons in memory"
        parts.append(f"{size_text(run.disk_bytes_per_token)} from the disk a token, {found}")
    return " · ".join(parts)
