"""Rows to evaluate on: prompt and completion, kept apart from what an index was built on by a hash of the id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreinfer_sim.base.errors import CorpusError
from coreinfer_sim.base.progress import counted


@dataclass(frozen=True)
class Row:
    """One prompt with a good answer."""

    set_name: str
    id: str
    prompt: str
    completion: str

    @property
    def digest(self) -> str:
        """Tells the row's texts from others that come under the same name."""
        return hashlib.sha256(f"{self.prompt}\0{self.completion}".encode("utf-8", "surrogatepass")).hexdigest()[:16]


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
    n_lines = n_empty = 0
    try:
        with path.open(encoding="utf-8") as file:
            for n_lines, line in enumerate(file, 1):
                try:
                    row = _row(path, n_lines, json.loads(line))
                except ValueError as error:
                    raise CorpusError(
                        f"{path}, line {n_lines}, is no JSON ({error}); expected one object a line; mend or remove it."
                    ) from error
                if not row.prompt.strip() or not row.completion.strip():
                    n_empty += 1
                elif hash_percent(row.id) in part:
                    rows.append(row)
                if len(rows) == limit:
                    break
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 ({error.reason}), expected UTF-8 text; convert it first.") from error
    if not rows:
        if not n_lines:
            raise CorpusError(f"{path} is empty, expected one object a line; give a file with rows.")
        found = f"{counted(n_lines, 'row')}, {n_empty} of them without prompt or completion"
        raise CorpusError(
            f"{path} holds {found}, and none whose id hashes into {part.start} to {part.stop - 1}; "
            + ("give a file with rows." if n_lines == n_empty else "name a wider --part.")
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


def _row(path: Path, number: int, raw: Any) -> Row:
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
    return Row(path.stem, str(raw["id"]), raw["prompt"], raw["completion"])


def joined(prompt: str, completion: str) -> tuple[str, str]:
    """Return prompt and completion as the model reads them: a newline between, unless the prompt ends in one."""
    return (prompt if prompt.endswith("\n") else prompt.rstrip() + "\n"), completion
