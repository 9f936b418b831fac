"""Prompts as texts and as conversations: what a model reads of them, and what routing looks at."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from jinja2 import TemplateError, TemplateSyntaxError

from coreinfer_sim.base.chats import Conversation, plain
from coreinfer_sim.base.errors import ChatTemplateError, PromptError


class _Turn(TypedDict):
    role: str
    content: str


class Message(_Turn, total=False):
    """One turn of a conversation; what stands beside role and content counts as far as the chat template reads it."""

    name: str
    tool_calls: list[Any]
    tool_call_id: str


def last_user_message(messages: list[Message]) -> str:
    """Return what the user said last.

    Raises:
        PromptError: nothing.
    """
    found: str | None = next((m["content"] for m in reversed(messages) if m["role"] == "user"), None)
    if messages and found is None:
        raise PromptError("the conversation has no message of the user, expected one.")
    if found is None or not found.strip():
        raise PromptError("the prompt is empty, expected some text.")
    return found


def within(context: int | None, n_prompt: int, max_new_tokens: int) -> int:
    """Return how many new tokens, at most ``max_new_tokens`` and at least one, a context has room for behind a prompt."""
    return max_new_tokens if context is None else max(1, min(max_new_tokens, context - n_prompt))


def prompt_ids(
    tokenizer: Any,
    name: str,
    prompt: str | list[Message],
    chat: bool,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """Return the ids [1, n_positions] that a model reads for a text, or for messages or a chat in its template.

    Raises:
        ChatTemplateError: the model, called ``name``, has no chat template, or that refuses the messages.
    """
    special = not chat and isinstance(prompt, str)  # a template writes the tokens that begin a text by itself
    text = prompt if special else rendered_chat(tokenizer, name, prompt, chat_template_kwargs or {})
    ids: torch.Tensor = tokenizer(text, add_special_tokens=special, return_tensors="pt", verbose=False)["input_ids"]
    return ids


def rendered_chat(
    tokenizer: Any, name: str, prompt: str | list[Message], chat_template_kwargs: Mapping[str, Any]
) -> str:
    """Return what a model reads before it answers in a conversation, in its chat template.

    Raises:
        ChatTemplateError: the model, called ``name``, has none, or that refuses the messages or the variables.
    """
    if tokenizer.chat_template is None:
        raise ChatTemplateError(f"{name} has no chat template; give the prompt as plain text.")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    reserved = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    taken = sorted(reserved.intersection(chat_template_kwargs))
    if taken:
        raise ChatTemplateError(
            f"chat_template_kwargs has {taken[0]}, expected variables of the template's own; leave it out."
        )
    return _in_template(tokenizer, name, messages, add_generation_prompt=True, **chat_template_kwargs)


def rendered(tokenizer: Any, name: str, turns: Conversation) -> str:
    """Return a whole conversation as a model reads it: in its chat template, or without one the texts one below the other.

    Raises:
        ChatTemplateError: the template of the model, called ``name``, refuses the messages.
    """
    if tokenizer.chat_template is None:
        return plain(turns)
    text = _in_template(tokenizer, name, [turn._asdict() for turn in turns])
    begin = tokenizer.bos_token
    if begin and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:  # which comes with tokenising again
        text = text.removeprefix(begin)
    return text


def _in_template(tokenizer: Any, name: str, messages: Sequence[Any], **variables: Any) -> str:
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, **variables))
        text.encode()  # half of a surrogate pair among the variables is no text
        return text
    except TemplateSyntaxError as error:
        raise ChatTemplateError(
            f"{name}'s chat template cannot be read ({error}); mend it in its folder, or give prompts as plain text."
        ) from error
    except Exception as error:  # whatever the template's code raises, of roles, of their order, or of a value's type
        own = isinstance(error, TemplateError)  # the others are Python's words on the template's code
        reason = " ".join(str(error).split())[:300] if own else "its code fails on it"
        raise ChatTemplateError(
            f"{name}'s chat template refuses the conversation ({reason}); send another one."
        ) from error
