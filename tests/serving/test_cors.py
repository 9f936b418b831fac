"""Pages of other origins ask in a browser only where the server was told so; a preflight brings no key."""

from __future__ import annotations

import httpx
import pytest
from served import NAME, Served, backend_of

from coreinfer_sim.serving.app import make_app

PAGE, OTHER = "https://app.example.org", "https://other.example.org"
ALLOWED = "access-control-allow-origin"


@pytest.fixture(scope="module")
def backend(language_model, wide_index):
    return backend_of(language_model, wide_index)


def preflight(server, origin, method="POST"):
    headers = {"Origin": origin, "Access-Control-Request-Method": method}
    headers["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-lang"
    return httpx.options(f"{server.url}/v1/chat/completions", headers=headers)


def ask(server, origin, key="secret", **fields):
    headers = {"Origin": origin, "Authorization": f"Bearer {key}"}
    body = {"messages": [{"role": "user", "content": "How do stars form?"}], "max_tokens": 2, **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", headers=headers, json=body, timeout=60)


@pytest.mark.parametrize("origins", [[PAGE], ["http://localhost:3000", PAGE], ["*"]], ids=["one", "two", "all"])
def test_pages_of_an_origin_may_ask(backend, origins):
    with Served(make_app(backend, NAME, api_key="secret", cors_origins=origins)) as server:
        answer = preflight(server, PAGE)
        assert answer.status_code == 200 and answer.headers[ALLOWED] in (PAGE, "*")
        assert "x-stainless-lang" in answer.headers["access-control-allow-headers"]
        assert "POST" in answer.headers["access-control-allow-methods"]
        statuses = []
        for given in ({}, {"stream": True}, {"key": "wrong"}, {"n": 2}, {"model": "other"}):
            answer = ask(server, PAGE, **given)
            assert answer.headers[ALLOWED] in (PAGE, "*")
            statuses.append(answer.status_code)
        assert statuses == [200, 200, 401, 400, 404]
        assert (ALLOWED in preflight(server, OTHER).headers) == (origins == ["*"])
        assert (ALLOWED in ask(server, OTHER).headers) == (origins == ["*"])


def test_a_failure_of_the_server_is_read_too(backend, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(backend, "complete", fail)
    with Served(make_app(backend, NAME, cors_origins=[PAGE])) as server:
        answer = ask(server, PAGE)
    assert answer.status_code == 500 and answer.headers[ALLOWED] == PAGE and "log" in answer.json()["error"]["message"]


def test_no_origin_is_allowed_unless_named(backend):
    with Served(make_app(backend, NAME)) as server:
        assert preflight(server, PAGE).status_code == 405
        assert ALLOWED not in ask(server, PAGE).headers
