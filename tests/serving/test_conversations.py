"""A conversation's next turn reads what is new, says so in llama.cpp's timings, and is answered as if it read everything."""

from __future__ import annotations

import pytest
from served import NAME, Served, backend_of, chat
from tiny_index import PROMPTS

from coreinfer_sim.generation.opening import load
from coreinfer_sim.serving.app import make_app
from coreinfer_sim.serving.backends import Backend

NUMBERS = {"cache_n", "prompt_n", "predicted_n"}
RATES = {f"{part}_{what}" for part in ("prompt", "predicted") for what in ("ms", "per_token_ms", "per_second")}
MODES = ["similarity", "dense", "stability"]


@pytest.fixture(scope="module")
def anew(language_model, wide_index):
    """A server that reads every prompt as a whole."""
    with Served(make_app(backend_of(language_model, wide_index, prefix_bytes=0), NAME)) as server:
        yield server.client()


def conversation(client, **options):
    """Return three answers, each to all that was said before."""
    messages, answers = [], []
    for prompt in PROMPTS:
        messages.append({"role": "user", "content": prompt})
        answers.append(chat(client, messages, **options))
        messages.append({"role": "assistant", "content": answers[-1].choices[0].message.content})
    return answers


def timings(answer):
    found = answer.model_extra["timings"]
    assert set(found) == NUMBERS | RATES
    assert found["cache_n"] + found["prompt_n"] == answer.usage.prompt_tokens
    assert found["predicted_n"] == answer.usage.completion_tokens
    return found


@pytest.mark.parametrize("mode", MODES)
def test_a_conversation_goes_on_from_what_was_read(language_model, wide_index, anew, mode):
    options = {"extra_body": {"coreinfer": {"mode": mode}}}
    with Served(make_app(backend_of(language_model, wide_index), NAME)) as server:
        found = conversation(server.client(), **options)
    expected = conversation(anew, **options)
    assert [each.choices for each in found] == [each.choices for each in expected]
    known, prompts = [timings(each)["cache_n"] for each in found], [each.usage.prompt_tokens for each in found]
    assert {timings(each)["cache_n"] for each in expected} == {0} and known[0] == 0
    if mode == "stability":  # it reads the prompt's activations
        assert known == [0, 0, 0]
    else:  # an answer may change how the tokens before it are cut
        assert all(n > before - 4 for n, before in zip(known[1:], prompts, strict=False))


def test_modes_share_what_was_read(language_model, wide_index):
    with Served(make_app(backend_of(language_model, wide_index), NAME)) as server:
        client = server.client()
        n_prompt = chat(client).usage.prompt_tokens
        again = chat(client, extra_body={"coreinfer": {"mode": "dense"}})
        assert timings(again)["cache_n"] == n_prompt - 1


def test_timings_of_streams_and_of_one_token(client):
    parts = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert [part.model_extra.get("timings") is not None for part in parts] == [False] * (len(parts) - 2) + [True, False]
    found = parts[-2].model_extra["timings"]
    assert set(found) == NUMBERS | RATES and all(value > 0 for name, value in found.items() if name != "cache_n")
    assert found["predicted_per_second"] == pytest.approx(1000 / found["predicted_per_token_ms"])
    one = timings(chat(client, max_tokens=1))
    assert one["predicted_per_second"] is None and one["predicted_per_token_ms"] is None


def test_timings_of_completions(client):
    options = {"model": NAME, "prompt": "Stars form when", "max_tokens": 6, "temperature": 0}
    assert timings(client.completions.create(**options))["predicted_n"] == 6
    *_, last = client.completions.create(**options, stream=True)
    assert last.model_extra["timings"]["predicted_n"] == 6


def test_llama_cpp_says_what_it_kept(wide_index, exported):
    pytest.importorskip("xllamacpp", reason="needs the extra llamacpp")
    generator = load(wide_index, fallback="none", engine="llamacpp", exported=str(exported), context=512)
    with Served(make_app(Backend(generator), NAME)) as server:
        known = [timings(each)["cache_n"] for each in conversation(server.client())]
        parts = list(chat(server.client(), stream=True))
    assert known[0] == 0 < known[1] < known[2]
    assert set(parts[-1].model_extra["timings"]) == NUMBERS | RATES
