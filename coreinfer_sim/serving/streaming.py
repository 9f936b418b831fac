"""A text as it comes, as the responses of OpenAI's API: whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from coreinfer_sim.serving.backends import Completion
from coreinfer_sim.serving.errors import error_response

_CLIENT_GONE = 499
"""Nobody reads it; nginx's word in its log for such a request."""


class ResponseFormat:
    """The JSON objects that stand around a text in one response."""

    def __init__(self, model: str, chat: bool, ignored: Sequence[str] = ()) -> None:
        """Begin a response.

        Args:
            model: its name.
            chat: of /v1/chat/completions rather than /v1/completions.
            ignored: fields of the request that were passed over.
        """
        self.chat, self._ignored = chat, list(ignored)
        kind = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self._whole = {
            "id": self.id,
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._chunk = {**self._whole, "object": "chat.completion.chunk" if chat else kind}

    def whole(self, completion: Completion) -> dict[str, Any]:
        """Return a whole response."""
        text = completion.text
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": _finish_reason(completion)}
        return {**self._whole, "choices": [choice], "usage": _usage(completion), **self._facts(completion)}

    def chunk(self, text: str, first: bool) -> dict[str, Any]:
        """Return a chunk of a streamed response."""
        delta = {"role": "assistant", "content": text} if first else {"content": text}
        content = {"delta": delta} if self.chat else {"text": text}
        return {**self._chunk, "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": None}]}

    def end(self, completion: Completion) -> dict[str, Any]:
        """Return the last chunk."""
        content: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": _finish_reason(completion)}
        return {**self._chunk, "choices": [choice], **self._facts(completion)}

    def usage(self, completion: Completion) -> dict[str, Any]:
        """Return the chunk that follows if usage was requested."""
        return {**self._chunk, "choices": [], "usage": _usage(completion)}

    def _facts(self, completion: Completion) -> dict[str, Any]:
        return {"timings": completion.timings, "coreinfer": {**completion.facts, "ignored": self._ignored}}


def _finish_reason(completion: Completion) -> str:
    return "stop" if completion.ended else "length"


def _usage(completion: Completion) -> dict[str, int]:
    n_prompt, n_new = completion.n_prompt_tokens, completion.n_new_tokens
    return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}


async def server_sent_events(
    form: ResponseFormat, first: str | Completion, events: AsyncIterator[str | Completion], usage: bool
) -> AsyncIterator[str]:
    """Yield server-sent events; an error that comes late is one of them.

    Args:
        form: of the response.
        first: of the events, already drawn.
        events: pieces of text, then the completion.
        usage: whether a chunk with the numbers of tokens ends the stream.
    """

    def line(content: dict[str, Any]) -> str:
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

    yield line(form.chunk(first if isinstance(first, str) else "", first=True))
    try:
        event = first
        while not isinstance(event, Completion):
            event = await anext(events)
            if isinstance(event, str):
                yield line(form.chunk(event, first=False))
        yield line(form.end(event))
        if usage:
            yield line(form.usage(event))
    except Exception as error:
        yield line(json.loads(bytes(error_response(error).body)))
    yield "data: [DONE]\n\n"


async def whole(form: ResponseFormat, events: AsyncIterator[str | Completion]) -> Response:
    """Return a response that is not streamed."""
    async for event in events:
        if isinstance(event, Completion):
            return JSONResponse(form.whole(event))
    raise AssertionError("the events ended without a completion")


async def streamed(form: ResponseFormat, events: AsyncIterator[str | Completion], usage: bool) -> Response:
    """Return a response that is streamed; it begins with the text, so that a refusal still has its status."""
    first = await anext(events)
    return StreamingResponse(server_sent_events(form, first, events, usage), media_type="text/event-stream")


async def while_connected(http: Request, response: Coroutine[Any, Any, Response]) -> Response:
    """Wait for a response as long as its client does: nobody tells a handler that the connection is gone."""
    answer, gone = asyncio.ensure_future(response), asyncio.ensure_future(http.receive())  # after the body, the end
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else Response(status_code=_CLIENT_GONE)
    finally:
        unfinished = {task for task in (answer, gone) if not task.done()}
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.wait(unfinished)
