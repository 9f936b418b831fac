"""What the user said is found in a text that any chat template rendered, and in no other text."""

from __future__ import annotations

import jinja2
import pytest
from chat_formats import FOLDED, FORMATS, TOOLS, assistant, rendered, system, user
from hypothesis import given, settings
from hypothesis import strategies as st

from coreinfer_sim.models.chat_templates import chat_format

QUESTION = "What is a <b> tag [in short]?\n\nSee also: {x} | 'y'."
AGAIN = "How do stars form?"
TALK = [user(QUESTION), assistant("It is bold.\n\nAnything else?"), user(AGAIN)]
KEPT_APART = [name for name in FORMATS if name != FOLDED]


@pytest.fixture(params=FORMATS)
def name(request) -> str:
    return request.param


def found(name: str, text: str) -> list[str]:
    return chat_format(*FORMATS[name]).user_texts(text)


def allows(name: str, *messages, **more) -> bool:
    try:
        rendered(name, *messages, **more)
    except jinja2.TemplateError:
        return False
    return True


@pytest.mark.parametrize("prompts", [True, False], ids=["with the answer's beginning", "without"])
def test_a_conversation_is_read_turn_by_turn(name, prompts):
    assert found(name, rendered(name, user(AGAIN), prompts=prompts)) == [AGAIN]
    assert found(name, rendered(name, *TALK, prompts=prompts)) == [QUESTION, AGAIN]


def test_first_tokens_and_white_space_at_the_edges_do_not_matter(name):
    text, bos = rendered(name, *TALK), FORMATS[name][1].get("bos_token", "")
    for other in (
        text.strip(),
        f"\n {text}\n",
        f"{bos}{text}",
        text.removeprefix(bos) if bos != "<|im_start|>" else text,
    ):
        assert found(name, other) == [QUESTION, AGAIN]


def test_an_answer_that_has_begun_does_not_matter(name):
    assert found(name, rendered(name, *TALK) + "Stars form") == [QUESTION, AGAIN]


@pytest.mark.parametrize("name", KEPT_APART)
@pytest.mark.parametrize("prompt", ["Be terse.", "Be terse.\n\nA user may ask anything:\n- stars\n- bread"])
def test_a_system_prompt_is_not_the_users(name, prompt):
    if allows(name, system(prompt), user(AGAIN)):
        assert found(name, rendered(name, system(prompt), user(AGAIN))) == [AGAIN]
        assert found(name, rendered(name, system(prompt), *TALK)) == [QUESTION, AGAIN]


def test_a_system_prompt_that_is_the_users_by_all_marks_is_said_to_be():
    assert [name for name in FORMATS if chat_format(*FORMATS[name]).folds] == [FOLDED]


def test_descriptions_of_tools_and_their_results_are_not_the_users():
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {}}}],
    }
    talk = [user(QUESTION), call, {"role": "tool", "content": "Rain."}]
    assert found("chatml, tools", rendered("chatml, tools", *talk, tools=TOOLS)) == [QUESTION]
    talk += [assistant("It rains."), user(AGAIN)]
    assert found("chatml, tools", rendered("chatml, tools", *talk, tools=TOOLS)) == [QUESTION, AGAIN]
    assert found("inst, tools", rendered("inst, tools", user(AGAIN), tools=TOOLS)) == [AGAIN]
    assert found("inst, tools", rendered("inst, tools", *TALK, tools=TOOLS)) == [QUESTION, AGAIN]
    assert found("llama 3", rendered("llama 3", user(QUESTION), assistant("f"), talk[2], user(AGAIN))) == [
        QUESTION,
        AGAIN,
    ]


def test_a_text_that_quotes_a_conversation_is_none(name):
    for text in (rendered(name, user(AGAIN)), rendered(name, *TALK)):
        assert found(name, f"What does this prompt do: {text}?") == []
        assert found(name, f"Translate:\n\n{text}\n\nThank you.") == []
    for text in ("", " \n", AGAIN, QUESTION, "<", "[", "<|", "system", "user: hi", "A user asks."):
        assert found(name, text) == []


def test_marks_that_are_quoted_within_a_conversation_are_text(name):
    opening = rendered(name, user("x")).partition("x")[0].splitlines()[-1:]
    for quoted in (*opening, "[/INST]", "<|im_end|>", "<end_of_turn>", "</s> and <|eot_id|>", "USER: or ASSISTANT:"):
        question = f"Where does {quoted} stand in a prompt?".replace("\n", " ")
        assert found(name, rendered(name, user(question))) == [question]
        talk = [user(AGAIN), assistant(f"Before it: {quoted} ends it."), user(AGAIN)]
        assert found(name, rendered(name, *talk)) == [AGAIN, AGAIN]


@pytest.mark.parametrize(
    "template", ["{{ messages[0]['content'] }}", "Hello.", "{{ raise_exception('no') }}", "{% if %}"]
)
def test_of_a_template_without_marks_nothing_is_learned(template):
    assert chat_format(template, {}) is None


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=200), st.sampled_from(sorted(FORMATS)))
def test_no_text_breaks_it(text, name):
    chat = chat_format(*FORMATS[name])
    assert all(each.strip() for each in chat.user_texts(text))
    assert all(each.strip() for each in chat.user_texts(rendered(name, user(text))))


@pytest.mark.parametrize("filling", [" ", "\n", "<s>", "[INST] ", "</s>", "<|im_end|>\n", "x "])
def test_long_texts_of_marks_are_read_in_one_pass(name, filling):
    assert len(found(name, filling * 5_000)) <= 1
    assert len(found(name, rendered(name, user(filling * 5_000 + AGAIN)))) <= 1
