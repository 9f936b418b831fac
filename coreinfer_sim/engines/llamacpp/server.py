"""One model in llama.cpp, in this process through xllamacpp; no torch, so that a process of its own stays small."""

from __future__ import annotations

import contextlib
import http.client
import json
import secrets
import socket
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from coreinfer_sim.base.errors import (
    ConfigError,
    GenerationCancelledError,
    GenerationError,
    ModelError,
    RequestRefusedError,
)

Cancelled = Callable[[], bool]
"""Says whether nobody wants an answer any more."""
_POLL = 0.1
"""Seconds between two questions whether an answer is still wanted."""
_BATCH = 128
"""Positions of a prompt that llama.cpp reads before it looks whether the request is still there."""


class LlamaServer:
    """One GGUF file in llama.cpp, spoken to as llama.cpp's own server, on the loopback interface and under a key."""

    def __init__(self, path: Path, folder: str, context: int, n_threads: int | None) -> None:
        """Open the file ``path``.

        Args:
            path: of the GGUF file.
            folder: for caches that are saved.
            context: positions of the cache.
            n_threads: None leaves it to llama.cpp.

        Raises:
            ConfigError: llama.cpp is not installed.
            ModelError: llama.cpp cannot load the file.
        """
        xllamacpp = library()
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel, parameters.n_batch = context, 1, _BATCH
        parameters.warmup, parameters.verbosity = False, -1
        parameters.slot_save_path = folder + "/"
        self._key = secrets.token_hex(16)
        parameters.api_keys = [self._key]
        if n_threads is not None:
            parameters.cpuparams.n_threads = n_threads
        try:
            self._server = xllamacpp.Server(parameters)
        except Exception as error:  # whatever llama.cpp throws
            raise ModelError(
                f"llama.cpp cannot load {path} ({' '.join(str(error).split())[:200]}), expected a sound GGUF file that fits into "
                "memory; export it anew."
            ) from error
        self.path = path
        self.post("/slots/0?action=erase", {})  # waits for its loop: one that is ended before it begins never ends

    def post(self, where: str, content: dict[str, Any], cancelled: Cancelled | None = None) -> Any:
        """Return the answer to a request.

        Raises:
            RequestRefusedError: llama.cpp refused it.
            GenerationCancelledError: ``cancelled`` said so before the answer came.
            GenerationError: llama.cpp does not answer.
        """
        with self._answer(where, content, cancelled) as answer:
            return json.loads(answer.read())

    def complete(self, request: dict[str, Any], cancelled: Cancelled | None = None) -> dict[str, Any]:
        """Return the answer to a completion request."""
        answer: dict[str, Any] = self.post("/completion", request, cancelled)
        return answer

    def stream(
        self, request: dict[str, Any], cancelled: Cancelled | None = None
    ) -> Generator[dict[str, Any], None, None]:
        """Yield the parts of the answer to a completion request as they come; closing the iterator ends the request.

        Tokens that end within a character are left out of the parts' ``tokens``.
        """
        with self._answer("/completion", {**request, "stream": True}, cancelled) as lines:
            part: dict[str, Any] = {}
            for line in lines:
                if line.startswith(b"data: {"):
                    part = json.loads(line[6:])
                    if "error" in part:
                        self._refuse(line[6:])
                    yield part
            if not part.get("stop"):
                raise http.client.IncompleteRead(b"")

    @contextlib.contextmanager
    def _answer(
        self, where: str, content: dict[str, Any], cancelled: Cancelled | None
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request, and hang up at the end of the block or as soon as its answer is not wanted any more."""
        connection = http.client.HTTPConnection(urlsplit(self._server.listening_address).netloc)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}", "Connection": "close"}
        try:
            connection.connect()
            with contextlib.closing(connection), _hanging_up(connection.sock, cancelled):
                connection.request("POST", where, json.dumps(content), headers)
                with connection.getresponse() as answer:
                    if answer.status != 200:
                        self._refuse(answer.read())
                    yield answer
        except (OSError, http.client.HTTPException, ValueError) as error:
            if cancelled is not None and cancelled():
                raise GenerationCancelledError("the generation was broken off, as its caller asked for.") from error
            raise GenerationError(
                f"llama.cpp does not answer for {self.path.name} ({error}), expected its server in this process; start again."
            ) from error

    def _refuse(self, answer: bytes) -> None:
        message = answer.decode("utf-8", "replace")
        with contextlib.suppress(ValueError, KeyError, TypeError):
            message = json.loads(message)["error"]["message"]
        raise RequestRefusedError(f"llama.cpp refused a request to {self.path.name} ({message[:200]}).")


@contextlib.contextmanager
def _hanging_up(connection: socket.socket, cancelled: Cancelled | None) -> Iterator[None]:
    """Within the block, end a connection, and so whatever waits for it, once its answer is not wanted any more."""
    if cancelled is None:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_POLL):
            if cancelled():
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                return

    watcher = threading.Thread(target=watch, name="coreinfer-sim-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def library() -> Any:
    """Return xllamacpp, or raise ConfigError if it is not installed."""
    try:
        import xllamacpp
    except ImportError as error:
        raise ConfigError("llama.cpp is not installed; run: pip install 'coreinfer-sim[llamacpp]'") from error
    return xllamacpp
