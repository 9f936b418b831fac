"""What people bring: one file, and every command takes it."""

from __future__ import annotations

import csv
import json

import pytest
from commands import ONE_PROCESS, TOPICS, call, parsed, refused, setting, succeeded

QUESTIONS = [f"What do {noun} tell us about {topic}?" for topic, nouns in TOPICS.items() for noun in nouns]
ANSWER = "All of it; they say so, again and again."


def write_csv(folder, separator, mark, columns):
    path = folder / "rows [1] #2.csv"
    with path.open("w", newline="", encoding="utf-8-sig" if mark else "utf-8") as file:
        writer = csv.writer(file, delimiter=separator, lineterminator="\r\n")
        writer.writerows([["Nr", *columns], *([n, question, ANSWER] for n, question in enumerate(QUESTIONS))])
        file.write("\r\n")
    return path


def write_chats(folder, form):
    path = folder / "chats.jsonl"
    role, content = ("role", "content") if form == "messages" else ("from", "value")
    user, assistant = ("user", "assistant") if form == "messages" else ("human", "gpt")
    turns = [[{role: user, content: q}, {role: assistant, content: ANSWER}] for q in QUESTIONS]
    path.write_text("".join(json.dumps({"id": f"x{n}", form: t}) + "\n" for n, t in enumerate(turns)))
    return path


@pytest.fixture(params=[("csv", ",", False), ("csv", ";", True), ("messages",), ("conversations",)], ids=str)
def source(request, tmp_path):
    kind, *how = request.param
    return write_csv(tmp_path, *how, ["prompt", "completion"]) if kind == "csv" else write_chats(tmp_path, kind)


def test_every_command_takes_it(source, tiny_checkpoint, tmp_path):
    out = tmp_path / "index"
    succeeded("build-index", source, "--model", tiny_checkpoint, "--out", out, "--clusters", 3, *ONE_PROCESS)
    summary = parsed("info", out)
    exemplars = [text for cluster in summary["clusters"] for text in cluster["exemplars"]]
    assert exemplars and set(exemplars) <= set(QUESTIONS)
    plain = sum(len(f"{question}\n{ANSWER}".split()) for question in QUESTIONS)
    assert summary["corpus"]["n_tokens"] > plain  # the whole conversation, in the chat template
    rows = parsed("generate", "--index", out, "--file", source, "--max-new-tokens", 1)
    assert [row["prompt"] for row in rows] == QUESTIONS
    scored = parsed("evaluate", source, "--index", out, "--contender", "dense", "--limit", 2)
    assert scored[0]["n_rows"] == 2
    parsed("tune", source, "--index", out, "--part", "0:100", "--limit", 12, "--keep-ratio", 0.5)


def test_columns_of_any_name(tiny_checkpoint, tmp_path):
    source = write_csv(tmp_path, "\t", False, ["The question", "The answer"])
    out = tmp_path / "index"
    build = ["build-index", source, "--model", tiny_checkpoint, "--out", out, "--clusters", 3, *ONE_PROCESS]
    refused(call(*build), "none is called prompt, text or messages")
    succeeded(*build, "--prompt-column", "The question", "--template", "{The question}: {The answer}")
    named = setting("corpus.prompt_column", "The question")
    rows = parsed("generate", "--index", out, "--file", source, "--max-new-tokens", 1, *named)
    assert [row["prompt"] for row in rows] == QUESTIONS
    named += setting("corpus.completion_column", "The answer")
    parsed("evaluate", source, "--index", out, "--contender", "dense", "--limit", 2, *named)
    refused(call("evaluate", source, "--index", out, *setting("corpus.limit", 3)), "corpus.limit is of builds")


