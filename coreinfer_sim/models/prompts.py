"""Prompts as texts and as conversations: what a model reads of them, and what routing looks at."""

from __future__ import annotations

from typing import Any

import torch
from jinja2 import TemplateError

from coreinfer_sim.base.chats import Conversation, plain
from coreinfer_sim.base.errors import ChatTemplateError, PromptError

Message = dict[str, str]


def last_user_message(messages: list[Message]) -> str:
    """Return what the user said last.

    Raises:
        PromptError: nothing.
    """
    found = next((m["content"] for m in reversed(messages) if m["role"] == "user"), None)
    if messages and found is None:
        raise PromptError("the conversation has no message of the user, expected one.")
    if found is None or not found.strip():
        raise PromptError("the prompt is empty, expected some text.")
    return found


def within(context: int | None, n_prompt: int, max_new_tokens: int) -> int:
    """Return how many new tokens, at most ``max_new_tokens`` and at least one, a context has room for behind a prompt."""
    return max_new_tokens if context is None else max(1, min(max_new_tokens, context - n_prompt))


def prompt_ids(tokenizer: Any, name: str, prompt: str | list[Message], chat: bool) -> torch.Tensor:
    """Return the ids [1, n_positions] that a model reads for a text, or for messages or a chat in its template.

    Raises:
        ChatTemplateError: the model, called ``name``, has no chat template, or that refuses the messages.
    """
    if not chat and isinstance(prompt, str):
        ids: torch.Tensor = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"]
        return ids
    if tokenizer.chat_template is None:
        raise ChatTemplateError(f"{name} has no chat template; give the prompt as plain text.")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except TemplateError as error:  # of roles, or of their order
        raise ChatTemplateError(
            f"{name}'s chat template refuses the conversation ({error}); send another one."
        ) from error
    ids = encoded["input_ids"]
    return ids


def rendered(tokenizer: Any, name: str, turns: Conversation) -> str:
    """Return a whole conversation as a model reads it: in its chat template, or without one the texts one below the other.

    Raises:
        ChatTemplateError: the template of the model, called ``name``, refuses the messages.
    """
    if tokenizer.chat_template is None:
        return plain(turns)
    messages = [turn._asdict() for turn in turns]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:
        raise ChatTemplateError(f"{name}'s chat template refuses the conversation ({error}).") from error
    begin = tokenizer.bos_token
    if begin and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:  # which comes with tokenising again
        text = text.removeprefix(begin)
    return text
