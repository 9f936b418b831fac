"""A chat on the terminal: history, answers as they come, and commands that say where they came from."""

from __future__ import annotations

import difflib
import gc
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

import click

from coreinfer_sim.base.decode_settings import SamplingConfig, choice
from coreinfer_sim.base.errors import ContextLengthError, CoreInferSimError, GenerationCancelledError
from coreinfer_sim.base.progress import counted
from coreinfer_sim.base.settings import Profile

from . import options
from .answering import facts
from .profiles import profile_lines

if TYPE_CHECKING:
    from coreinfer_sim.generation.text import Generation, Generator
    from coreinfer_sim.models.prompts import Message

_HELP = {
    "/why": "the topic of the last question, and how near it was",
    "/dense": "the last question once more, without sparsity",
    "/profile": "what decode may lose for fewer bytes; /profile fast goes on by that, with the conversation",
    "/stats": "what the answers took: tokens, speed, bytes",
    "/help": "this list",
    "/exit": "end, as Ctrl-D does; Ctrl-C ends an answer",
}
_COMMAND = re.compile(r"(/[a-z]+)|(/profile)\s+(\S+)")
_NEAREST = 3
"""Topics that /why shows."""


def is_command(line: str) -> bool:
    """Return whether a line of a chat is one of its commands, rather than a prompt."""
    found = _COMMAND.fullmatch(line.strip())
    return found is not None and (found[1] or found[2]) in _HELP


