"""The HTTP server: OpenAI's API over a backend, /health, /metrics and a page."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from coreinfer_sim.base.errors import CoreInferSimError, UnknownModeError
from coreinfer_sim.choosing.index_sets import IndexSets
from coreinfer_sim.models.prompts import Message
from coreinfer_sim.serving.backends import Backend, TextRequest
from coreinfer_sim.serving.errors import (
    AuthenticationError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestTooLargeError,
    error_json,
    error_response,
)
from coreinfer_sim.serving.request_queue import RequestQueue
from coreinfer_sim.serving.schemas import ChatRequest, CompletionRequest, LookupRequest
from coreinfer_sim.serving.streaming import ResponseFormat, cut_at_stops, server_sent_events, while_connected, whole

PAGE = Path(__file__).parent / "page.html"
_WITHOUT_KEY = ("/", "/health")


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
        backend: generates the texts; closed with the server.
        name: of the model, as /v1/models lists it.
        api_key: that requests must bring, except for the page and /health; None requires none.
        max_new_tokens: of one text; also the number where a request names none.
        queue_limit: requests that may wait or be answered at a time.
        timeout: seconds that a request may take, waiting included.
        body_limit: bytes of a request.

    Returns:
        The app; ``app.state.stop`` refuses further requests and ends open ones after a grace period.
    """
    queue = RequestQueue(backend, queue_limit=queue_limit, timeout=timeout)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(queue.close)

    app = FastAPI(title="coreinfer_sim", description="Sparse decode behind OpenAI's API.", lifespan=lifespan)
    app.state.stop = queue.stop
    _add_guard(app, api_key, body_limit)
    _add_error_handlers(app)
    _add_generation(app, queue, name, max_new_tokens)
    _add_models(app, backend, name)
    _add_lookup(app, backend)
    _add_status(app, queue)
    return app


def _add_guard(app: FastAPI, api_key: str | None, body_limit: int) -> None:
    """Check the key and the size of every request before anything else reads it."""

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if api_key is not None and request.url.path not in _WITHOUT_KEY:
            sent = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(sent.encode(), api_key.encode()):
                return error_response(AuthenticationError())
        body = bytearray()
        try:
            async for piece in request.stream():
                body += piece
                if len(body) > body_limit:
                    return error_response(
                        RequestTooLargeError(f"the request has more than {body_limit} bytes; send less.")
                    )
        except ClientDisconnect:
            return Response(status_code=400)  # which nobody reads
        request._body = bytes(body)  # what Starlette itself keeps once a body has been read
        return await call_next(request)


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every error in the form of OpenAI's API."""

    @app.exception_handler(CoreInferSimError)
    async def refused(_request: Request, error: Exception) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return error_json(400, f"the body is no JSON ({first['ctx']['error']} at character {first['loc'][-1]}).")
        field = ".".join(str(part) for part in first["loc"][1:]) or first.get("ctx", {}).get("field")
        reason = first["msg"].removeprefix("Value error, ")
        return error_json(400, f"{field or 'the body'}: {reason}", param=field)

    @app.exception_handler(HTTPException)
    async def http_error(_request: Request, error: HTTPException) -> Response:
        return error_json(error.status_code, f"{error.detail}.")

    @app.exception_handler(Exception)
    async def failed(_request: Request, error: Exception) -> Response:
        return error_response(error)


def _add_generation(app: FastAPI, queue: RequestQueue, name: str, max_new_tokens: int) -> None:
    """Add the two routes that generate."""

    async def respond(request: ChatRequest | CompletionRequest, http: Request) -> Response:
        checked = text_request(request, name, queue.backend, max_new_tokens)
        events = cut_at_stops(queue.generate(checked), checked.stop)
        form = ResponseFormat(name, isinstance(request, ChatRequest))
        if not request.stream:
            return await while_connected(http, whole(form, events))
        first = await anext(events)  # so that a refusal still has its status
        usage = request.stream_options is not None and request.stream_options.include_usage
        return StreamingResponse(server_sent_events(form, first, events, usage), media_type="text/event-stream")

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest, http: Request) -> Response:
        """Answer a conversation."""
        return await respond(request, http)

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, http: Request) -> Response:
        """Continue a text."""
        return await respond(request, http)


def text_request(
    request: ChatRequest | CompletionRequest, name: str, backend: Backend, max_new_tokens: int
) -> TextRequest:
    """Return a request as the backend reads it.

    Args:
        request: sound by itself.
        name: of the model that is served.
        backend: whose modes a request may choose from.
        max_new_tokens: limit of a request; also the number where it names none.

    Raises:
        ModelNotFoundError: the request names another model.
        InvalidRequestError: it requests too many tokens.
        UnknownModeError: the backend lacks the mode.
    """
    if request.model not in (None, name):
        raise ModelNotFoundError(request.model, name)
    limit = request.max_tokens
    if isinstance(request, ChatRequest):
        limit = request.max_completion_tokens or limit
    if limit is not None and limit > max_new_tokens:
        raise InvalidRequestError(f"{limit} new tokens were requested, expected at most {max_new_tokens}.")
    mode = (request.coreinfer.mode if request.coreinfer else None) or backend.modes[0]
    if mode not in backend.modes:
        raise UnknownModeError(f"coreinfer.mode is {mode!r}, expected one of {', '.join(backend.modes)}.")
    return TextRequest(
        prompt=request.text if isinstance(request, CompletionRequest) else _messages(request),
        max_new_tokens=limit or max_new_tokens,
        mode=mode,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        stop=request.stops,
        shorten=limit is None,
    )


def _messages(request: ChatRequest) -> list[Message]:
    roles = {"developer": "system"}
    return [{"role": roles.get(m.role, m.role), "content": m.text} for m in request.messages]


def _add_models(app: FastAPI, backend: Backend, name: str) -> None:
    """Add the list of the one model."""
    created = int(time.time())

    def description() -> dict[str, Any]:
        facts = {"modes": list(backend.modes), "clusters": len(backend.index)}
        return {"id": name, "object": "model", "created": created, "owned_by": "coreinfer_sim", "coreinfer": facts}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [description()]}

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:
        """Describe the one model."""
        if model_id != name:
            raise ModelNotFoundError(model_id, name)
        return JSONResponse(description())


def _add_lookup(app: FastAPI, backend: Backend) -> None:
    """Add the look-up that the page shows."""

    @app.post("/api/lookup")
    async def lookup(request: LookupRequest) -> Response:
        """Return the clusters nearest to a text, and the share of neurons that each layer keeps in the nearest."""
        if not request.text.strip():
            raise InvalidRequestError("the text is empty, expected some.")
        k = min(request.k, len(backend.index))
        matches = (await asyncio.to_thread(backend.index.lookup, [request.text], k))[0]
        kept = await asyncio.to_thread(_kept_shares, backend, matches[0].cluster)
        found = [{**vars(match), "confident": match.confident} for match in matches]
        return JSONResponse({"matches": found, "kept": kept})


def _kept_shares(backend: Backend, cluster: int) -> list[float]:
    """Return the share of neurons that a cluster's set keeps, by layer."""
    info = backend.index.manifest.model
    ids = IndexSets(backend.index).of_cluster(cluster).ids
    return [round(len(ids[n]) / info.d_ff, 4) if n in ids else 1.0 for n in range(info.n_layers)]


def _add_status(app: FastAPI, queue: RequestQueue) -> None:
    """Add health, metrics and the page."""

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Say that the server lives, and how many requests are open."""
        return {"status": "ok", "open_requests": queue.n_open}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(generate_latest(queue.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        """Return the page."""
        return PAGE.read_text(encoding="utf-8")
