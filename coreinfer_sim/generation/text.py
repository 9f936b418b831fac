"""Text in, text out: what every generator offers, whichever engine decodes, and what a text cost."""

from __future__ import annotations

import asyncio
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, overload

from coreinfer_sim.base.decode_settings import SamplingConfig, with_settings
from coreinfer_sim.base.errors import ConfigError, GenerationCancelledError, PromptError, UnknownModeError
from coreinfer_sim.base.settings import Profile
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.generation.routing import routing_text
from coreinfer_sim.generation.streaming import Cancelled, TextOutput, Watch, Write
from coreinfer_sim.index.clusters import Match
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.chat_templates import ChatFormat
from coreinfer_sim.models.prompts import Message

_PATIENCE = 0.1  # seconds until a call that waits asks again whether it is still wanted


@dataclass(frozen=True)
class Generation:
    """What one prompt gave and cost."""

    prompt: str
    """What it was routed by."""
    text: str
    """The new text, without the prompt and before the first stop text."""
    token_ids: list[int] | None
    """The new tokens; None where the engine gives text alone."""
    n_new_tokens: int
    ended: bool
    """Whether the text came to its end, rather than to the limit of new tokens."""
    selection: NeuronSelection
    keep_ratio: float | None
    """Held neurons over all neurons of the model; None where an exported file decides that."""
    engine: str
    """What decoded."""
    n_prompt_tokens: int
    prefill_seconds: float
    """From the call to the first new token; routing by meaning included."""
    decode_seconds: float
    """From the first new token to the last, without `prepare_seconds`."""
    mlp_bytes_per_token: int | None
    """MLP bytes that decode read for a token, counted by the engine; None where it cannot tell."""
    dense_mlp_bytes_per_token: int | None
    """The same in the dense model."""
    total_bytes_per_token: int | None = None
    """All bytes of weights that decode read for a token."""
    n_cached_tokens: int = 0
    """Of the prompt's tokens, those that were not read again: an earlier text began with the same ones."""
    lookup_seconds: float = 0.0
    """To choose the neurons before prefill: the prompt's embedding and the nearest cluster."""
    prepare_seconds: float = 0.0
    """To prepare the held weights; next to nothing where they are at hand from an earlier prompt."""
    not_first: str | None = None
    """Why the engine that comes first did not serve this call; None: it did."""
    file: str | None = None
    """Exported file that decoded."""
    read_ratio: float | None = None
    """Neurons that a token read in full, on average, over all neurons of the model; None where the engine cannot tell."""
    skips_zeros: bool = False
    """Whether the held neurons that a token did not read were zero, as ReLU makes them: nothing was left out."""
    disk_bytes_per_token: int | None = None
    """Bytes of weights that decode read from the disk for a token; None where all that tokens choose among is in memory."""
    found_ratio: float | None = None
    """Share of the neurons that tokens chose which were in memory; None where all are."""

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed; None with fewer than two new tokens."""
        n = self.n_new_tokens - 1
        return n / self.decode_seconds if n > 0 and self.decode_seconds > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        selection, speed = self.selection, self.tokens_per_second
        return {
            "prompt": self.prompt,
            "text": self.text,
            "mode": selection.mode,
            "cluster": selection.cluster,
            "label": selection.label,
            "similarity": None if selection.similarity is None else round(selection.similarity, 4),
            "confidence": None if selection.confidence is None else round(selection.confidence, 4),
            "confident": selection.confident,
            "keep_ratio": None if self.keep_ratio is None else round(self.keep_ratio, 4),
            "read_ratio": None if self.read_ratio is None else round(self.read_ratio, 4),
            "skips_zeros": self.skips_zeros,
            "engine": self.engine,
            "file": self.file,
            "ended": self.ended,
            "n_prompt_tokens": self.n_prompt_tokens,
            "n_cached_tokens": self.n_cached_tokens,
            "n_new_tokens": self.n_new_tokens,
            "prefill_seconds": round(self.prefill_seconds, 4),
            "decode_seconds": round(self.decode_seconds, 4),
            "tokens_per_second": None if speed is None else round(speed, 2),
            "lookup_seconds": round(self.lookup_seconds, 4),
            "prepare_seconds": round(self.prepare_seconds, 4),
            "mlp_bytes_per_token": self.mlp_bytes_per_token,
            "dense_mlp_bytes_per_token": self.dense_mlp_bytes_per_token,
            "total_bytes_per_token": self.total_bytes_per_token,
            "disk_bytes_per_token": self.disk_bytes_per_token,
            "found_ratio": None if self.found_ratio is None else round(self.found_ratio, 4),
        }


@dataclass(frozen=True)
class Request:
    """What `Generator.generate` was called with, once everything is decided."""

    prompt: str | list[Message]
    sampling: SamplingConfig
    routed_by: str
    mode: str
    chat: bool
    """Whether the prompt goes through the model's chat template."""
    shorten: bool
    chat_template_kwargs: Mapping[str, Any]
    output: TextOutput
    """Takes the text."""
    watch: Watch | None = None
    """Takes which neurons each token read."""


