"""Prompts to texts on llama.cpp: each prompt runs on the exported file that it routes to."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coreinfer_sim.base.errors import ConfigError, UnknownModeError
from coreinfer_sim.base.settings import UNFAMILIAR, Fallback
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.llamacpp.engine import Decoded, ExportedModel, LlamaCppEngine, StreamSettings
from coreinfer_sim.engines.llamacpp.router import DENSE, GLOBAL, SIMILARITY
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.prompts import Message, last_user_message, within


@dataclass(frozen=True)
class LlamaCppGeneration:
    """What one prompt gave and cost."""

    prompt: str
    text: str
    """The new text, without the prompt."""
    n_new_tokens: int
    ended: bool
    """Whether the text came to its end, rather than to the limit of new tokens."""
    model: str
    """File that decoded."""
    mode: str
    """similarity, global or dense."""
    cluster: int | None
    label: str | None
    similarity: float | None
    confidence: float | None
    n_prompt_tokens: int
    prefill: str
    """dense or sparse."""
    lookup_seconds: float
    load_seconds: float
    """To open files that were not open."""
    prefill_seconds: float
    """To the first new token, the handover of the cache included."""
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed; None with fewer than two new tokens."""
        n = self.n_new_tokens - 1
        return n / self.decode_seconds if n > 0 and self.decode_seconds > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        confident = None if self.confidence is None else self.confidence >= UNFAMILIAR
        return {**asdict(self), "confident": confident, "tokens_per_second": self.tokens_per_second}


class LlamaCppGenerator:
    """Generates on exported sets of an index."""

    def __init__(
        self,
        index: SemanticIndex,
        folder: str | Path,
        *,
        mode: str = SIMILARITY,
        fallback: Fallback | str | None = None,
        **options: Any,
    ) -> None:
        """Use the models that an export as GGUF with a router wrote.

        Args:
            index: routes the prompts.
            folder: with ``router.json`` and the models.
            mode: similarity, global or dense.
            fallback: for prompts that are unfamiliar to their cluster: global, dense or none; None takes global if it was
                exported.
            **options: of `LlamaCppEngine`.

        Raises:
            ConfigError: settings that llama.cpp cannot follow, or an export of another index.
        """
        _check_mode(mode)
        self.index, self.mode = index, mode
        self.engine = LlamaCppEngine(index, folder, **options)
        self.modes = self.engine.router.modes
        """Modes that the exported sets allow."""
        self._fallback = self._chosen_fallback(fallback)

    def __enter__(self) -> LlamaCppGenerator:
        """Use as a context; leaving it closes all models."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all models."""
        self.close()

    def close(self) -> None:
        """Close all models and forget saved caches."""
        self.engine.close()

    def generate(
        self,
        prompt: str | list[Message],
        *,
        chat: bool = False,
        max_new_tokens: int = 128,
        shorten: bool = False,
        write: Callable[[str], None] | None = None,
        routed_by: str | None = None,
        mode: str | None = None,
        **sampling: Any,
    ) -> LlamaCppGeneration:
        """Continue a prompt.

        Args:
            prompt: text, or messages of a chat; routing looks at the last user's message.
            chat: put the prompt into the model's chat template.
            max_new_tokens: at most.
            shorten: where the context has no room for as many, generate fewer, rather than refuse.
            write: receives the text as it comes.
            routed_by: text that routes in place of the last user message.
            mode: for this call; None takes the generator's.
            **sampling: of llama.cpp's server, such as ``temperature``, ``top_k``, ``seed``, ``stop``; greedy without.

        Raises:
            PromptError: empty, too long for the context, or refused by the chat template.
            GenerationError: llama.cpp refused; the message says why.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        begin = time.perf_counter()
        selection = self._route(routed_by or last_user_message(messages), mode or self.mode)
        looked_up = time.perf_counter()
        model = self.engine.model(selection)
        loaded = time.perf_counter()
        text = model.render(prompt, chat)
        ids = model.tokenize(text, parse_special=chat)
        if shorten:
            max_new_tokens = within(self.engine.context, len(ids), max_new_tokens)
        decoded = _decode(model, ids, StreamSettings(max_new_tokens, sampling), write)
        return LlamaCppGeneration(
            prompt=text,
            text=decoded.text,
            n_new_tokens=decoded.n_new_tokens,
            ended=decoded.ended,
            model=model.path.name,
            mode=selection.mode,
            cluster=selection.cluster,
            label=selection.label,
            similarity=selection.similarity,
            confidence=selection.confidence,
            n_prompt_tokens=len(ids),
            prefill="dense" if selection.mode == DENSE else self.engine.prefill,
            lookup_seconds=looked_up - begin,
            load_seconds=loaded - looked_up,
            prefill_seconds=decoded.prefill_seconds,
            decode_seconds=decoded.decode_seconds,
        )

    def _route(self, text: str, mode: str) -> NeuronSelection:
        """Return the mode that decodes, and where the text lies; no ids, as the exported files hold them."""
        if mode != SIMILARITY:
            return NeuronSelection(_check_mode(mode))
        match = self.index.lookup(text)[0]
        if not match.confident and self._fallback is not Fallback.NONE:
            mode = self._fallback.value
        return NeuronSelection(
            mode,
            cluster=match.cluster,
            label=match.label,
            similarity=match.similarity,
            confidence=match.confidence,
        )

    def _chosen_fallback(self, fallback: Fallback | str | None) -> Fallback:
        if fallback is None:
            return Fallback.GLOBAL if GLOBAL in self.modes else Fallback.NONE
        if Fallback(fallback) is Fallback.HYBRID:
            raise ConfigError("the fallback is hybrid, whose sets depend on the prompt; use global, dense or none.")
        if Fallback(fallback) is not Fallback.NONE:
            self.engine.router.path(Fallback(fallback).value)
        return Fallback(fallback)


def _check_mode(mode: str) -> str:
    if mode not in (SIMILARITY, GLOBAL, DENSE):
        raise UnknownModeError(
            f"mode {mode} was asked of llama.cpp, expected similarity, global or dense; sets that depend on the prompt need the "
            "backend transformers."
        )
    return mode


def _decode(
    model: ExportedModel, ids: list[int], settings: StreamSettings, write: Callable[[str], None] | None
) -> Decoded:
    """Return the text that follows a prompt; what ``write`` raises ends it."""
    if write is None:
        return model.complete(ids, settings)
    with closing(model.stream(ids, settings)) as events:
        for event in events:
            if isinstance(event, Decoded):
                return event
            write(event)
    raise AssertionError("the stream ended without its text")
