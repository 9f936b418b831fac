"""Rows: of a corpus, which is anything that `datasets` opens, and of JSONL files with prompts and completions."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from coreinfer_sim.base.errors import CorpusError
from coreinfer_sim.base.progress import counted
from coreinfer_sim.base.settings import CorpusConfig, template_fields

_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_USUAL_COLUMNS = ("prompt", "text")
_BLOCK = 1000

Tokenize = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class Row:
    """One row of a corpus, or of a set that is evaluated on."""

    id: str
    prompt: str
    """What a user would type; it is embedded."""
    text: str = ""
    """What the language model reads in a build."""
    n_tokens: int = 0
    """Tokens of ``text`` that the language model reads, after cutting."""
    completion: str = ""
    """A good answer, which evaluation scores."""
    set_name: str = ""
    """Name of the evaluated set."""

    @property
    def digest(self) -> str:
        """Tells prompt and completion from others that come under the same id."""
        return hashlib.sha256(f"{self.prompt}\0{self.completion}".encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass
class CorpusReport:
    """What became of the rows."""

    n_rows: int = 0
    n_kept: int = 0
    n_tokens: int = 0
    n_empty: int = 0
    n_duplicate: int = 0
    n_cut: int = 0
    """Texts cut to the largest number of tokens."""
    n_tokens_cut: int = 0
    """Tokens lost by that."""
    sha256: str = ""
    """Over every kept row's prompt and text."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        """Say in one line what was kept, dropped and cut."""
        parts = [
            f"{counted(self.n_kept, 'prompt')} with {counted(self.n_tokens, 'token')} kept of {counted(self.n_rows, 'row')}"
        ]
        if self.n_empty:
            parts.append(f"{counted(self.n_empty, 'empty row')} dropped")
        if self.n_duplicate:
            parts.append(f"{counted(self.n_duplicate, 'duplicate')} dropped")
        if self.n_cut:
            parts.append(f"{counted(self.n_cut, 'text')} cut, {counted(self.n_tokens_cut, 'token')} lost")
        return "; ".join(parts)


def read_corpus(config: CorpusConfig, tokenize: Tokenize) -> tuple[Iterator[Row], CorpusReport]:
    """Open a corpus and stream its rows.

    Args:
        config: where it is and how a row becomes text.
        tokenize: texts → token ids, special tokens included.

    Returns:
        The rows that are neither empty nor duplicates, and the report, which is complete once they have been drawn.

    Raises:
        CorpusError: it cannot be opened, lacks a column, or nothing is left.
    """
    report = CorpusReport()
    return _kept_rows(config, tokenize, report), report


def _kept_rows(config: CorpusConfig, tokenize: Tokenize, report: CorpusReport) -> Iterator[Row]:
    digest = hashlib.sha256()
    texts = _texts(config, report)
    while block := list(islice(texts, _block_size(config, report))):
        for (row_id, prompt, text), ids in zip(block, tokenize([text for _, _, text in block]), strict=True):
            if not ids:
                report.n_empty += 1
                continue
            n_tokens = min(len(ids), config.max_tokens)
            report.n_cut += len(ids) > n_tokens
            report.n_tokens_cut += len(ids) - n_tokens
            report.n_kept += 1
            report.n_tokens += n_tokens
            digest.update(f"{len(prompt)}:{prompt}{len(text)}:{text}".encode("utf-8", "surrogatepass"))
            yield Row(row_id, prompt, text, n_tokens)
    if report.n_kept == 0:
        raise CorpusError(
            f"the corpus {config.source} holds no usable text ({report.n_rows} rows, {report.n_empty} empty), expected at "
            "least one row with text; check the file and prompt_column."
        )
    report.sha256 = digest.hexdigest()


def check_corpus(config: CorpusConfig) -> None:
    """Raise CorpusError if the corpus cannot be opened or its first row lacks a column: cheap, before a model loads."""
    row = next(iter(open_rows(config)), None)
    if row is not None:
        _Columns.of(config, row)


