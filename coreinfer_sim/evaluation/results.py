"""Scores of contenders on rows, kept in a log from which a later run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from coreinfer_sim.base.errors import ConfigError, CorpusError
from coreinfer_sim.base.progress import counted
from coreinfer_sim.base.resuming import differing


@dataclass(frozen=True)
class Result:
    """One contender's score on one row."""

    contender: str
    set_name: str
    row_id: str
    n_tokens: int
    loss: float
    dense_loss: float
    kl: float
    n_same_top: int
    cluster: int | None
    mlp_bytes: int
    total_bytes: int
    text: str | None = None
    """Generated in place of the completion; None: nothing was generated."""
    reference: str | None = None
    """The row's completion, beside a generated text."""
    max_new_tokens: int | None = None
    """Under which the text was generated."""
    row_digest: str = ""
    """Of the texts that were scored, `Row.digest`."""
    read_ratio: float = 1.0
    """Share of the model's neurons that a token read in full, on average."""


def open_log(path: Path, setup: dict[str, Any]) -> TextIO:
    """Open a log for further results; its first line says what they were made with.

    Args:
        path: of the log.
        setup: everything but contenders and rows that scores depend on, as plain JSON types.

    Raises:
        ConfigError: the log was made with something else.
    """
    found = None
    if path.exists() and path.stat().st_size:
        with path.open(encoding="utf-8") as file:
            try:
                found = json.loads(file.readline())["setup"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path} is no log of evaluate, expected one or a new file; name another.") from error
        different = differing(found, setup)
        if different:
            raise ConfigError(
                f"{path} holds scores of other settings – {', '.join(different)} –, expected the same to go on; name "
                "another log."
            )
    whole = found is None or _ends_a_line(path)
    file = path.open("a", encoding="utf-8")
    if not whole:
        file.write("\n")  # what a kill cut short stays a line of its own
    if found is None:
        file.write(json.dumps({"setup": setup}) + "\n")
        file.flush()
    return file


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def read_results(path: Path) -> list[Result]:
    """Read the log of an earlier run; a last line that a kill cut short is dropped."""
    results = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                results.append(Result(**json.loads(line)))
            except (ValueError, TypeError):
                continue
    return results


def check_scored(results: Sequence[Result], n_rows: int) -> None:
    """Raise CorpusError if none of ``n_rows`` rows could be scored."""
    if not results:
        raise CorpusError(
            f"none of {counted(n_rows, 'row')} has two completion tokens, of which decode scores the second on; give longer "
            "completions or a larger max_tokens."
        )
