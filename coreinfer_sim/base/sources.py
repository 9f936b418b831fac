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

from coreinfer_sim.base.corpus_files import KINDS, check_there, files_of, kind_of
from coreinfer_sim.base.errors import ConfigError, CoreInferSimError, CorpusError
from coreinfer_sim.base.extra import require
from coreinfer_sim.base.hub import no_answer
from coreinfer_sim.base.separated import check_once, separated_rows, separator_of
from coreinfer_sim.base.settings import CorpusConfig
from coreinfer_sim.base.stores import AnyFile, RemoteFile, is_address
from coreinfer_sim.base.tables import rows_of_table
from coreinfer_sim.base.text_files import open_text

Values = dict[str, Any]
"""Of one row: text, None, or what is nested in lists and dictionaries."""
RawRows = Iterator[tuple[int, Values]]
"""Rows with their places, from 1: lines of a text file, rows of any other."""
N_SAMPLED = 100
_READ_AT_ONCE = 1 << 20
_OF_SOME = {"name": "configurations", "split": "splits", "separator": "separated values"}
"""What the settings choose among that do nothing for some kinds of corpora."""
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
    parts: Sequence[Source] = ()
    """The files of a folder."""
    chosen: str = ""
    """Which files of a folder these are."""

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
        ConfigError: a setting was given that does nothing for this kind.
    """
    check_there(config.source)
    path: Any = RemoteFile(config.source) if is_address(config.source) else Path(config.source)
    with _as_corpus_errors(config.source):
        if path.is_dir() and not _is_saved(path):
            _check_without(config, "name")
            files, chosen = files_of(path, config.split, is_asked=config.split != CorpusConfig.split)
            parts = [_file(file, config) for file in files]
            return Source(
                config.source, "row", lambda columns: _one_after_the_other(parts, columns), None, parts, chosen
            )
        if path.exists() and not path.is_dir():
            _check_without(config, "name", "split")
            return _file(path, config)
        _check_without(config, "separator", *(["name"] if path.is_dir() else []))
        return Source(config.source, "row", _data_set(path, config))


def _check_without(config: CorpusConfig, *names: str) -> None:
    """Raise ConfigError if a setting was given that does nothing for this kind of corpus."""
    for name in names:
        if getattr(config, name) != getattr(CorpusConfig, name):
            raise ConfigError(
                f"corpus.{name} does nothing for {config.source}, which has no {_OF_SOME[name]}; leave it out."
            )


def _file(path: AnyFile, config: CorpusConfig) -> Source:
    kind = kind_of(path)
    if kind in (".csv", ".tsv"):
        separator = separator_of(path, config.separator, "\t" if kind == ".tsv" else ",")
        return Source(str(path), "line", lambda columns: separated_rows(path, separator, columns), separator)
    _check_without(config, "separator")
    if kind == ".parquet":
        return Source(str(path), "row", lambda columns: _parquet(path, columns))
    readers: dict[str, Callable[[AnyFile], RawRows]] = {".txt": _lines, ".json": _json, ".jsonl": _json_lines}
    read = readers[".jsonl" if kind == ".ndjson" else kind]
    return Source(str(path), "line", lambda _columns: read(path))


def _one_after_the_other(sources: Sequence[Source], columns: Sequence[str] | None) -> RawRows:
    rows = (values for source in sources for _, values in source.rows(columns))
    yield from enumerate(rows, 1)


def _is_saved(folder: AnyFile) -> bool:
    """Tell whether ``save_to_disk`` of datasets wrote a folder; at an address, its Arrow files are not read."""
    if isinstance(folder, RemoteFile):
        return False
    return (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()


@contextmanager
def _as_corpus_errors(name: str) -> Iterator[None]:
    """Turn what a dozen libraries raise within the block into an error of ours."""
    try:
        yield
    except CoreInferSimError:
        raise
    except (EOFError, zlib.error) as error:
        raise CorpusError(
            f"{name} is cut short or damaged ({error}), expected a whole gzip file; fetch it again."
        ) from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{name} is no whole {error.encoding} text ({error.reason}); convert it to UTF-8.") from error
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
        if name.lower().endswith(".parquet"):
            lost = ", or its store was lost" if is_address(name) else ""
            raise CorpusError(
                f"{name} is cut short or damaged{lost} ({reason}), expected a whole Parquet file; fetch or write it again."
            ) from error
        raise CorpusError(
            f"the corpus {name} cannot be read ({reason}); expected a hub id, a {', '.join(KINDS)} file or a save_to_disk "
            "folder."
        ) from error


# Text


def _lines(path: AnyFile) -> RawRows:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, {"text": line.rstrip("\r\n")}


def _json_lines(path: AnyFile) -> RawRows:
    with open_text(path) as file:
        is_first = True
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if is_first and (line.lstrip().startswith("[") or line.strip() == "{"):  # JSON over several lines
                yield from _json(path)
                return
            is_first = False
            try:
                yield number, _object(path, number, _DECODER.decode(line))
            except (ValueError, RecursionError) as error:
                raise _no_json(path, number, error) from error


def _json(path: AnyFile) -> RawRows:
    with open_text(path) as file:
        for number, value in _json_values(path, file):
            yield number, _object(path, number, value)


def _json_values(path: AnyFile, file: TextIO) -> Iterator[tuple[int, Any]]:
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


def _object(path: AnyFile, number: int, value: Any) -> Values:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        kind = {list: "a list", type(None): "null"}.get(type(value), "no object")
        raise CorpusError(
            f"{path}, line {number:,}, is {kind}, expected an object with a row's columns; mend or remove it."
        )
    words = {True: "true", False: "false"}
    return {name: words[each] if isinstance(each, bool) else each for name, each in value.items()}


def _no_json(path: AnyFile, number: int, error: object) -> CorpusError:
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg}, column {error.colno}"
    return CorpusError(f"{path}, line {number:,}, is no JSON ({reason}); expected one object a row; mend or remove it.")


# Tables


def _parquet(path: AnyFile, columns: Sequence[str] | None) -> RawRows:
    require(f"reading {path}", "hub", "pyarrow")
    import pyarrow.parquet

    opened = path if isinstance(path, Path) else path.open()
    with pyarrow.parquet.ParquetFile(opened, pre_buffer=False) as file:  # which would read all groups of rows at once
        names = file.schema_arrow.names
        check_once(path, names, columns)
        known = [name for name in columns or () if name in names]
        tables = file.iter_batches(batch_size=1000, columns=known) if columns else file.iter_batches(batch_size=1000)
        yield from rows_of_table(tables)


def _data_set(path: Path, config: CorpusConfig) -> Callable[[Sequence[str] | None], RawRows]:
    """Open a data set on the hub, or one in a folder."""
    is_here = path.is_dir()
    what = f"reading the data set {config.source}"
    if not is_here:
        what = f"there is no file or folder {config.source!r}, and reading the hub's data set {config.source}"
    require(what, "hub", "datasets")
    if not is_here and (why := no_answer()):
        raise CorpusError(
            f"the corpus {config.source} cannot be read: it is no path here, and the hub does not answer ({why}); check the "
            "path or the connection."
        )
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is in the exception
    if is_here and _is_saved(path):
        opened: Any = datasets.load_from_disk(str(path))
        if isinstance(opened, dict):
            if config.split not in opened:
                raise CorpusError(
                    f"the corpus {path} has the splits {sorted(opened)}, expected {config.split}; name one in split."
                )
            opened = opened[config.split]
        else:
            _check_without(config, "split")
    else:
        opened = datasets.load_dataset(config.source, config.name, split=config.split, streaming=True)

    def read(columns: Sequence[str] | None) -> RawRows:
        names = opened.column_names
        chosen = opened.select_columns([name for name in columns if name in names]) if columns and names else opened
        return rows_of_table(chosen.with_format("arrow").iter(batch_size=1000))

    return read
