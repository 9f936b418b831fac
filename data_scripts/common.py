"""What the corpus scripts share: the options, and the writing of rows as JSONL."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING or __package__:
    from data_scripts.sources import Corpus, Request, Row, open_rows
else:  # imported by a script that runs as a file
    from sources import Corpus, Request, Row, open_rows


def command(*corpora: Corpus, flag: str = "--config") -> click.Command:
    """Return the command of a corpus script.

    Args:
        corpora: The corpus, or its variants by `Corpus.config`; the first is the default.
        flag: Option that picks a variant, where there is more than one.
    """
    default, variants = corpora[0], {str(corpus.config): corpus for corpus in corpora}

    @click.command(help=_help(default), context_settings={"max_content_width": 110})
    @click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="JSONL file to write.")
    @click.option(
        "--source",
        default=default.hub_id,
        show_default=True,
        metavar="PATH_OR_HUB_ID",
        help="What to read: a hub id, or local data in the same schema: a JSONL, JSON, CSV or Parquet file, "
        "a folder of such files, or a save_to_disk folder. A path that exists wins over a hub id.",
    )
    @click.option("--split", show_default=default.split, help="Split to read; a single file is read whole.")
    @click.option("--limit", type=click.IntRange(min=1), show_default="none", help="Stop after N written rows.")
    @click.option(
        "--streaming/--no-streaming",
        default=None,
        show_default="streaming" if default.streaming else "streaming for local files only",
        help="Read row by row, or first convert everything into the datasets cache; a save_to_disk folder is "
        "memory-mapped either way.",
    )
    @click.option("--revision", show_default="main", help="Branch, tag or commit of the hub data set.")
    @click.option("--force", is_flag=True, help="Replace an existing output file.")
    def main(
        out: Path,
        source: str,
        split: str | None,
        limit: int | None,
        streaming: bool | None,
        revision: str | None,
        force: bool,
        prompt_ratio: float = 0.5,
        variant: str = str(default.config),
    ) -> None:
        request = Request(out, source, split, limit, streaming, revision, force, prompt_ratio)
        try:
            click.echo(_write(variants[variant], request), err=True)
        except KeyboardInterrupt:
            click.echo(f"Interrupted: {out} was not written.", err=True)
            raise click.exceptions.Exit(130) from None

    if len(corpora) > 1:
        choice = click.Choice(list(variants))
        first = str(default.config)
        click.option(flag, "variant", type=choice, default=first, show_default=True, help="Hub configuration.")(main)
    if default.is_cut:
        ratio = click.FloatRange(0, 1, min_open=True, max_open=True)
        text = "Share of the words that go into the prompt, to the nearest word, at least one on either side."
        click.option("--prompt-ratio", type=ratio, default=0.5, show_default=True, help=text)(main)
    return main


def _help(corpus: Corpus) -> str:
    """Return the help text: what is written, and what happens to the rows."""
    about = ""
    if corpus.is_cut:
        about = (
            "The text is cut in two between words, at --prompt-ratio; only the white space at the cut is "
            "left out. Texts of fewer than two words are dropped.\n\n"
        )
    repeated = f" or a repeated {corpus.id_column}" if corpus.id_column else ""
    return (
        f'Write {corpus.title} as JSONL, one {{"id", "prompt", "completion"}} object a line.\n\n'
        f"\b\nprompt:      {corpus.prompt}\ncompletion:  {corpus.completion}\n\n{about}"
        f"White space around a text is trimmed. Rows with an empty text{repeated} are dropped. The last line "
        "on stderr counts the dropped rows and says why.\n\n"
        f"Example: python data_scripts/{corpus.name.split('-')[0]}.py --out corpus.jsonl --limit 1000"
    )


def _write(corpus: Corpus, request: Request) -> str:
    """Write the output file and return the summary line."""
    out = request.out.resolve()
    if out.exists() and not out.is_file():
        raise click.ClickException(f"{request.out}: found something other than a file; name another --out.")
    if out.exists() and not request.force:
        raise click.ClickException(f"{request.out} exists; pass --force to replace it or name another --out.")
    if not out.parent.is_dir():
        raise click.ClickException(f"{out.parent}: found no such folder, expected one for --out; create it.")
    part, rows = open_rows(corpus, request)
    dropped: Counter[str] = Counter()
    records = _records(corpus, rows, part, request, dropped)
    n_written = 0
    try:
        with _replacing(out) as file, _progress(corpus.title) as advance:
            for record in islice(records, request.limit):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                n_written += 1
                advance()
            if not n_written:
                raise click.ClickException(
                    f"{request.source}: found no row to write ({_count(dropped)}), expected at least one; "
                    "look at --source and --split. No file was written."
                )
    except OSError as error:
        raise click.ClickException(
            f"{request.out} could not be written: {error.strerror or error}; expected a writable folder with "
            "room; name another --out."
        ) from error
    return f"{request.out}: {n_written:,} rows written, {_count(dropped)}"


def _count(dropped: Counter[str]) -> str:
    """Return how many rows were dropped and why, as one phrase."""
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in dropped.most_common())
    return f"{dropped.total():,} dropped" + (f": {reasons}" if reasons else "")


def _records(
    corpus: Corpus, rows: Iterable[Row], part: str, request: Request, dropped: Counter[str]
) -> Iterator[dict[str, str]]:
    """Yield the output rows; count those left out in `dropped`."""
    seen: set[str] = set()
    for number, row in enumerate(rows):
        texts = [_text(corpus, row, path, request.source) for path in corpus.columns]
        name = f"{corpus.name}-{part}-{number}"
        if corpus.id_column:
            name = _text(corpus, row, corpus.id_column, request.source, is_id=True)
        empty = next((path for path, text in zip(corpus.columns, texts, strict=True) if not text), None)
        if empty or not name:
            reason: str | None = f"empty {empty or corpus.id_column}"
        elif name in seen:
            reason = f"repeated {corpus.id_column}"
        else:
            reason = corpus.reject(*texts) if corpus.reject else None
        if reason is None and corpus.is_cut and len(texts[0].split(maxsplit=1)) < 2:
            reason = "fewer than two words"
        if reason is not None:
            dropped[reason] += 1
            continue
        if corpus.id_column:
            seen.add(name)
        if corpus.pair:
            texts = list(corpus.pair(*texts))
        elif corpus.is_cut:
            texts = list(cut(texts[0], request.prompt_ratio))
        prompt, completion = texts
        yield {"id": name, "prompt": prompt, "completion": completion}


def cut(text: str, prompt_ratio: float) -> tuple[str, str]:
    """Cut a text of two or more words between two words, at `prompt_ratio` of them."""
    words = list(re.finditer(r"\S+", text))
    n_prompt = min(max(int(prompt_ratio * len(words) + 0.5), 1), len(words) - 1)
    return text[: words[n_prompt - 1].end()], text[words[n_prompt].start() :]


def _text(corpus: Corpus, row: Row, path: str, source: str, *, is_id: bool = False) -> str:
    """Return the trimmed text at a dotted path, "" where there is none.

    Raises:
        click.ClickException: The row has no such column, or it holds something other than text.
    """
    value: Any = row
    for key in path.split("."):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdigit():
            value = value[int(key)] if int(key) < len(value) else None
        elif value is not None:
            found = (f"{k} ({', '.join(v)})" if isinstance(v, Mapping) else k for k, v in row.items())
            raise click.ClickException(
                f"{source}: found the columns {', '.join(found)}, expected {corpus.expected}; "
                f"give a --source in the schema of {corpus.hub_id}."
            )
    if value is not None and not isinstance(value, (str, int) if is_id else str):
        kind = type(value).__name__
        raise click.ClickException(f"{source}: found {kind} in {path}, expected text; make it a string.")
    return "" if value is None else str(value).strip()


@contextmanager
def _replacing(out: Path) -> Iterator[TextIO]:
    """Open a temporary file beside `out` that takes its place at the end, or is removed on any error."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[], None]]:
    """Yield what to call after each row; shows a counter on stderr when that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    counter = TextColumn("{task.description}: {task.completed:,} rows")
    stderr = Console(stderr=True)
    with Progress(SpinnerColumn(), counter, TimeElapsedColumn(), console=stderr, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda: progress.advance(task)
