"""Where rows come from: text files, Parquet, and what `datasets` opens; every value is the text that stands in the file."""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from coreinfer_sim.base.errors import CorpusError
from coreinfer_sim.base.separated import separated_rows, separator_of
from coreinfer_sim.base.settings import CorpusConfig
from coreinfer_sim.base.tables import rows_of_table
from coreinfer_sim.base.text_files import open_text

Values = dict[str, Any]
"""Of one row: text, None, or what is nested in lists and dictionaries."""
RawRows = Iterator[tuple[int, Values]]
"""Rows with their places, from 1: lines of a text file, rows of any other."""
N_SAMPLED = 100
_READ_AT_ONCE = 1 << 20
_SPLITS = {"train", "test", "validation", "valid", "val", "dev"}
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)
"""Numbers stay the characters that they are written in."""
_NO_SPACE = re.compile(r"\S|\Z")


@dataclass(frozen=True)
class Source:
    """A corpus that can be read several times."""

    name: str
    unit: str
    """What places count: line or row."""
    read: Callable[[Sequence[str] | None], RawRows]
    """Draws the rows, with some columns alone, or all."""
    separator: str | None = None
    """Of a file with separated values."""

    def rows(self, columns: Sequence[str] | None = None) -> RawRows:
        """Stream the rows.

        Args:
            columns: to read; None: all.

        Raises:
            CorpusError: the source is damaged; where it can be told, the message names the line.
        """
        with _as_corpus_errors(self.name):
            yield from self.read(columns)

    def sample(self) -> list[Values]:
        """Return the first rows, by which columns are recognised."""
        return [values for _, values in islice(self.rows(), N_SAMPLED)]

    def where(self, place: int) -> str:
        """Name a row."""
        return f"{self.name}, {self.unit} {place:,}"


def open_source(config: CorpusConfig) -> Source:
    """Open a corpus.

    Raises:
        CorpusError: there is none, or of a kind that is not read.
    """
    path = Path(config.source)
    if not path.exists() and (path.is_absolute() or is_file_name(config.source)):
        raise CorpusError(f"there is no file {path}, expected a corpus; check the path.")
    with _as_corpus_errors(config.source):
        if path.is_file():
            return _file(path, config)
        files = _files(path, config) if path.is_dir() and not _is_saved(path) else []
        if files:
            sources = [_file(file, config) for file in files]
            return Source(config.source, "row", lambda columns: _one_after_the_other(sources, columns))
        return Source(config.source, "row", _data_set(path, config))


def _file(path: Path, config: CorpusConfig) -> Source:
    kind = _kind(path)
    if kind in (".csv", ".tsv"):
        separator = separator_of(path, config.separator, "\t" if kind == ".tsv" else ",")
        return Source(str(path), "line", lambda columns: separated_rows(path, separator, columns), separator)
    if kind == ".parquet":
        return Source(str(path), "row", lambda columns: _parquet(path, columns))
    readers: dict[str, Callable[[Path], RawRows]] = {".txt": _lines, ".json": _json, ".jsonl": _json_lines}
    read = readers[".jsonl" if kind == ".ndjson" else kind]
    return Source(str(path), "line", lambda _columns: read(path))


def _files(folder: Path, config: CorpusConfig) -> list[Path]:
    """Return the files of a folder that are read as one corpus: all of one kind, those of the split where names tell splits.

    Raises:
        CorpusError: they are of several kinds, or none is of the split.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and is_file_name(path.name))
    kinds = sorted({_suffix(path) for path in files})
    if len(kinds) > 1:
        raise CorpusError(
            f"the folder {folder} holds files of several kinds ({', '.join(kinds)}), expected one; name a file."
        )
    words = {path: set(re.split(r"[^a-z]+", path.name.lower())) for path in files}
    if len(set().union(*words.values()) & _SPLITS) < 2:
        return files
    chosen = [path for path in files if config.split.lower() in words[path]]
    if not chosen:
        raise CorpusError(
            f"the folder {folder} has files of several splits and none of {config.split}; name one in split, or a file."
        )
    return chosen


def _one_after_the_other(sources: Sequence[Source], columns: Sequence[str] | None) -> RawRows:
    rows = (values for source in sources for _, values in source.rows(columns))
    yield from enumerate(rows, 1)


def _is_saved(folder: Path) -> bool:
    """Tell whether ``save_to_disk`` of datasets wrote a folder."""
    return (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()


KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet")


def is_file_name(name: str) -> bool:
    """Tell whether a name ends as the files do that are read."""
    return _suffix(Path(name)) in KINDS


def set_name(source: str) -> str:
    """Return what rows of a source are called together: the file's name without its endings, or the name on the hub."""
    name = Path(source).name
    return re.sub(rf"(?i)({'|'.join(map(re.escape, KINDS))})?(\.gz)?$", "", name) or name


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _kind(path: Path) -> str:
    suffix = _suffix(path)
    if suffix not in KINDS:
        raise CorpusError(
            f"the corpus {path} ends in {path.suffix!r}, expected one of {', '.join(KINDS)}, all but the last also with .gz; "
            "convert or rename it."
        )
    if path.stat().st_size == 0:
        raise CorpusError(f"the corpus {path} is empty, expected at least one row; check the file.")
    return suffix


