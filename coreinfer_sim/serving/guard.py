"""What every request passes first: its key, the size of its body, and a last answer where nothing else gives one."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coreinfer_sim.serving.errors import AuthenticationError, RequestTooLargeError, error_response

_WITHOUT_KEY = ("/", "/health")
_FILES = "/page/"
"""Of the page, which hold nothing of this server's own."""


class Guard:
    """Stands around an app; refuses requests before anything else reads them."""

    def __init__(self, app: ASGIApp, api_key: str | None, body_limit: int) -> None:
        """Stand around an app.

        Args:
            app: that answers.
            api_key: that requests must bring, except for the page and /health; None requires none.
            body_limit: bytes of a request.
        """
        self._app, self._key, self._limit = app, api_key, body_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = False

        async def watched_send(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            self._check_key(scope)
            body = await self._read(receive)
            if body is not None:
                await self._app(scope, _replayed(body, receive), watched_send)
        except Exception as error:
            if began:  # nothing can be said any more
                raise
            await error_response(error)(scope, receive, send)

    def _check_key(self, scope: Scope) -> None:
        if self._key is None or scope["path"] in _WITHOUT_KEY or scope["path"].startswith(_FILES):
            return
        sent = Headers(scope=scope).get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(sent.encode(), self._key.encode()):
            raise AuthenticationError()

    async def _read(self, receive: Receive) -> bytes | None:
        """Return the body, or None if the client left within it."""
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._limit:
                raise RequestTooLargeError(f"the request has more than {self._limit} bytes; send less.")
        return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return what gives a body that has been read, and then what comes after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
