"""Why a request can be refused, and its response: a status, OpenAI's error type and code, a message."""

from __future__ import annotations

import logging

from fastapi.responses import JSONResponse

from coreinfer_sim.base.errors import (
    ConfigError,
    ContextLengthError,
    CoreInferSimError,
    MissingMapError,
    PromptError,
    RequestRefusedError,
    SamplingError,
    UnknownModeError,
)

_log = logging.getLogger(__name__)


class ServingError(CoreInferSimError):
    """A request is refused; each kind has its HTTP status and OpenAI's code for it."""

    status = 500
    code: str | None = None
    param: str | None = None
    """The field that is wrong, where it is the same for all of this kind."""
    message = "the request is refused."
    """Of this kind, where a request has none of its own."""

    def __init__(self, message: str | None = None) -> None:
        """Refuse a request."""
        super().__init__(message or self.message)


class InvalidRequestError(ServingError):
    """The request needs something that this server does not do."""

    status = 400


class NoChatError(InvalidRequestError):
    """A conversation is sent to a base model."""

    def __init__(self, name: str) -> None:
        """Name the model."""
        super().__init__(
            f"{name} is a base model without a chat template, expected a text to continue; send it as prompt to /v1/completions."
        )


class AuthenticationError(ServingError):
    """The API key is missing or wrong."""

    status, code, message = 401, "invalid_api_key", "the API key is missing or wrong."


class ModelNotFoundError(ServingError):
    """The request names another model."""

    status, code, param = 404, "model_not_found", "model"

    def __init__(self, found: str, expected: str) -> None:
        """Name both models."""
        super().__init__(f"the model {found!r} does not exist, expected {expected!r}.")


class NoNeuronsError(ServingError):
    """Of an answer nobody knows which neurons its tokens read."""

    status = 404

    def __init__(self, answer: str) -> None:
        """Name the answer."""
        super().__init__(
            f"of the answer {answer!r} it is not known which neurons its tokens read, expected the id of one of the last answers "
            'that was asked for with "coreinfer": {"neurons": true}.'
        )


class RequestTooLargeError(ServingError):
    """The body has too many bytes."""

    status = 413


class QueueFullError(ServingError):
    """Too many requests wait."""

    status, code, message = 429, "rate_limit_exceeded", "too many requests wait; try again later."


class ShutdownError(ServingError):
    """The server is shutting down."""

    status, message = 503, "the server is shutting down; ask again when it is back."


class RequestTimeoutError(ServingError):
    """A request took too long, waiting included."""

    status = 504
    message = "the request took too long, waiting included; ask for fewer tokens or try again later."


def error_response(error: Exception) -> JSONResponse:
    """Return the answer to a request that failed; what is the server's own fault goes into its log."""
    if isinstance(error, ServingError):
        return error_json(error.status, str(error), error.code, error.param)
    if isinstance(error, MissingMapError):
        return error_json(404, str(error))
    if isinstance(error, UnknownModeError):
        return error_json(400, str(error), param="coreinfer.mode")
    if isinstance(error, ContextLengthError):
        return error_json(400, str(error), "context_length_exceeded")
    if isinstance(error, (PromptError, SamplingError, RequestRefusedError, ConfigError)):
        return error_json(400, str(error))
    _log.error("a request failed", exc_info=error)
    return error_json(500, "the server failed; its log says why.")


def error_json(status: int, message: str, code: str | None = None, param: str | None = None) -> JSONResponse:
    """Return an error as OpenAI's API words it.

    Args:
        status: of HTTP.
        message: for people.
        code: OpenAI's name for this kind of error, if it has one.
        param: the field of the request that is wrong.
    """
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == 429:
        kind = "rate_limit_error"
    content = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse(content, status_code=status, headers=headers)
