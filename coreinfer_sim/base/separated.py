"""Separated values: the separator is recognised, and a row with more or fewer fields than the header is refused."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator, Sequence

from coreinfer_sim.base.errors import CorpusError
from coreinfer_sim.base.progress import counted
from coreinfer_sim.base.settings import SEPARATORS
from coreinfer_sim.base.stores import AnyFile
from coreinfer_sim.base.text_files import open_text

_SNIFFED = 1 << 18
_MOST_IN_FIELD = 1 << 28


def separator_of(path: AnyFile, named: str | None, usual: str) -> str:
    """Return the separator that was named, or else the one with which the most rows have as many fields as the header."""
    if named is not None:
        return SEPARATORS.get(named, named)
    with open_text(path) as file:
        sample = file.read(_SNIFFED)
        whole = not file.read(1)
    first = io.StringIO(sample, newline="").readline()
    if _names_separator(first):
        return first.strip()[-1]
    best, found = (0.0, 1), usual
    for separator in (usual, *(each for each in dict.fromkeys(SEPARATORS.values()) if each != usual)):
        try:
            rows = [row for row in csv.reader(io.StringIO(sample, newline=""), delimiter=separator) if row]
        except csv.Error:
            continue
        rows = rows if whole or len(rows) < 2 else rows[:-1]
        n_columns = len(rows[0]) if rows else 0
        score = (sum(len(row) == n_columns for row in rows) / max(1, len(rows)), n_columns)
        if n_columns > 1 and score > best:
            best, found = score, separator
    return found


def separated_rows(
    path: AnyFile, separator: str, columns: Sequence[str] | None
) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Draw the rows of a file with their lines; an empty field is None.

    Args:
        path: of the file.
        separator: one character.
        columns: that are asked for, each of which must be there once; None: all.

    Raises:
        CorpusError: a ragged row, or quotes that do not end; the message names the line.
    """
    csv.field_size_limit(_MOST_IN_FIELD)
    with open_text(path) as file:
        first = file.readline()
        skipped = n_before = 1 if _names_separator(first) else 0
        lines = file if skipped else itertools.chain([first], file)
        reader, header = csv.reader(lines, delimiter=separator, strict=True), None
        try:
            for row in reader:
                begin, n_before = n_before + 1, reader.line_num + skipped
                if not row:
                    continue
                if header is None:
                    header = [name.strip() for name in row]
                    check_once(path, header, columns)
                    continue
                if len(row) != len(header):
                    raise CorpusError(
                        f"{path}, line {begin:,}, has {counted(len(row), 'field')}, expected {len(header)} as in its header, "
                        f"parted by {separator!r}; put quotes around a field that holds the separator, or name another one in "
                        "corpus.separator."
                    )
                yield begin, {name: value or None for name, value in zip(header, row, strict=True)}
        except csv.Error as error:
            reason = "a quoted field does not end" if "end of data" in str(error) else error
            raise CorpusError(
                f"{path}, line {n_before + 1:,}, cannot be read ({reason}); mend the quotes of this row."
            ) from error


def _names_separator(line: str) -> bool:
    """Tell whether a file's first line is Excel's way to name the separator."""
    return line.lower().startswith("sep=") and len(line.strip()) == 5


def check_once(path: AnyFile, header: Sequence[str], columns: Sequence[str] | None) -> None:
    """Raise CorpusError if a column that is asked for is in a file's header more than once."""
    twice = sorted({name for name in header if header.count(name) > 1} & set(columns or ()))
    if twice:
        raise CorpusError(f"{path} has several columns called {twice[0]!r}, expected one; rename them.")
