"""Intervals by the delete-a-group jackknife: sums of a fixed number of groups of texts, whatever the number of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

N_GROUPS = 16
Sums = dict[str, np.ndarray]
"""By name; the first axis is the group of texts."""


class Measure(NamedTuple):
    """One number that an experiment finds."""

    labels: dict[str, Any]
    """What it is of: "measure", and further facts such as layer or position."""
    value: float
    """Of all texts; nan where nothing was to be counted."""
    is_ratio: bool = False
    """Whether it is above zero and may be many times as large: the interval is then that of its logarithm."""


def with_intervals(
    sums: Sums, measures: Callable[[Sums], Sequence[Measure]], unit: str = "texts"
) -> list[dict[str, Any]]:
    """Return each measure's labels, its value, and the ends of its 95 % interval.

    Groups of texts are left out in turn, and the interval is Student's, with one degree of freedom fewer than groups
    (Kott, The delete-a-group jackknife, 2001). None stands for what texts of one group alone cannot tell.

    Args:
        sums: of each group.
        measures: turns sums without their first axis into numbers, always as many and in the same order.
        unit: the sum that is zero for groups that tell nothing.
    """
    from scipy.stats import t

    used = np.flatnonzero(sums[unit])
    total = {name: values[used].sum(axis=0) for name, values in sums.items()}
    found = measures(total)
    left = [
        [each.value for each in measures({name: total[name] - values[group] for name, values in sums.items()})]
        for group in used
        if len(used) > 1
    ]
    rows = []
    for place, (labels, value, is_ratio) in enumerate(found):
        row = {**labels, "value": _rounded(value), "low": None, "high": None}
        without, middle = np.array([values[place] for values in left]), value
        if is_ratio:
            without, middle = np.log(without), float(np.log(value))
        if len(without) > 1 and np.isfinite(without).all() and np.isfinite(value):
            n = len(without)
            deviation = np.sqrt((n - 1) / n * np.square(without - without.mean()).sum())
            half = float(t.ppf(0.975, n - 1) * deviation)
            low, high = np.exp([middle - half, middle + half]) if is_ratio else (middle - half, middle + half)
            row |= {"low": _rounded(low), "high": _rounded(high)}
        rows.append(row)
    return rows


def ratio(part: Any, whole: Any) -> float:
    """Return a share as a number, nan of nothing."""
    return float(part) / float(whole) if float(whole) else float("nan")


def _rounded(value: float) -> float | None:
    """Return five digits, or None for what is no number."""
    return float(f"{value:.5g}") if np.isfinite(value) else None
