"""Corpora of a few rows, written in every format that is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets

from coreinfer_sim.base.rows import read_corpus
from coreinfer_sim.base.settings import CorpusConfig

Rows = list[dict[str, Any]]

ROWS: Rows = [
    {"id": "a", "prompt": "How do stars form?", "answer": "From clouds of gas."},
    {"id": "b", "prompt": "Why does bread rise?", "answer": 'Yeast gives off gas, "and" it\'s trapped.'},
    {"id": "c", "prompt": "Was ist ein Gebäude – 建物?", "answer": "Ein Haus."},
]


def words(texts: list[str]) -> list[list[int]]:
    """One token a word, after one that begins the text."""
    return [[1] + [2] * len(text.split()) for text in texts]


def read(source: str | Path, tokenize: Callable[[list[str]], list[list[int]]] = words, **settings: Any):
    """Return the sentences and the report of a corpus."""
    drawn, report = read_corpus(CorpusConfig(str(source), **settings), tokenize)
    return list(drawn), report


def as_jsonl(rows: Rows, folder: Path) -> str:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def as_json(rows: Rows, folder: Path) -> str:
    path = folder / "corpus.json"
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return str(path)


def as_csv(rows: Rows, folder: Path) -> str:
    datasets.Dataset.from_list(rows).to_csv(folder / "corpus.csv")
    return str(folder / "corpus.csv")


def as_parquet(rows: Rows, folder: Path) -> str:
    datasets.Dataset.from_list(rows).to_parquet(folder / "corpus.parquet")
    return str(folder / "corpus.parquet")


def as_folder(rows: Rows, folder: Path) -> str:
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return str(folder / "saved")


def as_folder_of_splits(rows: Rows, folder: Path) -> str:
    whole = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"test": whole.select([0]), "train": whole}).save_to_disk(folder / "saved")
    return str(folder / "saved")
