"""The HTTP server: OpenAI's API over a backend, /health, /metrics and a page."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from coreinfer_sim.base.errors import ConfigError, CoreInferSimError, PromptError
from coreinfer_sim.serving.backends import Answered, Asked, Backend
from coreinfer_sim.serving.engine import Busy, Engine, Stopping, TimedOut
from coreinfer_sim.serving.schemas import ChatRequest, CompletionRequest, LookupRequest

PAGE = Path(__file__).parent / "page.html"
_OPEN = ("/", "/health")
_CLIENT_GONE = 499
"""Nobody reads it; nginx's word in its log for such a request."""
_log = logging.getLogger(__name__)


def make_app(
    backend: Backend,
    name: str,
    *,
    api_key: str | None = None,
    max_new_tokens: int = 1024,
    queue_limit: int = 64,
    timeout: float = 300.0,
    body_limit: int = 2 << 20,
) -> FastAPI:
    """Make the server.

    Args:
        backend: answers the requests; closed with the server.
        name: of the model, as /v1/models lists it.
        api_key: that requests must bring, except for the page and /health; None asks for none.
        max_new_tokens: of one answer; also the number where a request names none.
        queue_limit: requests that may wait or be answered at a time.
        timeout: seconds that a request may take, waiting included.
        body_limit: bytes of a request.
    """
    engine = Engine(backend, queue_limit=queue_limit, timeout=timeout)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="coreinfer_sim", description="Sparse decode behind OpenAI's API.", lifespan=lifespan)
    app.state.stop = engine.stop
    begun = int(time.time())

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        """Check the key and the size before anything is read."""
        if api_key is not None and request.url.path not in _OPEN:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), api_key.encode()):
                return _error(401, "the API key is missing or wrong.", "invalid_api_key")
        size = 0
        body = bytearray()
        try:
            async for piece in request.stream():
                size += len(piece)
                if size > body_limit:
                    return _error(413, f"the request has more than {body_limit} bytes; send less.")
                body += piece
        except ClientDisconnect:
            return Response(status_code=400)  # which nobody reads
        request._body = bytes(body)  # what Starlette itself keeps once a body has been read
        return await call_next(request)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _error(400, f"the body is no JSON ({first['ctx']['error']} at character {first['loc'][-1]}).")
        where = ".".join(str(part) for part in first["loc"][1:]) or first.get("ctx", {}).get("field")
        said = first["msg"].removeprefix("Value error, ")
        return _error(400, f"{where or 'the body'}: {said}", param=where)

    @app.exception_handler(HTTPException)
    async def http_error(_request: Request, error: HTTPException) -> Response:
        return _error(error.status_code, f"{error.detail}.")

    @app.exception_handler(Exception)
    async def failed(_request: Request, error: Exception) -> Response:
        _log.error("a request failed", exc_info=error)
        return _error(500, "the server failed; its log says why.")

    def asked_of(request: ChatRequest | CompletionRequest) -> Asked:
        limit = request.max_tokens
        if isinstance(request, ChatRequest):
            limit = request.max_completion_tokens or limit
        if request.model not in (None, name):
            raise _Refused(404, f"the model {request.model!r} does not exist, expected {name!r}.", "model_not_found")
        if limit is not None and limit > max_new_tokens:
            raise _Refused(400, f"{limit} new tokens were asked for, expected at most {max_new_tokens}.")
        mode = (request.coreinfer.mode if request.coreinfer else None) or backend.modes[0]
        if mode not in backend.modes:
            raise _Refused(400, f"coreinfer.mode is {mode!r}, expected one of {', '.join(backend.modes)}.")
        prompt: Any = request.text if isinstance(request, CompletionRequest) else _messages(request)
        return Asked(
            prompt,
            limit or max_new_tokens,
            mode,
            1.0 if request.temperature is None else request.temperature,
            1.0 if request.top_p is None else request.top_p,
            request.seed,
            request.stops,
            shorten=limit is None,
        )

    async def respond(request: ChatRequest | CompletionRequest, http: Request) -> Response:
        chat = isinstance(request, ChatRequest)
        try:
            asked = asked_of(request)
            events = _without_stops(engine.answer(asked), asked.stop)
            frame = _Frame(name, chat)
            if request.stream:
                first = await anext(events)  # so that a refusal still has its status
                usage = request.stream_options is not None and request.stream_options.include_usage
                return StreamingResponse(_stream(frame, first, events, usage), media_type="text/event-stream")
            return await _while_there(http, _whole(frame, events))
        except (_Refused, Busy, Stopping, TimedOut, CoreInferSimError) as error:
            return _refusal(error)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest, http: Request) -> Response:
        """Answer a conversation."""
        return await respond(request, http)

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, http: Request) -> Response:
        """Go on from a text."""
        return await respond(request, http)

    def model_facts() -> dict[str, Any]:
        facts = {"modes": list(backend.modes), "clusters": len(backend.index)}
        return {"id": name, "object": "model", "created": begun, "owned_by": "coreinfer_sim", "coreinfer": facts}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [model_facts()]}

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:
        """Describe the one model."""
        if model_id != name:
            return _error(404, f"the model {model_id!r} does not exist, expected {name!r}.", "model_not_found")
        return JSONResponse(model_facts())

    @app.post("/api/lookup")
    async def lookup(request: LookupRequest) -> Response:
        """Return the clusters nearest to a text, and the share of neurons that each layer keeps in the nearest."""
        if not request.text.strip():
            return _error(400, "the text is empty, expected some.")
        k = min(request.k, len(backend.index))
        matches = (await asyncio.to_thread(backend.index.lookup, [request.text], k))[0]
        kept = await asyncio.to_thread(_kept, backend, matches[0].cluster)
        found = [{**vars(match), "confident": match.confident} for match in matches]
        return JSONResponse({"matches": found, "kept": kept})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Say that the server lives, and how many requests are open."""
        return {"status": "ok", "open_requests": engine.n_open}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(generate_latest(engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        """Return the page."""
        return PAGE.read_text(encoding="utf-8")

    return app


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Frame:
    """What stands around the text in an answer."""

    def __init__(self, model: str, chat: bool) -> None:
        self.chat = chat
        kind = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        self._whole = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._part = {**self._whole, "object": "chat.completion.chunk" if chat else kind}

    def whole(self, text: str, answered: Answered) -> dict[str, Any]:
        """Return a whole answer."""
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": _reason(answered)}
        return {**self._whole, "choices": [choice], "usage": _usage(answered), "coreinfer": answered.facts}

    def part(self, text: str, begins: bool) -> dict[str, Any]:
        """Return a piece of a streamed answer."""
        delta = {"role": "assistant", "content": text} if begins else {"content": text}
        content = {"delta": delta} if self.chat else {"text": text}
        return {**self._part, "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": None}]}

    def end(self, answered: Answered) -> dict[str, Any]:
        """Return the last piece."""
        content: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": _reason(answered)}
        return {**self._part, "choices": [choice], "coreinfer": answered.facts}

    def usage(self, answered: Answered) -> dict[str, Any]:
        """Return the piece that follows if usage was asked for."""
        return {**self._part, "choices": [], "usage": _usage(answered)}


async def _stream(
    frame: _Frame, first: str | Answered, events: AsyncIterator[str | Answered], usage: bool
) -> AsyncIterator[str]:
    """Yield server-sent events; an error that comes late is one of them."""

    def line(content: dict[str, Any]) -> str:
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

    yield line(frame.part(first if isinstance(first, str) else "", begins=True))
    try:
        event = first
        while not isinstance(event, Answered):
            event = await anext(events)
            if isinstance(event, str):
                yield line(frame.part(event, begins=False))
        yield line(frame.end(event))
        if usage:
            yield line(frame.usage(event))
    except Exception as error:
        yield line(json.loads(bytes(_refusal(error).body)))
    yield "data: [DONE]\n\n"


async def _whole(frame: _Frame, events: AsyncIterator[str | Answered]) -> Response:
    """Return an answer that is not streamed."""
    text = ""
    async for event in events:
        if isinstance(event, Answered):
            return JSONResponse(frame.whole(text, event))
        text += event
    raise AssertionError("an answer ended without its end")


async def _while_there(http: Request, answering: Coroutine[Any, Any, Response]) -> Response:
    """Wait for an answer as long as its client does: nobody tells a handler that the connection is gone."""
    answer, gone = asyncio.ensure_future(answering), asyncio.ensure_future(http.receive())  # after the body, the end
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else Response(status_code=_CLIENT_GONE)
    finally:
        open_ends = {task for task in (answer, gone) if not task.done()}
        for task in open_ends:
            task.cancel()
        if open_ends:
            await asyncio.wait(open_ends)


async def _without_stops(
    events: AsyncIterator[str | Answered], stops: tuple[str, ...]
) -> AsyncIterator[str | Answered]:
    """Cut the text before the first stop; what may be the beginning of one is held back."""
    held, stopped = "", False
    async for event in events:
        if isinstance(event, Answered):
            if held and not stopped:
                yield held
            yield event
        elif not stopped:
            held += event
            places = [place for stop in stops if (place := held.find(stop)) >= 0]
            stopped = bool(places)
            n_safe = min(places) if places else len(held) - _overlap(held, stops)
            if n_safe:
                yield held[:n_safe]
            held = held[n_safe:]


def _overlap(text: str, stops: tuple[str, ...]) -> int:
    """Return how many of the text's last characters may be the beginning of a stop."""
    lengths = (n for stop in stops for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n]))
    return max(lengths, default=0)


