"""What a prompt is routed by, however it comes: the one place that decides."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.chat_templates import ChatFormat, chat_format, template_of
from coreinfer_sim.models.prompts import Message, last_user_message

_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
_SHORTEST, _SHORTEST_BEFORE = 8, 20
"""Characters of a field of a document that say which part of a context is the document's: in its last paragraph, and before
that, where a shorter one may belong to an example."""


def routing_text(index: SemanticIndex | None, prompt: str | list[Message], chat: ChatFormat | None = None) -> str:
    """Return what a prompt is routed by: a text itself, of a conversation the user's last message that is familiar.

    A new topic is familiar to some cluster, and moves the conversation there. "And why?" is familiar to none, and leaves
    it where it was. Where nothing is familiar, the last message counts. A text that the model's chat template rendered is
    the conversation that it was rendered from.

    Args:
        index: says what is familiar; None: the last message counts.
        prompt: a text, or the messages of a conversation.
        chat: of the model's chat template; None: a text is never taken for a conversation.

    Raises:
        PromptError: the prompt is empty, or no message is the user's.
    """
    if isinstance(prompt, str):
        said = (chat.user_texts(prompt) if chat is not None else []) or [prompt]
    else:
        said = [m["content"] for m in prompt if m["role"] == "user" and m["content"].strip()]
    folds = isinstance(prompt, str) and chat is not None and said != [prompt] and chat.folds
    candidates = [part for text in reversed(said) for part in (_parts(text) if folds else [text])]
    if (
        index is not None and len(candidates) > 1
    ):  # else there is nothing to choose among, and nothing is embedded twice
        for text in candidates:
            if index.lookup(text)[0].confident:
                return text
    return last_user_message([{"role": "user", "content": said[-1]}] if isinstance(prompt, str) else prompt)


def _parts(text: str) -> Iterator[str]:
    """Yield a text and what follows each of its blank lines: a system prompt or tools may stand before one."""
    yield text
    for found in _BLANK_LINE.finditer(text):
        if rest := text[found.end() :].strip():
            yield rest


def chat_format_of(tokenizer: Any) -> ChatFormat | None:
    """Return how a tokenizer's chat template marks turns; None: it has none, or it cannot be told."""
    found = template_of(tokenizer)
    return None if found is None else chat_format(*found)


def routing_text_of_ids(index: SemanticIndex | None, ids: torch.Tensor, tokenizer: Any) -> str:
    """Return what a prompt of token ids [n_positions] is routed by; see `routing_text`."""
    chat = chat_format_of(tokenizer)
    if chat is not None:
        rendered = tokenizer.decode(ids, skip_special_tokens=False)
        if chat.user_texts(rendered):
            return routing_text(index, rendered, chat)
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def last_question(context: str, document: Any = None, chat: ChatFormat | None = None) -> str:
    """Return the question at the end of a context that may begin with answered ones.

    Args:
        context: a text, or a conversation in the model's chat template, whose last message of the user's counts.
        document: whose question it is, by field. Those of its texts that stand in the context say which part counts.
        chat: of the model's chat template.

    Returns:
        The part that the document's texts span, from the longest of them on and with those in the paragraph before it;
        where there is none, what follows the last blank line.
    """
    said = chat.user_texts(context) if chat is not None else []
    text = (said[-1] if said else context).strip()
    values = document.values() if isinstance(document, dict) else [document]
    starts = [0, *(found.end() for found in _BLANK_LINE.finditer(text))]
    places = {
        part: place
        for part in (each.strip() for each in values if isinstance(each, str))
        if (place := text.rfind(part)) >= 0 and len(part) >= (_SHORTEST if place >= starts[-1] else _SHORTEST_BEFORE)
    }
    if not places:
        return text[starts[-1] :].strip()
    paragraph = max(start for start in starts if start <= places[max(places, key=len)])
    ours = {part: place for part, place in places.items() if place >= paragraph}
    return text[min(ours.values()) : max(place + len(part) for part, place in ours.items())]
