"""Exported sets of neurons as an engine: a selection names the file, and llama.cpp runs the whole loop on it.

A dense prefill is handed over: the dense model reads the prompt, its cache is saved, and the cluster's model, whose cache
has the same shape, decodes from there. So the phases are those of `SparseModel`: the prompt is read densely and gives the
first token; every later one is decoded sparsely.
"""

from __future__ import annotations

import functools
import struct
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coreinfer_sim.base.errors import (
    ChatTemplateError,
    ConfigError,
    ContextLengthError,
    GenerationError,
    RequestRefusedError,
    UnknownModeError,
)
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.llamacpp.pool import ModelPool
from coreinfer_sim.engines.llamacpp.router import DENSE, GLOBAL, SIMILARITY, read_router
from coreinfer_sim.engines.llamacpp.server import Cancelled, LlamaServer
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.prompts import Message

_SLOT_FILE = "prompt.bin"
_SLOT = {"cache_prompt": True, "id_slot": 0}
_ALL = 1 << 20
"""Log-probabilities to ask for: more than any vocabulary has."""
_BIAS = 1e4
"""Far more than logits are apart."""
_BROKEN = "\ufffd"
"""What llama.cpp writes for bytes that are no character, or not yet a whole one."""
_MOST_BYTES = 4
"""Of one character."""
_CHAT_TEMPLATE = struct.pack("<Q", 23) + b"tokenizer.chat_template"
"""As a GGUF file names it: the length, then the name."""
_MOST_METADATA = 64 << 20
"""Bytes at the beginning of a GGUF file among which its metadata lie."""


@dataclass(frozen=True)
class StreamSettings:
    """How a text is decoded."""

    max_new_tokens: int = 128
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Of llama.cpp's server, such as ``temperature``, ``top_k``, ``seed``; greedy without."""
    cancelled: Cancelled | None = None
    """Says whether nobody wants the text any more."""


@dataclass(frozen=True)
class Piece:
    """New text and what there is so far."""

    text: str
    """May be empty."""
    n_new_tokens: int
    """So far, this piece's included."""
    prefill_seconds: float
    """To the first new token, the handover of the cache included."""
    ended: bool = False
    """Whether an end token came, rather than the limit of new tokens; of the last piece."""
    n_cached: int = 0
    """Tokens of the prompt that were not read again; of the last piece."""


