"""Folders of files: what lies in one is read as it would be alone, at any depth, and nothing is left out without a word."""

from __future__ import annotations

import gzip

import datasets
import pytest
from corpora import read

from coreinfer_sim.base.errors import ConfigError, CorpusError
from coreinfer_sim.base.rows import describe_corpus
from coreinfer_sim.base.settings import CorpusConfig
from coreinfer_sim.base.sources import open_source


def rows_of(path, **settings):
    return list(open_source(CorpusConfig(str(path), **settings)).rows())


def values_of(path, **settings):
    return [values for _, values in rows_of(path, **settings)]


def texts_of(path, **settings):
    return [values["text"] for values in values_of(path, **settings)]


def write_folder(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_files_of_a_folder_are_one_corpus(tmp_path):
    rows = {f"part-{n}.csv": f"q;a\n00{n};x, y\n" for n in range(3)}
    folder = write_folder(tmp_path, {**rows, "README.md": "Not read."})
    assert rows_of(folder) == [(n + 1, {"q": f"00{n}", "a": "x, y"}) for n in range(3)]
    (folder / "part-1.csv").write_text("q;a\n1;2;3\n")
    with pytest.raises(CorpusError, match=r"part-1.csv, line 2, has 3 fields"):
        rows_of(folder)


@pytest.mark.parametrize("name", ["a.csv", "data/a.csv", "2023/more/a.csv", "data/a.csv.gz"])
def test_a_file_reads_the_same_wherever_it_lies(tmp_path, name):
    content = b"prompt;answer\n007;NA\n2024-01-05;null\n1e5;true\n"
    write_folder(tmp_path, {name: gzip.compress(content) if name.endswith(".gz") else content})
    expected = [("007", "NA"), ("2024-01-05", "null"), ("1e5", "true")]
    assert [(values["prompt"], values["answer"]) for values in values_of(tmp_path)] == expected


@pytest.mark.parametrize("name", ["br[1]", "br*", "br?", "a b#c%20"])
def test_the_folder_that_was_named_is_read(tmp_path, name):
    for folder, text in (("br1", "another"), ("br", "another"), (name, "this")):
        write_folder(tmp_path / folder, {"data/q.csv": f"text\n{text}\n"})
        datasets.Dataset.from_dict({"text": [text]}).save_to_disk(tmp_path / "saved" / folder)
    assert texts_of(tmp_path / name) == texts_of(tmp_path / "saved" / name) == ["this"]


def test_files_beside_folders_and_in_them_are_read(tmp_path):
    rows = {"b.jsonl": "1", "2023/a.jsonl": "2", "2024/deep/c.jsonl": "3"}
    files = {name: f'{{"text": "row {n}"}}\n' for name, n in rows.items()}
    write_folder(tmp_path, {**files, ".cache/x.jsonl": "no", ".git/y.csv": "no", "dataset_infos.json": "{}"})
    assert sorted(texts_of(tmp_path)) == ["row 1", "row 2", "row 3"]
    assert "3 files" in describe_corpus(CorpusConfig(str(tmp_path)))


def test_links_to_folders_are_followed_once(tmp_path):
    folder = write_folder(tmp_path / "real", {"a.txt": "here\n"})
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "link").symlink_to(folder)
    (folder / "round").symlink_to(folder)
    assert texts_of(tmp_path / "corpus") == ["here"]


LAYOUTS = [
    ("train.jsonl", "test.jsonl", "dev.jsonl"),
    ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl"),
    ("train/a.jsonl", "test/a.jsonl", "val/a.jsonl"),
    ("data/training/a.jsonl", "data/eval/a.jsonl", "data/valid/a.jsonl"),
    ("test/train.jsonl", "train/test.jsonl", "train/dev.jsonl"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[0])
def test_the_split_of_a_folder_is_chosen(tmp_path, layout):
    splits = ("train", "test", "validation")
    write_folder(tmp_path, {name: f'{{"text": "{split}"}}\n' for name, split in zip(layout, splits, strict=True)})
    assert texts_of(tmp_path) == ["train"]
    assert [texts_of(tmp_path, split=split) for split in splits] == [[split] for split in splits]
    said = describe_corpus(CorpusConfig(str(tmp_path), split="test"))
    assert "1 of 3 files, of the split test" in said


def test_a_split_of_any_name_is_chosen(tmp_path):
    write_folder(tmp_path, {f"data/{name}-0.txt": f"{name}\n" for name in ("train_sft", "test_sft", "train_gen")})
    assert texts_of(tmp_path, split="train_sft") == ["train_sft"]
    assert texts_of(tmp_path) == ["train_gen", "train_sft"]
    with pytest.raises(CorpusError, match="files of the splits test, train and none of dev"):
        rows_of(tmp_path, split="dev")


def test_kinds_of_a_folder_are_not_mixed(tmp_path):
    write_folder(tmp_path, {"a.jsonl": '{"text": "a"}\n', "more/b.csv": "text\nc\n"})
    with pytest.raises(CorpusError, match=r"several kinds \(.csv, .jsonl\)"):
        rows_of(tmp_path)


@pytest.mark.parametrize(("name", "said"), [("b.csv", "'question'"), ("more/c.csv", "'question'")])
def test_files_whose_columns_differ_are_refused(tmp_path, name, said):
    write_folder(tmp_path, {"a.csv": "prompt,answer\nHow?,So.\n", name: "question,answer\nWho?,They.\n"})
    with pytest.raises(CorpusError, match=rf"{name} has the columns .*{said}.*, expected prompt as in another file"):
        read(tmp_path)


def test_what_does_nothing_for_a_folder_is_refused(tmp_path):
    write_folder(tmp_path, {"a.txt": "x\n"})
    with pytest.raises(ConfigError, match=r"corpus.name does nothing .* has no configurations; leave it out"):
        rows_of(tmp_path, name="en")
    with pytest.raises(CorpusError, match="no files of splits and none of test"):
        rows_of(tmp_path, split="test")
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"corpus.split does nothing"):
        rows_of(tmp_path / "saved", split="test")


def test_a_packed_file_in_a_folder_is_named(tmp_path):
    write_folder(tmp_path, {"a.zip": b"PK\x03\x04"})
    with pytest.raises(CorpusError, match="a.zip is packed, .* unpack it first"):
        rows_of(tmp_path)
