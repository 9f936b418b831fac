"""Conversations in a corpus, in the forms in which data sets have them."""

from __future__ import annotations

import ast
import json
from typing import Any, NamedTuple

_ROLES = {
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"},
    **{"observation": "tool", "function": "tool", "function_response": "tool"},
}
"""ShareGPT's names, and those of chat templates."""
_KEYS = (("role", "content"), ("from", "value"))


class Turn(NamedTuple):
    """One message."""

    role: str
    """user, assistant, system, tool, or what the corpus calls it."""
    content: str


Conversation = tuple[Turn, ...]


def is_conversation(value: Any) -> bool:
    """Tell whether a value is a list of messages: ``role`` and ``content``, or ShareGPT's ``from`` and ``value``.

    A list may also be written as text, in JSON or as Python prints it, as tables of texts hold them.
    """
    messages = _listed(value)
    return bool(messages) and all(_keys(message) is not None for message in messages)


def fault_of(value: Any) -> str:
    """Say in brackets which message of a list makes it no conversation; nothing where the list holds no message."""
    for number, message in enumerate(_listed(value), 1):
        if isinstance(message, dict) and _keys(message) is None:
            has_role = any(isinstance(message.get(role), str) for role, _ in _KEYS)
            return f" (message {number} has no {'content' if has_role else 'role'})"
    return ""


def conversation_of(value: Any) -> tuple[Conversation, int]:
    """Return the messages of a list, and how many of their parts are no text, such as images, which are left out.

    Args:
        value: for which `is_conversation` holds.
    """
    turns, n_other = [], 0
    for message in _listed(value):
        role, content = (message.get(key) for key in _keys(message) or _KEYS[0])
        text, n = _text(content)
        n_other += n
        turns.append(Turn(_ROLES.get(str(role).lower(), str(role).lower()), text))
    return tuple(turns), n_other


def last_question(turns: Conversation) -> int | None:
    """Return the place of the user's last message with text, or None."""
    places = (place for place in reversed(range(len(turns))) if turns[place].role == "user")
    return next((place for place in places if turns[place].content.strip()), None)


def plain(turns: Conversation) -> str:
    """Return the texts of a conversation one below the other, as a model without a chat template reads it."""
    return "\n".join(turn.content.strip() for turn in turns if turn.content.strip())


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        for read in (json.loads, ast.literal_eval):
            try:
                value = read(value.strip())
                break
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return value if isinstance(value, list) else []


def _keys(message: Any) -> tuple[str, str] | None:
    if not isinstance(message, dict):
        return None
    for role, content in _KEYS:
        if isinstance(message.get(role), str) and (content in message or "tool_calls" in message):
            return role, content
    return None


def _text(content: Any) -> tuple[str, int]:
    """Return the text of a message, whose content may be a text, its parts or nothing, and how many parts are no text."""
    if content is None:
        return "", 0
    if isinstance(content, str):
        return content, 0
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        return str(content).lower() if isinstance(content, bool) else str(content), 0
    texts = [
        part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None for part in content
    ]
    found = [text for text in texts if isinstance(text, str)]
    return "\n".join(found), len(texts) - len(found)
