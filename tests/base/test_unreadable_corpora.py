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
        ("blank.csv", 'id,prompt\n1,\n2," "\n3,\n', "3 rows, 3 empty"),
    ],
)
def test_a_corpus_without_text_is_refused(tmp_path, name, content, counted):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(CorpusError, match=rf"no usable text \({counted}\)"):
        read(tmp_path / name)


def test_a_corpus_without_rows_is_refused(tmp_path):
    (tmp_path / "lines.txt").write_text("\n\n", encoding="utf-8")
    with pytest.raises(CorpusError, match="is empty, expected at least one row"):
        read(tmp_path / "lines.txt")
    (tmp_path / "header.csv").write_text("id,prompt\n", encoding="utf-8")
    with pytest.raises(CorpusError, match="holds no row, expected at least one"):
        read(tmp_path / "header.csv")


def test_an_unknown_suffix_is_refused(tmp_path):
    (tmp_path / "corpus.docx").write_text("text", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"ends in '\.docx', expected one of \.jsonl, .*\.csv"):
        read(tmp_path / "corpus.docx")


@pytest.mark.parametrize("source", ["/nowhere/corpus.jsonl", "nowhere.csv", "/nowhere/saved"])
def test_a_missing_file_is_said_to_be_missing(source):
    with pytest.raises(CorpusError, match=f"there is no file or folder {source!r}"):
        read(source)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.parquet", b"this is no parquet file"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        CorpusError, match=rf"{name} is cut short or damaged \(.+\), expected a whole Parquet"
    ) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_truncated_parquet_file_is_an_error(tmp_path):
    path = Path(as_parquet(ROWS, tmp_path))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorpusError, match="is cut short or damaged"):
        read(path)


def test_a_folder_without_a_data_set_is_an_error(tmp_path):
    with pytest.raises(CorpusError, match=r"holds no \.jsonl, .* file, expected at least one"):
        read(tmp_path)


def test_a_hub_id_that_cannot_be_reached_is_an_error():
    with pytest.raises(CorpusError, match="no-such-owner/no-such-set cannot be read"):
        read("no-such-owner/no-such-set")
