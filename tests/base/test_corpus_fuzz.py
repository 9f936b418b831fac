"""Any rows, written in any of the usual ways, are read as they were; any bytes give rows or one sentence."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from pathlib import Path

import pytest
from corpora import words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coreinfer_sim.base.errors import CorpusError
from coreinfer_sim.base.rows import read_corpus
from coreinfer_sim.base.settings import CorpusConfig
from coreinfer_sim.base.sources import open_source

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=30)
NAMES = st.lists(
    st.text(st.characters(categories=["L", "N"], include_characters=" _-.:"), min_size=1, max_size=12)
    .map(str.strip)
    .filter(bool),
    min_size=2,
    max_size=4,
    unique=True,
)
FAST, SLOW = 200, 5000


def fuzz(n: int):
    return settings(max_examples=n, deadline=None, suppress_health_check=list(HealthCheck))


def both(test):
    """Run a property on few examples, and marked as slow on many."""

    @pytest.mark.parametrize("n", [FAST, pytest.param(SLOW, marks=pytest.mark.slow)])
    def run(n):
        fuzz(n)(test)()

    run.__doc__ = test.__doc__
    return run


def read_back(name: str, content: bytes, **config) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        return [values for _, values in open_source(CorpusConfig(str(path), **config)).rows()]


@both
@given(st.data())
def test_separated_values_come_back(data):
    """Separator, quotes, line ends, mark, encoding and compression change no value."""
    names = data.draw(NAMES)
    rows = data.draw(st.lists(st.tuples(*([TEXT] * len(names))), min_size=1, max_size=5))
    separator, end = data.draw(st.sampled_from(",;\t|")), data.draw(st.sampled_from(["\n", "\r\n"]))
    file = io.StringIO(newline="")
    quoting = data.draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    if any("\r" in value for row in rows for value in row):  # which Python's writer does not quote by itself
        quoting = csv.QUOTE_ALL
    writer = csv.writer(file, delimiter=separator, lineterminator=end, quoting=quoting)
    writer.writerows([names, *rows])
    encoding = data.draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
    content = file.getvalue().encode(encoding)
    packed = data.draw(st.booleans())
    found = read_back(
        "a.csv.gz" if packed else "a.csv", gzip.compress(content) if packed else content, separator=separator
    )
    assert found == [{n: v or None for n, v in zip(names, row, strict=True)} for row in rows]


@both
@given(
    st.lists(
        st.dictionaries(TEXT, st.one_of(st.none(), TEXT, st.integers(), st.booleans(), st.lists(TEXT))), min_size=1
    ),
    st.booleans(),
)
def test_json_comes_back(rows, as_array):
    """Texts stay as they are; a number or truth value is the characters that JSON writes for it."""
    content = json.dumps(rows) if as_array else "\n".join(map(json.dumps, rows))
    expected = [{k: json.dumps(v) if isinstance(v, int) else v for k, v in row.items()} for row in rows]
    assert read_back("a.json" if as_array else "a.jsonl", content.encode()) == expected


@both
@given(st.lists(TEXT.map(lambda text: "".join(text.splitlines())).filter(str.strip), min_size=1))
def test_lines_come_back(lines):
    """A line is a prompt."""
    assert [values["text"] for values in read_back("a.txt", "\n".join(lines).encode())] == lines


@both
@given(
    st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".csv.gz"]),
    st.one_of(st.binary(max_size=300), TEXT.map(str.encode)),
)
def test_any_bytes_give_rows_or_one_sentence(suffix, content):
    """No traceback of a library, no text that is no Unicode, one line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a{suffix}")
        path.write_bytes(content)
        try:
            rows, report = read_corpus(CorpusConfig(str(path)), words)
            found = list(rows)
        except CorpusError as error:
            assert len(str(error).splitlines()) == 1 and str(error).endswith(".")
        else:
            assert found and report.n_rows >= len(found)
            for row in found:
                row.text.encode()