class Generator(ABC):
    """Generates, streams, scores and looks up: the outer half of an engine, which commands and the server speak to."""

    index: SemanticIndex | None
    """Routes prompts; None: only modes that need no index."""
    modes: tuple[str, ...]
    """Ways of choosing neurons that a call may name, the default first."""
    name: str
    """Of the model."""
    chat_format: ChatFormat | None = None
    """How the model's chat template marks turns; None: it has none, or it cannot be told."""
    profile: Profile | None = None
    """By which the default mode decodes; None: a mode or a ratio was named instead."""

    def __init__(self) -> None:
        """Let one text at a time be generated."""
        self._free = threading.RLock()

    def __enter__(self) -> Generator:
        """Return the generator itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of what it holds."""
        self.close()

    def generate(
        self,
        prompt: str | list[Message],
        sampling: SamplingConfig | None = None,
        *,
        chat: bool = False,
        mode: str | None = None,
        shorten: bool = False,
        write: Write | None = None,
        cancelled: Cancelled | None = None,
        watch: Watch | None = None,
        routed_by: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Generation:
        """Generate one continuation; calls of several threads wait for each other, or share their steps (`takes_turns`).

        Args:
            prompt: a text, or the messages of a conversation.
            sampling: how tokens are chosen, and how many at most.
            chat: put a text into the model's chat template.
            mode: one of `modes`; None takes the first.
            shorten: where the context has no room for as many new tokens, generate fewer, rather than refuse.
            write: receives the new text piece by piece, as it comes.
            cancelled: says whether nobody wants the text any more; asked in prefill and at every token.
            watch: receives which neurons each new token read, where the engine knows (`tells_neurons`).
            routed_by: text that routes in place of the prompt; see `routing_text`.
            chat_template_kwargs: further variables of the chat template, such as ``{"enable_thinking": False}``.
            **settings: further fields of `SamplingConfig`, such as ``max_new_tokens=64``.

        Raises:
            UnknownModeError: there is no such mode.
            ConfigError: there is no such setting.
            PromptError: the prompt is empty, or does not fit into the context together with the new tokens.
            GenerationCancelledError: ``cancelled`` said so.
        """
        mode = self.checked_mode(mode)
        if watch is not None and not self.tells_neurons:
            raise ConfigError(f"{self.name} is decoded by an engine that does not tell which neurons tokens read.")
        if not (
            isinstance(prompt, str) or (isinstance(prompt, list) and all(isinstance(each, dict) for each in prompt))
        ):
            raise PromptError(
                f"the prompt is {type(prompt).__name__}, expected one text, or the messages of a conversation."
            )
        sampling = with_settings(settings, (sampling or SamplingConfig(),))[0]
        output = TextOutput(sampling.stop, write, cancelled)
        chat = chat or not isinstance(prompt, str)
        kwargs = chat_template_kwargs or {}
        with self._turn(output):
            routed = routed_by or routing_text(self.index, prompt, self.chat_format)
            output.check()
            return self._generate(Request(prompt, sampling, routed, mode, chat, shorten, kwargs, output, watch))

    @contextmanager
    def _turn(self, output: TextOutput) -> Iterator[None]:
        """Wait until no other call generates, unless calls take turns, as long as somebody wants the text."""
        output.check()
        if self.takes_turns:
            yield
            return
        while not self._free.acquire(timeout=_PATIENCE):
            output.check()
        try:
            yield
        finally:
            self._free.release()

    @abstractmethod
    def _generate(self, request: Request) -> Generation:
        """Do what `generate` says."""

    def stream(
        self, prompt: str | list[Message], sampling: SamplingConfig | None = None, **options: Any
    ) -> Iterator[str]:
        """Yield the new text as it comes; options as for `generate`. Leaving the loop early breaks the generation off."""
        pieces: queue.Queue[str | BaseException | None] = queue.Queue()
        worker, left = self._in_thread(pieces.put, prompt, sampling, options)
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            left.set()
            worker.join()

    async def astream(
        self, prompt: str | list[Message], sampling: SamplingConfig | None = None, **options: Any
    ) -> AsyncGenerator[str, None]:
        """Yield the new text as it comes, to asyncio; options as for `generate`.

        Closing the stream, or cancelling the task that reads it, breaks the generation off.

        Example:
            >>> async for piece in generator.astream("How do stars form?", max_new_tokens=64):
            ...     print(piece, end="", flush=True)
        """
        pieces: asyncio.Queue[str | BaseException | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(piece: str | BaseException | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        worker, left = self._in_thread(put, prompt, sampling, options)
        try:
            while (piece := await pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            left.set()
            await asyncio.to_thread(worker.join)

    def _in_thread(
        self,
        put: Callable[[Any], None],
        prompt: str | list[Message],
        sampling: SamplingConfig | None,
        options: Mapping[str, Any],
    ) -> tuple[threading.Thread, threading.Event]:
        """Generate in a thread; ``put`` takes the pieces, then an error if there was one, then None.

        Returns:
            The thread, and what breaks it off once it is set.
        """
        left = threading.Event()

        def work() -> None:
            try:
                self.generate(prompt, sampling, write=put, cancelled=left.is_set, **options)
            except GenerationCancelledError:  # nobody reads the stream any more
                pass
            except BaseException as error:  # it is raised where the text is read
                put(error)
            put(None)

        worker = threading.Thread(target=work, name="coreinfer-sim-stream", daemon=True)
        worker.start()
        return worker, left

    def checked_mode(self, mode: str | None) -> str:
        """Return the mode that a call named, or the default; raise UnknownModeError if there is no such mode."""
        if mode is not None and mode not in self.modes:
            raise UnknownModeError(f"the mode is {mode!r}, expected one of {', '.join(self.modes)}.")
        return mode or self.modes[0]

    def read_ahead(self, cancelled: Cancelled) -> None:
        """Read what a next turn will begin with, while nobody wants anything else: `generate` by another thread goes first.

        Args:
            cancelled: says whether something else is wanted; asked often.
        """
        return None

    @property
    def takes_turns(self) -> bool:
        """Whether calls of several threads share their decode steps; otherwise one thread calls it at a time."""
        return False

    @property
    def tells_neurons(self) -> bool:
        """Whether it knows which neurons each token read."""
        return False

    @property
    @abstractmethod
    def has_chat_template(self) -> bool:
        """Whether it answers conversations; a base model only continues texts."""

    @abstractmethod
    def score(self, prompt: str, completion: str, *, mode: str | None = None) -> list[float]:
        """Return the log-probability in nats of each completion token, as decode would have predicted it.

        The first one comes from the prompt's prefill.
        """

    @overload
    def lookup(self, prompt: str, k: int = 1) -> list[Match]: ...
    @overload
    def lookup(self, prompt: list[str], k: int = 1) -> list[list[Match]]: ...
    def lookup(self, prompt: str | Sequence[str], k: int = 1) -> Any:
        """Return the ``k`` semantic clusters nearest to a prompt, or to each of several, best first."""
        if self.index is None:
            raise ConfigError("there is no index to look prompts up in; load one.")
        return self.index.lookup(prompt, k) if isinstance(prompt, str) else self.index.lookup(list(prompt), k)

    @abstractmethod
    def close(self) -> None:
        """Let go of prepared weights and open files."""
