"""What differs between the settings of two runs is named, with both values where they are short."""

from __future__ import annotations

from coreinfer_sim.base.resuming import differing


def test_settings_that_differ_are_named():
    wanted = {"seed": 1, "limit": 50, "model": "a" * 99, "config": {"alpha": 0.4, "compensation": {"tokens": 300}}}
    assert differing(wanted, wanted) == []
    found = {"seed": 1, "model": "b", "config": {"alpha": 0.5, "compensation": {"tokens": 200}}}
    assert differing(found, wanted) == [
        "limit (not given there, 50 here)",
        "model",
        "alpha (0.5 there, 0.4 here)",
        "compensation tokens (200 there, 300 here)",
    ]
    assert differing(None, {"seed": 1}) == ["seed (not given there, 1 here)"]
