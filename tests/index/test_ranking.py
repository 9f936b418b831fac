"""The best neurons: how many, in which order, and ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.index.ranking import n_kept, top_ids, top_mask


def ids_of(mask):
    return [np.flatnonzero(row).tolist() for row in np.asarray(mask)]


@pytest.mark.parametrize(
    ("ratio", "d_ff", "expected"),
    [(1.0, 48, 48), (0.5, 48, 24), (0.4, 48, 19), (0.8, 5, 4), (0.001, 48, 1), (0.29, 100, 29), (0.999, 10, 9)],
)
def test_n_kept_is_rounded_down_but_at_least_one(ratio, d_ff, expected):
    assert n_kept(ratio, d_ff) == expected


def test_n_kept_of_whole_percents_is_exact():
    assert [n_kept(percent / 100, 100) for percent in range(1, 101)] == list(range(1, 101))
    assert [n_kept(percent / 100, 14300) for percent in range(1, 101)] == [143 * percent for percent in range(1, 101)]


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_n_kept_refuses_what_is_no_ratio(ratio):
    with pytest.raises(ConfigError, match="keep ratio"):
        n_kept(ratio, 48)


def test_top_mask_breaks_ties_by_activation_then_id():
    counts = np.array([[3, 1, 1, 1, 0], [2, 2, 2, 2, 2], [0, 0, 0, 0, 9]])
    activation = np.array([[0.0, 5.0, 7.0, 5.0, 99.0], [1.0, 1.0, 1.0, 4.0, 1.0], [0, 0, 0, 0, 0]], np.float32)
    assert ids_of(top_mask(counts, activation, 2)) == [[0, 2], [0, 3], [0, 4]]
    assert ids_of(top_mask(counts, activation, 3)) == [[0, 1, 2], [0, 1, 3], [0, 1, 4]]
    assert top_mask(counts, activation, 5).all()


def test_top_ids_breaks_ties_by_activation_then_id():
    score = np.array([3.0, 1.0, 1.0, 1.0, 0.0])
    activation = np.array([0.0, 5.0, 7.0, 5.0, 99.0])
    assert top_ids(score, activation, 1).tolist() == [0]
    assert top_ids(score, activation, 2).tolist() == [0, 2]
    assert top_ids(score, activation, 3).tolist() == [0, 1, 2]
    assert top_ids(score, activation, 5).tolist() == [0, 1, 2, 3, 4]


def plain_order(counts, activation):
    """Ids from best to worst, by one comparison after the other."""
    return sorted(range(len(counts)), key=lambda n: (-int(counts[n]), -float(activation[n]), n))


@st.composite
def scored_rows(draw, activation):
    n_rows, d_ff = draw(st.integers(1, 4)), draw(st.integers(1, 30))
    highest = draw(st.sampled_from([0, 1, 3, 500]))
    row = st.lists(st.integers(0, highest), min_size=d_ff, max_size=d_ff)
    counts = draw(st.lists(row, min_size=n_rows, max_size=n_rows))
    values = draw(st.lists(st.lists(activation, min_size=d_ff, max_size=d_ff), min_size=n_rows, max_size=n_rows))
    return np.array(counts, np.int32), np.array(values, np.float32), draw(st.integers(1, d_ff))


FEW_VALUES = st.sampled_from([0.0, 0.25, 1.0, 3.0])
MANY_VALUES = st.floats(0, 2.0**20, width=32).map(lambda value: round(value * 4096) / 4096)


@given(scored_rows(st.one_of(FEW_VALUES, MANY_VALUES)))
@settings(max_examples=300, deadline=None)
def test_top_mask_agrees_with_a_sort(rows):
    counts, activation, n = rows
    mask = top_mask(counts, activation, n)
    assert mask.sum(axis=1).tolist() == [n] * len(counts)
    for row in range(len(counts)):
        best = sorted(plain_order(counts[row], activation[row])[:n])
        assert np.flatnonzero(mask[row]).tolist() == best
        assert top_ids(counts[row], activation[row], n).tolist() == best


@given(scored_rows(st.floats(0, float(np.finfo(np.float32).max), width=32)))
@settings(max_examples=150, deadline=None)
def test_top_mask_marks_exactly_n_for_any_activation(rows):
    counts, activation, n = rows
    mask = top_mask(counts, activation, n)
    assert mask.sum(axis=1).tolist() == [n] * len(counts)
    for marked, count in zip(mask, counts, strict=True):
        if not marked.all():
            assert count[marked].min() >= count[~marked].max()
