"""Rows to evaluate on: prompt and completion, kept apart from what an index was built on by a hash of the id."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from coreinfer_sim.base.errors import CorpusError
from coreinfer_sim.base.progress import counted
from coreinfer_sim.base.rows import Row, read_completions


def hash_percent(row_id: str) -> int:
    """Return a number in 0 to 99 that depends on the id alone."""
    return int(hashlib.sha256(row_id.encode()).hexdigest()[:8], 16) % 100


def read_rows(path: str | Path, part: range, limit: int | None) -> list[Row]:
    """Read the rows of a JSONL file whose id hashes into ``part``.

    Args:
        path: JSONL with "id", "prompt" and "completion".
        part: of the 100 parts into which ids hash.
        limit: take at most this many, in the file's order.

    Raises:
        CorpusError: no such file, no JSONL, fields missing, or no row in the part.
    """
    path = Path(path)
    rows: list[Row] = []
    n_rows, n_empty = 0, 0
    for row in read_completions(path):
        n_rows += 1
        if not row.prompt.strip() or not row.completion.strip():
            n_empty += 1
        elif hash_percent(row.id) in part:
            rows.append(row)
        if len(rows) == limit:
            break
    if not rows:
        if not n_rows:
            raise CorpusError(f"{path} is empty, expected one object a line; give a file with rows.")
        found = f"{counted(n_rows, 'row')}, {n_empty} of them without prompt or completion"
        raise CorpusError(
            f"{path} holds {found}, and none whose id hashes into {part.start} to {part.stop - 1}; "
            + ("give a file with rows." if n_rows == n_empty else "name a wider part.")
        )
    return rows


def read_sets(paths: Sequence[str | Path], part: range, limit: int | None) -> list[Row]:
    """Read the rows of several files, one set each; arguments and errors as for `read_rows`.

    Raises:
        CorpusError: scores could not be told apart: two files of one name, or two rows of one id.
    """
    rows = [row for path in paths for row in read_rows(path, part, limit)]
    names = [Path(path).stem for path in paths]
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
