"""Exported sets of neurons as an engine: a selection names the file, and llama.cpp runs the whole loop on it.

A dense prefill is handed over: the dense model reads the prompt, its cache is saved, and the cluster's model, whose cache
has the same shape, decodes from there. So the phases are those of `SparseModel`: the prompt is read densely and gives the
first token; every later one is decoded sparsely.
"""

from __future__ import annotations

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
from coreinfer_sim.engines.llamacpp.server import LlamaServer
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.prompts import Message

_SLOT_FILE = "prompt.bin"
_SLOT = {"cache_prompt": True, "id_slot": 0}
_ALL = 1 << 20
"""Log-probabilities to ask for: more than any vocabulary has."""
_BIAS = 1e4
"""Far more than logits are apart."""


@dataclass(frozen=True)
class StreamSettings:
    """How a text is decoded."""

    max_new_tokens: int = 128
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Of llama.cpp's server, such as ``temperature``, ``top_k``, ``seed``, ``stop``; greedy without."""


@dataclass(frozen=True)
class Decoded:
    """A whole text and what it cost."""

    text: str
    n_new_tokens: int
    ended: bool
    """Whether the text came to its end, rather than to the limit of new tokens."""
    prefill_seconds: float
    """To the first new token, the handover of the cache included."""
    decode_seconds: float


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

    def render(self, prompt: str | list[Message], chat: bool) -> str:
        """Return the text that the model reads for a prompt.

        Args:
            prompt: a text or a conversation.
            chat: put it into the model's chat template.

        Raises:
            ChatTemplateError: the template refuses the conversation.
        """
        if not chat:
            return str(prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            return str(self._decoder.post("/apply-template", {"messages": messages})["prompt"])
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

    def stream(self, ids: Sequence[int], settings: StreamSettings) -> Generator[str | Decoded, None, None]:
        """Yield the text that follows a prompt in pieces, then as a whole.

        Parts of a text that is no sound UTF-8 may be missing, as llama.cpp leaves them out of streams.

        Args:
            ids: of the prompt, [n_positions].
            settings: how to decode.

        Raises:
            ContextLengthError: the prompt and the new tokens do not fit into the context.
            GenerationError: llama.cpp refuses; the message says why.
        """
        return self._decode(list(ids), settings, in_pieces=True)

    def complete(self, ids: Sequence[int], settings: StreamSettings) -> Decoded:
        """Return the text that follows a prompt; see `stream`, but nothing is missing."""
        (decoded,) = self._decode(list(ids), settings, in_pieces=False)
        assert isinstance(decoded, Decoded)
        return decoded

    def _decode(
        self, ids: list[int], settings: StreamSettings, in_pieces: bool
    ) -> Generator[str | Decoded, None, None]:
        self._check_length(len(ids), settings.max_new_tokens)
        request = {"temperature": 0.0, **settings.sampling, **_SLOT, "return_tokens": True}
        begin = time.perf_counter()
        # 1) The dense model reads the prompt and gives the first token.
        new: list[int] = []
        text = ""
        answer: dict[str, Any] = {"stop_type": "limit"}
        if self._reader is not None:
            answer = self._reader.complete({**request, "prompt": ids, "n_predict": 1})
            new, text = answer["tokens"], answer["content"]
        n_new = len(new)
        goes_on = answer["stop_type"] == "limit" and n_new < settings.max_new_tokens
        if goes_on:
            self._hand_over()
        prefill_seconds = time.perf_counter() - begin
        # 2) The set's model decodes. A first token that ends within a character cannot be shown before what follows.
        shown = in_pieces and (not new or text.strip("\ufffd") != "")
        if shown and text:
            yield text
        if goes_on:
            rest = {**request, "prompt": [*ids, *new], "n_predict": settings.max_new_tokens - n_new}
            if shown:
                with closing(self._decoder.stream(rest)) as parts:
                    for answer in parts:
                        text += answer["content"]
                        if answer["content"]:
                            yield answer["content"]
            else:
                answer = self._decoder.complete(rest)
                new = [*new, *answer["tokens"]]
            n_new += answer["tokens_predicted"]
            if self._reader is None:
                prefill_seconds += answer["timings"]["prompt_ms"] / 1000
        decode_seconds = time.perf_counter() - begin - prefill_seconds
        # 3) The whole text.
        if not shown:
            text = self._decoder.post("/detokenize", {"tokens": new})["content"]
            if in_pieces:
                yield text
        yield Decoded(text, n_new, answer["stop_type"] != "limit", prefill_seconds, decode_seconds)

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

    def close(self) -> None:
        """Close all models and remove saved caches."""
        self.pool.close()
        self._saved.cleanup()


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
