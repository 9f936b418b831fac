"""What is wrong with a request, in its own words: which field, what was found, what was expected."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException
from starlette.requests import Request

_EXPECTED = {
    "model": "a text",
    "messages": "a list of one message or more",
    "role": "system, developer, user, assistant, tool or function",
    "content": "a text, or a list of parts with text",
    "name": "a text",
    "tool_calls": "a list",
    "tool_call_id": "a text",
    "prompt": "a text",
    "max_tokens": "a whole number of 1 or more",
    "max_completion_tokens": "a whole number of 1 or more",
    "temperature": "a number from 0 to 2",
    "top_p": "a number from 0 to 1",
    "top_k": "a whole number, 0 or -1 for no limit",
    "min_p": "a number from 0 to 1",
    "repetition_penalty": "a number from 0.01 to 100",
    "seed": "a whole number",
    "stop": "a text or a list of texts",
    "stream": "true or false",
    "stream_options": "an object with include_usage",
    "include_usage": "true or false",
    "chat_template_kwargs": "an object",
    "coreinfer": "an object with mode and neurons",
    "mode": "a text",
    "neurons": "true or false",
    "text": "a text",
    "k": "a whole number from 1 to 100",
    "topic": "a whole number",
}
"""By the name of the field."""
_MOST_SHOWN = 60
_REFUSED = "refused"
_GZIP = b"\x1f\x8b"


def refusal(message: str, field: str = "") -> PydanticCustomError:
    """Return what a validator raises for a value that is refused in words of our own.

    Args:
        message: a sentence without its full stop; it follows the path of the value unless it names the field itself.
        field: that the message names.
    """
    return PydanticCustomError(_REFUSED, "refused", {"message": message, "field": field})


def shown(value: Any) -> str:
    """Return a value as a message shows it: as JSON, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


def sentence(error: Mapping[str, Any], content_type: str) -> tuple[str, str | None]:
    """Return what is wrong with a body, and the field that it concerns.

    Args:
        error: the first that pydantic found.
        content_type: of the request.
    """
    kind, place, details = error["type"], error["loc"][1:], error.get("ctx", {})
    if kind == "json_invalid":
        return f"the body is no JSON ({details['error']} at character {place[-1]}).", None
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    if kind == _REFUSED:
        named = details["field"]
        return f"{details['message']}." if named else f"{path}: {details['message']}.", named or path or None
    if not place:
        if kind == "missing":
            return "the body is empty, expected a JSON object.", None
        if not isinstance(error["input"], (dict, list)) and "json" not in content_type:
            return f"the content type is {content_type or 'not given'}, expected application/json.", None
        return f"the body is {shown(error['input'])}, expected a JSON object.", None
    name = next(part for part in reversed(place) if isinstance(part, str))
    if kind == "extra_forbidden":
        return f"{path} is unknown, expected mode or neurons.", path
    what = "an object with role and content" if name == "messages" and isinstance(place[-1], int) else _EXPECTED[name]
    return f"{path} is {'missing' if kind == 'missing' else shown(error['input'])}, expected {what}.", path


def http_sentence(request: Request, error: HTTPException, known: Sequence[str]) -> str:
    """Return what is wrong with a request that no route took, or whose body could not be parsed.

    Args:
        request: that was refused.
        error: the framework's, of which the cause counts where it has one.
        known: methods and paths that are served.
    """
    cause = error.__cause__
    if error.status_code in (404, 405):
        return f"{request.method} {shown(request.url.path)} is not served, expected one of {', '.join(known)}."
    if isinstance(cause, UnicodeDecodeError):
        is_packed = bytes(cause.object[:2]) == _GZIP or "content-encoding" in request.headers
        found = (
            "is compressed" if is_packed else f"is not UTF-8 (byte 0x{cause.object[cause.start]:02X} at {cause.start})"
        )
        return f"the body {found}, expected JSON in UTF-8, not compressed; send that."
    if isinstance(cause, RecursionError):
        return "the body is nested too deeply, expected a JSON object of the API; send a flatter one."
    return f"{error.detail.rstrip('.')}."
