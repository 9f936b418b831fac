"""The choice of a keep ratio that keeps a promise."""

from __future__ import annotations

import pytest

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.rows import Row
from coreinfer_sim.evaluation.contenders import Contender
from coreinfer_sim.evaluation.tune import (
    KEEP_RATIOS,
    READ_RATIOS,
    candidates,
    check_rows,
    choose_profile,
    first_and_further,
    hopeful,
)


def test_tuning_wants_rows_of_every_set():
    check_rows(["a"] * 8 + ["b"] * 2, range(100))
    with pytest.raises(ConfigError, match="there are 9 rows to tune on, expected 10.*than 70:85"):
        check_rows(["a"] * 9, range(70, 85))
    with pytest.raises(ConfigError, match="there is one row of b, expected 2 or more of every set"):
        check_rows(["a"] * 9 + ["b"], range(100))


def summary_of(**bounds):
    return [
        {"contender": name, "ratio": high - 0.01, "ratio_interval": [1.0, high], "n_rows": 5}
        | {"mlp_bytes_per_token": n, "total_bytes_per_token": n + 7}
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


def test_candidates_are_sets_and_tokens_that_choose(wide_index):
    found = candidates(wide_index)
    fitted = [info.keep_ratio for info in wide_index.manifest.compensation]
    assert {c.keep_ratio for c in found if c.name == "similarity"} == {*KEEP_RATIOS, *fitted}
    assert [c.read_ratio for c in found if c.name == "all"] == list(READ_RATIOS)
    assert not any(c.name == "all" for c in candidates(wide_index, by_token=False))
    assert {c.name for c in candidates(wide_index, keep_ratios=[0.5])} == {"similarity"}
    assert [str(c) for c in candidates(wide_index, read_ratios=[0.5, 0.3])] == ["all 1 read 0.3", "all 1 read 0.5"]
    for named in ({"keep_ratios": [1.0]}, {"read_ratios": [0.5, 1.0]}):
        with pytest.raises(ConfigError, match="ratio 1 is dense decode"):
            candidates(wide_index, **named)


def test_rounded_weights_are_tried_densely_too(wide_index):
    found = candidates(wide_index, read_ratios=[0.5], kinds=["16bit", "int8", "int4"])
    assert [str(c) for c in found] == [
        *("all 1 read 0.5", "all 1 read 0.5 int8", "dense int8"),
        *("all 1 read 0.5 int4", "dense int4"),
    ]


def test_the_profile_names_ratio_type_and_layout():
    tried = [
        Contender("all", read_ratio=0.4),
        Contender("all", weights="int8", read_ratio=0.5),
        Contender("dense", weights="int4"),
    ]
    layouts = {"16bit": "bfloat16", "int8": "Q8_0 high"}
    for highs, expected in (
        ((1.01, 1.2, 1.3), (0.4, "stored", "bfloat16")),
        ((1.01, 1.02, 1.3), (0.5, "int8", "Q8_0 high")),
        ((1.01, 1.02, 1.02), (1.0, "int4", "")),
        ((1.2, 1.2, 1.2), (1.0, "stored", "")),
    ):
        numbers = zip(tried, highs, (60, 40, 20), strict=True)
        summary = summary_of(**{str(each): (high, n_bytes) for each, high, n_bytes in numbers})
        found = choose_profile(tried, summary, 0.05, 100, layouts)
        assert (found.read_ratio, found.weights, found.layout) == expected
        assert found.keep_ratio == 1.0 and found.of_sets == (expected[0] == 1.0)
