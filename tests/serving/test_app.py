"""The server speaks OpenAI's API to OpenAI's own client, and tells it what is wrong."""

from __future__ import annotations

import json
import re
import socket
import time

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import NAME, Served, backend_of, chat
from tiny_index import PROMPTS, WIDE_RATIO

from coreinfer_sim.generation.opening import load
from coreinfer_sim.serving.app import make_app

AS_JSON = {"Content-Type": "application/json"}


def test_chat_gives_what_generate_gives(client, language_model, wide_index):
    generator = load(wide_index, language_model, keep_ratio=WIDE_RATIO, fallback="none")
    expected = generator.generate(PROMPTS[1], chat=True, max_new_tokens=8)
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
    assert found["kept"] == [pytest.approx(WIDE_RATIO, abs=1e-3)] * 3


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


def test_a_key_guards_all_but_page_and_health(language_model, wide_index):
    with Served(make_app(backend_of(language_model, wide_index), NAME, api_key="secret")) as server:
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").models.list()
        assert len(list(server.client("secret").models.list())) == 1
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == httpx.get(server.url).status_code == 200


def test_a_client_that_leaves_within_its_request_is_no_failure(served, caplog):
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
        time.sleep(0.2)
    time.sleep(0.5)
    assert httpx.get(f"{served.url}/health").json()["open_requests"] == 0
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


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
