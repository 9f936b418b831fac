"""Corpora that cannot be read are refused by what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpora import ROWS, as_parquet, read

from coreinfer_sim.base.errors import CorpusError


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "corpus.jsonl").touch()
    with pytest.raises(CorpusError, match="is empty, expected at least one row"):
        read(tmp_path / "corpus.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "counted"),
    [
        ("blank.jsonl", '{"prompt": ""}\n{"prompt": "  "}\n', "2 rows, 2 empty"),
        ("lines.txt", "\n\n", "2 rows, 2 empty"),
        ("header.csv", "id,prompt\n", "0 rows, 0 empty"),
    ],
)
def test_a_corpus_without_text_is_refused(tmp_path, name, content, counted):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(CorpusError, match=rf"no usable text \({counted}\)"):
        read(tmp_path / name)


def test_an_unknown_suffix_is_refused(tmp_path):
    (tmp_path / "corpus.docx").write_text("text", encoding="utf-8")
    with pytest.raises(
        CorpusError, match=r"ends in '\.docx', expected one of \.jsonl, \.json, \.csv, \.parquet, \.txt"
    ):
        read(tmp_path / "corpus.docx")


@pytest.mark.parametrize("source", ["/nowhere/corpus.jsonl", "nowhere.csv", "/nowhere/saved"])
def test_a_missing_file_is_said_to_be_missing(source):
    with pytest.raises(CorpusError, match=f"there is no file {source}"):
        read(source)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.jsonl", b'{"prompt": "a"}\n{"prompt": "b\n{"prompt": "c"}\n'),
        ("broken.json", b'[{"prompt": "a"}, {"prompt": '),
        ("text.parquet", b"this is no parquet file"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=rf"{name} cannot be read \(.+\); expected a hub id") as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["latin.jsonl", "latin.csv", "latin.txt"])
def test_a_file_in_another_encoding_is_to_be_converted(tmp_path, name):
    (tmp_path / name).write_bytes('{"prompt": "café"}\n'.encode("latin-1"))
    with pytest.raises(CorpusError, match=rf"{name} is not UTF-8 \(.+\), expected UTF-8 text; convert it first"):
        read(tmp_path / name)


def test_a_truncated_parquet_file_is_an_error(tmp_path):
    path = Path(as_parquet(ROWS, tmp_path))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorpusError, match="cannot be read"):
        read(path)


def test_a_folder_without_a_data_set_is_an_error(tmp_path):
    with pytest.raises(CorpusError, match="cannot be read"):
        read(tmp_path)


def test_a_hub_id_that_cannot_be_reached_is_an_error():
    with pytest.raises(CorpusError, match="no-such-owner/no-such-set cannot be read"):
        read("no-such-owner/no-such-set")
