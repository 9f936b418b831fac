"""What requests are answered, with which fields passed over, and what is refused in the client's own words."""

from __future__ import annotations

import gzip
import json
import re

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import NAME, chat
from tiny_index import PROMPTS

AS_JSON = {"Content-Type": "application/json"}
INTERNALS = re.compile(
    r"pydantic|Input should|value_error|Traceback|validat|NoneType|\bdict\b|\bstr\b|\bint\b|Exception"
)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SUBJECTS = {CHAT: {"messages": [{"role": "user", "content": PROMPTS[0]}]}, COMPLETIONS: {"prompt": PROMPTS[0]}}


def ask(served, where=CHAT, **fields):
    body = {**SUBJECTS[where], "max_tokens": 4, "temperature": 0, **fields}
    return httpx.post(served.url + where, content=json.dumps(body), headers=AS_JSON, timeout=60)


def refused(answer, *says, param=None):
    """Check that an answer is OpenAI's error with a plain sentence, and return it."""
    assert 400 <= answer.status_code < 500, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith(".") and not INTERNALS.search(error["message"]), error["message"]
    for text in says:
        assert text in error["message"]
    assert param is None or error["param"] == param
    return error["message"]


# --- what changes nothing ---------------------------------------------------------------------------------------------

HINTS = {
    "user": "me",
    "metadata": {"run": "1"},
    "store": True,
    "reasoning_effort": "low",
    "service_tier": "auto",
    "safety_identifier": "x",
    "parallel_tool_calls": False,
    "verbosity": "low",
    "prediction": {"type": "content", "content": "x"},
    "something_new": [1, {"deep": None}],
    "half \ud800 a name": 1,
}


@pytest.mark.parametrize("where", SUBJECTS)
@pytest.mark.parametrize("name", HINTS, ids=ascii)
def test_hints_are_passed_over_and_listed(served, where, name):
    plain, hinted = ask(served, where), ask(served, where, **{name: HINTS[name]})
    assert hinted.status_code == 200, hinted.text
    assert hinted.json()["choices"] == plain.json()["choices"] and hinted.json()["usage"] == plain.json()["usage"]
    assert plain.json()["coreinfer"]["ignored"] == []
    assert hinted.json()["coreinfer"]["ignored"] == [name.replace("\ud800", "?")]


def test_what_was_passed_over_stands_in_the_last_chunk(client):
    *_, last = chat(client, stream=True, extra_body={"user": "me", "stream_options": {"other": 1}})
    assert last.model_extra["coreinfer"]["ignored"] == ["user", "stream_options.other"]
    whole = chat(client, [{"role": "user", "content": "hi", "weight": 1}], extra_body={"stream_options": {}})
    assert whole.model_extra["coreinfer"]["ignored"] == ["stream_options", "messages.weight"]


NEUTRAL = [
    *({name: None} for name in ("n", "stream", "temperature", "max_tokens", "stop", "seed", "top_p", "top_k", "tools")),
    *({name: None} for name in ("response_format", "logprobs", "chat_template_kwargs", "coreinfer", "stream_options")),
    *({"n": 1}, {"n": 1.0}, {"logit_bias": {}}, {"tools": []}, {"tool_choice": "auto"}, {"tool_choice": "none"}),
    *({"response_format": {"type": "text"}}, {"presence_penalty": 0}, {"frequency_penalty": 0.0}, {"top_p": 1}),
    *({"logprobs": False}, {"top_logprobs": 0}, {"max_tokens": 4.0}, {"stop": []}, {"modalities": ["text"]}),
    *(
        {"grammar": ""},
        {"guided_regex": ""},
        {"guided_choice": []},
        {"structured_outputs": {}},
        {"stop": ""},
        {"suffix": ""},
    ),
    *({"continue_final_message": False}, {"add_generation_prompt": True}),
]


