"""Rows that tests score, and results by hand."""

from __future__ import annotations

from coreinfer_sim.base.rows import Row
from coreinfer_sim.evaluation.results import Result

ROWS = [
    Row(str(n), f"What do {noun} do?", completion=f"Most {noun} sleep at night.", set_name="things")
    for n, noun in enumerate(["cats", "owls"])
]


def result(contender: str, set_name: str, row_id: str, n_tokens: int, loss: float, dense_loss: float) -> Result:
    """Return a result with half a nat of KL and half the likeliest tokens."""
    return Result(contender, set_name, row_id, n_tokens, loss, dense_loss, 0.5 * n_tokens, n_tokens // 2, None, 40, 100)
