"""Rows to evaluate on: prompt and completion, kept apart from what an index was built on by a hash of the id."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from coreinfer_sim.errors import CorpusError


@dataclass(frozen=True)
class Row:
    """One prompt with a good answer."""

    set_name: str
    id: str
    prompt: str
    completion: str


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
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                raw = json.loads(line)
                missing = {"id", "prompt", "completion"} - set(raw)
                if missing:
                    raise CorpusError(
                        f"{path}, line {number}, has the fields {sorted(raw)}, expected {', '.join(sorted(missing))} too; "
                        "evaluation needs id, prompt and completion."
                    )
                if hash_percent(str(raw["id"])) in part and raw["prompt"].strip() and raw["completion"].strip():
                    rows.append(Row(path.stem, str(raw["id"]), raw["prompt"], raw["completion"]))
                if len(rows) == limit:
                    break
    except (ValueError, TypeError, AttributeError) as error:
        raise CorpusError(f"{path} is no JSONL ({error}); expected one object a line.") from error
    if not rows:
        raise CorpusError(
            f"{path} holds no row whose id hashes into {part.start} to {part.stop - 1}; name a wider --part."
        )
    return rows


def joined(prompt: str, completion: str) -> tuple[str, str]:
    """Return prompt and completion as the model reads them: a newline between, unless the prompt ends in one."""
    return (prompt if prompt.endswith("\n") else prompt.rstrip() + "\n"), completion