class Chat:
    """A conversation with a model; one without a chat template continues each text by itself."""

    def __init__(
        self,
        generator: Generator,
        sampling: SamplingConfig,
        system: str | None,
        *,
        raw: bool,
        reopen: Callable[[Profile | None], Generator],
    ) -> None:
        """Begin a conversation.

        Args:
            generator: what answers; the chat closes it.
            sampling: how tokens are chosen.
            system: the system message.
            raw: leave the chat template out.
            reopen: opens what answers by a profile, or with None by what was asked at first.
        """
        self.name, self._reopen = generator.name, reopen
        self._generator, self._sampling = generator, sampling
        self._templated = generator.has_chat_template and not raw
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[Message] = []
        """The user's messages and the answers, in turn."""
        self._runs: list[Generation] = []

    def __enter__(self) -> Chat:
        """Return the chat itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of what answers."""
        if hasattr(self, "_generator"):
            self._generator.close()

    def talk(self, lines: Iterable[str]) -> None:
        """Answer what is typed until /exit, or until the lines end."""
        for line in self._while_reading(lines):
            text = line.strip()
            try:
                if text == "/exit":
                    return
                if command := _COMMAND.fullmatch(text):
                    self._command(command[1] or command[2], command[3])
                elif text:
                    self.ask(options.readable(text))
            except CoreInferSimError as error:
                if not hasattr(self, "_generator"):  # nothing is left to answer
                    raise
                click.echo(f"Error: {error}", err=True)

    def _while_reading(self, lines: Iterable[str]) -> Iterator[str]:
        """Yield lines; while one is being typed, the latest answer is read for what follows it."""
        typed = iter(lines)
        while True:
            ended = threading.Event()
            reader = threading.Thread(target=self._generator.read_ahead, args=(ended.is_set,), daemon=True)
            reader.start()
            try:
                line = next(typed, None)
            finally:
                ended.set()
                reader.join()
            if line is None:
                return
            yield line

    def ask(self, text: str) -> None:
        """Answer a message."""
        self._turns.append({"role": "user", "content": text})
        try:
            answer = self._generated(None)
        except BaseException:
            self._turns.pop()
            raise
        self._turns.append({"role": "assistant", "content": answer})

    def _generated(self, mode: str | None) -> str:
        """Answer the user's last message, and return what was said; of a text that Ctrl-C has ended, what came until then."""
        pieces: list[str] = []

        def write(piece: str) -> None:
            pieces.append(piece)
            click.echo(piece, nl=False)

        with _interrupts() as stopped, suppress(GenerationCancelledError):
            while True:
                try:
                    run = self._generator.generate(
                        [*self._system, *self._turns] if self._templated else self._turns[-1]["content"],
                        self._sampling,
                        mode=mode,
                        shorten=True,
                        write=write,
                        cancelled=stopped.is_set,
                    )
                    self._runs.append(run)
                    break
                except ContextLengthError:
                    if not self._templated or len(self._turns) < 3:
                        raise
                    del self._turns[:2]
                    click.echo("The conversation is longer than the context: its oldest turn is left out.", err=True)
        click.echo("")
        return "".join(pieces)

    def _command(self, text: str, word: str | None) -> None:
        known = {"/why": self._why, "/dense": self._dense, "/stats": self._stats, "/help": self._help}
        if text == "/profile":
            self._profile(word)
        elif text not in known:
            near = difflib.get_close_matches(text, _HELP, 1)
            hint = f"; nearest: {near[0]}" if near else ""
            click.echo(f"There is no command {text}{hint}; /help lists them.", err=True)
        elif text != "/help" and not self._runs:
            click.echo("Nothing has been asked yet.", err=True)
        else:
            known[text]()

    def _why(self) -> None:
        index, run = self._generator.index, self._runs[-1]
        if index is None:
            click.echo(f"There is no index: mode {run.selection.mode} looks nothing up.")
            return
        for match in self._generator.lookup(run.prompt, k=min(_NEAREST, len(index))):
            familiar = "" if match.confident else "  (unfamiliar)"
            click.echo(f"  similarity {match.similarity:.3f}  {match.label}{familiar}")
        click.echo(f"  {facts(run)}")

    def _dense(self) -> None:
        """Show what the dense model says to the last message; the conversation keeps the first answer."""
        said = self._turns.pop()
        try:
            self._generated("dense")
        finally:
            self._turns.append(said)
        click.echo(f"  {facts(self._runs[-1])}")

    def _stats(self) -> None:
        n_tokens = sum(run.n_new_tokens for run in self._runs)
        seconds = sum(run.prefill_seconds + run.decode_seconds + run.prepare_seconds for run in self._runs)
        prompt, n_cached = counted(self._runs[-1].n_prompt_tokens, "token"), self._runs[-1].n_cached_tokens
        click.echo(f"  last: {facts(self._runs[-1])}")
        click.echo(f"  its prompt: {prompt}, of which {n_cached} had been read for an earlier one")
        click.echo(f"  all: {counted(len(self._runs), 'answer')}, {counted(n_tokens, 'token')} in {seconds:.1f} s")

    def _profile(self, name: str | None) -> None:
        """Show the profiles, or go on by one."""
        from coreinfer_sim.choosing.promised import measured

        index = self._generator.index
        manifest = None if index is None else index.manifest
        if name is not None:
            profile = choice("profile", name, Profile)
            if profile is not Profile.EXACT:
                measured(index, profile)  # before anything is closed
            if profile is not self._generator.profile:
                self._switch(profile)
        for line in profile_lines(manifest, self._generator.profile):
            click.echo(line)
        if name is None:
            click.echo(
                "/profile NAME opens the model again, which takes as long as the start, and keeps the conversation.",
                err=True,
            )

    def _switch(self, profile: Profile) -> None:
        before, begin = self._generator.profile, time.perf_counter()
        try:
            self._open(profile)
        except CoreInferSimError:
            self._open(before)
            raise
        seconds = time.perf_counter() - begin
        click.echo(f"The model was opened again in {seconds:.1f} s; the conversation goes on.", err=True)

    def _open(self, profile: Profile | None) -> None:
        """Open the model for a profile, once the memory of what answered before is free."""
        if hasattr(self, "_generator"):
            self._generator.close()
            del self._generator
        gc.collect()  # a model's modules refer to each other
        self._generator = self._reopen(profile)

    def _help(self) -> None:
        for name, what in _HELP.items():
            click.echo(f"  {name:9s} {what}")


def typed_lines() -> Iterator[str]:
    """Yield what is typed at the terminal until Ctrl-D, or Ctrl-C where nothing is being answered."""
    with suppress(ImportError):  # without it, lines cannot be edited
        import readline  # noqa: F401
    while True:
        try:
            yield input(">>> ")
        except (EOFError, KeyboardInterrupt):
            click.echo("")
            return


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Let Ctrl-C set an event within the block, so that an answer ends at a token and not in the middle of one."""
    stopped = threading.Event()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        stopped.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
