"""A server in a thread, and a client's short way to ask it."""

from __future__ import annotations

import socket
import threading
import time

import openai
import uvicorn
from tiny_index import PROMPTS, WIDE_RATIO

from coreinfer_sim.base.decode_settings import DecodeConfig, SelectionConfig
from coreinfer_sim.base.settings import Fallback
from coreinfer_sim.generation.in_process import TextGenerator
from coreinfer_sim.serving.backends import Backend

NAME = "tiny"
"""What the served model is called."""


class Served:
    """An app under uvicorn, in a thread."""

    def __init__(self, app):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self.url = f"http://127.0.0.1:{port}"

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            time.sleep(0.02)
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def client(self, key="none"):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


def backend_of(language_model, index, **options):
    selection = SelectionConfig(keep_ratio=WIDE_RATIO, fallback=Fallback.NONE)
    return Backend(TextGenerator(language_model, index, selection, DecodeConfig(**options)))


def chat(client, text=PROMPTS[0], **options):
    """Ask for a greedy answer of 8 tokens to a text, or to a conversation."""
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    return client.chat.completions.create(
        model=NAME, messages=messages, **{"max_tokens": 8, "temperature": 0, **options}
    )