class ExportedModel:
    """One exported set, open in llama.cpp, perhaps beside the dense model that reads its prompts."""

    def __init__(self, decoder: LlamaServer, reader: LlamaServer | None, context: int) -> None:
        """Use open models.

        Args:
            decoder: of the set.
            reader: the dense model, which reads prompts; None lets the decoder read them.
            context: positions of the cache.
        """
        self.path = decoder.path
        self._decoder, self._reader, self._context = decoder, reader, context

    def render(
        self, prompt: str | list[Message], chat: bool, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> str:
        """Return the text that the model reads for a prompt.

        Args:
            prompt: a text or a conversation.
            chat: put it into the model's chat template.
            chat_template_kwargs: further variables of the template.

        Raises:
            ChatTemplateError: the template refuses the conversation.
        """
        if not chat:
            return str(prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            content = {"messages": messages, "chat_template_kwargs": dict(chat_template_kwargs or {})}
            return str(self._decoder.post("/apply-template", content)["prompt"])
        except RequestRefusedError as error:
            raise ChatTemplateError(f"the chat template refuses the conversation: {error} Send another one.") from error

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: of a prompt or of a part of one.
            add_special: add the tokens that begin a text.
            parse_special: read the names of special tokens, as a chat template writes them, as those tokens.
        """
        content = {"content": text, "add_special": add_special, "parse_special": parse_special}
        ids: list[int] = self._decoder.post("/tokenize", content)["tokens"]
        return ids

    def stream(self, ids: Sequence[int], settings: StreamSettings) -> Generator[Piece, None, None]:
        """Yield the text that follows a prompt in pieces; closing the iterator ends the decoding.

        A text that ends within a character ends before it.

        Args:
            ids: of the prompt, [n_positions].
            settings: how to decode.

        Raises:
            ContextLengthError: the prompt and the new tokens do not fit into the context.
            GenerationCancelledError: nobody wants the text any more.
            GenerationError: llama.cpp refuses; the message says why.
        """
        self._check_length(len(ids), settings.max_new_tokens)
        request = {"temperature": 0.0, **settings.sampling, **_SLOT, "return_tokens": True}
        begin, prefill_seconds = time.perf_counter(), 0.0
        # 1) The dense model reads the prompt and gives the first token.
        new: list[int] = []
        cut, n_cached = False, 0
        if self._reader is not None:
            answer = self._reader.complete({**request, "prompt": list(ids), "n_predict": 1}, settings.cancelled)
            new, text, ended = answer["tokens"], answer["content"], answer["stop_type"] != "limit"
            goes_on = not ended and len(new) < settings.max_new_tokens
            cut = goes_on and text.endswith(_BROKEN)
            if goes_on:
                self._hand_over()
            prefill_seconds, n_cached = time.perf_counter() - begin, _n_cached(answer)
            yield Piece("" if cut else text, len(new), prefill_seconds, ended, n_cached)
            if not goes_on:
                return
        # 2) The set's model decodes. A first token that ends within a character waits for those that complete it.
        rest = {**request, "prompt": [*ids, *new], "n_predict": settings.max_new_tokens - len(new)}
        waiting = new if cut else []
        with closing(self._decoder.stream(rest, settings.cancelled)) as parts:
            for part in parts:
                prefill_seconds = prefill_seconds or time.perf_counter() - begin
                text, ended = part["content"], part.get("stop_type", "limit") not in ("limit", "none")
                if waiting:
                    text, waiting = self._completed(waiting, part)
                n_cached = n_cached if self._reader is not None else _n_cached(part)
                yield Piece(text, len(new) + part["tokens_predicted"], prefill_seconds, ended, n_cached)

    def _completed(self, waiting: list[int], part: dict[str, Any]) -> tuple[str, list[int]]:
        """Return the text of tokens that waited and of a further part, and what waits on."""
        tokens = part["tokens"] if part["content"] else []
        text = self._decoder.post("/detokenize", {"tokens": [*waiting, *tokens]})["content"]
        if len(waiting) + len(tokens) <= part["tokens_predicted"]:  # of a text that is no sound UTF-8 some are left out
            return self._decoder.post("/detokenize", {"tokens": waiting})["content"] + part["content"], []
        waits = text.endswith(_BROKEN) and len(waiting) + len(tokens) < _MOST_BYTES and not part["stop"]
        return ("", [*waiting, *tokens]) if waits else (text, [])

    def score(self, ids: Sequence[int], start: int) -> list[float]:
        """Return ln p(ids[i] | ids[:i]) for every i from ``start`` on, as decode would have read them.

        The first of them follows the prompt ``ids[:start]`` and so is the reader's, as in `stream`.

        Args:
            ids: a given text, [n_positions].
            start: of the part to score, 1 or more.

        Raises:
            ConfigError: nothing is left to score, or nothing comes before it.
            ContextLengthError: the text does not fit into the context.
            GenerationError: llama.cpp refuses; the message says why.
        """
        if not 1 <= start < len(ids):
            raise ConfigError(f"start is {start}, expected 1 to {len(ids) - 1} for a text of {len(ids)} tokens.")
        self._check_length(len(ids), 0)
        found = [_log_probability(self._reader or self._decoder, ids[:start], ids[start])]
        if len(ids) > start + 1:
            self._hand_over()
        return found + [
            _log_probability(self._decoder, ids[:place], ids[place]) for place in range(start + 1, len(ids))
        ]

    def _check_length(self, n_given: int, max_new_tokens: int) -> None:
        if n_given + max_new_tokens > self._context:
            raise ContextLengthError(
                f"the prompt has {n_given} tokens, which with {max_new_tokens} new ones exceed the context of "
                f"{self._context}; shorten it, or raise context."
            )

    def _hand_over(self) -> None:
        """Give the cache of the prompt that the dense model has read, if it has, to the model that decodes."""
        if self._reader is None:
            return
        saved = self._reader.post("/slots/0?action=save", {"filename": _SLOT_FILE})
        try:
            self._decoder.post("/slots/0?action=restore", {"filename": _SLOT_FILE})
        except RequestRefusedError as error:
            raise GenerationError(
                f"the dense model's cache of {saved['n_saved']} positions does not fit {self.path.name}: {error} Export both "
                "anew from one model, or set prefill to sparse."
            ) from error


def _log_probability(server: LlamaServer, before: Sequence[int], token: int) -> float:
    """Return ln p(token | before).

    A bias makes llama.cpp choose the token, whose probability it gives as it was without the bias. Of a token that ends
    within a character it gives none; then those of all tokens are read beside another choice.
    """
    request = {"temperature": 0.0, **_SLOT, "n_predict": 1, "prompt": list(before)}

    def find(choice: int, n_probs: int) -> float | None:
        answer = server.complete({**request, "n_probs": n_probs, "logit_bias": [[choice, _BIAS]]})
        for step in answer.get("completion_probabilities", []):
            for each in (step, *step["top_logprobs"]):
                if each["id"] == token:
                    return float(each["logprob"])
        return None

    found = find(token, 1)
    if found is None:
        (letter, *_) = server.post("/tokenize", {"content": "a", "add_special": False})["tokens"]
        found = find(letter, _ALL)
    if found is None:
        raise GenerationError(
            f"llama.cpp gives {server.path.name}'s token {token} no probability, expected one of its own."
        )
    return found


class LlamaCppEngine:
    """The exported sets of an index, each opened on first use."""

    def __init__(
        self,
        index: SemanticIndex,
        folder: str | Path,
        *,
        prefill: str = "dense",
        memory_limit: int | None = None,
        context: int = 4096,
        n_threads: int | None = None,
    ) -> None:
        """Open no file yet.

        Args:
            index: that was exported.
            folder: with ``router.json`` and the GGUF files.
            prefill: "dense" reads prompts with the dense model, "sparse" with the one that decodes.
            memory_limit: bytes of files that may be open at a time; None sets no limit.
            context: positions of each model's cache.
            n_threads: of llama.cpp; None leaves its own choice.

        Raises:
            ConfigError: an export of another index, or an unknown ``prefill``.
        """
        if prefill not in ("dense", "sparse"):
            raise ConfigError(f"prefill is {prefill!r}, expected dense or sparse.")
        self.router = read_router(Path(folder), index)
        self.prefill, self.context = prefill, context
        self._saved = tempfile.TemporaryDirectory(prefix="coreinfer-sim-")
        self.pool = ModelPool(memory_limit, self._saved.name, context, n_threads)

    def model(self, selection: NeuronSelection) -> ExportedModel:
        """Open the exported set that a selection stands for; its ids are not looked at.

        Use the model before the next call, and then let go of it: that call may close its files.

        Raises:
            UnknownModeError: its mode chooses neurons by the prompt.
            ConfigError: the set was not exported, or the memory limit is too small.
            ModelError: a file is missing or damaged.
        """
        wanted = set_of(selection)
        path = self.router.path(wanted)
        dense = self.router.path(DENSE) if self.prefill == "dense" and wanted != DENSE else None
        reader = None if dense is None else self.pool.get(dense, beside=path)
        return ExportedModel(self.pool.get(path, beside=dense), reader, self.context)

    @functools.cached_property
    def has_chat_template(self) -> bool:
        """Whether the files hold one; without, llama.cpp takes one that the model has never seen."""
        path = self.router.folder / next(iter(self.router.files.values()))
        with path.open("rb") as file:
            return _CHAT_TEMPLATE in file.read(_MOST_METADATA)

    def close(self) -> None:
        """Close all models and remove saved caches."""
        self.pool.close()
        self._saved.cleanup()


def _n_cached(answer: Mapping[str, Any]) -> int:
    """Return how many tokens of the prompt llama.cpp did not read again."""
    return int(answer.get("timings", {}).get("cache_n", 0))


def set_of(selection: NeuronSelection) -> int | str:
    """Return which exported set a selection stands for: a cluster's number, GLOBAL or DENSE.

    Raises:
        UnknownModeError: none, as its neurons were chosen by the prompt.
    """
    if selection.mode in (GLOBAL, DENSE):
        return selection.mode
    if selection.mode != SIMILARITY or selection.cluster is None:
        raise UnknownModeError(
            f"the mode is {selection.mode}, expected similarity, global or dense; sets that depend on the prompt were not "
            "exported."
        )
    return selection.cluster