def test_the_settings_of_columns_are_named_as_the_command_takes_them(tiny_checkpoint, tmp_path):
    corpus = tmp_path / "corpus.csv"
    corpus.write_text("first,second,third\nstars,bread,law\n")
    said = "none is called prompt, text or messages and holds text; name one in "
    refused(call("build-index", corpus, "--model", tiny_checkpoint), f"{said}--prompt-column or --template")
    refused(
        call("generate", "--file", corpus, "--model", tiny_checkpoint), f"{said}corpus.prompt_column or corpus.template"
    )


def test_what_is_missing_is_said_before_anything_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call("build-index", "none.csv", "--model", "./none")
    refused(done, "there is no file or folder 'none.csv', expected a corpus; check the path")
    assert "The index is called" not in done.stderr


def test_damaged_rows_are_counted_and_named_by_every_command(index, tiny_checkpoint, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "What of \ud83d?", "completion": ANSWER}, {"prompt": QUESTIONS[0], "completion": ANSWER}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for arguments in (
        ["build-index", path, "--model", tiny_checkpoint, "--out", tmp_path / "i", "--clusters", 1, *ONE_PROCESS],
        ["evaluate", path, "--index", index, "--contender", "dense"],
        ["generate", "--index", index, "--file", path, "--max-new-tokens", "1"],
    ):
        said = succeeded(*arguments).stderr
        assert "1 row with U+FFFD for what is no Unicode text (line 1)" in said, said


def test_a_conversation_is_continued_where_the_user_spoke_last(index, tmp_path):
    path = tmp_path / "chats.jsonl"
    turns = [
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "And bread?"},
    ]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    (row,) = parsed("generate", "--index", index, "--file", path, "--max-new-tokens", 1)
    (short,) = parsed("generate", "--index", index, "--chat", "--max-new-tokens", 1, stdin="And bread?\n")
    assert row["n_prompt_tokens"] > short["n_prompt_tokens"]
    refused(call("generate", "--index", index, "--file", path, "--chat", "--system", "Hi"), "rows are conversations")


@pytest.mark.parametrize("arguments", [["evaluate"], ["tune"], ["generate", "--file"]])
def test_a_file_that_is_not_there_is_a_usage_error(index, arguments):
    for name in ("/nowhere/rows.txt", "nowhere.csv.gz"):
        result = call(*arguments, name, "--index", index)
        assert result.exit_code == 2 and "there is no file" in result.stderr


@pytest.mark.parametrize("command", [["build-index"], ["evaluate"], ["tune"], ["generate", "--file"]], ids=" ".join)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gbk.txt", "is not UTF-8: line 1 .* iconv -f ENCODING -t UTF-8"),
        ("-", "there is no file or folder '-'"),
        ("./nothere", "there is no file or folder './nothere'"),
        ("http://127.0.0.1:9/rows.jsonl", "check the address and the network"),
    ],
)
def test_what_cannot_be_read_is_told_by_every_command(index, tiny_checkpoint, tmp_path, command, name, said):
    (tmp_path / "gbk.txt").write_bytes("恒星是怎样形成的？\n面包为什么会发酵？\n".encode("gbk"))
    source = tmp_path / name if name == "gbk.txt" else name
    model = (
        ["--model", tiny_checkpoint, "--out", tmp_path / "new"] if command == ["build-index"] else ["--index", index]
    )
    result = call(*command, source, *model)
    refused(result, said, code=2 if result.exit_code == 2 else 1)


def test_the_folder_that_was_named_is_built_from(tiny_checkpoint, tmp_path):
    for name, rows in (("br[1]", QUESTIONS), ("br1", ["Wrong folder, is it not?"] * 3)):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data" / "q.csv").write_text("".join(f"{row}\n" for row in ["prompt", *rows]))
    out, source = tmp_path / "index", tmp_path / "br[1]"
    said = succeeded(
        "build-index", source, "--model", tiny_checkpoint, "--out", out, "--clusters", 3, *ONE_PROCESS
    ).stderr
    assert "1 file" in said
    rows = parsed("generate", "--index", out, "--file", source, "--max-new-tokens", 1)
    assert [row["prompt"] for row in rows] == QUESTIONS
