"""Speed over what grows is drawn."""

from __future__ import annotations

from itertools import count

from coreinfer_sim.bench.plot import plot_growth


def test_growth_is_drawn(tmp_path):
    numbers = count(1)
    lines = {name: [(2**n, float(next(numbers))) for n in range(3)] for name in ("ours", "dense")}
    plot_growth({"prompt tokens": lines, "rows": lines}, "tiny", tmp_path / "growth.svg")
    assert (tmp_path / "growth.svg").read_text().startswith("<?xml")
