"""The choice of what profiles decode by."""

from __future__ import annotations

import pytest

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.rows import Row
from coreinfer_sim.base.settings import Profile
from coreinfer_sim.evaluation.contenders import Contender
from coreinfer_sim.evaluation.tune import (
    KEEP_RATIOS,
    READ_RATIOS,
    candidates,
    check_rows,
    choose_profiles,
    first_and_further,
    hopeful,
)


def test_tuning_wants_rows_of_every_set():
    check_rows(["a"] * 8 + ["b"] * 2, range(100))
    with pytest.raises(ConfigError, match="there are 9 rows to tune on, expected 10.*than 70:85"):
        check_rows(["a"] * 9, range(70, 85))
    with pytest.raises(ConfigError, match="there is one row of b, expected 2 or more of every set"):
        check_rows(["a"] * 9 + ["b"], range(100))


DENSE = Contender("dense")
DENSE_BYTES = 100


def summary_of(*rows):
    """Return a summary of dense decode and of contenders, each with the upper end of its interval and its MLP bytes."""
    return [
        {"contender": str(contender), "ratio": high - 0.01, "ratio_interval": [1.0, high], "n_rows": 5}
        | {"mlp_bytes_per_token": n, "total_bytes_per_token": n + 7}
        for contender, high, n in [(DENSE, 1.0, DENSE_BYTES), *rows]
    ]


def chosen(tried, highs, n_bytes, balanced=0.03, fast=0.1, layouts=None):
    """Return what balanced and fast are of contenders."""
    summary = summary_of(*zip(tried, highs, n_bytes, strict=True))
    found = choose_profiles([DENSE, *tried], summary, layouts, {Profile.BALANCED: balanced, Profile.FAST: fast})
    return found["balanced"], found["fast"]


def test_a_profile_is_the_fewest_bytes_that_keep_its_promise():
    tried = [Contender("similarity", ratio) for ratio in (0.4, 0.6, 0.8)]
    balanced, fast = chosen(tried, (1.2, 1.06, 1.01), (40, 60, 80))
    assert (balanced.keep_ratio, balanced.mlp_bytes, balanced.high, balanced.n_rows) == (0.8, 80, 1.01, 5)
    assert (fast.keep_ratio, fast.max_increase, fast.compensated) == (0.6, 0.1, False)
    assert (fast.total_bytes, fast.dense_total_bytes) == (67, 107) and fast.gain == pytest.approx(40 / 107)
    assert chosen(tried, (1.2, 1.06, 1.01), (40, 60, 80), 0.05, 0.5)[1].keep_ratio == 0.4


def test_a_profile_without_a_gain_is_dense_and_says_so():
    tried = [Contender("similarity", 0.6), Contender("similarity", 0.8)]
    for highs, n_bytes in (((1.2, 1.11), (60, 80)), ((1.0, 1.0), (101, 102))):  # too much of a loss, or nothing gained
        for profile in chosen(tried, highs, n_bytes):
            assert profile.is_dense and (profile.gain, profile.mlp_bytes, profile.high) == (0.0, DENSE_BYTES, 1.0)
    assert (
        profile.in_words() == "no gain: nothing that reads fewer bytes keeps perplexity within +10.0%, so dense decode"
    )


def test_of_as_many_bytes_a_profile_takes_the_sets_that_cost_less():
    tried = [Contender("similarity", 0.6, compensated=compensated) for compensated in (True, False)]
    for highs in ((1.02, 1.01), (1.01, 1.02)):
        found, _ = chosen(tried, highs, (60.01, 60))
        assert (found.compensated, found.high) == (highs[0] < highs[1], 1.01)


def test_hopeless_keep_ratios_are_dropped_early():
    rows = [Row(str(n), "p", completion="c", set_name=name) for name in ("a", "b") for n in range(20)]
    first, further = first_and_further(rows)
    assert first == [*rows[:5], *rows[20:25]] and further == [*rows[5:20], *rows[25:]]
    assert first_and_further(rows[:36]) == (rows[:36], [])  # 9 rows would say too little
    tried = [Contender("similarity", ratio) for ratio in (0.4, 0.6, 0.8)]
    summary = summary_of(*zip(tried, (1.2, 1.1, 1.01), (40, 60, 80), strict=True))
    for row, low in zip(summary, (1.2, 1.101, 1.09, 1.0), strict=True):
        row["ratio_interval"] = [low, 1.3]
    assert hopeful([*tried, DENSE], summary, 0.05) == [*tried[1:], DENSE]


def test_candidates_are_sets_and_tokens_that_choose(wide_index):
    found = candidates(wide_index)
    fitted = [info.keep_ratio for info in wide_index.manifest.compensation]
    assert {c.keep_ratio for c in found if c.name == "similarity"} == {*KEEP_RATIOS, *fitted}
    assert [c.read_ratio for c in found if c.name == "all"] == list(READ_RATIOS)
    assert not any(c.name == "all" for c in candidates(wide_index, by_token=False))
    assert {c.name for c in candidates(wide_index, keep_ratios=[0.5])} == {"similarity", "dense"}
    by_token = candidates(wide_index, read_ratios=[0.5, 0.3])
    assert [str(c) for c in by_token] == ["all 1 read 0.3", "all 1 read 0.5", "dense 16bit"]
    for named in ({"keep_ratios": [1.0]}, {"read_ratios": [0.5, 1.0]}):
        with pytest.raises(ConfigError, match="ratio 1 is dense decode"):
            candidates(wide_index, **named)


def test_every_type_of_weights_is_tried_densely_too(wide_index):
    found = candidates(wide_index, read_ratios=[0.5], kinds=["16bit", "int8", "int4"])
    assert [str(c) for c in found] == [
        *("all 1 read 0.5", "dense 16bit", "all 1 read 0.5 int8", "dense int8"),
        *("all 1 read 0.5 int4", "dense int4"),
    ]
    assert (
        str(candidates(wide_index, read_ratios=[0.5], kinds=["int8"])[0]) == "dense 16bit"
    )  # what it is compared with


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
        found, _ = chosen(tried, highs, (60, 40, 20), layouts=layouts)
        assert (found.read_ratio, found.weights, found.layout) == expected
        assert found.keep_ratio == 1.0 and found.of_sets == (expected[0] == 1.0)
        assert found.is_dense == (expected == (1.0, "stored", ""))
