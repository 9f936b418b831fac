"""Corpora: every kind of source gives the same sentences, and every row that is left out is counted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from corpora import ROWS, Rows, as_csv, as_folder, as_folder_of_splits, as_json, as_jsonl, as_parquet, read

from coreinfer_sim.base.errors import CoreInferSimError, CorpusError
from coreinfer_sim.base.rows import CorpusReport, Row


@pytest.fixture
def jsonl(tmp_path):
    """Write rows as JSONL and return the path."""

    def write(rows: Rows, name: str = "corpus.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


KINDS = [as_jsonl, as_json, as_csv, as_parquet, as_folder, as_folder_of_splits]


@pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__)
def test_every_kind_of_source_gives_the_same_sentences(write, tmp_path):
    sentences, report = read(write(ROWS, tmp_path))
    assert sentences == [
        Row("a", "How do stars form?", "How do stars form?", 5),
        Row("b", "Why does bread rise?", "Why does bread rise?", 5),
        Row("c", "Was ist ein Gebäude – 建物?", "Was ist ein Gebäude – 建物?", 7),
    ]
    assert (report.n_rows, report.n_kept, report.n_tokens) == (3, 3, 17)
    assert report.sha256 == read(as_jsonl(ROWS, tmp_path))[1].sha256


def test_a_suffix_in_capitals_is_the_same_kind(tmp_path):
    path = Path(as_jsonl(ROWS, tmp_path)).rename(tmp_path / "CORPUS.JSONL")
    assert len(read(path)[0]) == 3


def test_a_text_file_is_one_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("How do stars form?\n\n  Why does bread rise?  \nHow do stars form?\n", encoding="utf-8")
    sentences, report = read(path)
    assert [(s.id, s.prompt) for s in sentences] == [("0", "How do stars form?"), ("1", "Why does bread rise?")]
    assert (report.n_rows, report.n_kept, report.n_empty, report.n_duplicate) == (3, 2, 0, 1)  # a blank line is no row


def test_the_split_of_a_saved_folder_is_chosen(tmp_path):
    source = as_folder_of_splits(ROWS, tmp_path)
    assert [s.id for s in read(source, split="test")[0]] == ["a"]
    with pytest.raises(CorpusError, match=r"has the splits \['test', 'train'\], expected dev; name one in split"):
        read(source, split="dev")


# Columns


def test_prompt_is_read_before_text(jsonl):
    assert read(jsonl([{"text": "long", "prompt": "short", "other": "x"}]))[0][0].prompt == "short"
    assert read(jsonl([{"title": "x", "text": "long"}]))[0][0].prompt == "long"


def test_the_only_text_column_is_the_prompt(jsonl):
    (sentence,), _ = read(jsonl([{"n": 3, "question": "How do stars form?"}]))
    assert sentence.prompt == sentence.text == "How do stars form?"


def test_a_named_column_is_the_prompt(jsonl):
    (sentence,), _ = read(jsonl([{"prompt": "no", "question": "yes"}]), prompt_column="question")
    assert sentence.prompt == sentence.text == "yes"


def test_a_named_column_may_hold_numbers(jsonl):
    assert [s.prompt for s in read(jsonl([{"n": 7}, {"n": 8}]), prompt_column="n")[0]] == ["7", "8"]


def test_a_template_leaves_the_usual_column_the_prompt(jsonl):
    (sentence,), _ = read(jsonl(ROWS[:1]), template="Q: {prompt}\nA: {answer}")
    assert (sentence.prompt, sentence.text) == ("How do stars form?", "Q: How do stars form?\nA: From clouds of gas.")


def test_a_template_over_other_columns_is_both_prompt_and_text(jsonl):
    (sentence,), _ = read(jsonl([{"q": "How?", "a": "So."}]), template="{q} {a}")
    assert sentence.prompt == sentence.text == "How? So."


def test_a_template_beside_a_prompt_column_is_the_text_alone(jsonl):
    (sentence,), report = read(jsonl(ROWS[:1]), prompt_column="prompt", template="{{Q}} {prompt} {answer}")
    assert sentence.prompt == "How do stars form?"
    assert sentence.text == "{Q} How do stars form? From clouds of gas."
    assert sentence.n_tokens == report.n_tokens == 10  # counted in the text, not in the prompt


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt_column": "qestion"},
        {"template": "{prompt} {qestion}"},
        {"prompt_column": "prompt", "template": "{qestion}"},
    ],
)
def test_a_missing_column_is_named(jsonl, settings):
    with pytest.raises(CorpusError, match=r"has the columns \['answer', 'id', 'prompt'\], expected qestion;"):
        read(jsonl(ROWS), **settings)


def test_columns_that_leave_a_choice_are_refused(jsonl):
    with pytest.raises(CorpusError, match=r"\['answer', 'question'\].*prompt_column or template"):
        read(jsonl([{"question": "a", "answer": "b"}]))


@pytest.mark.parametrize("column", ["prompt", "text"])
def test_an_empty_first_row_does_not_hide_the_column(jsonl, column):
    sentences, report = read(jsonl([{"id": "1", column: None}, {"id": "2", column: "How do stars form?"}]))
    assert [s.prompt for s in sentences] == ["How do stars form?"]
    assert report.n_empty == 1


@pytest.mark.parametrize("template", ["{prompt:d}", "{prompt!x}", "{prompt:{width}}"])
def test_a_template_that_cannot_be_filled_is_an_error_of_ours(jsonl, template):
    with pytest.raises(CoreInferSimError, match="template"):
        read(jsonl(ROWS), template=template)


def test_a_column_of_any_name_stands_in_a_template(jsonl):
    rows = [{"The question": "How?", "a.b {x": "no", "Antwort: kurz": "So."}]
    assert read(jsonl(rows), template="{The question} {Antwort: kurz}")[0][0].text == "How? So."


def test_the_id_is_the_column_or_else_the_row(jsonl):
    rows = [{"id": 0, "prompt": "a"}, {"id": None, "prompt": "b"}, {"prompt": "c"}]
    assert [s.id for s in read(jsonl(rows))[0]] == ["0", "1", "2"]


# What is left out


def test_duplicates_are_dropped_and_counted(jsonl):
    rows = [{"prompt": "a b"}, {"prompt": " a b "}, {"prompt": "c"}, {"prompt": "a b"}]
    sentences, report = read(jsonl(rows))
    assert [s.prompt for s in sentences] == ["a b", "c"]
    assert (report.n_rows, report.n_kept, report.n_duplicate) == (4, 2, 2)
    sentences, report = read(jsonl(rows), deduplicate=False)
    assert (len(sentences), report.n_duplicate) == (4, 0)


def test_the_same_prompt_with_another_text_is_no_duplicate(jsonl):
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "a", "answer": "2"}, {"prompt": "a", "answer": "2"}]
    sentences, report = read(jsonl(rows), prompt_column="prompt", template="{prompt} {answer}")
    assert [s.text for s in sentences] == ["a 1", "a 2"]
    assert report.n_duplicate == 1


def test_empty_rows_are_dropped_and_counted(jsonl):
    rows = [{"prompt": "a"}, {"prompt": ""}, {"prompt": None}, {"prompt": " \n\t\u3000"}, {"other": "x"}]
    sentences, report = read(jsonl(rows))
    assert [s.prompt for s in sentences] == ["a"]
    assert (report.n_rows, report.n_empty, report.n_duplicate) == (5, 4, 0)


def test_a_template_over_nothing_but_empty_fields_is_an_empty_row(jsonl):
    rows = [{"a": "", "b": None}, {"a": "x", "b": ""}]
    sentences, report = read(jsonl(rows), template="A: {a} B: {b}")
    assert [s.text for s in sentences] == ["A: x B:"]
    assert report.n_empty == 1


def test_a_text_without_tokens_is_an_empty_row(jsonl):
    def tokenize(texts):
        return [[] if text == "?" else [1] for text in texts]

    sentences, report = read(jsonl([{"prompt": "?"}, {"prompt": "a"}]), tokenize)
    assert [s.prompt for s in sentences] == ["a"]
    assert (report.n_kept, report.n_empty) == (1, 1)


def test_reading_stops_at_the_limit(jsonl):
    rows = [{"prompt": f"prompt {i // 2}"} for i in range(40)]
    sentences, report = read(jsonl(rows), limit=3)
    assert [s.prompt for s in sentences] == ["prompt 0", "prompt 1", "prompt 2"]
    assert (report.n_rows, report.n_kept, report.n_duplicate) == (5, 3, 2)  # the rows after the last kept are not read


def test_the_limit_counts_kept_prompts_over_many_blocks(jsonl):
    rows = [{"prompt": "" if i % 5 == 0 else f"prompt {i % 1700}"} for i in range(4000)]
    kept = {row["prompt"] for row in rows} - {""}
    assert len(kept) == 1360
    assert len(read(jsonl(rows), limit=1200)[0]) == 1200
    sentences, report = read(jsonl(rows), limit=2000)
    assert {s.prompt for s in sentences} == kept
    assert (report.n_rows, report.n_kept, report.n_empty) == (4000, 1360, 800)
    assert report.n_kept + report.n_empty + report.n_duplicate == report.n_rows


def test_long_texts_are_cut_and_every_lost_token_is_counted(jsonl):
    rows = [{"prompt": "one two three"}, {"prompt": "one two three four"}, {"prompt": "1 2 3 4 5 6 7 8 9"}]
    sentences, report = read(jsonl(rows), max_tokens=4)
    assert [s.n_tokens for s in sentences] == [4, 4, 4]
    assert (report.n_tokens, report.n_cut, report.n_tokens_cut) == (12, 2, 1 + 6)
    assert sentences[2].text == "1 2 3 4 5 6 7 8 9"


def test_the_report_says_what_happened():
    assert str(CorpusReport(n_rows=3, n_kept=3, n_tokens=1234)) == "3 prompts with 1,234 tokens kept of 3 rows"
    full = str(CorpusReport(9, 3, 30, n_empty=4, n_duplicate=2, n_cut=1, n_tokens_cut=5))
    assert "4 empty rows dropped" in full and "2 duplicates dropped" in full and "1 text cut, 5 tokens lost" in full


# The hash


def test_the_hash_is_that_of_the_texts_alone(jsonl):
    renamed = [{"id": str(i), "prompt": row["prompt"]} for i, row in enumerate(ROWS)]
    one, other = read(jsonl(ROWS))[1].sha256, read(jsonl(renamed, "other.jsonl"))[1].sha256
    assert one == other and re.fullmatch("[0-9a-f]{64}", one)


@pytest.mark.parametrize(
    "changed",
    [
        [*ROWS[:2]],
        [*ROWS[::-1]],
        [{**ROWS[0], "prompt": "How do stars form!"}, *ROWS[1:]],
        [{**ROWS[0], "answer": "From clouds of dust."}, *ROWS[1:]],
    ],
    ids=["one less", "another order", "another prompt", "another text"],
)
def test_the_hash_notices_every_change(jsonl, changed):
    settings = {"prompt_column": "prompt", "template": "{prompt} {answer}"}
    assert read(jsonl(ROWS), **settings)[1].sha256 != read(jsonl(changed), **settings)[1].sha256


def test_the_hash_notices_where_a_prompt_ends(jsonl):
    settings = {"prompt_column": "a", "template": "{b}", "deduplicate": False}
    one = read(jsonl([{"a": "x", "b": "yz"}]), **settings)[1].sha256
    assert one != read(jsonl([{"a": "xy", "b": "z"}]), **settings)[1].sha256
