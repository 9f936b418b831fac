"""Requests are answered in turn, without mixing; those that cannot be are refused, and those that nobody waits for end."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from served import NAME, Served, backend_of, chat
from tiny_index import PROMPTS

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


def test_an_answer_that_nobody_waits_for_is_broken_off(language_model, wide_index):
    backend = backend_of(language_model, wide_index)
    complete = backend.complete

    def slowly(request, write, cancelled):
        def wait(text):
            time.sleep(0.1)
            write(text)

        return complete(request, wait, cancelled)

    backend.complete = slowly
    with Served(make_app(backend, NAME, max_new_tokens=900)) as server:
        body = {"prompt": PROMPTS[0], "max_tokens": 900, "temperature": 0}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.3)
        give_up = time.monotonic() + 10
        while 'outcome="' not in (told := httpx.get(f"{server.url}/metrics").text) and time.monotonic() < give_up:
            time.sleep(0.05)
    assert 'outcome="hung up"' in told and 'outcome="answered"' not in told


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
