"""ExportedGenerator: exported sets of an index, decoded by llama.cpp, each prompt on the one that it routes to."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import fields
from typing import Any

from coreinfer_sim.base.decode_settings import DecodeConfig, SamplingConfig, SelectionConfig
from coreinfer_sim.base.errors import ChatTemplateError, ConfigError
from coreinfer_sim.base.settings import Fallback, Mode
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.llamacpp.engine import LlamaCppEngine, StreamSettings
from coreinfer_sim.engines.llamacpp.router import GLOBAL
from coreinfer_sim.generation.routing import routing_text
from coreinfer_sim.generation.text import Generation, Generator, Request
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.chat_templates import chat_format
from coreinfer_sim.models.prompts import within

_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repeat_penalty",
}
"""Our settings, and what llama.cpp's server calls them."""
_MOST_TOP_K = 2**31 - 1
"""That llama.cpp takes; more than any vocabulary has."""
_SEEDS = 2**32 - 1
"""Of llama.cpp; the next one stands for a seed by chance."""
_FIXED = ("keep_ratio", "read_ratio", "score", "sparse_layers", "compensated", "alpha")
"""Settings of a selection that export has decided."""
_NOT_THERE = ("min_new_tokens", "no_repeat_ngram_size", "num_beams")


class ExportedGenerator(Generator):
    """Generates on the files that ``export`` wrote."""

    def __init__(self, index: SemanticIndex, selection: SelectionConfig, decode: DecodeConfig) -> None:
        """Open no file yet.

        Args:
            index: that was exported; it routes prompts.
            selection: mode and fallback; all else was decided by the export.
            decode: folder of the export, prefill, memory limit and context.

        Raises:
            ConfigError: settings that export has decided, or an export of another index.
        """
        super().__init__()
        defaults = SelectionConfig(), DecodeConfig()
        fixed = [name for name in _FIXED if getattr(selection, name) != getattr(defaults[0], name)]
        fixed += [name for name in ("weights", "memory_budget") if getattr(decode, name) != getattr(defaults[1], name)]
        if fixed:
            raise ConfigError(
                f"{fixed[0]} does not apply to the engine llamacpp, whose models were fixed by export; leave it out."
            )
        if decode.exported is None:
            raise ConfigError("llama.cpp needs the models exported from the index, and no folder of them was given.")
        self.index: SemanticIndex = index
        self.name = index.manifest.model.name
        self._engine = LlamaCppEngine(
            index,
            decode.exported,
            prefill=decode.prefill.value,
            memory_limit=decode.memory_limit,
            context=decode.context,
        )
        router = self._engine.router
        if router.chat_template is not None:
            self.chat_format = chat_format(router.chat_template, router.special_tokens)
        there = router.modes
        self.modes = tuple(dict.fromkeys([selection.named_mode.value, *there]))
        if selection.named_mode.value not in ("similarity", "global", "dense"):
            self._engine.close()
            raise ConfigError(
                f"mode {selection.named_mode.value} was asked of llama.cpp, expected similarity, global or dense; sets that "
                "depend on the prompt need another engine."
            )
        self._fallback = self._chosen_fallback(selection.fallback)

    def _generate(self, request: Request) -> Generation:
        if request.chat and not self.has_chat_template:
            raise ChatTemplateError(f"{self.name} has no chat template; give the prompt as plain text.")
        # 1) the set, open in llama.cpp
        begin, output = time.perf_counter(), request.output
        selection = self._route(request.routed_by, request.mode)
        looked_up = time.perf_counter()
        model = self._engine.model(selection)
        opened = time.perf_counter()
        # 2) a prompt that fits
        rendered = self.chat_format is not None and bool(self.chat_format.user_texts(str(request.prompt)))
        text = model.render(request.prompt, request.chat, request.chat_template_kwargs)
        ids = model.tokenize(text, parse_special=request.chat or rendered)
        n_new = request.sampling.max_new_tokens
        n_new = within(self._engine.context, len(ids), n_new) if request.shorten else n_new
        settings = StreamSettings(n_new, llamacpp_sampling(request.sampling, self._engine.context), output.cancelled)
        # 3) the text; leaving the loop ends the decoding
        output.check()
        decode_began = time.perf_counter()
        with closing(model.stream(ids, settings)) as pieces:
            for latest in pieces:
                output.check()
                if output.add(latest.text):
                    break
        seconds = time.perf_counter() - decode_began
        return Generation(
            prompt=request.routed_by,
            text=output.end(),
            token_ids=None,
            n_new_tokens=latest.n_new_tokens,
            ended=output.stopped or latest.ended,
            selection=selection,
            keep_ratio=None,
            engine="llamacpp",
            n_prompt_tokens=len(ids),
            n_cached_tokens=latest.n_cached,
            prefill_seconds=latest.prefill_seconds + looked_up - begin,
            decode_seconds=seconds - latest.prefill_seconds,
            mlp_bytes_per_token=None,
            dense_mlp_bytes_per_token=None,
            lookup_seconds=looked_up - begin,
            prepare_seconds=opened - looked_up,
            file=model.path.name,
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether the exported files hold one."""
        return self._engine.has_chat_template

    def score(self, prompt: str, completion: str, *, mode: str | None = None) -> list[float]:
        """Return the log-probability of each completion token; see `Generator.score`."""
        routed = routing_text(self.index, prompt, self.chat_format)
        model = self._engine.model(self._route(routed, self.checked_mode(mode)))
        before, after = model.tokenize(prompt), model.tokenize(completion, add_special=False)
        return model.score([*before, *after], len(before))

    def close(self) -> None:
        """Close all models."""
        self._engine.close()

    def _route(self, text: str, mode: str) -> NeuronSelection:
        """Return what a prompt decodes with, by name; its neurons are in the file."""
        if mode != Mode.SIMILARITY.value:
            return NeuronSelection(mode)
        match = self.index.lookup(text)[0]
        if not match.confident and self._fallback is not Fallback.NONE:
            mode = self._fallback.value
        return NeuronSelection(mode, {}, match.cluster, match.similarity, match.label, confidence=match.confidence)

    def _chosen_fallback(self, fallback: Fallback | None) -> Fallback:
        if fallback is None:
            return Fallback.GLOBAL if GLOBAL in self._engine.router.files else Fallback.NONE
        if fallback is Fallback.HYBRID:
            raise ConfigError("the fallback is hybrid, whose sets depend on the prompt; take global, dense or none.")
        if fallback is not Fallback.NONE:
            self._engine.router.path(fallback.value)  # which says what is missing
        return fallback


def llamacpp_sampling(sampling: SamplingConfig, context: int) -> dict[str, Any]:
    """Return the settings as llama.cpp's server names them, but for stop texts, which `TextOutput` looks for.

    Raises:
        ConfigError: llama.cpp has no such setting.
    """
    defaults = {field.name: field.default for field in fields(SamplingConfig)}
    for name in _NOT_THERE:
        if getattr(sampling, name) != defaults[name]:
            raise ConfigError(f"{name} does not apply to the engine llamacpp; leave it out.")
    given = {theirs: getattr(sampling, ours) for ours, theirs in _SAMPLING.items()}
    found: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if sampling.samples:
        found = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **found}
    if sampling.repetition_penalty is not None:
        found["repeat_last_n"] = context  # all of it, as transformers does
    if sampling.top_k is not None:
        found["top_k"] = min(sampling.top_k, _MOST_TOP_K)
    if sampling.seed is not None:
        found["seed"] = sampling.seed % _SEEDS
    if sampling.ignore_eos:
        found["ignore_eos"] = True
    return found
