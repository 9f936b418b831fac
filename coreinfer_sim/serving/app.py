"""The HTTP server: OpenAI's API over a backend, /health, /metrics and a page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from coreinfer_sim.base.errors import CoreInferSimError, UnknownModeError
from coreinfer_sim.generation.streaming import Watch
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
from coreinfer_sim.serving.static import add_page
from coreinfer_sim.serving.streaming import ResponseFormat, streamed, while_connected, whole
from coreinfer_sim.serving.topics import Neurons, check_watchable, lookup_of, map_of
from coreinfer_sim.serving.wording import http_sentence, sentence

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

    Returns:
        The app; ``app.state.stop`` refuses further requests and ends open ones after a grace period.
    """
    queue = RequestQueue(backend, parallel=parallel, queue_limit=queue_limit, timeout=timeout)

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
    neurons = Neurons(backend.index)
    _add_generation(app, queue, name, max_new_tokens, neurons)
    _add_models(app, backend, name)
    _add_topics(app, backend, neurons)
    _add_status(app, queue, api_key is not None)
    add_page(app)
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


def _add_generation(app: FastAPI, queue: RequestQueue, name: str, max_new_tokens: int, neurons: Neurons) -> None:
    """Add the two routes that generate."""

    async def respond(request: ChatRequest | CompletionRequest, http: Request) -> Response:
        form = ResponseFormat(name, isinstance(request, ChatRequest), request.ignored)
        watch = neurons.begin(form.id) if request.coreinfer and request.coreinfer.neurons else None
        events = queue.generate(text_request(request, name, queue.backend, max_new_tokens, watch))
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
    request: ChatRequest | CompletionRequest,
    name: str,
    backend: Backend,
    max_new_tokens: int,
    watch: Watch | None = None,
) -> TextRequest:
    """Return a request as the backend reads it.

    Args:
        request: sound by itself.
        name: of the model that is served.
        backend: whose modes a request may choose from.
        max_new_tokens: limit of a request; also the number where it names none, or a larger one.
        watch: receives which neurons tokens read.

    Raises:
        ModelNotFoundError: the request names another model.
        NoChatError: it is a conversation, and the model continues texts.
        UnknownModeError: the backend lacks the mode.
        ConfigError: nothing tells which neurons tokens read.
    """
    if request.model not in (None, name):
        raise ModelNotFoundError(request.model, name)
    if isinstance(request, ChatRequest) and not backend.chats:
        raise NoChatError(name)
    mode = (request.coreinfer.mode if request.coreinfer else None) or backend.modes[0]
    if mode not in backend.modes:
        raise UnknownModeError(f"coreinfer.mode is {mode!r}, expected one of {', '.join(backend.modes)}.")
    if watch is not None:
        check_watchable(backend.tells_neurons, name)
    return TextRequest(
        prompt=request.subject,
        max_new_tokens=min(request.limit or max_new_tokens, max_new_tokens),
        mode=mode,
        stop=tuple(request.stop or ()),
        seed=request.seed,
        chat_template_kwargs=request.template_kwargs,
        watch=watch,
        **{name: value for name in _SAMPLING if (value := getattr(request, name)) is not None},
    )


def _add_models(app: FastAPI, backend: Backend, name: str) -> None:
    """Add the list of the one model."""
    created = int(time.time())

    def description() -> dict[str, Any]:
        index = backend.index
        facts = {
            "modes": list(backend.modes),
            "profile": backend.profile,
            "clusters": len(index),
            "chat": backend.chats,
            "map": index.manifest.map is not None,
            "neurons": backend.tells_neurons
            and index.manifest.model.places is None,  # of experts there are too many to be drawn
        }
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


def _add_topics(app: FastAPI, backend: Backend, neurons: Neurons) -> None:
    """Add what says why an answer is as it is: the map, the look-up, and the neurons."""

    @app.get("/api/map")
    async def map_() -> Response:
        """Return the prompts of the corpus as dots by topic."""
        return JSONResponse(await asyncio.to_thread(map_of, backend.index))

    @app.post("/api/lookup")
    async def lookup(request: LookupRequest) -> Response:
        """Return the topics nearest to a text, and its place on the map."""
        subject = request.subject
        text = await asyncio.to_thread(backend.routing_text, subject) if not isinstance(subject, str) else subject
        if not text.strip():
            raise InvalidRequestError("the text is empty, expected some.")
        return JSONResponse(await asyncio.to_thread(lookup_of, backend.index, text, request.k))

    @app.get("/api/topics/{topic}/neurons")
    async def of_topic(topic: int) -> Response:
        """Return which neurons are core neurons of a topic, and which of those it shares."""
        return JSONResponse(await asyncio.to_thread(neurons.of_topic, topic))

    @app.get("/api/neurons/{answer}")
    async def of_answer(answer: str) -> Response:
        """Return which neurons the latest token of an answer read."""
        return JSONResponse(neurons.of_answer(answer))


def _add_status(app: FastAPI, queue: RequestQueue, needs_key: bool) -> None:
    """Add health and metrics."""

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Say that the server lives, how many requests are open, and whether they need a key."""
        return {"status": "ok", "open_requests": queue.n_open, "needs_key": needs_key}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(generate_latest(queue.metrics.registry), media_type=CONTENT_TYPE_LATEST)
