"""The server speaks OpenAI's API to OpenAI's own client, and tells it what is wrong."""

from __future__ import annotations

import socket
import time

import httpx
import openai
import pytest
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
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok", "open_requests": 0, "needs_key": False}
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


def test_modes_can_be_overridden(client):
    dense = chat(client, extra_body={"coreinfer": {"mode": "dense"}})
    assert dense.model_extra["coreinfer"]["mode"] == "dense" and dense.model_extra["coreinfer"]["keep_ratio"] == 1
    with pytest.raises(openai.BadRequestError, match="coreinfer.mode is 'fast'"):
        chat(client, extra_body={"coreinfer": {"mode": "fast"}})


@pytest.mark.parametrize("n_stops", [1, 6, 200])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_answers_end_before_a_stop(client, n_stops, stream):
    free = chat(client)
    text = free.choices[0].message.content
    stop = text[-2:]  # its last token comes at the limit
    given = stop if n_stops == 1 else [*(f"never {number}" for number in range(n_stops - 1)), stop]
    answer = chat(client, stop=given, stream=stream)
    if stream:
        *parts, last = [part.choices[0] for part in answer]
        found, reason = "".join(part.delta.content or "" for part in parts), last.finish_reason
    else:
        found, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert answer.usage.completion_tokens <= free.usage.completion_tokens
    assert (found, reason) == (text[: text.find(stop)], "stop")


@pytest.mark.parametrize("stop", [None, [], "never there", ["never there"] * 20], ids=["null", "none", "text", "many"])
def test_a_stop_that_never_comes_changes_nothing(client, stop):
    answer = chat(client, extra_body={"stop": stop})
    assert answer.choices == chat(client).choices and answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("seed", [0, 3, -1, 2**40, 10**30])
def test_a_seed_repeats_an_answer(client, seed):
    once, again = (chat(client, temperature=1, extra_body={"seed": seed}) for _ in range(2))
    assert once.choices == again.choices
    assert chat(client, temperature=1, seed=12345).choices != once.choices


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 0}, {"min_p": 1}, {"temperature": 1e-30}])
def test_narrow_sampling_takes_the_likeliest(client, narrow):
    assert chat(client, extra_body={"temperature": 1, **narrow}).choices == chat(client).choices


def test_repetition_penalty_is_honoured(client):
    ids = chat(client, max_tokens=40).choices
    assert chat(client, max_tokens=40, extra_body={"repetition_penalty": 5}).choices != ids
    assert chat(client, max_tokens=40, extra_body={"repetition_penalty": 1, "top_k": -1, "min_p": 0}).choices == ids


def test_what_the_server_cannot_take_at_all(client, served):
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, "word " * 2000)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="is empty"):
        chat(client, "  ")
    with pytest.raises(openai.BadRequestError, match="no message of the user"):
        chat(client, [{"role": "assistant", "content": "Hello."}])
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.APIStatusError) as error:
        chat(client, "word " * 10_000)
    assert error.value.status_code == 413
    assert httpx.get(f"{served.url}/nothing").json()["error"]["message"].startswith('GET "/nothing" is')


def test_without_a_limit_an_answer_is_as_long_as_the_context_allows(client, language_model):
    context = language_model.context_length
    ids = language_model.tokenizer("How do stars form? " * 400)["input_ids"][: context - 20]
    prompt = language_model.tokenizer.decode(ids, skip_special_tokens=True)
    answer = client.completions.create(model=NAME, prompt=prompt, temperature=0)
    assert context - 64 < answer.usage.prompt_tokens < context and answer.usage.completion_tokens > 0
    if answer.choices[0].finish_reason == "length":
        assert answer.usage.total_tokens == context
    named = client.completions.create(model=NAME, prompt=prompt, temperature=0, max_tokens=64)
    assert named.choices == answer.choices and named.usage == answer.usage
    long = language_model.tokenizer.decode(ids * 2, skip_special_tokens=True)
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=NAME, prompt=long, temperature=0, max_tokens=1)
    assert error.value.code == "context_length_exceeded"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_limit_above_the_servers_is_cut_to_it(client, name):
    answer = chat(client, max_tokens=None, extra_body={name: 32_000})
    assert answer.usage.completion_tokens == 64 and answer.choices[0].finish_reason == "length"


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