@pytest.mark.parametrize("fields", NEUTRAL, ids=str)
def test_what_changes_nothing_is_taken(served, fields):
    answer = ask(served, **{"max_completion_tokens": 4, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.json()["coreinfer"]["ignored"] == [] and answer.json()["usage"]["completion_tokens"] == 4


# --- conversations ----------------------------------------------------------------------------------------------------


def said(served, messages, **fields):
    """Return what an answer to messages is made of: the number of tokens that were read, and the text."""
    answer = ask(served, messages=messages, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["prompt_tokens"], answer.json()["choices"][0]["message"]["content"]


USER = {"role": "user", "content": PROMPTS[0]}


def test_content_as_parts_is_their_text(served):
    whole = said(served, [USER])
    for cut in (4, len(PROMPTS[0])):
        parts = [{"type": "text", "text": PROMPTS[0][:cut]}, {"type": "text", "text": PROMPTS[0][cut:]}]
        assert said(served, [{"role": "user", "content": parts, "name": "Ann"}]) == whole


@pytest.mark.parametrize("turn", [{"content": None}, {}, {"content": ""}, {"content": []}], ids=str)
def test_earlier_turns_of_the_assistant_may_be_empty(served, turn):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": "1", "content": "42"}
    turns = [USER, {"role": "assistant", "tool_calls": [call], **turn}, result, USER]
    expected = [USER, {"role": "assistant", "content": ""}, {"role": "tool", "content": "42"}, USER]
    assert said(served, turns) == said(served, expected)


def test_a_developer_is_the_system(served):
    assert said(served, [{"role": "developer", "content": "Be brief."}, USER]) == said(
        served, [{"role": "system", "content": "Be brief."}, USER]
    )


def test_variables_reach_the_chat_template(served, language_model, monkeypatch):
    template = language_model.tokenizer.chat_template
    monkeypatch.setattr(language_model.tokenizer, "chat_template", template + "{{ mood }}")
    plain, _ = said(served, [USER])
    moody, _ = said(served, [USER], chat_template_kwargs={"mood": "in a good mood", "enable_thinking": False})
    assert moody > plain
    refused(ask(served, chat_template_kwargs={"chat_template": "x"}), "chat_template_kwargs has chat_template")
    refused(ask(served, chat_template_kwargs={"messages": []}), "chat_template_kwargs has messages")
    refused(ask(served, chat_template_kwargs={"mood": "\ud800"}), "chat template refuses")
    monkeypatch.setattr(language_model.tokenizer, "chat_template", "{{ messages[0]['content'] + 1 }}")
    refused(ask(served), "chat template refuses the conversation")


# --- what is refused --------------------------------------------------------------------------------------------------

UNDONE = {
    "n": (2, "n is 2, expected 1: this server gives one choice."),
    "best_of": (3, "best_of is 3, expected 1: this server gives one choice."),
    "logprobs": (True, "logprobs is true, expected false: this server gives no log-probabilities."),
    "top_logprobs": (5, "top_logprobs is 5, expected 0"),
    "presence_penalty": (0.5, "presence_penalty is 0.5, expected 0"),
    "frequency_penalty": (-1, "frequency_penalty is -1, expected 0"),
    "logit_bias": ({"5": 1}, 'logit_bias is {"5": 1}, expected none'),
    "tools": ([{"type": "function"}], "expected none: this server calls no tools."),
    "tool_choice": ("required", 'tool_choice is "required", expected none or auto'),
    "functions": ([1], "this server calls no tools."),
    "response_format": ({"type": "json_object"}, "this server writes plain text."),
    "grammar": ("root ::= x", 'grammar is "root ::= x", expected none: this server writes plain text.'),
    "continue_final_message": (
        True,
        "continue_final_message is true, expected false: this server begins a new message.",
    ),
    "add_generation_prompt": (False, "add_generation_prompt is false, expected true"),
    "guided_json": ({}, "this server writes plain text."),
    "audio": ({"voice": "x"}, "this server writes plain text."),
    "echo": (True, "echo is true, expected false"),
    "suffix": ("x", 'suffix is "x", expected none'),
}


@pytest.mark.parametrize("where", SUBJECTS)
@pytest.mark.parametrize("name", UNDONE)
def test_what_cannot_be_done_is_refused_by_name(served, where, name):
    value, says = UNDONE[name]
    refused(ask(served, where, **{name: value}), says, param=name)


WRONG = {
    "max_tokens": ["5", True, 0, -1, 1.5, [], {}],
    "max_completion_tokens": ["5", 0],
    "temperature": ["0", -1, 2.5, float("nan"), float("inf"), True],
    "top_p": ["1", -0.1, 1.1],
    "top_k": [-2, 1.5, "5"],
    "min_p": [2, "0"],
    "repetition_penalty": [0, -1, "1", float("inf")],
    "seed": ["3", 1.5, True, []],
    "stop": [5, [5], {}, [None], [""], ["x"] * 1001, "\ud800"],
    "stream": ["yes", 1, []],
    "stream_options": [5, [], {"include_usage": "yes"}],
    "chat_template_kwargs": [5, []],
    "coreinfer": [5, {"mode": 5}, {"mod": "dense"}, {"mode": "fast"}],
    "model": [5, []],
    "messages": [None, [], 5, "hi", {}, [5], [{}], [{"role": "user"}], [{"content": "hi"}]],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_told_in_plain_words(served, name):
    for value in WRONG[name]:
        message = refused(ask(served, **{name: value}))
        assert message.startswith(name) and ("expected" in message), message


MESSAGES = [
    ({"role": "robot", "content": "hi"}, 'messages[0].role is "robot", expected system, developer, user'),
    ({"role": "user", "content": None}, "messages[0].content is null, expected a text"),
    ({"role": "user"}, "messages[0].content is missing, expected a text"),
    ({"role": "user", "content": 5}, "messages[0].content is 5, expected a text"),
    ({"role": "user", "content": ["hi"]}, 'messages[0].content: a part of the content is "hi", expected'),
    ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content: a part's text is null, expected a text"),
    ({"role": "user", "content": [{"type": "image_url"}]}, '"image_url", expected text: this server reads no images.'),
    ({"role": "user", "content": [{"type": "input_audio"}]}, "this server reads no sound."),
    ({"role": "user", "content": [{"type": "thing"}]}, 'is of type "thing", expected text.'),
    ({"role": "user", "content": "\ud800"}, "messages[0].content: half of a surrogate pair is no text"),
]


@pytest.mark.parametrize(("message", "says"), MESSAGES, ids=[ascii(message) for message, _ in MESSAGES])
def test_wrong_messages_are_told_in_plain_words(served, message, says):
    refused(ask(served, messages=[message]), says)


PROMPT = [
    (["a", "b"], "prompt has 2 texts, expected one: this server gives one choice."),
    ([], "prompt has 0 texts, expected one"),
    ([1, 2], "prompt is [1, 2], expected a text."),
    (None, "prompt is null, expected a text."),
    ("\ud800", "prompt: half of a surrogate pair is no text, expected whole characters."),
]


@pytest.mark.parametrize(("prompt", "says"), PROMPT, ids=[ascii(prompt) for prompt, _ in PROMPT])
def test_wrong_prompts_are_told_in_plain_words(served, prompt, says):
    refused(ask(served, COMPLETIONS, prompt=prompt), says, param="prompt")


@pytest.mark.parametrize("where", [*SUBJECTS, "/api/lookup"])
def test_bodies_that_are_no_request(served, where):
    def post(content, headers=AS_JSON):
        return httpx.post(served.url + where, content=content, headers=headers)

    refused(post(b'{"prompt": '), "the body is no JSON (Expecting value at character 11")
    refused(post(b"[1]"), "the body is [1], expected a JSON object.")
    refused(post(b'"hi"'), 'the body is "hi", expected a JSON object.')
    refused(post(b""), "expected a JSON object")
    refused(post(b"[" * 9000))
    refused(post(b"[" * 5000 + b"]" * 5000), "the body is nested too deeply, expected a JSON object")
    refused(
        post('{"prompt": "Gebäude"}'.encode("latin-1")),
        "the body is not UTF-8 (byte 0xE4 at 15), expected JSON in UTF-8",
    )
    packed = {**AS_JSON, "Content-Encoding": "gzip"}
    refused(
        post(gzip.compress(b"{}"), packed), "the body is compressed, expected JSON in UTF-8, not compressed; send that."
    )
    refused(post(b"{}", {"Content-Type": "text/plain"}), "the content type is text/plain, expected application/json.")
    refused(post(b"{}"), "is missing, expected")


def test_paths_and_methods_that_exist_are_named(served):
    answer = httpx.post(served.url + "/v1/embeddings", content=b"{}", headers=AS_JSON)
    refused(
        answer,
        'POST "/v1/embeddings" is not served, expected one of',
        "POST /v1/chat/completions, POST /v1/completions",
    )
    assert answer.status_code == 404
    answer = httpx.get(served.url + CHAT)
    refused(answer, 'GET "/v1/chat/completions" is not served, expected one of', "POST /v1/chat/completions")
    assert answer.status_code == 405
    refused(httpx.post(served.url + "/v1/models/x"), "is not served", "GET /v1/models/{model_id:path}")


def test_the_openai_client_sees_the_field(client):
    with pytest.raises(openai.BadRequestError, match="n is 2, expected 1") as error:
        chat(client, n=2)
    assert error.value.param == "n" and error.value.type == "invalid_request_error"


# --- whatever is sent -------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PART = st.fixed_dictionaries({}, optional={"type": st.sampled_from(["text", "image_url", 5]), "text": JSON, "x": JSON})
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "tool", "system", "robot"]) | JSON,
        "content": st.just("hi") | st.lists(PART, max_size=3) | JSON,
        "tool_calls": JSON,
        "name": JSON,
    },
)
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "seed", "top_k", "presence_penalty", "n")
FIELDS = {
    **{name: JSON for name in (*UNDONE, *WRONG, "prompt", "text", "k", "user")},
    **{name: JSON | st.floats(-2, 2) | st.integers(-2, 3) for name in NUMBERS},
    "stop": JSON | st.lists(st.text(max_size=3), max_size=9),
    "stream": JSON | st.booleans(),
    "messages": JSON | st.lists(MESSAGE, max_size=3),
    "chat_template_kwargs": JSON | st.dictionaries(st.sampled_from(["tools", "x", "messages"]), JSON, max_size=2),
}
BODY = st.fixed_dictionaries({}, optional=FIELDS) | st.dictionaries(st.sampled_from(list(FIELDS)), JSON, max_size=3)


