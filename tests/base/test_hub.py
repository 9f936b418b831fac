"""A hub is asked once whether it answers, and what its cache holds is taken without it."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from coreinfer_sim.base.errors import CorpusError, ModelError
from coreinfer_sim.base.hub import no_answer, out_of_reach
from coreinfer_sim.base.settings import CorpusConfig
from coreinfer_sim.base.sources import open_source

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def online(monkeypatch, tmp_path):
    """The hub's library as a user has it, its cache empty and its address on this machine, where nothing listens."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    return tmp_path


@pytest.fixture
def asked(online, monkeypatch):
    """A server in the hub's place; what it was asked."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def do_HEAD(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        yield requests
        server.shutdown()
        thread.join()


def cached(cache: Path, name: str) -> None:
    """Put a model's configuration into the hub's cache."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")


def test_it_is_asked_once(asked):
    assert no_answer() is None and asked == ["/"]
    assert out_of_reach("some/model") is None and asked == ["/"]  # nor again, once it has answered


def test_why_it_does_not_answer(online, monkeypatch):
    assert "refused" in no_answer()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert no_answer() == "HF_HUB_OFFLINE is set"


def test_what_is_cached_is_taken_without_it(online):
    assert "refused" in out_of_reach("some/model")
    cached(online, "some/model")
    assert out_of_reach("some/model") is None
    assert constants.HF_HUB_OFFLINE  # nothing else waits for the hub


@pytest.mark.parametrize("name", ["./model", "/nowhere/model", "~/model", "model.gguf", "a/b/c"])
def test_paths_are_not_asked_for(online, name):
    assert out_of_reach(name) is None


def test_a_model_and_a_corpus_that_are_out_of_reach(online):
    from coreinfer_sim.models.source import source_of

    with pytest.raises(
        ModelError, match=r"'some/model' cannot be loaded \(it is no path here, and the hub does not answer"
    ):
        source_of("some/model")
    with pytest.raises(CorpusError, match="some/data cannot be read: it is no path here, and the hub does not answer"):
        open_source(CorpusConfig("some/data"))
