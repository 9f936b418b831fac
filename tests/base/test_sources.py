"""Sources of rows: what stands in a file is what is read, whatever its separators, quotes, line ends and encoding."""

from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import json
import lzma
import os
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest

from coreinfer_sim.base.corpus_files import set_name
from coreinfer_sim.base.errors import ConfigError, CorpusError
from coreinfer_sim.base.settings import CorpusConfig
from coreinfer_sim.base.sources import open_source


def rows_of(path, columns=None, **settings):
    return list(open_source(CorpusConfig(str(path), **settings)).rows(columns))


def values_of(path, columns=None, **settings):
    return [values for _, values in rows_of(path, columns, **settings)]


@pytest.fixture
def written(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


AS_IT_STANDS = [
    "007",
    "1.50",
    "1e5",
    "+7",
    "NA",
    "null",
    "NaN",
    "None",
    "true",
    "False",
    "2024-01-05",
    "1,5",
    "0x1F",
    "١٢",
]


@pytest.mark.parametrize("value", AS_IT_STANDS)
def test_a_csv_value_is_its_characters(written, value):
    path = written("a.csv", f'prompt,answer\nq,"{value}"\nr,x\n')
    assert values_of(path)[0]["answer"] == value


@pytest.mark.parametrize("value", ["7", "7.0", "1e5", "-0.10", "12345678901234567890123", "true", "false"])
def test_a_json_scalar_is_its_characters(written, value):
    for path in (written("a.jsonl", f'{{"a": {value}}}\n'), written("a.json", f'[{{"a": {value}}}]')):
        assert values_of(path) == [{"a": value}]


def test_a_json_string_stays_a_string(written):
    texts = ["2024-01-05", "2024-01-05T10:00:00Z", "007", "true", " padded ", "a\nb"]
    path = written("a.jsonl", "".join(json.dumps({"a": text}) + "\n" for text in texts))
    assert [values["a"] for values in values_of(path)] == texts


@pytest.mark.parametrize(
    ("array", "texts"),
    [
        (pa.array([7, None]), ["7", None]),
        (pa.array([0.1, 7.0], pa.float32()), ["0.1", "7.0"]),
        (pa.array([0.5, 1e300]), ["0.5", "1e+300"]),
        (pa.array([1234567.0, 0.00001], pa.float32()), ["1234567.0", "0.00001"]),
        (pa.array([0.0, float("nan"), None]), ["0.0", None, None]),
        (pa.array([datetime.timedelta(days=1, minutes=90)], pa.duration("ns")), ["1 day, 1:30:00"]),
        (pa.array([datetime.timedelta(seconds=90)], pa.duration("s")), ["0:01:30"]),
        (pa.array([decimal.Decimal("0.00000001")], pa.decimal128(20, 8)), ["0.00000001"]),
        (pa.array([True, False]), ["true", "false"]),
        (pa.array([datetime.date(2024, 1, 5)]), ["2024-01-05"]),
        (pa.array([datetime.datetime(2024, 1, 5, 12, 30)]), ["2024-01-05 12:30:00"]),
        (pa.array([decimal.Decimal("1.50")]), ["1.50"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array(["x"], pa.large_string()), ["x"]),
        (pa.array(["é".encode()]), ["é"]),
        (pa.array([["a", "b"]]), [["a", "b"]]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_a_parquet_value_is_its_plain_text(tmp_path, array, texts):
    pyarrow.parquet.write_table(pa.table({"a": array}), tmp_path / "a.parquet")
    assert [values["a"] for values in values_of(tmp_path / "a.parquet")] == texts


def test_what_the_extra_hub_reads_names_it(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(pa.table({"a": ["x"]}), tmp_path / "a.parquet")
    for name in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    for source in (str(tmp_path / "a.parquet"), "some/data"):
        with pytest.raises(ConfigError, match=rf"reading .*{source} needs .*pip install 'coreinfer-sim\[hub\]'"):
            list(open_source(CorpusConfig(source)).rows())


def test_a_column_twice_in_parquet_matters_only_where_it_is_read(tmp_path):
    twice = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"]), pa.array(["z"])], names=["a", "a", "b"])
    pyarrow.parquet.write_table(twice, tmp_path / "a.parquet")
    assert values_of(tmp_path / "a.parquet", ["b"]) == [{"b": "z"}]
    with pytest.raises(CorpusError, match="several columns called 'a', expected one; rename them"):
        values_of(tmp_path / "a.parquet", ["a"])


def test_parquet_text_that_is_no_utf8_is_read(tmp_path):
    broken = pa.array([b"caf\xe9", b"ok"]).view(pa.string())
    pyarrow.parquet.write_table(pa.table({"a": broken}), tmp_path / "a.parquet")
    assert [values["a"] for values in values_of(tmp_path / "a.parquet")] == ["caf\udce9", "ok"]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_separators_line_ends_and_marks(written, separator, end, mark):
    lines = [
        ["Nr", "The question", "Answer"],
        ["1", f'"one{separator} two"', '"say ""hi"""'],
        ["2", "b; c, d" if separator not in ";," else "b", ""],
    ]
    path = written("a.csv", mark + end.join(separator.join(line) for line in lines) + end + end)
    first, second = values_of(path)
    assert first == {"Nr": "1", "The question": f"one{separator} two", "Answer": 'say "hi"'}
    assert second["Answer"] is None and second["Nr"] == "2"


def test_a_tsv_needs_no_sniffing(written):
    assert values_of(written("a.tsv", "q\ta, b; c\nx\ty, z\n")) == [{"q": "x", "a, b; c": "y, z"}]


def test_excel_names_its_separator(written):
    path = written("a.csv", "sep=;\r\nq;a\r\n1,5;2\r\n")
    assert rows_of(path) == [(3, {"q": "1,5", "a": "2"})]


@pytest.mark.parametrize("named", ["^", "tab"])
def test_a_separator_can_be_named(written, named):
    sign = "\t" if named == "tab" else named
    assert values_of(written("a.csv", f"q{sign}a,b\nx{sign}y,z\n"), separator=named) == [{"q": "x", "a,b": "y,z"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,answer\nWhy, oh why?,So.\n", "line 2, has 3 fields, expected 2"),
        ("prompt,answer\na,b\n\nc\n", "line 4, has 1 field, expected 2"),
        ('prompt,answer\n"a\nb",c\nd,e,f\n', "line 4, has 3 fields"),
        ('prompt,answer\na,"b\nc,d\n', "line 2, cannot be read .a quoted field does not end"),
        ('prompt,answer\na,"b" c\n', "line 2, cannot be read"),
    ],
)
def test_a_ragged_row_is_refused_with_its_line(written, content, message):
    with pytest.raises(CorpusError, match=message):
        rows_of(written("a.csv", content))


def test_quoted_line_breaks_stay_and_places_are_lines(written):
    assert rows_of(written("a.csv", 'q,a\n"x\ny",1\n\nz,2\n')) == [
        (2, {"q": "x\ny", "a": "1"}),
        (5, {"q": "z", "a": "2"}),
    ]


def test_a_column_twice_matters_only_where_it_is_read(written):
    path = written("a.csv", "q,a,a\n1,2,3\n")
    assert values_of(path, ["q"])[0]["q"] == "1"
    with pytest.raises(CorpusError, match="several columns called 'a'"):
        values_of(path, ["a"])


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    ("encoding", "mark"),
    [("utf-8", b""), ("utf-8", b"\xef\xbb\xbf"), ("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff")],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_encodings(written, name, encoding, mark, pack):
    text = {"a.jsonl": '{"text": "Gebäude 建物"}\n', "a.json": '[{"text": "Gebäude 建物"}]'}.get(
        name, "Gebäude 建物\n" if name == "a.txt" else "text\nGebäude 建物\n"
    )
    path = written(name + (".gz" if pack is gzip.compress else ""), pack(mark + text.encode(encoding)))
    assert [values["text"] for values in values_of(path)] == ["Gebäude 建物"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_its_mark_is_refused_by_name(written, encoding):
    with pytest.raises(CorpusError, match="UTF-16 without a byte order mark"):
        rows_of(written("a.csv", "prompt,answer\nq,a\n".encode(encoding)))


@pytest.mark.parametrize("damage", [b"\xff", b"\xe2\x82", b"\xf0\x9f\x98", b"\xc3", b"\x80\x81", b"\xed\xa0\xbd"])
def test_a_damaged_row_is_not_the_end_of_a_file(written, damage):
    path = written("a.txt", "Gebäude\n".encode() + b"cut " + damage + b"\nlast\n")
    first, second, third = (values["text"] for values in values_of(path))
    assert (first, third) == ("Gebäude", "last") and second.startswith("cut \udc80"[:4])
    alone = values_of(written("b.jsonl", b'{"text": "cut ' + damage + b'"}\n{"text": "last"}\n'))
    assert alone[1] == {"text": "last"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"PK\x03\x04rest", "a zip or Excel file"),
        ("a.jsonl", b"PAR1rest", "a Parquet file"),
        ("a.jsonl", bz2.compress(b"{}"), "packed by bzip2, expected text; unpack it"),
        ("a.jsonl", lzma.compress(b"{}"), "packed by xz, expected text; unpack it"),
        ("a.jsonl", b"\x28\xb5\x2f\xfdrest", "packed by zstd, expected text; unpack it"),
        (
            "a.jsonl.gz",
            gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0),
            "packed by gzip, expected text; unpack it",
        ),
        ("a.jsonl", b"ARROW1\0\0", "an Arrow or Feather file"),
        ("a.jsonl", b"\xff\xff\xff\xff\x10", "an Arrow stream"),
        *(
            (f"a.{name}", b"x", "is packed, .* unpack it first")
            for name in ("csv.bz2", "jsonl.zst", "zip", "parquet.gz")
        ),
        ("a.txt", b"\n \n", "is empty"),
        ("a.csv", b"", "is empty"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 5000, mtime=0)[:60], "cut short or damaged"),
        (
            "a.csv.gz",
            gzip.compress("".join(f"{n},{n * n}\n" for n in range(9000)).encode(), mtime=0)[:-200],
            "cut short",
        ),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2, is no JSON"),
        ("a.jsonl", b"[" * 100_000, "is no JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2, is a list, expected an object"),
        ("a.json", b'[{"a": 1},\n {"a": }]', "line 2, is no JSON"),
        ("a.json", b'[{"a": 1},\n {"a": 2}', "the array does not end"),
        ("a.parquet", b"PAR1 no", "is cut short or damaged .*, expected a whole Parquet file"),
        ("a.xlsx", b"x", "ends in '.xlsx', expected one of"),
    ],
)
def test_what_is_damaged_is_named(written, name, content, message):
    with pytest.raises(CorpusError, match=message):
        rows_of(written(name, content))


def test_json_values_one_after_the_other_and_arrays_of_texts(written):
    objects = '{"a": "1"}\n\n{\n "a": "2"\n}\n'
    assert rows_of(written("a.json", objects)) == [(1, {"a": "1"}), (3, {"a": "2"})]
    assert values_of(written("b.json", '["x", "y"]')) == [{"text": "x"}, {"text": "y"}]
    assert rows_of(written("d.jsonl", objects[12:])) == [(1, {"a": "2"})]
    assert values_of(written("c.jsonl", '[\n{"a": "1"},\n{"a": "2"}]')) == [{"a": "1"}, {"a": "2"}]


def test_a_long_array_is_read_piece_by_piece(written):
    raw = [{"a": f"row {n}", "b": "x" * 9000} for n in range(500)]
    path = written("a.json", json.dumps(raw, indent=1))
    found = rows_of(path)
    assert [values["a"] for _, values in found] == [each["a"] for each in raw]
    assert [place for place, _ in found] == [2 + 4 * n for n in range(500)]


@pytest.mark.parametrize(
    "name", ["rows[1].jsonl", "rows*.jsonl", "a b#c%20.jsonl", "réné?.jsonl", "{x}.jsonl", "-dash.jsonl"]
)
def test_the_file_that_was_named_is_read(written, name):
    for other in ("rows1.jsonl", "rows.jsonl"):
        written(other, '{"text": "another"}\n')
    assert values_of(written(name, '{"text": "this"}\n')) == [{"text": "this"}]


def test_a_foreign_column_may_be_anything(written):
    late = "".join(json.dumps({"text": f"row {n}", "x": None if n < 300 else [{"a": n}]}) + "\n" for n in range(400))
    assert len(values_of(written("a.jsonl", late), ["text"])) == 400


@pytest.mark.parametrize(
    ("source", "name"), [("a/b.jsonl.gz", "b"), ("c.v2.csv", "c.v2"), ("org/data", "data"), ("x.JSONL", "x")]
)
def test_a_set_is_called_after_its_file(source, name):
    assert set_name(source) == name


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("-", "there is no file or folder '-'"),
        ("", "there is no file or folder ''"),
        ("./nothere", "there is no file or folder"),
        ("nothere/", "there is no file or folder"),
        ("a/b/c", "there is no file or folder"),
        ("nothere.csv.bz2", "there is no file or folder"),
        (
            "http://127.0.0.1:9/rows.jsonl",
            "there is nothing at http.*, expected a corpus; check the address and the network",
        ),
        ("nothere/*.jsonl", "name one file, or a folder of them"),
    ],
)
def test_what_is_not_there_is_said_to_be_missing(source, said):
    with pytest.raises(CorpusError, match=said):
        open_source(CorpusConfig(source))


def test_a_pipe_is_refused():
    reading, writing = os.pipe()
    with (
        os.fdopen(reading),
        os.fdopen(writing),
        pytest.raises(CorpusError, match="is a pipe or a device, expected a file"),
    ):
        open_source(CorpusConfig(f"/dev/fd/{reading}"))


@pytest.mark.parametrize(
    "settings", [{"split": "test"}, {"name": "en"}, {"separator": ";"}], ids=lambda given: [*given][0]
)
def test_a_setting_that_does_nothing_is_refused(written, settings):
    (name,) = settings
    with pytest.raises(ConfigError, match=f"corpus.{name} does nothing for .*a.jsonl, which has no .*; leave it out"):
        rows_of(written("a.jsonl", '{"text": "x"}\n'), **settings)
