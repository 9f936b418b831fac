"""The rows of a corpus: a data set on the hub, or local files in its schema."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

Row = Mapping[str, Any]

FORMATS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
PACKED = {".gz", ".bz2", ".xz", ".zst"}


@dataclass(frozen=True)
class Corpus:
    """A data set and how one of its rows becomes a prompt and a completion."""

    name: str
    """Start of the made-up ids."""
    title: str
    """Name in the help text."""
    hub_id: str
    """Data set on the Hugging Face hub."""
    prompt: str
    """What the prompt is, for the help text."""
    completion: str
    """What the completion is, for the help text."""
    columns: tuple[str, ...]
    """Dotted paths of the texts used; a number picks from a list, as in `answers.text.0`."""
    pair: Callable[..., tuple[str, str]] | None = None
    """Takes the texts, returns (prompt, completion). Without it two texts are the pair and one is cut."""
    reject: Callable[..., str | None] | None = None
    """Takes the texts, returns why the row is to be left out, or None to keep it."""
    id_column: str | None = None
    """Column holding the id; without it ids are made of name, split and row number."""
    config: str | None = None
    """Configuration on the hub; None is the hub's default."""
    split: str = "train"
    """Split that is read when none is asked for."""
    streaming: bool = False
    """Whether the hub data set is streamed when nothing else is asked for."""

    @property
    def is_cut(self) -> bool:
        """Whether a single text is cut into prompt and completion."""
        return self.pair is None and len(self.columns) == 1

    @property
    def expected(self) -> str:
        """The columns a source must have, for messages."""
        return ", ".join(([self.id_column] if self.id_column else []) + list(self.columns))


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    out: Path
    source: str
    split: str | None
    limit: int | None
    streaming: bool | None
    revision: str | None
    force: bool
    prompt_ratio: float


def open_rows(corpus: Corpus, request: Request) -> tuple[str, Iterable[Row]]:
    """Return the name of the part that is read (for ids) and its rows."""
    path = Path(request.source).expanduser()
    is_local = path.exists()
    is_whole = path.is_file() or (path / "state.json").is_file()
    is_file_name = path.suffix in FORMATS or path.suffix in PACKED
    if not is_local and (is_file_name or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", request.source)):
        raise click.ClickException(f"{request.source}: found no such path, expected one or a hub id.")
    if is_whole and request.split:
        raise click.UsageError(f"--split: {request.source} is one part and read whole; leave --split out.")
    if is_local and request.revision:
        raise click.UsageError(f"--revision: {request.source} is local; leave --revision out.")
    split = request.split or corpus.split
    streaming = request.streaming if request.streaming is not None else (is_local or corpus.streaming)
    try:
        rows = _load(corpus, request, split, streaming)
    except Exception as error:
        raise _unreadable(request.source, error) from error
    stem = path.resolve()
    while stem.suffix in FORMATS or stem.suffix in PACKED:
        stem = stem.with_suffix("")
    return stem.name if is_whole else split, _guarded(rows, request.source)


def _load(corpus: Corpus, request: Request, split: str, streaming: bool) -> Iterable[Row]:
    """Return the rows of a local or hub data set."""
    import datasets
    import huggingface_hub.utils

    datasets.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
    path = Path(request.source).expanduser()
    if path.is_file():
        suffixes = [suffix for suffix in path.suffixes if suffix not in PACKED]
        kind = FORMATS.get(suffixes[-1] if suffixes else "")
        if kind is None:
            raise ValueError(f"found a file named {path.name}, expected one ending in {', '.join(FORMATS)}")
        more = {"keep_default_na": False} if kind == "csv" else {}
        return datasets.load_dataset(kind, data_files=str(path), split="train", streaming=streaming, **more)
    if (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    if (path / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(str(path))
        if split not in splits:
            raise ValueError(f"found the splits {', '.join(splits)}, expected {split}")
        return splits[split]
    if path.is_dir():
        return datasets.load_dataset(str(path), split=split, streaming=streaming)
    return datasets.load_dataset(
        request.source, corpus.config, split=split, streaming=streaming, revision=request.revision
    )


def _guarded(rows: Iterable[Row], source: str) -> Iterator[Row]:
    """Yield the rows; whatever reading them raises becomes one sentence."""
    try:
        yield from rows
    except Exception as error:
        raise _unreadable(source, error) from error


def _unreadable(source: str, error: Exception) -> click.ClickException:
    """Return an error raised by `datasets` as one sentence."""
    if type(error).__name__ == "DatasetGenerationError" and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    advice = "check --source and --split, and the network where it is a hub data set"
    if isinstance(error, ImportError):
        advice = "install what is missing: pip install datasets"
    elif "scripts are no longer supported" in lines[0]:
        advice = "pass --revision refs/convert/parquet to read the hub's own conversion"
    return click.ClickException(f"{source} could not be read: {lines[0][:300].rstrip('. ')}; {advice}.")
