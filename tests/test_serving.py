"""The server speaks OpenAI's API to OpenAI's own client, in turn and without mixing answers, over either backend."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import uvicorn
from click.testing import CliRunner
from coreinfer_sim_cli.main import main
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_llamacpp import PROMPTS, RATIO, checkpoint, exported, index  # noqa: F401

from coreinfer_sim.choosing.predictors import make_predictor
from coreinfer_sim.engines.llamacpp.generator import LlamaCppGenerator
from coreinfer_sim.generation.text import TextGenerator
from coreinfer_sim.models.loading import load_model
from coreinfer_sim.serving.app import _overlap, _without_stops, make_app
from coreinfer_sim.serving.backends import Answered, Asked, LlamaCppBackend, TransformersBackend, routing_text

NAME = "tiny"
AS_JSON = {"Content-Type": "application/json"}


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


@pytest.fixture(scope="module")
def language_model(checkpoint):  # noqa: F811
    return load_model(checkpoint, "float32")


def backend_of(language_model, index):  # noqa: F811
    return TransformersBackend(language_model, index, keep_ratio=RATIO, fallback="none")


@pytest.fixture(scope="module")
def served(language_model, index):  # noqa: F811
    app = make_app(backend_of(language_model, index), NAME, max_new_tokens=64, body_limit=20_000)
    with Served(app) as server:
        yield server


@pytest.fixture(scope="module")
def client(served):
    return served.client()


def chat(client, text=PROMPTS[0], **options):
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    return client.chat.completions.create(
        model=NAME, messages=messages, **{"max_tokens": 8, "temperature": 0, **options}
    )


def test_all_modes_share_one_cache_of_compact_weights(language_model, index):  # noqa: F811
    backend = TransformersBackend(
        language_model, index, keep_ratio=RATIO, fallback="none", runtime={"cache_bytes": 1, "engine": "transformers"}
    )
    one = n_held = 0
    for mode in ("similarity", "global", "random"):
        backend.answer(Asked(PROMPTS[0], 4, mode, temperature=0), lambda _text: None)
        caches = {id(each.sparse._compacts): each.sparse._compacts for each in backend._generators.values()}
        n_held = sum(cache.n_bytes for cache in caches.values())
        one = one or n_held
    assert 0 < n_held <= 1.1 * one  # a mode's own one would have kept its set beside the others'
    backend.close()
    assert not sum(cache.n_bytes for cache in caches.values())


def test_chat_gives_what_generate_gives(client, language_model, index):  # noqa: F811
    predictor = make_predictor("similarity", language_model.layers, index, keep_ratio=RATIO, fallback="none")
    expected = TextGenerator(language_model, predictor).generate(
        PROMPTS[1], chat=True, max_new_tokens=8, do_sample=False
    )
    answer = chat(client, PROMPTS[1])
    assert answer.choices[0].message.content == expected.text and answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == expected.n_prompt_tokens and answer.usage.completion_tokens == 8
    facts = answer.model_extra["coreinfer"]
    assert facts["cluster"] == expected.selection.cluster and facts["mode"] == "similarity"
    assert facts["similarity"] == pytest.approx(expected.selection.similarity, abs=1e-3)


def test_streams_add_up_to_the_whole(client):
    whole = chat(client)
    parts = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-2].choices[0].finish_reason == "length" and parts[-2].model_extra["coreinfer"]["cluster"] is not None
    assert parts[-1].usage == whole.usage


def test_completions_go_on_from_a_text(client):
    options = {"model": NAME, "prompt": "Stars form when", "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**options)
    parts = list(client.completions.create(**options, stream=True))
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text != ""
    assert whole.usage.completion_tokens == 6


def test_models_health_metrics_and_page(client, served):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).model_extra["coreinfer"]["clusters"] == 3
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok", "open_requests": 0}
    chat(client)
    metrics = httpx.get(f"{served.url}/metrics").text
    for name in (
        "requests_total",
        "new_tokens_total",
        "cluster_hits_total",
        "swaps_total",
        "queue",
        "tokens_per_second",
    ):
        assert f"coreinfer_{name}" in metrics
    assert "<title>coreinfer_sim</title>" in httpx.get(served.url).text
    found = httpx.post(f"{served.url}/api/lookup", json={"text": PROMPTS[0], "k": 9}).json()
    assert len(found["matches"]) == 3 and found["matches"][0]["similarity"] >= found["matches"][1]["similarity"]
    assert found["kept"] == [pytest.approx(RATIO, abs=1e-3)] * 3


def test_modes_can_be_overridden(client):
    dense = chat(client, extra_body={"coreinfer": {"mode": "dense"}})
    assert dense.model_extra["coreinfer"]["mode"] == "dense" and dense.model_extra["coreinfer"]["keep_ratio"] == 1
    with pytest.raises(openai.BadRequestError, match="coreinfer.mode is 'fast'"):
        chat(client, extra_body={"coreinfer": {"mode": "fast"}})


def test_stops_and_seeds(client):
    whole = chat(client).choices[0].message.content
    stop = whole[len(whole) // 2 :][:2]
    cut = chat(client, stop=stop)
    assert cut.choices[0].message.content == whole[: whole.find(stop)]
    assert chat(client, temperature=1, seed=3).choices == chat(client, temperature=1, seed=3).choices


def test_bad_requests_are_told_in_the_clients_words(client, served):
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, "word " * 2000)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="is empty"):
        chat(client, "  ")
    with pytest.raises(openai.BadRequestError, match="at most 64"):
        chat(client, max_tokens=65)
    for wrong in ({"n": 2}, {"logprobs": True}, {"frequency_penalty": 1.0}, {"temperature": -1}, {"stop": [""]}):
        with pytest.raises(openai.BadRequestError):
            chat(client, **wrong)
    undone = ({"response_format": {"type": "json_object"}}, {"tools": [1]}, {"logit_bias": {"5": 1}}, {"fooo": 1})
    for wrong in (*undone, {"top_k": 5}, {"functions": [1]}, {"suffix": "x"}, {"best_of": 3}):
        with pytest.raises(openai.BadRequestError, match="does not do that") as error:
            chat(client, extra_body=wrong)
        assert error.value.param == next(iter(wrong))
    neutral = {"n": 1, "logit_bias": {}, "tools": [], "response_format": {"type": "text"}, "user": "me", "top_p": 1}
    assert chat(client, extra_body=neutral).usage == chat(client).usage
    for wrong in ({"max_tokens": "5"}, {"max_tokens": True}, {"seed": 1.5}, {"temperature": "0"}):
        with pytest.raises(openai.BadRequestError):
            chat(client, extra_body=wrong)
    with pytest.raises(openai.BadRequestError, match="no message of the user"):
        chat(client, [{"role": "assistant", "content": "Hello."}])
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.APIStatusError) as error:
        chat(client, "word " * 10_000)
    assert error.value.status_code == 413
    half = {
        "v1/chat/completions": '{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 2}',
        "v1/completions": '{"prompt": "\\ud800", "max_tokens": 2}',
        "api/lookup": '{"text": "\\ud800"}',
    }
    for where, content in half.items():
        answer = httpx.post(f"{served.url}/{where}", content=content, headers=AS_JSON)
        assert answer.status_code == 400 and re.search("surrogate|unicode", answer.json()["error"]["message"])
    answer = httpx.post(
        f"{served.url}/v1/chat/completions",
        content='{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stop": "\\udc00"}',
        headers=AS_JSON,
    )
    assert answer.status_code == 400 and "half of a surrogate pair" in answer.json()["error"]["message"]
    answer = httpx.post(f"{served.url}/v1/completions", content=b'{"prompt": ', headers=AS_JSON)
    assert answer.json()["error"]["message"].startswith("the body is no JSON (Expecting value at character 11")
    assert httpx.post(f"{served.url}/v1/chat/completions", content=b"[" * 9000, headers=AS_JSON).status_code == 400
    assert httpx.get(f"{served.url}/nothing").json()["error"]["message"] == "Not Found."


def test_without_a_limit_an_answer_is_as_long_as_the_context_allows(client, language_model):
    context = language_model.context_length
    ids = language_model.tokenizer("How do stars form? " * 400)["input_ids"][: context - 20]
    prompt = language_model.tokenizer.decode(ids, skip_special_tokens=True)
    answer = client.completions.create(model=NAME, prompt=prompt, temperature=0)
    assert context - 64 < answer.usage.prompt_tokens < context and answer.usage.completion_tokens > 0
    if answer.choices[0].finish_reason == "length":
        assert answer.usage.total_tokens == context
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=NAME, prompt=prompt, temperature=0, max_tokens=64)
    assert error.value.code == "context_length_exceeded"


def test_a_key_guards_all_but_page_and_health(language_model, index):  # noqa: F811
    with Served(make_app(backend_of(language_model, index), NAME, api_key="secret")) as server:
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").models.list()
        assert len(list(server.client("secret").models.list())) == 1
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == httpx.get(server.url).status_code == 200


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


def test_full_queues_and_slow_answers_are_refused(language_model, index):  # noqa: F811
    with Served(make_app(backend_of(language_model, index), NAME, queue_limit=1, max_new_tokens=500)) as server:
        slow = chat(server.client(), max_tokens=500, stream=True)
        next(iter(slow))
        with pytest.raises(openai.RateLimitError):
            chat(server.client())
        slow.close()
    with Served(make_app(backend_of(language_model, index), NAME, timeout=0.01, max_new_tokens=500)) as server:
        with pytest.raises(openai.InternalServerError) as error:
            chat(server.client(), max_tokens=500)
        assert error.value.status_code == 504


def test_an_answer_that_nobody_waits_for_is_broken_off(language_model, index):  # noqa: F811
    backend = backend_of(language_model, index)
    answer = backend.answer

    def slowly(asked, write):
        def wait(text):
            time.sleep(0.1)
            write(text)

        return answer(asked, wait)

    backend.answer = slowly
    with Served(make_app(backend, NAME, max_new_tokens=900)) as server:
        asked = {"prompt": PROMPTS[0], "max_tokens": 900, "temperature": 0}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=asked, timeout=0.3)
        give_up = time.monotonic() + 10
        while 'outcome="' not in (told := httpx.get(f"{server.url}/metrics").text) and time.monotonic() < give_up:
            time.sleep(0.05)
    assert 'outcome="hung up"' in told and 'outcome="answered"' not in told


def test_llama_cpp_serves_the_same_answers(client, index, exported):  # noqa: F811
    generator = LlamaCppGenerator(index, exported, fallback="none", context=256)
    with Served(make_app(LlamaCppBackend(generator), NAME)) as server:
        for text in PROMPTS[:2]:
            theirs, ours = chat(server.client(), text), chat(client, text)
            assert theirs.usage == ours.usage
            assert theirs.model_extra["coreinfer"]["confident"] == ours.model_extra["coreinfer"]["confident"]
            assert theirs.model_extra["coreinfer"]["cluster"] == ours.model_extra["coreinfer"]["cluster"]
        with pytest.raises(openai.BadRequestError, match="expected one of similarity, global, dense"):
            chat(server.client(), extra_body={"coreinfer": {"mode": "hybrid"}})


def test_the_command_serves_exported_clusters(index, exported):  # noqa: F811
    command = [sys.executable, "-c", "from coreinfer_sim_cli.main import main; main()", "serve"]
    given = ["--index", index.name, "--backend", "llamacpp", "--exported", str(exported), "--port", "0", "--name", NAME]
    with subprocess.Popen([*command, *given, "--prefill", "sparse"], stderr=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stderr if "Serving" in line)
        url = re.search(r"http://[\d.:]+", line)[0]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            answer = chat(client)
        assert answer.usage.completion_tokens == 8 and answer.model_extra["coreinfer"]["prefill"] == "sparse"
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert "Traceback" not in rest, rest


def test_a_stream_is_told_that_the_server_shuts_down(language_model, index, caplog):  # noqa: F811
    app = make_app(backend_of(language_model, index), NAME, max_new_tokens=500)
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


def test_a_client_that_leaves_within_its_request_is_no_failure(served, caplog):
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
        time.sleep(0.2)
    time.sleep(0.5)
    assert httpx.get(f"{served.url}/health").json()["open_requests"] == 0
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_conversation_moves_with_its_topic(index):  # noqa: F811
    def said(*texts):
        return routing_text(index, [{"role": "user", "content": text} for text in texts])

    assert said(PROMPTS[0] + " 1", "zzz qqq 17") == PROMPTS[0] + " 1"
    assert said(PROMPTS[0] + " 1", PROMPTS[1] + " 2") == PROMPTS[1] + " 2"
    assert said("zzz qqq 17") == "zzz qqq 17" and routing_text(index, "text") == "text"


@given(st.lists(st.text("abc", max_size=4), max_size=8), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_text_is_cut_before_the_first_stop(pieces, stops):
    async def events():
        for piece in pieces:
            yield piece
        yield Answered("", 1, 1, True)

    async def run():
        return [event async for event in _without_stops(events(), tuple(stops))]

    import asyncio

    *texts, last = asyncio.run(run())
    whole = "".join(pieces)
    places = [whole.find(stop) for stop in stops if stop in whole]
    assert "".join(texts) == whole[: min(places, default=len(whole))] and isinstance(last, Answered)
    assert _overlap("xab", ("abc",)) == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    "model",
    "messages",
    "prompt",
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "stream",
    "n",
    "coreinfer",
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["/v1/chat/completions", "/v1/completions", "/api/lookup"]),
    st.dictionaries(st.sampled_from([*FIELDS, "text", "k"]), JSON, max_size=5) | JSON,
    st.booleans(),
)
def test_no_content_makes_the_server_fail(served, where, content, sound):
    if sound and isinstance(content, dict):
        content = {"messages": [{"role": "user", "content": "hi"}], "prompt": "hi", "max_tokens": 1, **content}
    answer = httpx.post(served.url + where, content=json.dumps(content), headers=AS_JSON, timeout=60)
    assert answer.status_code < 500
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_command_asks_for_a_key_where_others_can_reach_it(index):  # noqa: F811
    result = CliRunner().invoke(main, ["serve", "--index", index.name, "--host", "0.0.0.0"])
    assert result.exit_code == 1 and "give --api-key" in result.output
    result = CliRunner().invoke(main, ["serve", "--index", index.name, "--prefill", "sparse"])
    assert result.exit_code == 2 and "--prefill needs --backend llamacpp" in result.output


def test_the_command_serves_until_it_is_interrupted(index, checkpoint):  # noqa: F811
    command = [sys.executable, "-c", "from coreinfer_sim_cli.main import main; main()", "serve"]
    given = ["--index", index.name, "--model", checkpoint, "--port", "0", "--keep-ratio", "0.4", "--name", NAME]
    with subprocess.Popen([*command, *given], stderr=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stderr if "Serving" in line)
        url = re.search(r"http://[\d.:]+", line)[0]
        assert httpx.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"] == NAME
        port = url.rsplit(":", 1)[1]
        busy = subprocess.run([*command, *given, "--port", port], capture_output=True, text=True)
        assert busy.returncode == 1 and "expected a free port" in busy.stderr and "Traceback" not in busy.stderr
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode in (0, 130) and "Traceback" not in rest
