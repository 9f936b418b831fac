"""The corpus scripts: real schemas in, exact JSONL out; and what they say when something is wrong."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import datasets
import pytest
from click.testing import CliRunner, Result

from data_scripts.common import cut

ROOT = Path(__file__).resolve().parents[2]
Rows = list[dict[str, Any]]

QUESTIONS: Rows = [
    {
        "type": "Adversarial",
        "category": "Kitchen",
        "question": "Does salted water boil at once?",
        "best_answer": "No, salt barely changes the boiling point.",
        "correct_answers": ["No, salt barely changes the boiling point."],
        "incorrect_answers": ["Yes, at once."],
        "source": "https://example.org/salt",
    },
]
PARAGRAPHS: Rows = [
    {
        "id": "p1",
        "title": "Mill",
        "context": " The mill was built in 1802 by two brothers. ",
        "question": "When was the mill built?",
        "answers": {"text": ["1802", "in 1802"], "answer_start": [22, 19]},
    },
    {
        "id": "p2",
        "title": "Mill",
        "context": "The mill was built in 1802 by two brothers.",
        "question": "Who built it?",
        "answers": {"text": ["two brothers"], "answer_start": [30]},
    },
]
TRIVIA: Rows = [
    {
        "question": "Which metal is liquid at room temperature?",
        "question_id": "q_1",
        "question_source": "https://example.org/",
        "entity_pages": {"doc_source": [], "filename": [], "title": [], "wiki_context": []},
        "search_results": {"description": [], "filename": [], "rank": [], "title": [], "url": []},
        "answer": {
            "aliases": ["Mercury", "Quicksilver"],
            "normalized_aliases": ["mercury", "quicksilver"],
            "matched_wiki_entity_name": "",
            "normalized_matched_wiki_entity_name": "",
            "normalized_value": "mercury",
            "type": "WikipediaEntity",
            "value": "Mercury",
        },
    },
]
WITHHELD = {
    **TRIVIA[0],
    "question_id": "q_2",
    "answer": {**TRIVIA[0]["answer"], "aliases": [], "value": "<unk>"},
}
GERMAN: Rows = [{"translation": {"de": "Der Zug hält hier.", "en": "The train stops here."}}]
ROMANIAN: Rows = [{"translation": {"ro": "Ploaia s-a oprit.", "en": "The rain has stopped."}}]
REPORTS: Rows = [{"document": "A bridge reopened.\nTraffic flows.", "summary": "A bridge is open again.", "id": "77"}]
NEWS: Rows = [{"article": "The ferry sailed. It was late.", "highlights": "Ferry sailed .\nIt was late .", "id": "a0f"}]
ITEMS: Rows = [{"text": "Harbour opens  again after the storm", "label": 0}]
LINES: Rows = [
    {"text": ""},
    {"text": " = Lighthouse = \n"},
    {"text": " The tower @-@ like house stands . \n"},
    {"text": " Alone \n"},
]
PAGES: Rows = [
    {"text": "One two three.\nFour five.", "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org/"}
]

# script, more arguments, input rows, file format, output rows, end of the summary
CASES: list[tuple[str, list[str], Rows, str, Rows, str]] = [
    (
        "truthful_qa",
        [],
        QUESTIONS,
        "csv",
        [
            {
                "id": "truthful_qa-data-0",
                "prompt": "Does salted water boil at once?",
                "completion": "No, salt barely changes the boiling point.",
            }
        ],
        "1 rows written, 0 dropped",
    ),
    (
        "squad",
        [],
        PARAGRAPHS,
        "parquet",
        [
            {
                "id": "p1",
                "prompt": "The mill was built in 1802 by two brothers.\n\nWhen was the mill built?",
                "completion": "1802",
            },
            {
                "id": "p2",
                "prompt": "The mill was built in 1802 by two brothers.\n\nWho built it?",
                "completion": "two brothers",
            },
        ],
        "2 rows written, 0 dropped",
    ),
    (
        "trivia_qa",
        [],
        [*TRIVIA, *TRIVIA, WITHHELD],
        "parquet",
        [{"id": "q_1", "prompt": "Which metal is liquid at room temperature?", "completion": "Mercury"}],
        "1 rows written, 2 dropped: 1 repeated question_id, 1 answer withheld",
    ),
    (
        "wmt16",
        [],
        GERMAN,
        "jsonl",
        [{"id": "wmt16-de-en-data-0", "prompt": "Der Zug hält hier.", "completion": "The train stops here."}],
        "1 rows written, 0 dropped",
    ),
    (
        "wmt16",
        ["--pair", "ro-en"],
        ROMANIAN,
        "parquet",
        [{"id": "wmt16-ro-en-data-0", "prompt": "Ploaia s-a oprit.", "completion": "The rain has stopped."}],
        "1 rows written, 0 dropped",
    ),
    (
        "xsum",
        [],
        REPORTS,
        "parquet",
        [
            {
                "id": "77",
                "prompt": "A bridge reopened.\nTraffic flows.",
                "completion": "A bridge is open again.",
            }
        ],
        "1 rows written, 0 dropped",
    ),
    (
        "cnn_dailymail",
        [],
        NEWS,
        "json",
        [
            {
                "id": "a0f",
                "prompt": "The ferry sailed. It was late.",
                "completion": "Ferry sailed .\nIt was late .",
            }
        ],
        "1 rows written, 0 dropped",
    ),
    (
        "ag_news",
        [],
        ITEMS,
        "parquet",
        [{"id": "ag_news-data-0", "prompt": "Harbour opens  again", "completion": "after the storm"}],
        "1 rows written, 0 dropped",
    ),
    (
        "wikitext",
        ["--prompt-ratio", "0.2"],
        LINES,
        "parquet",
        [{"id": "wikitext-2-raw-v1-data-2", "prompt": "The", "completion": "tower @-@ like house stands ."}],
        "1 rows written, 3 dropped: 1 empty text, 1 heading, 1 fewer than two words",
    ),
    (
        "c4",
        [],
        PAGES,
        "jsonl.gz",
        [{"id": "c4-data-0", "prompt": "One two three.", "completion": "Four five."}],
        "1 rows written, 0 dropped",
    ),
]
SCRIPTS = sorted({case[0] for case in CASES})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep the datasets cache in the test's folder, and the hub out of reach."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    yield


def load(script: str) -> click.Command:
    """Return the command of a script."""
    return importlib.import_module(f"data_scripts.{script}").main


def run(script: str, *args: object) -> Result:
    """Run a script in this process."""
    return CliRunner().invoke(load(script), [str(arg) for arg in args])


def save(rows: Rows, folder: Path, suffix: str = "jsonl", name: str = "data") -> Path:
    """Write rows as one file of the format that the suffix names."""
    path = folder / f"{name}.{suffix}"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if suffix == "jsonl":
        path.write_text(lines)
    elif suffix == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "csv":
        datasets.Dataset.from_list(rows).to_csv(path)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def read(path: Path) -> Rows:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("script", "args", "rows", "suffix", "expected", "summary"),
    CASES,
    ids=["-".join([case[0], *case[1]]) for case in CASES],
)
def test_rows(
    tmp_path: Path, script: str, args: list[str], rows: Rows, suffix: str, expected: Rows, summary: str
) -> None:
    """Each corpus, in its real schema, gives exactly these rows."""
    out = tmp_path / "out.jsonl"
    result = run(script, "--out", out, "--source", save(rows, tmp_path, suffix), *args)
    assert result.exit_code == 0, result.output
    assert read(out) == expected
    assert result.stdout == ""
    assert result.stderr == f"{out}: {summary}\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_column_names_found_and_expected(tmp_path: Path, script: str) -> None:
    """Another schema is an error that names both."""
    out = tmp_path / "out.jsonl"
    result = run(script, "--out", out, "--source", save([{"id": "1", "body": "Some words here."}], tmp_path))
    assert result.exit_code == 1
    assert "found the columns id, body, expected " in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not out.exists()


def test_missing_nested_column(tmp_path: Path) -> None:
    """A field missing inside a column is an error too."""
    result = run("wmt16", "--pair", "ro-en", "--out", tmp_path / "out", "--source", save(GERMAN, tmp_path))
    assert result.exit_code == 1
    assert "found the columns translation (de, en), expected translation.ro, translation.en" in result.stderr


def test_other_kind_of_column(tmp_path: Path) -> None:
    """A column that holds no text is an error, not turned into text."""
    source = save([{"document": 3, "summary": "Three.", "id": "1"}], tmp_path)
    result = run("xsum", "--out", tmp_path / "out", "--source", source)
    assert result.exit_code == 1
    assert "found int in document, expected text" in result.stderr


def test_empty_texts_are_dropped_and_counted(tmp_path: Path) -> None:
    """Empty, blank and null texts are left out, and the summary says so."""
    rows = [
        {**PARAGRAPHS[0], "answers": {"text": [], "answer_start": []}},
        {**PARAGRAPHS[1], "question": "  "},
        {**PARAGRAPHS[1], "context": None},
        {**PARAGRAPHS[1], "id": None},
        PARAGRAPHS[1],
    ]
    out = tmp_path / "out.jsonl"
    result = run("squad", "--out", out, "--source", save(rows, tmp_path, "parquet"))
    assert [row["id"] for row in read(out)] == ["p2"]
    reasons = "1 empty answers.text.0, 1 empty question, 1 empty context, 1 empty id"
    assert result.stderr == f"{out}: 1 rows written, 4 dropped: {reasons}\n"


@pytest.mark.parametrize("rows", [[], [{"document": "", "summary": "Nothing.", "id": "1"}]], ids=["none", "dropped"])
def test_no_rows_is_an_error_and_leaves_no_file(tmp_path: Path, rows: Rows) -> None:
    """An empty result is a failure."""
    source = save(rows, tmp_path)
    result = run("xsum", "--out", tmp_path / "out.jsonl", "--source", source)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["data.jsonl"]


def test_limit_counts_written_rows(tmp_path: Path) -> None:
    """Dropped rows do not count towards the limit."""
    rows = [{**REPORTS[0], "id": str(i), "document": "" if i == 0 else f"Report {i}."} for i in range(6)]
    out = tmp_path / "out.jsonl"
    result = run("xsum", "--out", out, "--source", save(rows, tmp_path), "--limit", 2)
    assert [row["id"] for row in read(out)] == ["1", "2"]
    assert result.stderr == f"{out}: 2 rows written, 1 dropped: 1 empty document\n"


def test_existing_file_needs_force(tmp_path: Path) -> None:
    """An existing file is replaced only on request."""
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    args = ("--out", out, "--source", save(REPORTS, tmp_path))
    refused = run("xsum", *args)
    assert (refused.exit_code, out.read_text()) == (1, "mine")
    assert "pass --force" in refused.stderr
    assert run("xsum", *args, "--force").exit_code == 0
    assert [row["id"] for row in read(out)] == ["77"]


def test_force_keeps_the_old_file_when_the_run_fails(tmp_path: Path) -> None:
    """The old file stays until the new one is complete."""
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    assert run("xsum", "--out", out, "--source", save(GERMAN, tmp_path), "--force").exit_code == 1
    assert out.read_text() == "mine"


def test_device_is_never_replaced(tmp_path: Path) -> None:
    """Force replaces files only."""
    result = run("xsum", "--out", os.devnull, "--source", save(REPORTS, tmp_path), "--force")
    assert result.exit_code == 1
    assert "other than a file" in result.stderr


def test_missing_out_folder(tmp_path: Path) -> None:
    """The output folder is checked before anything is read."""
    result = run("xsum", "--out", tmp_path / "no" / "out.jsonl", "--source", save(REPORTS, tmp_path))
    assert result.exit_code == 1
    assert "no such folder" in result.stderr


@pytest.mark.parametrize("source", ["no-such-file.jsonl", "./no-such-folder", "a/b/c"])
def test_missing_source(tmp_path: Path, source: str) -> None:
    """What looks like a path is not looked for on the hub."""
    result = run("xsum", "--out", tmp_path / "out.jsonl", "--source", source)
    assert result.exit_code == 1
    assert f"{source}: found no such path" in result.stderr


def test_unknown_file_format(tmp_path: Path) -> None:
    """An unknown ending is an error that lists the known ones."""
    source = tmp_path / "data.xlsx"
    source.write_text("?")
    result = run("xsum", "--out", tmp_path / "out.jsonl", "--source", source)
    assert result.exit_code == 1
    assert "found a file named data.xlsx, expected one ending in .jsonl" in result.stderr


def test_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    """A library's error becomes one sentence, without traceback."""
    source = tmp_path / "data.parquet"
    source.write_bytes(b"PAR1 not really")
    result = run("xsum", "--out", tmp_path / "out.jsonl", "--source", source)
    assert result.exit_code == 1
    assert f"{source} could not be read" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_made_up_ids_tell_shards_apart(tmp_path: Path) -> None:
    """Only the format is left out of the file name in an id."""
    out = tmp_path / "out.jsonl"
    source = save(PAGES, tmp_path, "jsonl.gz", "train.00007-of-01024")
    assert run("c4", "--out", out, "--source", source).exit_code == 0
    assert read(out)[0]["id"] == "c4-train.00007-of-01024-0"


