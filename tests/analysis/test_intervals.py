"""Intervals: those of textbooks where textbooks have one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from coreinfer_sim.analysis.intervals import N_GROUPS, Measure, ratio, with_intervals


def mean(sums):
    return [Measure({"measure": "mean"}, ratio(sums["values"], sums["texts"]))]


def test_of_a_mean_the_interval_is_students():
    values = np.random.default_rng(0).normal(5, 2, N_GROUPS)
    (row,) = with_intervals({"texts": np.ones(N_GROUPS), "values": values}, mean)
    low, high = stats.t.interval(0.95, N_GROUPS - 1, values.mean(), stats.sem(values))
    assert (row["value"], row["low"], row["high"]) == pytest.approx((values.mean(), low, high), rel=1e-4)


def test_it_covers_the_truth_in_about_19_of_20_cases():
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        texts = random.integers(20, 40, N_GROUPS)
        values = np.array([random.exponential(3.0, n).sum() for n in texts])
        (row,) = with_intervals({"texts": texts, "values": values}, mean)
        hits += row["low"] <= 3.0 <= row["high"]
    assert 0.91 < hits / 400 < 0.98


def test_groups_without_a_text_do_not_count():
    texts = np.array([1, 1, 1] + [0] * (N_GROUPS - 3))
    (row,) = with_intervals({"texts": texts, "values": texts * np.arange(1.0, N_GROUPS + 1)}, mean)
    half = stats.t.ppf(0.975, 2) * stats.sem([1, 2, 3])
    assert (row["value"], row["low"], row["high"]) == pytest.approx((2, 2 - half, 2 + half), rel=1e-4)


def test_one_group_tells_nothing_of_the_interval_and_no_text_of_the_value():
    texts = np.array([4] + [0] * (N_GROUPS - 1))
    (row,) = with_intervals({"texts": texts, "values": 2.0 * texts}, mean)
    assert (row["value"], row["low"], row["high"]) == (2.0, None, None)
    (row,) = with_intervals({"texts": texts * 0, "values": 2.0 * texts}, mean)
    assert (row["value"], row["low"], row["high"]) == (None, None, None)


def test_a_ratios_interval_stays_above_zero():
    def as_ratio(sums):
        return [Measure({}, float(np.exp(sums["values"] / sums["texts"])), is_ratio=True)]

    values = np.array([0.0, 9.0] * (N_GROUPS // 2))
    (row,) = with_intervals({"texts": np.ones(N_GROUPS), "values": values}, as_ratio)
    low, high = stats.t.interval(0.95, N_GROUPS - 1, values.mean(), stats.sem(values))
    assert (row["low"], row["high"]) == pytest.approx((np.exp(low), np.exp(high)), rel=1e-3)
