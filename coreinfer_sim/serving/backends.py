"""What generates the text of a request: our own runtime or llama.cpp, behind one face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from coreinfer_sim.base.settings import Mode
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.engines.cache import DEFAULT_BYTES, CompactCache
from coreinfer_sim.engines.llamacpp.generator import LlamaCppGenerator
from coreinfer_sim.generation.text import TextGenerator
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.prompts import Message, last_user_message, within


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


class Backend(Protocol):
    """Generates one text at a time."""

    modes: Sequence[str]
    """That a request may ask for, the default first."""
    index: SemanticIndex

    def complete(self, request: TextRequest, write: Callable[[str], None]) -> Completion:
        """Generate; ``write`` receives the text as it comes; what it raises ends the generation."""

    def close(self) -> None:
        """Let go of everything."""


def routing_text(index: SemanticIndex, prompt: str | list[Message]) -> str:
    """Return what a conversation is routed by: the user's last message that is familiar to its cluster.

    A new topic is familiar to some cluster, and moves the conversation there. "And why?" is familiar to none, and leaves
    it where it was. Where nothing is familiar, the last message counts.
    """
    if isinstance(prompt, str):
        return prompt
    said = [m["content"] for m in prompt if m["role"] == "user" and m["content"].strip()]
    if len(said) == 1:  # nothing to choose among, so nothing is embedded twice
        return said[0]
    for text in reversed(said):
        if index.lookup(text)[0].confident:
            return text
    return last_user_message(prompt)


class TransformersBackend:
    """Our own runtime."""

    def __init__(
        self,
        language_model: LanguageModel,
        index: SemanticIndex,
        mode: str = "similarity",
        runtime: dict[str, Any] | None = None,
        **predictor: Any,
    ) -> None:
        """Serve a model; ``runtime`` goes to `SparseModel`, ``predictor`` are the further arguments of `make_predictor`."""
        self.index = index
        self._model = language_model
        self._runtime, self._settings = dict(runtime or {}), predictor
        self.compacts = CompactCache(self._runtime.pop("cache_bytes", DEFAULT_BYTES))
        """Compact weights of all modes together."""
        self._runtime["compacts"] = self.compacts
        self.modes = tuple(dict.fromkeys([mode, *(each.value for each in Mode)]))
        self._generators: dict[str, TextGenerator] = {}
        self._generator(mode)  # what is wrong with the settings is known before anything is served

    def _generator(self, mode: str) -> TextGenerator:
        if mode not in self._generators:
            predictor = make_predictor(mode, self._model.layers, self.index, **self._settings)
            self._generators[mode] = TextGenerator(self._model, predictor, **self._runtime)
        return self._generators[mode]

    def complete(self, request: TextRequest, write: Callable[[str], None]) -> Completion:
        """Generate one text."""
        if request.seed is not None:
            torch.manual_seed(request.seed)
        if request.temperature > 0:
            options: dict[str, Any] = {
                "do_sample": True,
                "temperature": request.temperature,
                "top_p": request.top_p,
                "top_k": 0,
            }
        else:
            options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if request.stop:
            options.update(stop_strings=list(request.stop), tokenizer=self._model.tokenizer)
        run = self._generator(request.mode).generate(
            request.prompt,
            chat=not isinstance(request.prompt, str),
            max_new_tokens=request.max_new_tokens,
            shorten=request.shorten,
            write=write,
            routed_by=routing_text(self.index, request.prompt),
            num_beams=1,
            **options,
        )
        facts = run.as_dict()
        most = within(self._model.context_length, run.n_prompt_tokens, request.max_new_tokens)
        kept = ("mode", "cluster", "label", "similarity", "confidence", "confident", "keep_ratio", "tokens_per_second")
        return Completion(
            run.text,
            run.n_prompt_tokens,
            len(run.token_ids),
            len(run.token_ids) < most or self._is_end(run.token_ids[-1]),
            {**{name: facts[name] for name in kept}, "mlp_bytes_per_token": run.mlp_bytes_per_token},
        )

    def _is_end(self, token: int) -> bool:
        ends = self._model.model.generation_config.eos_token_id
        return token in (ends if isinstance(ends, list) else [ends])

    def close(self) -> None:
        """Let go of the compact weights."""
        for generator in self._generators.values():
            generator.sparse.close()


class LlamaCppBackend:
    """Exported sets on llama.cpp."""

    def __init__(self, generator: LlamaCppGenerator) -> None:
        """Serve what a generator has."""
        self._generator = generator
        self.index = generator.index
        self.modes = tuple(dict.fromkeys([generator.mode, *generator.modes]))

    def complete(self, request: TextRequest, write: Callable[[str], None]) -> Completion:
        """Generate one text."""
        sampling: dict[str, Any] = {
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": 0,
            "min_p": 0.0,
        }
        if request.seed is not None:
            sampling["seed"] = request.seed
        run = self._generator.generate(
            request.prompt,
            chat=not isinstance(request.prompt, str),
            max_new_tokens=request.max_new_tokens,
            shorten=request.shorten,
            write=write,
            routed_by=routing_text(self.index, request.prompt),
            mode=request.mode,
            stop=list(request.stop),
            **sampling,
        )
        facts = run.as_dict()
        kept = ("mode", "cluster", "label", "similarity", "confidence", "confident", "model", "prefill")
        return Completion(
            run.text,
            run.n_prompt_tokens,
            run.n_new_tokens,
            run.ended,
            {**{name: facts[name] for name in kept}, "tokens_per_second": run.tokens_per_second},
        )

    def close(self) -> None:
        """Close the models."""
        self._generator.close()