@pytest.mark.parametrize("streaming", ["--streaming", "--no-streaming"])
def test_folder_of_split_files(tmp_path: Path, streaming: str) -> None:
    """A folder laid out as on the hub is read by split."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("train", "test"):
        save([{**ITEMS[0], "text": f"Out of {name}"}], folder, "parquet", f"{name}-00000-of-00001")
    out = tmp_path / "out.jsonl"
    assert run("ag_news", "--out", out, "--source", folder, "--split", "test", streaming).exit_code == 0
    assert read(out) == [{"id": "ag_news-test-0", "prompt": "Out of", "completion": "test"}]
    wrong = run("ag_news", "--out", tmp_path / "no.jsonl", "--source", folder, "--split", "dev", streaming)
    assert wrong.exit_code == 1
    assert "dev" in wrong.stderr and "--split" in wrong.stderr


def test_save_to_disk_folders(tmp_path: Path) -> None:
    """A saved data set and a saved dictionary of them are read."""
    one = datasets.Dataset.from_list(ITEMS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one}).save_to_disk(tmp_path / "many")
    for name, part in (("one", "one"), ("many", "train")):
        out = tmp_path / f"{name}.jsonl"
        assert run("ag_news", "--out", out, "--source", tmp_path / name).exit_code == 0
        assert read(out)[0]["id"] == f"ag_news-{part}-0"
    wrong = run("ag_news", "--out", tmp_path / "out", "--source", tmp_path / "many", "--split", "test")
    assert "found the splits train, expected test" in wrong.stderr


@pytest.mark.parametrize(
    "args",
    [["--split", "test"], ["--revision", "main"], ["--limit", "0"], ["--prompt-ratio", "1"], ["--pair", "x"]],
)
def test_wrong_usage_exits_2(tmp_path: Path, args: list[str]) -> None:
    """Options that cannot apply are usage errors."""
    script = "wmt16" if "--pair" in args else "ag_news"
    out = tmp_path / "out.jsonl"
    assert run(script, "--out", out, "--source", save(ITEMS, tmp_path), *args).exit_code == 2
    assert not out.exists()


HUB = [
    ("truthful_qa", [], "truthfulqa/truthful_qa", "generation", "validation", False),
    ("squad", [], "rajpurkar/squad", None, "train", False),
    ("trivia_qa", [], "mandarjoshi/trivia_qa", "rc.nocontext", "train", False),
    ("wmt16", [], "wmt/wmt16", "de-en", "train", False),
    ("wmt16", ["--pair", "ro-en"], "wmt/wmt16", "ro-en", "train", False),
    ("xsum", [], "EdinburghNLP/xsum", None, "train", False),
    ("cnn_dailymail", [], "abisee/cnn_dailymail", "3.0.0", "train", False),
    ("ag_news", ["--streaming"], "fancyzhx/ag_news", None, "train", True),
    ("wikitext", [], "Salesforce/wikitext", "wikitext-2-raw-v1", "train", False),
    (
        "wikitext",
        ["--config", "wikitext-103-raw-v1"],
        "Salesforce/wikitext",
        "wikitext-103-raw-v1",
        "train",
        False,
    ),
    ("c4", [], "allenai/c4", "en", "train", True),
]


@pytest.mark.parametrize(("script", "args", "hub_id", "config", "split", "streaming"), HUB)
def test_hub_call(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    args: list[str],
    hub_id: str,
    config: str | None,
    split: str,
    streaming: bool,
) -> None:
    """The hub id, configuration and split are the documented ones."""
    calls: list[tuple[tuple[object, ...], dict[str, object]]] = []

    def load_dataset(*given: object, **named: object) -> Rows:
        calls.append((given, named))
        return next(case[2] for case in CASES if case[:2] == (script, args if "--pair" in args else case[1]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert run(script, "--out", tmp_path / "out.jsonl", *args).exit_code == 0
    assert calls == [((hub_id, config), {"split": split, "streaming": streaming, "revision": None})]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Could not reach the hub.\nSecond line"), "Could not reach the hub; check --source"),
        (
            RuntimeError("Dataset scripts are no longer supported, but found xsum.py"),
            "--revision refs/convert/parquet",
        ),
        (ImportError("No module named 'datasets'"), "pip install datasets"),
    ],
)
def test_hub_failure_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    """Hub failures say what to do next."""

    def load_dataset(*_given: object, **_named: object) -> Rows:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    result = run("xsum", "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 1
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("connection lost")], ids=["ctrl-c", "network"])
def test_break_in_the_middle_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Ctrl-C exits 130, a lost connection 1; neither leaves a file."""

    def load_dataset(*_given: object, **_named: object) -> Iterator[dict[str, Any]]:
        yield REPORTS[0]
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    result = run("xsum", "--out", tmp_path / "out.jsonl")
    assert result.exit_code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert ("Interrupted" if result.exit_code == 130 else "could not be read: connection lost") in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "prompt_ratio", "expected"),
    [
        ("a b c", 0.5, ("a b", "c")),
        ("a b c d", 0.25, ("a", "b c d")),
        ("a b", 0.01, ("a", "b")),
        ("a b", 0.99, ("a", "b")),
        ("a\n\n b  c d", 0.75, ("a\n\n b  c", "d")),
    ],
)
def test_cut(text: str, prompt_ratio: float, expected: tuple[str, str]) -> None:
    """The cut falls between words, with at least one on either side."""
    assert cut(text, prompt_ratio) == expected


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_is_written(script: str) -> None:
    """The help tells what prompt and completion are, and of the cut."""
    result = run(script, "--help")
    assert result.exit_code == 0
    assert "prompt: " in result.output and "completion: " in result.output
    assert ("cut in two between words" in result.output) == (script in ("ag_news", "c4", "wikitext"))


def test_help_imports_nothing_heavy() -> None:
    """Importing every script leaves the large libraries alone."""
    names = ", ".join(f"data_scripts.{script}" for script in SCRIPTS)
    heavy = "{'datasets', 'huggingface_hub', 'numpy', 'pandas', 'pyarrow', 'rich', 'torch'}"
    code = f"import sys, {names}; sys.exit(', '.join({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("as_file", [True, False], ids=["file", "module"])
def test_runs_from_a_clone(tmp_path: Path, as_file: bool) -> None:
    """A script runs as a file from anywhere and as a module from the clone."""
    out = tmp_path / "out.jsonl"
    how = [str(ROOT / "data_scripts" / "xsum.py")] if as_file else ["-m", "data_scripts.xsum"]
    done = subprocess.run(
        [sys.executable, *how, "--out", str(out), "--source", str(save(REPORTS, tmp_path))],
        cwd=tmp_path if as_file else ROOT,
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"{out}: 1 rows written, 0 dropped\n"
    assert read(out)[0]["completion"] == "A bridge is open again."
