"""What is read of a row: recognised columns, conversations in every form, and what is never a prompt."""

from __future__ import annotations

import json

import pytest
from corpora import read

from coreinfer_sim.base.chats import Turn
from coreinfer_sim.base.errors import ChatTemplateError, CorpusError
from coreinfer_sim.base.rows import CorpusReport, describe_corpus, read_corpus, read_prompts
from coreinfer_sim.base.settings import CorpusConfig

TURNS = [
    ("system", "Be brief."),
    ("user", "Why is grass green?"),
    ("assistant", "Chlorophyll."),
    ("user", "And hay?"),
    ("assistant", "Dry."),
]
WHOLE = "Be brief.\nWhy is grass green?\nChlorophyll.\nAnd hay?\nDry."


@pytest.fixture
def jsonl(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def openai(turns):
    return [{"role": role, "content": content} for role, content in turns]


def sharegpt(turns):
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(role, role), "value": content} for role, content in turns]


def parts(turns):
    return [{"role": role, "content": [{"type": "text", "text": content}]} for role, content in turns]


FORMS = [
    {"Messages": [{"role": role.capitalize(), "content": content} for role, content in TURNS]},
    {"messages": json.dumps(openai(TURNS)), "id": "1"},
    {"conversations": str(sharegpt(TURNS))},
    {"messages": openai(TURNS)},
    {"id": "x7", "conversations": sharegpt(TURNS)},
    {"uuid": "x7", "conversations": openai(TURNS), "score": 3},
    {"messages": parts(TURNS), "source": "web", "lang": "en"},
    {"prompt": openai(TURNS[:4]), "completion": openai(TURNS[4:])},
    {"dialogue": openai(TURNS), "n": 4},
    {"id": "0", "prompt": "And hay?", "system_prompt": "Be brief.", "model": "m", "messages": openai(TURNS)},
]


@pytest.mark.parametrize("row", FORMS, ids=lambda row: "+".join(row))
def test_conversations_are_recognised(jsonl, row):
    (sentence,), _ = read(jsonl(row))
    assert (sentence.prompt, sentence.text) == ("And hay?", WHOLE)
    assert "conversations in" in describe_corpus(CorpusConfig(str(jsonl(row))))


def test_prompt_and_completion_are_a_conversation(jsonl):
    rows = {"id": "a", "prompt": "How?", "completion": "So."}, {"id": "b", "prompt": "Who?", "completion": None}
    seen = []

    def render(turns):
        seen.append(turns)
        return " ".join(f"<{turn.role}>{turn.content}" for turn in turns)

    drawn, _ = read_corpus(CorpusConfig(str(jsonl(*rows))), lambda texts: [[1] for _ in texts], render)
    assert [(row.prompt, row.text) for row in drawn] == [("How?", "<user>How? <assistant>So."), ("Who?", "<user>Who?")]
    assert seen[0] == (Turn("user", "How?"), Turn("assistant", "So."))


def test_a_named_column_or_template_is_taken_as_it_is(jsonl):
    path = jsonl({"prompt": "How?", "completion": "So.", "messages": openai(TURNS)})
    assert read(path, prompt_column="prompt")[0][0].text == "How?"
    assert read(path, template="{prompt}|{completion}")[0][0].text == "How?|So."
    assert read(path, prompt_column="messages")[0][0].prompt == "And hay?"
    assert read(path, prompt_column="prompt", completion_column="completion")[0][0].text == "How?\nSo."


def test_a_conversation_that_the_template_refuses_is_left_out_and_counted(jsonl):
    def render(turns):
        if turns[0].role == "system":
            raise ChatTemplateError("the model's chat template refuses the conversation (no system)")
        return turns[0].content

    path = jsonl({"messages": openai(TURNS)}, {"messages": openai(TURNS[1:])})
    drawn, report = read_corpus(CorpusConfig(str(path)), lambda texts: [[1] for _ in texts], render)
    assert len(list(drawn)) == 1
    assert "1 conversation left out (line 1: the model's chat template refuses" in str(report)


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "assistant", "content": "Hello."}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}],
        [],
    ],
)
def test_a_conversation_without_a_question_is_an_empty_row(jsonl, turns):
    _, report = read(jsonl({"messages": openai(TURNS)}, {"messages": turns}))
    assert (report.n_kept, report.n_empty) == (1, 1)


