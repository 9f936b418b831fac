"""What generates the text of a request: a generator of any engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from coreinfer_sim.base.decode_settings import SamplingConfig
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.generation.text import Generator
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.prompts import Message

_FACTS = (
    *("mode", "cluster", "label", "similarity", "confidence", "confident", "keep_ratio", "engine", "file"),
    *("tokens_per_second", "mlp_bytes_per_token"),
)


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
    seed: int | None = None
    stop: tuple[str, ...] = ()
    shorten: bool = False
    """Whether fewer tokens will do where the context has no room for ``max_new_tokens``, which nobody named."""


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


class Backend:
    """Generates one text at a time."""

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

    def complete(self, request: TextRequest, write: Callable[[str], None]) -> Completion:
        """Generate; ``write`` receives the text as it comes; what it raises ends the generation."""
        sampling = SamplingConfig(
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=0,
            seed=request.seed,
            stop=request.stop,
        )
        run = self._generator.generate(
            request.prompt,
            sampling,
            chat=not isinstance(request.prompt, str),
            mode=request.mode,
            shorten=request.shorten,
            write=write,
        )
        facts = run.as_dict()
        return Completion(
            run.text, run.n_prompt_tokens, run.n_new_tokens, run.ended, {name: facts[name] for name in _FACTS}
        )

    def close(self) -> None:
        """Let go of everything."""
        self._generator.close()
