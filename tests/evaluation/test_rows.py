"""Rows to evaluate on: read, checked and divided by their ids."""

from __future__ import annotations

import json

import pytest

from coreinfer_sim.base.errors import ConfigError, CorpusError
from coreinfer_sim.base.rows import Row
from coreinfer_sim.base.settings import CorpusConfig
from coreinfer_sim.evaluation.rows import hash_percent, read_rows


def test_rows_by_part(tmp_path):
    path = tmp_path / "things.jsonl"
    raw = [{"id": f"t{n}", "prompt": f"p{n}", "completion": "c"} for n in range(200)]
    path.write_text("\n".join(map(json.dumps, raw)))
    low, high = (read_rows(path, part, None) for part in (range(0, 70), range(70, 100)))
    assert {r.id for r in low} | {r.id for r in high} == {r["id"] for r in raw}
    assert not {r.id for r in low} & {r.id for r in high}
    assert all(hash_percent(r.id) < 70 for r in low)
    assert len(read_rows(path, range(0, 100), 7)) == 7
    with pytest.raises(CorpusError, match="1 row, .* none whose id hashes .* wider part"):
        path.write_text(json.dumps(raw[0]))
        read_rows(path, range(hash_percent("t0") + 1, 100), None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"id": "1", "prompt": "p"}\n', "has prompts in 'prompt' and no completions, expected prompt and completion"),
        (b"nothing\n", "line 1, is no JSON"),
        ('{"id": "1", "prompt": "café", "completion": "c"}'.encode("latin-1"), "is not UTF-8.*convert it"),
        (b'{"id": "1", "prompt": "p", "completion": ["a"]}\n', "no completions"),
        (
            b'{"id": "1", "prompt": "p", "completion": "c"}\n{"prompt": "p", "completion": ["a"]}\n',
            "line 2: completion is a list",
        ),
        (b"", "is empty"),
        (b'{"id": "1", "prompt": "p", "completion": " "}\n', "give a file with rows"),
    ],
)
def test_what_cannot_be_scored_is_named(tmp_path, content, message):
    path = tmp_path / "things.jsonl"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        read_rows(path, range(0, 100), None)


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    import datasets

    raw = [{"id": f"t{n}", "prompt": f"p {n}", "completion": f"c {n}"} for n in range(5)]
    whole = datasets.Dataset.from_list(raw)
    whole.to_csv(tmp_path / "things.csv")
    whole.to_parquet(tmp_path / "things.parquet")
    whole.to_json(tmp_path / "things.jsonl")
    (tmp_path / "things.json").write_text("\ufeff" + json.dumps(raw), encoding="utf-8")
    expected = [Row(r["id"], r["prompt"], completion=r["completion"], set_name="things") for r in raw]
    for suffix in ("csv", "parquet", "jsonl", "json"):
        assert read_rows(tmp_path / f"things.{suffix}", range(0, 100), None) == expected


def test_columns_of_other_names(tmp_path):
    path = tmp_path / "things.csv"
    path.write_text("The question;The answer\nHow?;So.\n")
    columns = CorpusConfig("", prompt_column="The question", completion_column="The answer")
    (row,) = read_rows(path, range(0, 100), None, columns)
    assert (row.id, row.prompt, row.completion) == ("0", "How?", "So.")


def test_the_last_answer_of_a_conversation_is_scored(tmp_path):
    path = tmp_path / "chats.jsonl"
    turns = [
        ("system", "Be brief."),
        ("user", "One?"),
        ("assistant", "1"),
        ("user", "Two?"),
        ("assistant", "2"),
        ("user", "Bye."),
    ]
    path.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    (row,) = read_rows(path, range(0, 100), None)
    assert (row.prompt, row.completion, row.history) == ("Two?", "2", tuple(turns[:4]))


def test_settings_of_builds_are_refused(tmp_path):
    path = tmp_path / "things.jsonl"
    path.write_text('{"prompt": "p", "completion": "c"}\n')
    with pytest.raises(ConfigError, match="corpus.template is of builds"):
        read_rows(path, range(0, 100), None, CorpusConfig("", template="{prompt}"))