def test_calls_and_images_in_a_conversation(jsonl):
    turns = [
        {"role": "user", "content": [{"type": "image", "image": "x"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]},
        {"role": "tool", "content": {"type": "text", "text": "A cat."}},
        {"role": "assistant", "content": "A cat."},
    ]
    (sentence,), report = read(jsonl({"messages": turns}))
    assert (sentence.prompt, sentence.text) == ("What is it?", "What is it?\nA cat.\nA cat.")
    assert "1 row with parts that are no text" in str(report)


@pytest.mark.parametrize(
    "name", ["id", "ID", "row_id", "question_id", "uuid", "index", "Unnamed: 0", "__index_level_0__", "md5 hash"]
)
def test_a_column_of_ids_is_never_the_prompt(jsonl, name):
    row = {name: "how do stars form", "question": "How do stars form?"}
    assert read(jsonl(row))[0][0].prompt == "How do stars form?"
    with pytest.raises(CorpusError, match="none is called prompt, text or messages"):
        read(jsonl({name: "how do stars form"}))


@pytest.mark.parametrize("values", [["1", "2,5", "-3e4"], ["abc", "row-7"], ["550e8400-e29b", "6fa459ea"], ["", "x_1"]])
def test_numbers_and_single_words_are_no_prompts(jsonl, values):
    rows = [{"code": value, "question": f"How {n}?"} for n, value in enumerate(values)]
    assert [s.prompt for s in read(jsonl(*rows))[0]] == [row["question"] for row in rows]


@pytest.mark.parametrize("name", ["prompt", "text", "Prompt"])
@pytest.mark.parametrize("values", [["1", "2"], [3, None], ["4.5", ""]])
def test_numbers_are_no_prompts_whatever_their_column_is_called(jsonl, name, values):
    rows = [{name: value, "question": f"How {n}?"} for n, value in enumerate(values)]
    assert [s.prompt for s in read(jsonl(*rows))[0]] == ["How 0?", "How 1?"]
    assert [s.prompt for s in read(jsonl(*rows), template="{question}")[0]] == ["How 0?", "How 1?"]
    assert read(jsonl(*rows), prompt_column=name)[0][0].prompt == str(values[0])
    with pytest.raises(CorpusError, match="none is called prompt, text or messages"):
        read(jsonl(*({name: value} for value in values)))


def test_a_table_in_a_text_file_is_said_to_be_one(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("How?\tSo.\nWho?\tThey.\n")
    assert "each has 1 tab: name it .tsv if it is a table" in describe_corpus(CorpusConfig(str(path)))
    for other in ("How?\tSo.\nWho?\n", "How?\tSo.\n", "How?\nWho?\n"):
        path.write_text(other)
        assert "tab" not in describe_corpus(CorpusConfig(str(path))).removeprefix(str(path))


def test_rows_inside_an_object_are_named(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": "1", "data": [{"question": "How?"}, {"question": "Who?"}]}))
    for settings in ({}, {"prompt_column": "question"}):
        with pytest.raises(CorpusError, match="is one object with its rows in 'data', expected the rows at the top"):
            read(path, **settings)


def test_writing_without_spaces_is_a_prompt(jsonl):
    assert read(jsonl({"id": "1", "question": "恒星是怎样形成的？"}))[0][0].prompt == "恒星是怎样形成的？"


@pytest.mark.parametrize("name", ["Prompt", "TEXT"])
def test_capitals_of_the_usual_names_do_not_matter(jsonl, name):
    assert read(jsonl({"id": 1, "n": 3, name: "Why?"}))[0][0].prompt == "Why?"
    with pytest.raises(CorpusError, match=f"expected {name.swapcase()}; .* such as '{name}'"):
        read(jsonl({name: "Why?"}), prompt_column=name.swapcase())


def test_one_word_that_asks_is_a_prompt(jsonl):
    assert read(jsonl({"id": "a1", "uuid": "u1", "question": "Why?"}))[0][0].prompt == "Why?"


@pytest.mark.parametrize("value", [["one", "two"], [{"content": "one"}], {"a": 1}])
def test_messages_that_are_none_are_named(jsonl, value):
    with pytest.raises(CorpusError, match="in the column 'messages', expected text, or a list of messages with role"):
        read(jsonl({"messages": value}))


@pytest.mark.parametrize(
    ("message", "lacks"), [({"content": "So."}, "role"), ({"role": "user"}, "content"), ({"from": "gpt"}, "content")]
)
def test_a_message_that_lacks_something_is_named(jsonl, message, lacks):
    turns = [{"role": "user", "content": "How?"}, message]
    for rows in ([{"messages": turns}], [{"messages": turns[:1]}, {"messages": turns}]):
        with pytest.raises(CorpusError, match=rf"\(message 2 has no {lacks}\)"):
            read(jsonl(*rows))


@pytest.mark.parametrize(("content", "text"), [(True, "true"), (False, "false"), (7, "7"), ("True", "True")])
def test_a_scalar_content_is_its_characters(jsonl, content, text):
    turns = [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": content}]
    assert read(jsonl({"messages": turns}))[0][0].text == f"Is it so?\n{text}"


@pytest.mark.parametrize("value", [["a", "b"], {"a": "b"}, [["a"]], [{"role": "user"}]])
def test_lists_and_objects_are_never_printed(jsonl, value):
    rows = {"prompt": "How?", "tags": "x"}, {"prompt": value, "tags": value}
    for settings in ({}, {"prompt_column": "prompt"}, {"template": "{tags}"}, {"template": "{prompt} {tags}"}):
        with pytest.raises(
            CorpusError, match=r"rows.jsonl, line 2: \w+ is (a list|an object), expected text|none is called"
        ):
            read(jsonl(*rows), **settings)


@pytest.mark.parametrize("text", ["cut \ud83d", "\udc00 cut", "a \ud83d b"])
def test_half_a_character_is_read_as_the_replacement_character(jsonl, text):
    (_, second), report = read(jsonl({"prompt": "How?"}, {"prompt": text, "other": "\ud83d"}))
    assert "\ufffd" in second.prompt and not any("\ud800" <= c <= "\udfff" for c in second.prompt)
    assert report.n_mended == 1 and "1 row with U+FFFD for what is no Unicode text (line 2)" in str(report)


def test_damage_in_a_foreign_column_does_not_count(jsonl):
    _, report = read(jsonl({"prompt": "How?", "other": "cut \ud83d"}))
    assert report.n_mended == 0


def test_prompts_for_generation_keep_what_was_said_before(jsonl):
    report = CorpusReport()
    (row,) = read_prompts(CorpusConfig(str(jsonl({"messages": openai(TURNS)}))), report)
    assert row.history == tuple(TURNS[:4]) and row.prompt == "And hay?"
    (row,) = read_prompts(CorpusConfig(str(jsonl({"question": "Why is it so?"}))), report)
    assert (row.prompt, row.history) == ("Why is it so?", ())


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        ([{"prompt": "How?"}], {}, "prompts in 'prompt'"),
        ([{"q": "How is it?", "a": "So."}], {"template": "{q} {a}"}, "what the template makes is embedded and read"),
        (
            [{"prompt": "How?", "completion": "So."}],
            {},
            "prompts in 'prompt', completions in 'completion': both are read",
        ),
        ([{"conversations": sharegpt(TURNS)}], {}, "the user's last message is the prompt, the whole is read"),
    ],
)
def test_what_was_recognised_is_said(jsonl, rows, settings, said):
    assert said in describe_corpus(CorpusConfig(str(jsonl(*rows)), **settings))