def _messages(request: ChatRequest) -> list[dict[str, str]]:
    roles = {"developer": "system"}
    return [{"role": roles.get(m.role, m.role), "content": m.text} for m in request.messages]


def _reason(answered: Answered) -> str:
    return "stop" if answered.ended else "length"


def _usage(answered: Answered) -> dict[str, int]:
    n_prompt, n_new = answered.n_prompt_tokens, answered.n_new_tokens
    return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}


def _kept(backend: Backend, cluster: int) -> list[float]:
    """Return the share of neurons that a cluster's set keeps, by layer."""
    d_ff = backend.index.manifest.model.d_ff
    ids = backend.index.cluster_selection(cluster).ids
    return [round(len(ids[n]) / d_ff, 4) if n in ids else 1.0 for n in range(backend.index.manifest.model.n_layers)]


def _refusal(error: Exception) -> JSONResponse:
    """Return the answer to a request that cannot be met."""
    if isinstance(error, _Refused):
        return _error(error.status, str(error), error.code)
    if isinstance(error, Busy):
        return _error(429, "too many requests wait; try again later.", "rate_limit_exceeded")
    if isinstance(error, Stopping):
        return _error(503, "the server is shutting down; ask again when it is back.")
    if isinstance(error, TimedOut):
        return _error(504, "the request took too long, waiting included; ask for fewer tokens or try again later.")
    if isinstance(error, PromptError):
        too_long = "context" in str(error)
        return _error(400, str(error), "context_length_exceeded" if too_long else None)
    if isinstance(error, ConfigError):
        return _error(400, str(error))
    _log.error("a request failed", exc_info=error)
    return _error(500, "the server failed; its log says why.")


def _error(status: int, message: str, code: str | None = None, param: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == 429:
        kind = "rate_limit_error"
    content = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse(content, status_code=status, headers=headers)
