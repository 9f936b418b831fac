"""One model in llama.cpp, in this process through xllamacpp; no torch, so that a process of its own stays small."""

from __future__ import annotations

import contextlib
import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any

from coreinfer_sim.base.errors import ConfigError, GenerationError, ModelError, RequestRefusedError


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
        parameters.n_ctx, parameters.n_parallel = context, 1
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

    def post(self, where: str, content: dict[str, Any]) -> Any:
        """Return the answer to a request.

        Raises:
            RequestRefusedError: llama.cpp refused it.
            GenerationError: llama.cpp does not answer.
        """
        with self._open(where, content) as answer:
            return json.loads(answer.read())

    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a completion request."""
        answer: dict[str, Any] = self.post("/completion", request)
        return answer

    def stream(self, request: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Yield the parts of the answer to a completion request as they come; closing the iterator ends the request.

        Tokens that end within a character are left out of the parts' ``tokens``.
        """
        with self._open("/completion", {**request, "stream": True}) as lines:
            for line in lines:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])

    def _open(self, where: str, content: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self._server.listening_address}{where}",
            json.dumps(content).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"},
        )
        try:
            return _DIRECT.open(request)
        except urllib.error.HTTPError as error:
            answer = error.read().decode("utf-8", "replace")
            with contextlib.suppress(ValueError, KeyError, TypeError):
                answer = json.loads(answer)["error"]["message"]
            raise RequestRefusedError(f"llama.cpp refused a request to {self.path.name} ({answer[:200]}).") from error
        except urllib.error.URLError as error:
            raise GenerationError(
                f"llama.cpp does not answer for {self.path.name} ({error.reason}), expected its server in this process; start "
                "again."
            ) from error


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server runs in this process, so no proxy


def library() -> Any:
    """Return xllamacpp, or raise ConfigError if it is not installed."""
    try:
        import xllamacpp
    except ImportError as error:
        raise ConfigError("llama.cpp is not installed; run: pip install 'coreinfer-sim[llamacpp]'") from error
    return xllamacpp
