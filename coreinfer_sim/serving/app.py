"""The HTTP server: OpenAI's API over a backend, /health, /metrics and a page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from coreinfer_sim.base.errors import CoreInferSimError, UnknownModeError
from coreinfer_sim.choosing.index_sets import IndexSets
from coreinfer_sim.serving.backends import Backend, TextRequest
from coreinfer_sim.serving.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    NoChatError,
    error_json,
    error_response,
)
from coreinfer_sim.serving.guard import Guard
from coreinfer_sim.serving.request_queue import RequestQueue
from coreinfer_sim.serving.schemas import ChatRequest, CompletionRequest, LookupRequest
from coreinfer_sim.serving.streaming import ResponseFormat, streamed, while_connected, whole
from coreinfer_sim.serving.topics import TopicLog
from coreinfer_sim.serving.wording import http_sentence, sentence

PAGE = Path(__file__).parent / "page.html"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def make_app(
    backend: Backend,
    name: str,
    *,
    api_key: str | None = None,
    max_new_tokens: int = 1024,
    parallel: int = 4,
    queue_limit: int = 64,
    timeout: float = 300.0,
    body_limit: int = 2 << 20,
    cors_origins: Sequence[str] = (),
    log_topics: bool = False,
) -> FastAPI:
    """Make the server.

    Args:
        backend: generates the texts; closed with the server.
        name: of the model, as /v1/models lists it.
        api_key: that requests must bring, except for the page and /health; None requires none.
        max_new_tokens: of one text; also the number where a request names none, or a larger one.
        parallel: requests that are answered at a time, where the backend lets them share decode steps.
        queue_limit: requests that may wait or be answered at a time.
        timeout: seconds that a request may take, waiting included.
        body_limit: bytes of a request.
        cors_origins: of pages that may read answers, such as ``https://example.org``; ``*`` stands for all.
        log_topics: count prompts by topic in the user's data folder, without their texts.

    Returns:
        The app; ``app.state.stop`` refuses further requests and ends open ones after a grace period.
    """
    topics = TopicLog(backend.index) if log_topics else None
    queue = RequestQueue(backend, parallel=parallel, queue_limit=queue_limit, timeout=timeout, topics=topics)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(queue.close)

    app = FastAPI(title="coreinfer_sim", description="Sparse decode behind OpenAI's API.", lifespan=lifespan)
    app.state.stop = queue.stop
    app.add_middleware(Guard, api_key=api_key, body_limit=body_limit)
    if cors_origins:  # around the guard: a preflight brings no key, and a page reads refusals too
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    _add_error_handlers(app)
    _add_generation(app, queue, name, max_new_tokens)
    _add_models(app, backend, name)
    _add_lookup(app, backend)
    _add_status(app, queue)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every error in the form of OpenAI's API."""

    @app.exception_handler(CoreInferSimError)
    async def refused(_request: Request, error: Exception) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, field = sentence(error.errors()[0], request.headers.get("content-type", ""))
        return error_json(400, message, param=field)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        routes = (route for route in app.routes if isinstance(route, APIRoute))
        known = [f"{method} {route.path}" for route in routes for method in sorted(route.methods or ())]
        return error_json(error.status_code, http_sentence(request, error, known))


def _add_generation(app: FastAPI, queue: RequestQueue, name: str, max_new_tokens: int) -> None:
    """Add the two routes that generate."""

    async def respond(request: ChatRequest | CompletionRequest, http: Request) -> Response:
        events = queue.generate(text_request(request, name, queue.backend, max_new_tokens))
        form = ResponseFormat(name, isinstance(request, ChatRequest), request.ignored)
        if not request.stream:
            return await while_connected(http, whole(form, events))
        usage = request.stream_options is not None and bool(request.stream_options.include_usage)
        return await while_connected(http, streamed(form, events, usage))

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
        max_new_tokens: limit of a request; also the number where it names none, or a larger one.

    Raises:
        ModelNotFoundError: the request names another model.
        NoChatError: it is a conversation, and the model continues texts.
        UnknownModeError: the backend lacks the mode.
    """
    if request.model not in (None, name):
        raise ModelNotFoundError(request.model, name)
    if isinstance(request, ChatRequest) and not backend.chats:
        raise NoChatError(name)
    mode = (request.coreinfer.mode if request.coreinfer else None) or backend.modes[0]
    if mode not in backend.modes:
        raise UnknownModeError(f"coreinfer.mode is {mode!r}, expected one of {', '.join(backend.modes)}.")
    return TextRequest(
        prompt=request.subject,
        max_new_tokens=min(request.limit or max_new_tokens, max_new_tokens),
        mode=mode,
        stop=tuple(request.stop or ()),
        seed=request.seed,
        chat_template_kwargs=request.template_kwargs,
        **{name: value for name in _SAMPLING if (value := getattr(request, name)) is not None},
    )


def _add_models(app: FastAPI, backend: Backend, name: str) -> None:
    """Add the list of the one model."""
    created = int(time.time())

    def description() -> dict[str, Any]:
        facts = {"modes": list(backend.modes), "clusters": len(backend.index), "chat": backend.chats}
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
