"""The choice of a keep ratio that keeps a promise."""

from __future__ import annotations

import pytest

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.rows import Row
from coreinfer_sim.evaluation.contenders import Contender
from coreinfer_sim.evaluation.tune import check_rows, choose_profile, first_and_further, hopeful


def test_tuning_wants_rows_of_every_set():
    check_rows(["a"] * 8 + ["b"] * 2, range(100))
    with pytest.raises(ConfigError, match="there are 9 rows to tune on, expected 10.*than 70:85"):
        check_rows(["a"] * 9, range(70, 85))
    with pytest.raises(ConfigError, match="there is one row of b, expected 2 or more of every set"):
        check_rows(["a"] * 9 + ["b"], range(100))


def summary_of(**bounds):
    return [
        {"contender": name, "ratio": high - 0.01, "ratio_interval": [1.0, high], "mlp_bytes_per_token": n, "n_rows": 5}
        for name, (high, n) in bounds.items()
    ]


def test_the_profile_is_the_fewest_bytes_that_keep_the_promise():
    tried = [Contender("similarity", ratio) for ratio in (0.4, 0.6, 0.8)]
    names = [str(contender) for contender in tried]
    summary = summary_of(**dict(zip(names, [(1.2, 40), (1.04, 60), (1.01, 80)], strict=True)))
    found = choose_profile(tried, summary, 0.05, 100)
    assert (found.keep_ratio, found.mlp_bytes, found.high, found.n_rows) == (0.6, 60, 1.04, 5)
    assert choose_profile(tried, summary, 0.5, 100).keep_ratio == 0.4
    dense = choose_profile(tried, summary, 0.005, 100)
    assert (dense.keep_ratio, dense.ratio, dense.mlp_bytes, dense.compensated) == (1.0, 1.0, 100, False)


def test_of_as_many_bytes_the_profile_takes_the_sets_that_cost_less():
    tried = [Contender("similarity", 0.6, compensated=compensated) for compensated in (True, False)]
    for highs in ((1.04, 1.02), (1.02, 1.04)):
        rounded_off = zip(tried, highs, (60_001, 60_000), strict=True)
        summary = summary_of(**{str(each): (high, n_bytes) for each, high, n_bytes in rounded_off})
        found = choose_profile(tried, summary, 0.05, 100)
        assert (found.compensated, found.high) == (highs[0] < highs[1], 1.02)


def test_hopeless_keep_ratios_are_dropped_early():
    rows = [Row(str(n), "p", completion="c", set_name=name) for name in ("a", "b") for n in range(20)]
    first, further = first_and_further(rows)
    assert first == [*rows[:5], *rows[20:25]] and further == [*rows[5:20], *rows[25:]]
    assert first_and_further(rows[:36]) == (rows[:36], [])  # 9 rows would say too little
    tried = [Contender("similarity", ratio) for ratio in (0.4, 0.6, 0.8)]
    names = [str(contender) for contender in tried]
    summary = summary_of(**dict(zip(names, [(1.2, 40), (1.1, 60), (1.01, 80)], strict=True)))
    for row, low in zip(summary, (1.101, 1.09, 1.0), strict=True):
        row["ratio_interval"] = [low, 1.3]
    assert hopeful(tried, summary, 0.05) == tried[1:]