@contextmanager
def _as_corpus_errors(name: str) -> Iterator[None]:
    """Turn what a dozen libraries raise within the block into an error of ours."""
    try:
        yield
    except CorpusError:
        raise
    except (EOFError, zlib.error) as error:
        raise CorpusError(
            f"{name} is cut short or damaged ({error}), expected a whole gzip file; fetch it again."
        ) from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{name} is no whole {error.encoding} text ({error.reason}); convert it to UTF-8.") from error
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
        raise CorpusError(
            f"the corpus {name} cannot be read ({reason}); expected a hub id, a {', '.join(KINDS)} file or a save_to_disk "
            "folder."
        ) from error


# Text


def _lines(path: Path) -> RawRows:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, {"text": line.rstrip("\r\n")}


def _json_lines(path: Path) -> RawRows:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if number == 1 and line.lstrip().startswith("["):  # one array, whatever it is called
                yield from _json(path)
                return
            try:
                yield number, _object(path, number, _DECODER.decode(line))
            except (ValueError, RecursionError) as error:
                raise _no_json(path, number, error) from error


def _json(path: Path) -> RawRows:
    with open_text(path) as file:
        for number, value in _json_values(path, file):
            yield number, _object(path, number, value)


def _json_values(path: Path, file: TextIO) -> Iterator[tuple[int, Any]]:
    """Draw the values of an array, or those that follow one another, each with the line it begins in."""
    text, at, line, in_array, is_first = file.read(_READ_AT_ONCE), 0, 1, False, True
    while True:
        # 1) to the next value
        found = _NO_SPACE.search(text, at)
        end = len(text) if found is None else found.start()
        if end < len(text) and (text[end] == "[" if is_first else in_array and text[end] in ",]"):
            in_array = text[end] != "]"
            end += 1
            is_first = False
            line += text.count("\n", at, end)
            at = end
            continue
        line += text.count("\n", at, end)
        at = end
        # 2) the value, with as much text as it takes
        try:
            if at == len(text):
                raise json.JSONDecodeError("Unterminated", text, at)
            value, end = _DECODER.raw_decode(text, at)
        except RecursionError as error:
            raise _no_json(path, line, error) from error
        except json.JSONDecodeError as error:
            may_go_on = error.pos > len(text) - 64 or error.msg.startswith("Unterminated")
            more = file.read(max(_READ_AT_ONCE, len(text) - at)) if may_go_on else ""
            if more:
                text, at = text[at:] + more, 0
                continue
            if at == len(text) and not in_array:
                return
            raise _no_json(path, line, "the array does not end" if at == len(text) else error) from error
        yield line, value
        line += text.count("\n", at, end)
        at, is_first = end, False


def _object(path: Path, number: int, value: Any) -> Values:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        kind = {list: "a list", type(None): "null"}.get(type(value), "no object")
        raise CorpusError(
            f"{path}, line {number:,}, is {kind}, expected an object with a row's columns; mend or remove it."
        )
    words = {True: "true", False: "false"}
    return {name: words[each] if isinstance(each, bool) else each for name, each in value.items()}


def _no_json(path: Path, number: int, error: object) -> CorpusError:
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg}, column {error.colno}"
    return CorpusError(f"{path}, line {number:,}, is no JSON ({reason}); expected one object a row; mend or remove it.")


# Tables


def _parquet(path: Path, columns: Sequence[str] | None) -> RawRows:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        known = [name for name in columns or () if name in file.schema_arrow.names]
        tables = file.iter_batches(batch_size=1000, columns=known) if columns else file.iter_batches(batch_size=1000)
        yield from rows_of_table(tables)


def _data_set(path: Path, config: CorpusConfig) -> Callable[[Sequence[str] | None], RawRows]:
    """Open a data set on the hub, or one in a folder."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is in the exception
    if path.is_dir() and _is_saved(path):
        opened: Any = datasets.load_from_disk(str(path))
        if isinstance(opened, dict):
            if config.split not in opened:
                raise CorpusError(
                    f"the corpus {path} has the splits {sorted(opened)}, expected {config.split}; name one in split."
                )
            opened = opened[config.split]
    else:
        opened = datasets.load_dataset(config.source, config.name, split=config.split, streaming=True)

    def read(columns: Sequence[str] | None) -> RawRows:
        names = opened.column_names
        chosen = opened.select_columns([name for name in columns if name in names]) if columns and names else opened
        return rows_of_table(chosen.with_format("arrow").iter(batch_size=1000))

    return read
