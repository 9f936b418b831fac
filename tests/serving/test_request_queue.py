"""Requests are answered in turn, without mixing; those that cannot be are refused, and those that nobody waits for end."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from served import NAME, Served, backend_of, chat
from tiny_index import PROMPTS

from coreinfer_sim.base.errors import GenerationCancelledError
from coreinfer_sim.serving.app import make_app


def test_answers_of_many_clients_do_not_mix(client, served):
    texts = [f"{prompt} {number}" for number in range(3) for prompt in PROMPTS]
    alone = {text: chat(client, text).choices[0].message.content for text in texts}

    def ask(number):
        text = texts[number % len(texts)]
        stream = chat(served.client(), text, stream=True)
        if number % 5 == 4:  # hangs up midway
            next(iter(stream))
            stream.close()
            return True
        return "".join(p.choices[0].delta.content or "" for p in stream if p.choices) == alone[text]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(48)))
    while httpx.get(f"{served.url}/health").json()["open_requests"]:
        time.sleep(0.05)
    assert 'outcome="hung up"' in httpx.get(f"{served.url}/metrics").text


def test_full_queues_and_slow_answers_are_refused(language_model, wide_index):
    with Served(make_app(backend_of(language_model, wide_index), NAME, queue_limit=1, max_new_tokens=500)) as server:
        slow = chat(server.client(), max_tokens=500, stream=True)
        next(iter(slow))
        with pytest.raises(openai.RateLimitError):
            chat(server.client())
        slow.close()
    with Served(make_app(backend_of(language_model, wide_index), NAME, timeout=0.01, max_new_tokens=500)) as server:
        with pytest.raises(openai.InternalServerError) as error:
            chat(server.client(), max_tokens=500)
        assert error.value.status_code == 504


@pytest.fixture
def stuck(language_model, wide_index):
    """A backend that gives no text, and whether somebody still wants each of its requests."""
    backend = backend_of(language_model, wide_index)
    backend.wanted = []

    def complete(_request, _write, cancelled):
        number = len(backend.wanted)
        backend.wanted.append(True)
        while not cancelled():
            time.sleep(0.01)
        backend.wanted[number] = False
        raise GenerationCancelledError

    backend.complete = complete
    return backend


def within(seconds, holds):
    give_up = time.monotonic() + seconds
    while not holds() and time.monotonic() < give_up:
        time.sleep(0.02)
    return holds()


def outcomes(server):
    found = re.findall(r'requests_total{outcome="([a-z ]+)"} ([0-9]+)', httpx.get(f"{server.url}/metrics").text)
    return {outcome: int(number) for outcome, number in found}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("where", ["chat/completions", "completions"])
def test_a_client_that_hangs_up_frees_the_worker(stuck, stream, where):
    """In the queue and before any text came, too."""
    body = {"messages": [{"role": "user", "content": "hi"}], "prompt": "hi", "max_tokens": 5, "stream": stream}

    def hang_up(after):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/{where}", json=body, timeout=after)

    with Served(make_app(stuck, NAME, parallel=1)) as server, ThreadPoolExecutor() as pool:
        running = pool.submit(hang_up, 1.0)
        assert within(1, lambda: stuck.wanted == [True])
        hang_up(0.3)  # in the queue
        assert within(1, lambda: httpx.get(f"{server.url}/health").json()["open_requests"] == 1)
        running.result()
        assert within(1, lambda: stuck.wanted == [False])
        assert within(1, lambda: outcomes(server) == {"hung up": 2})


@pytest.mark.parametrize(("takes_turns", "n_running"), [(True, 3), (False, 1)])
def test_so_many_requests_are_answered_at_a_time(stuck, takes_turns, n_running):
    stuck.takes_turns = takes_turns
    body = {"prompt": "hi", "max_tokens": 5}

    def hang_up():
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=1.0)

    with Served(make_app(stuck, NAME, parallel=3)) as server, ThreadPoolExecutor() as pool:
        waiting = [pool.submit(hang_up) for _ in range(4)]
        assert within(1, lambda: httpx.get(f"{server.url}/health").json()["open_requests"] == 4)
        assert within(0.5, lambda: stuck.wanted == [True] * n_running)
        for each in waiting:
            each.result()
        assert within(1, lambda: not any(stuck.wanted))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_deadline_frees_the_worker(stuck, stream):
    with Served(make_app(stuck, NAME, timeout=0.3)) as server:
        for number in range(2):
            with pytest.raises(openai.InternalServerError) as error:
                chat(server.client(), stream=stream)
            assert error.value.status_code == 504
            assert within(1, lambda number=number: stuck.wanted == [False] * (number + 1))
        assert outcomes(server) == {"timed out": 2}


def test_a_stream_is_told_that_the_server_shuts_down(language_model, wide_index, caplog):
    app = make_app(backend_of(language_model, wide_index), NAME, max_new_tokens=500)
    with Served(app) as server:
        stream = iter(chat(server.client(), max_tokens=500, stream=True))
        next(stream)
        app.state.stop(grace=0.0)
        with pytest.raises(openai.APIError, match="is shutting down"):
            for _ in stream:
                pass
        with pytest.raises(openai.InternalServerError, match="is shutting down") as error:
            chat(server.client())
        assert error.value.status_code == 503
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