def _texts(config: CorpusConfig, report: CorpusReport) -> Iterator[tuple[str, str, str]]:
    """Draw (id, prompt, text) of the rows that are neither empty nor duplicates."""
    seen: set[bytes] = set()
    columns: _Columns | None = None
    for number, row in enumerate(open_rows(config)):
        columns = columns or _Columns.of(config, row)
        report.n_rows += 1
        prompt, text = columns.prompt(row), columns.text(row)
        if not prompt or not text:
            report.n_empty += 1
            continue
        key = hashlib.sha1(f"{prompt}\0{text}".encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
        if config.deduplicate and key in seen:
            report.n_duplicate += 1
            continue
        seen.add(key)
        row_id = row.get("id")
        yield str(number if row_id is None else row_id), prompt, text


@dataclass(frozen=True)
class _Columns:
    """Which columns of a corpus are read."""

    prompt_column: str | None
    template: str | None

    @classmethod
    def of(cls, config: CorpusConfig, row: dict[str, Any]) -> _Columns:
        """Find the columns in the first row, or raise CorpusError."""
        wanted = template_fields(config.template) if config.template else []
        if config.prompt_column:
            wanted = [config.prompt_column, *wanted]
        missing = [name for name in wanted if name not in row]
        if missing:
            raise CorpusError(
                f"the corpus {config.source} has the columns {sorted(row)}, expected {', '.join(missing)}; name an "
                "existing column in prompt_column or template."
            )
        if config.prompt_column:
            return cls(config.prompt_column, config.template)
        strings = [name for name, value in row.items() if isinstance(value, str)]
        usual = [
            name for name in _USUAL_COLUMNS if isinstance(row.get(name, 0), str | None)
        ]  # a first row may be empty
        if config.template:
            return cls(usual[0] if usual else None, config.template)
        if not usual and len(strings) != 1:
            raise CorpusError(
                f"the corpus {config.source} has the columns {sorted(row)}, and none is called prompt or text and holds text; "
                "name one in prompt_column or template."
            )
        return cls((usual or strings)[0], None)

    def prompt(self, row: dict[str, Any]) -> str:
        """Return what is embedded: the prompt column, or where a template has none beside it the whole text."""
        return self.text(row) if self.prompt_column is None else _as_text(row.get(self.prompt_column))

    def text(self, row: dict[str, Any]) -> str:
        """Return what the language model reads: the template, or else the prompt."""
        if self.template is None:
            return self.prompt(row)
        fields = {name: _as_text(row.get(name)) for name in template_fields(self.template)}
        return self.template.format(**fields).strip() if any(fields.values()) else ""


def _as_text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _block_size(config: CorpusConfig, report: CorpusReport) -> int:
    """Return how many texts to tokenise at once: no more than the limit still lets in."""
    return _BLOCK if config.limit is None else min(_BLOCK, config.limit - report.n_kept)


def open_rows(config: CorpusConfig) -> Iterator[dict[str, Any]]:
    """Stream the rows of a corpus as dictionaries.

    Raises:
        CorpusError: `datasets` cannot open or read it.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is in the exception
    path = Path(config.source)
    try:
        yield from _dataset(datasets, path, config)
    except CorpusError:
        raise
    except Exception as error:  # datasets raises the errors of a dozen libraries
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError):
            raise CorpusError(
                f"the corpus {config.source} is not UTF-8 ({cause.reason}), expected UTF-8 text; convert it first."
            ) from error
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise CorpusError(
            f"the corpus {config.source} cannot be read ({reason}); expected a hub id, a {', '.join(_LOADERS)} file or a "
            "save_to_disk folder."
        ) from error


def _dataset(datasets: Any, path: Path, config: CorpusConfig) -> Any:
    """Open a corpus as an iterable of rows."""
    if path.is_file():
        if path.stat().st_size == 0:
            raise CorpusError(f"the corpus {path} is empty, expected at least one row; check the file.")
        loader = _LOADERS.get(path.suffix.lower())
        if loader is None:
            raise CorpusError(
                f"the corpus {path} ends in {path.suffix!r}, expected one of {', '.join(_LOADERS)}; convert or rename it."
            )
        return datasets.load_dataset(loader, data_files=str(path), split="train", streaming=True)
    if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
        dataset = datasets.load_from_disk(str(path))
        if isinstance(dataset, dict):
            if config.split not in dataset:
                raise CorpusError(
                    f"the corpus {path} has the splits {sorted(dataset)}, expected {config.split}; name one in split."
                )
            dataset = dataset[config.split]
        return dataset
    if not path.exists() and (path.is_absolute() or path.suffix.lower() in _LOADERS):
        raise CorpusError(f"there is no file {path}, expected a corpus; check the path.")
    return datasets.load_dataset(config.source, config.name, split=config.split, streaming=True)


def load_rows(path: Path) -> list[Row]:
    """Read the rows that a build has drawn from its corpus."""
    with path.open(encoding="utf-8") as file:
        return [Row(**json.loads(line)) for line in file]


def read_completions(path: Path) -> Iterator[Row]:
    """Draw the rows of a JSONL file with "id", "prompt" and "completion"; the set is called after the file.

    Raises:
        CorpusError: no JSONL, or a row without these fields; the message names the line.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield _with_completion(path, number, json.loads(line))
                except ValueError as error:
                    raise CorpusError(
                        f"{path}, line {number}, is no JSON ({error}); expected one object a line; mend or remove it."
                    ) from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 ({error.reason}), expected UTF-8 text; convert it first.") from error


def _with_completion(path: Path, number: int, raw: Any) -> Row:
    """Check one line's fields."""
    fields = ("id", "prompt", "completion")
    if not isinstance(raw, dict) or not set(fields) <= set(raw):
        found = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
        raise CorpusError(f"{path}, line {number}, has {found}, expected an object with {', '.join(fields)}.")
    for name in ("prompt", "completion"):
        if not isinstance(raw[name], str):
            raise CorpusError(
                f"{path}, line {number}: {name} is {raw[name]!r:.60}, expected text; write it as a string."
            )
    return Row(str(raw["id"]), raw["prompt"], completion=raw["completion"], set_name=path.stem)
