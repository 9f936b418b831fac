"""What generates the text of a request: a generator of any engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coreinfer_sim.base.decode_settings import MAX_SEED, SamplingConfig
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.generation.routing import routing_text
from coreinfer_sim.generation.streaming import Cancelled, Watch, Write
from coreinfer_sim.generation.text import Generation, Generator
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.prompts import Message

_FACTS = (
    *(
        "mode",
        "cluster",
        "label",
        "similarity",
        "confidence",
        "confident",
        "keep_ratio",
        "read_ratio",
        "engine",
        "file",
    ),
    *("tokens_per_second", "mlp_bytes_per_token"),
)
_LEAST_TEMPERATURE = 1e-4
"""Below it the likeliest token is taken, which is what a lower one comes to without the overflow."""
_LEAST_TOP_P = 1e-6
"""Leaves the likeliest token, as 0 does."""


@dataclass(frozen=True)
class TextRequest:
    """A request for one text."""

    prompt: str | list[Message]
    """A text to continue, or a conversation."""
    max_new_tokens: int
    mode: str
    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 and -1: no limit."""
    min_p: float = 0.0
    repetition_penalty: float | None = None
    """None: the checkpoint's own."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    watch: Watch | None = None
    """Receives which neurons each token read."""


@dataclass(frozen=True)
class Completion:
    """One generated text and what it cost."""

    text: str
    n_prompt_tokens: int
    n_new_tokens: int
    ended: bool
    """Whether the text came to its end, rather than to the limit of new tokens."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Where it was routed and how fast it was."""
    timings: dict[str, float | None] = field(default_factory=dict)
    """What it took, as llama.cpp's server says it; see `timings_of`."""


class Backend:
    """Generates texts: one at a time, or several in threads that share decode steps."""

    def __init__(self, generator: Generator) -> None:
        """Serve what a generator gives.

        Raises:
            ConfigError: it has no index.
        """
        if generator.index is None:
            raise ConfigError("a server routes each request by an index, and none was given; give one.")
        self._generator = generator
        self.index: SemanticIndex = generator.index
        self.modes: Sequence[str] = generator.modes
        """That a request may name, the default first."""
        self.chats = generator.has_chat_template
        """Whether it answers conversations; a base model only continues texts."""
        self.takes_turns = generator.takes_turns
        """Whether several threads may call `complete` at a time."""
        self.tells_neurons = generator.tells_neurons
        """Whether requests may be watched."""
        self.profile = None if generator.profile is None else generator.profile.value
        """By which the default mode decodes."""

    def complete(self, request: TextRequest, write: Write, cancelled: Cancelled | None = None) -> Completion:
        """Generate at most ``max_new_tokens``, fewer where the context has no room for them.

        Args:
            request: what to generate.
            write: receives the text as it comes.
            cancelled: says whether nobody wants it any more.

        Raises:
            GenerationCancelledError: ``cancelled`` said so.
        """
        sampling = SamplingConfig(
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature if request.temperature >= _LEAST_TEMPERATURE else 0.0,
            top_p=max(request.top_p, _LEAST_TOP_P),
            top_k=max(0, request.top_k),
            min_p=request.min_p or None,
            repetition_penalty=request.repetition_penalty,
            seed=None if request.seed is None else request.seed % (MAX_SEED + 1),
            stop=request.stop,
        )
        run = self._generator.generate(
            request.prompt,
            sampling,
            chat=not isinstance(request.prompt, str),
            mode=request.mode,
            shorten=True,
            write=write,
            cancelled=cancelled,
            watch=request.watch,
            chat_template_kwargs=request.chat_template_kwargs,
        )
        facts = run.as_dict()
        return Completion(
            run.text,
            run.n_prompt_tokens,
            run.n_new_tokens,
            run.ended,
            {name: facts[name] for name in _FACTS},
            timings_of(run),
        )

    def routing_text(self, prompt: str | list[Message]) -> str:
        """Return what a prompt is routed by."""
        return routing_text(self.index, prompt, self._generator.chat_format)

    def read_ahead(self, cancelled: Cancelled) -> None:
        """Read what a next turn will begin with until ``cancelled`` says that something else is wanted."""
        self._generator.read_ahead(cancelled)

    def close(self) -> None:
        """Let go of everything."""
        self._generator.close()


def timings_of(run: Generation) -> dict[str, float | None]:
    """Return what a text took, by the names of llama.cpp's server: tokens, milliseconds, and rates.

    The first new token comes out of the prompt's last pass, so that decode's rates are of the others; None where there are none.
    """
    n_read, n_decoded = run.n_prompt_tokens - run.n_cached_tokens, run.n_new_tokens - 1
    prompt_ms, predicted_ms = 1000 * run.prefill_seconds, 1000 * run.decode_seconds
    return {
        "cache_n": run.n_cached_tokens,
        "prompt_n": n_read,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / n_read if n_read else None,
        "prompt_per_second": n_read / run.prefill_seconds if run.prefill_seconds else None,
        "predicted_n": run.n_new_tokens,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": predicted_ms / n_decoded if n_decoded > 0 else None,
        "predicted_per_second": run.tokens_per_second,
    }