def is_answered_or_refused(served, where, content, sound):
    if sound and isinstance(content, dict):
        subject = {"messages": [{"role": "user", "content": "hi"}], "prompt": "hi", "text": "hi", "max_tokens": 1}
        content = {**subject, **content}
    answer = httpx.post(served.url + where, content=json.dumps(content), headers=AS_JSON, timeout=60)
    if answer.status_code != 200:
        refused(answer)
    elif where == "/api/lookup":
        assert answer.json()["matches"]
    elif answer.headers["content-type"].startswith("text/event-stream"):
        lines = [line[6:] for line in answer.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]" and all("error" not in json.loads(line) for line in lines[:-1])
    else:
        assert answer.json()["choices"][0]["finish_reason"] in ("stop", "length") and answer.json()["model"] == NAME
        assert isinstance(answer.json()["coreinfer"]["ignored"], list)


def fuzz(n_examples):
    @settings(max_examples=n_examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from([CHAT, COMPLETIONS, "/api/lookup"]), BODY | JSON, st.booleans())
    def run(served, where, content, sound):
        is_answered_or_refused(served, where, content, sound)

    return run


test_whatever_is_sent_is_answered_or_refused = fuzz(200)
test_whatever_is_sent_is_answered_or_refused_at_length = pytest.mark.slow(fuzz(5000))
