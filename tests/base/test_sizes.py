"""Sizes are read from text."""

from __future__ import annotations

import pytest

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import parse_size


@pytest.mark.parametrize(
    ("text", "expected"), [("2GiB", 2 << 30), ("500 MB", 500_000_000), ("1.5kb", 1500), ("77", 77), ("8B", 8)]
)
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "2 apples", "0"])
def test_no_sizes(text):
    with pytest.raises(ConfigError, match="no size"):
        parse_size(text)
