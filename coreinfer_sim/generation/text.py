"""Text in, text out: streaming, and what a call cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from coreinfer_sim.base.errors import ContextLengthError
from coreinfer_sim.base.settings import Engine
from coreinfer_sim.choosing.predictors import Predictor
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import dense_bytes
from coreinfer_sim.models.prompts import Message, last_user_message, prompt_ids, within


@dataclass(frozen=True)
class Generation:
    """What one prompt gave and cost."""

    prompt: str
    text: str
    """The new text, without the prompt."""
    token_ids: list[int]
    """The new tokens."""
    selection: NeuronSelection
    n_prompt_tokens: int
    keep_ratio: float
    """Kept neurons over all neurons of the model."""
    prefill_seconds: float
    """From the call to the first new token; routing by meaning included."""
    decode_seconds: float
    """From the first new token to the last, without `swap_seconds`."""
    mlp_bytes_per_token: int
    """MLP bytes that one decoded token reads."""
    dense_mlp_bytes_per_token: int
    """The same in the dense model."""
    lookup_seconds: float = 0.0
    """To choose the neurons before prefill: the prompt's embedding and the nearest cluster."""
    swap_seconds: float = 0.0
    """To put the compact weights in place, after the first token or, if prefill is sparse or the weights lie on disk, before
    it; they are cut only if they are not at hand from an earlier prompt."""
    engine: str = Engine.TRANSFORMERS.value
    """What decoded: lean or transformers."""
    n_refreshes: int = 0
    """How often the selection was derived anew from the text; the dense readings for it are not in the bytes."""

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed; None with fewer than two new tokens."""
        n = len(self.token_ids) - 1
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
            "keep_ratio": round(self.keep_ratio, 4),
            "n_prompt_tokens": self.n_prompt_tokens,
            "n_new_tokens": len(self.token_ids),
            "prefill_seconds": round(self.prefill_seconds, 4),
            "decode_seconds": round(self.decode_seconds, 4),
            "tokens_per_second": None if speed is None else round(speed, 2),
            "lookup_seconds": round(self.lookup_seconds, 4),
            "swap_seconds": round(self.swap_seconds, 4),
            "engine": self.engine,
            "mlp_bytes_per_token": self.mlp_bytes_per_token,
            "dense_mlp_bytes_per_token": self.dense_mlp_bytes_per_token,
            "n_refreshes": self.n_refreshes,
        }


class _Clock(TextStreamer):
    """Streams new text to a function and notes when the first token came."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write
        self._n_puts = 0
        self.first_token: float | None = None

    def put(self, value: torch.Tensor) -> None:
        self._n_puts += 1
        if self._n_puts == 2:  # the first put is the prompt
            self.first_token = time.perf_counter()
        if self._write is None:
            return
        is_prompt = self.next_tokens_are_prompt
        super().put(value)
        if not is_prompt and not self.token_cache:  # a line has ended, and with it what its last token is decoded with
            self.token_cache = [int(value.flatten()[-1])]
            self.print_len = len(self.tokenizer.decode(self.token_cache, **self.decode_kwargs))

    def end(self) -> None:
        if self._write is not None:
            super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        assert self._write is not None
        if text:
            self._write(text)


class TextGenerator:
    """Generates text with a model and a predictor."""

    def __init__(
        self, language_model: LanguageModel, predictor: Predictor, refresh: str | None = None, **options: Any
    ) -> None:
        """Wrap a loaded model; see `make_predictor` for the predictor and `SparseModel` for the rest."""
        self.language_model = language_model
        self.sparse = SparseModel(language_model.model, predictor, language_model.tokenizer, refresh, **options)

    def generate(
        self,
        prompt: str | list[Message],
        *,
        chat: bool = False,
        max_new_tokens: int = 128,
        shorten: bool = False,
        write: Callable[[str], None] | None = None,
        routed_by: str | None = None,
        **options: Any,
    ) -> Generation:
        """Generate one continuation.

        Args:
            prompt: a text, or the messages of a conversation. Routing looks at the last user message.
            chat: put a text into the model's chat template.
            max_new_tokens: most tokens to generate.
            shorten: where the context has no room for as many, generate fewer, rather than refuse.
            write: takes the new text piece by piece, as it comes.
            routed_by: text that routes in place of the last user message.
            **options: of transformers' ``generate``.

        Raises:
            PromptError: the prompt is empty.
            ContextLengthError: it does not fit into the context together with ``max_new_tokens``.
            ChatTemplateError: see `prompt_ids`.
        """
        text, ids = self._encode(prompt, chat)
        if shorten:
            max_new_tokens = within(self.language_model.context_length, ids.shape[1], max_new_tokens)
        self._check_length(ids.shape[1], max_new_tokens)
        clock = _Clock(self.language_model.tokenizer, write)
        beams = options.get("num_beams") or self.language_model.model.generation_config.num_beams or 1
        streams = beams == 1
        begin = time.perf_counter()
        output = self.sparse.generate(
            ids,
            prompts=[routed_by or text],
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=self.language_model.tokenizer.pad_token_id,
            streamer=clock if streams else None,
            **options,
        )
        end = time.perf_counter()
        new = output[0, ids.shape[1] :].tolist()
        first = clock.first_token or self.sparse.decode_began or end  # beams do not stream
        selection, layers = self.sparse.selections[0], self.sparse.layers
        generated = self.language_model.tokenizer.decode(new, skip_special_tokens=True)
        if write is not None and not streams:
            write(generated)
        return Generation(
            prompt=text,
            text=generated,
            token_ids=new,
            selection=selection,
            n_prompt_tokens=ids.shape[1],
            keep_ratio=selection.keep_ratio(layers),
            prefill_seconds=first - begin,
            decode_seconds=end - first - (self.sparse.swap_seconds if self.sparse.swapped_in_decode else 0.0),
            mlp_bytes_per_token=self.sparse.mlp_bytes(selection),
            dense_mlp_bytes_per_token=dense_bytes(layers),
            lookup_seconds=self.sparse.lookup_seconds,
            swap_seconds=self.sparse.swap_seconds,
            engine=self.sparse.engine_used.value,
            n_refreshes=self.sparse.n_refreshes,
        )

    def _encode(self, prompt: str | list[Message], chat: bool) -> tuple[str, torch.Tensor]:
        """Return the text to route by, and the prompt's ids [1, n_positions]."""
        lm = self.language_model
        routed = last_user_message([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        return routed, prompt_ids(lm.tokenizer, lm.name, prompt, chat).to(lm.model.device)

    def _check_length(self, n_prompt: int, max_new_tokens: int) -> None:
        limit = self.language_model.context_length
        if limit is not None and n_prompt + max_new_tokens > limit:
            budgeted = limit == self.language_model.position_limit
            what = "the memory budget has room for" if budgeted else "the model's context is"
            raise ContextLengthError(
                f"the prompt has {n_prompt} tokens and {max_new_tokens} new ones were asked for, but {what} "
                f"{limit}; shorten the prompt"
                + (f" or ask for at most {limit - n_prompt}." if limit > n_prompt else ".")
            )
