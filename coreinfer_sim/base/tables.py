"""Rows of Arrow tables, their values as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any


def rows_of_table(tables: Iterable[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Draw the rows of Arrow tables or batches with their numbers, from 1.

    A value is the text that a person would write for it: 7, 0.5, true, 2024-01-05, 1:30:00. None stays None, and what is not
    a number is None too; lists and structures stay nested.
    """
    number = 0
    for table in tables:
        columns = {name: _texts(table.column(place)) for place, name in enumerate(table.schema.names)}
        for place in range(table.num_rows):
            number += 1
            yield number, {name: values[place] for name, values in columns.items()}


def _texts(column: Any) -> list[Any]:
    import numpy as np
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        try:
            return list(column.to_pylist())
        except UnicodeDecodeError:  # Parquet keeps bytes, whatever they are called
            column = column.cast(pa.binary() if pa.types.is_string(kind) else pa.large_binary())
            kind = column.type
    if pa.types.is_duration(kind):
        with suppress(pa.ArrowInvalid):  # nanoseconds are pandas's to write
            column = column.cast(pa.duration("us"))
    values = column.to_pylist()
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in values]
    if pa.types.is_nested(kind):
        return list(values)
    if pa.types.is_floating(kind):
        short = np.dtype(kind.to_pandas_dtype()).type  # 0.1 in 32 bits is 0.1, not 0.10000000149
        return [None if value is None or value != value else _plain(short(value)) for value in values]
    if pa.types.is_decimal(kind):
        return [None if value is None else f"{value:f}" for value in values]
    if pa.types.is_boolean(kind):
        return [None if value is None else str(value).lower() for value in values]
    return [None if value is None else str(value) for value in values]


def _plain(number: Any) -> str:
    """Write a number of numpy without an exponent, unless it has more digits before or behind its point than anyone writes."""
    import numpy as np

    is_usual = number == 0 or 1e-16 < abs(number) < 1e16
    return np.format_float_positional(number, trim="0") if is_usual else str(number)
