"""Rows to evaluate on: prompts with completions, kept apart from what an index was built on by a hash of the id."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from coreinfer_sim.base.corpus_files import set_name
from coreinfer_sim.base.errors import CorpusError
from coreinfer_sim.base.progress import Progress, counted
from coreinfer_sim.base.rows import CorpusReport, Row, check_no_build, describe_corpus, read_completions
from coreinfer_sim.base.settings import CorpusConfig


def hash_percent(row_id: str) -> int:
    """Return a number in 0 to 99 that depends on the id alone."""
    return int(hashlib.sha256(row_id.encode()).hexdigest()[:8], 16) % 100


def read_rows(
    source: str | Path,
    part: range,
    limit: int | None,
    corpus: CorpusConfig | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Read the rows of a file or data set whose id hashes into ``part``.

    Args:
        source: of any kind that a build reads, with prompts and completions, or conversations.
        part: of the 100 parts into which ids hash; a row without an id has its number for one.
        limit: take at most this many, in the source's order.
        corpus: how it is read; its own source is not looked at.
        progress: takes a line where something was mended.

    Raises:
        CorpusError: no such file, damaged, columns missing, or no row in the part.
    """
    config = replace(corpus or CorpusConfig(""), source=str(source))
    path, report = config.source, CorpusReport()
    check_no_build(config)
    if progress is not None:
        progress.say(f"Reading {describe_corpus(config)}.")
    rows: list[Row] = []
    for row in read_completions(config, report):
        if hash_percent(row.id) in part:
            rows.append(row)
        if len(rows) == limit:
            break
    remarks = report.remarks()
    if progress is not None and remarks:
        progress.say(f"{path}: {'; '.join(remarks)}.")
    n_rows, n_empty = report.n_rows, report.n_empty
    if not rows:
        if not n_rows:
            raise CorpusError(f"{path} is empty, expected one object a line; give a file with rows.")
        found = f"{counted(n_rows, 'row')}, {n_empty} of them without prompt or completion"
        raise CorpusError(
            f"{path} holds {found}, and none whose id hashes into {part.start} to {part.stop - 1}; "
            + ("give a file with rows." if n_rows == n_empty else "name a wider part.")
        )
    return rows


def read_sets(
    sources: Sequence[str | Path],
    part: range,
    limit: int | None,
    corpus: CorpusConfig | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Read the rows of several files or data sets, one set each; arguments and errors as for `read_rows`.

    Raises:
        CorpusError: scores could not be told apart: two files of one name, or two rows of one id.
    """
    rows = [row for source in sources for row in read_rows(source, part, limit, corpus, progress)]
    names = [set_name(str(source)) for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise CorpusError(f"two sets are called {twice}, expected each to have its own name; rename a file.")
    known: set[tuple[str, str]] = set()
    for row in rows:
        if (row.set_name, row.id) in known:
            raise CorpusError(
                f"two rows of {row.set_name} have the id {row.id!r}, expected each to have its own; rename one."
            )
        known.add((row.set_name, row.id))
    return rows


def joined(prompt: str, completion: str) -> tuple[str, str]:
    """Return prompt and completion as the model reads them: a newline between, unless the prompt ends in one."""
    return (prompt if prompt.endswith("\n") else prompt.rstrip() + "\n"), completion
