"""Sums that add up, and intervals as wide as they ought to be."""

from __future__ import annotations

import math

import pytest
from scored import result

from coreinfer_sim.evaluation.summary import summarise


def test_sums_by_hand():
    results = [
        result("a", "one", "1", 2, 2.0, 1.0),
        result("a", "one", "2", 2, 4.0, 3.0),
        result("a", "two", "3", 4, 12.0, 4.0),
        result("a", "two", "4", 6, 18.0, 6.0),
    ]
    (row,) = summarise(results)
    assert row["sets"]["one"]["ratio"] == pytest.approx(math.exp(0.5), abs=1e-4)
    assert row["sets"]["one"]["perplexity"] == pytest.approx(math.exp(1.5), abs=1e-3)
    assert row["sets"]["two"]["ratio"] == pytest.approx(math.exp(2), abs=1e-4)
    assert row["ratio"] == pytest.approx(math.exp(1.25), abs=1e-3)
    low, high = row["ratio_interval"]
    assert low <= row["ratio"] <= high
    assert (row["kl"], row["same_top"], row["mlp_bytes_per_token"], row["n_rows"]) == (0.5, 0.5, 40, 4)


def test_an_interval_needs_two_rows_of_every_set_and_is_as_wide_as_their_difference():
    pair = [result("a", "one", str(n), 1, loss, 0.0) for n, loss in enumerate((0.0, 2.0))]
    (row,) = summarise(pair)
    low, high = row["ratio_interval"]
    spread = math.sqrt(2)  # draws are 0, 1 or 2 away; of two rows the variance of the mean is twice theirs
    assert (low, high) == (pytest.approx(math.exp(1 - spread), abs=1e-3), pytest.approx(math.exp(1 + spread), abs=1e-3))
    (row,) = summarise([*pair, result("a", "two", "1", 1, 1.0, 0.0)])
    assert row["ratio_interval"] is None
