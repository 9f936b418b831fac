"""The output head in two stages: a copy of few bits for all rows, and the exact rows of those that may be the greatest.

An exact row gives w·x, the copy w̃·x̃, where x̃ are the inputs as they are rounded for it. By Cauchy and Schwarz these differ by at
most ‖w - w̃‖·‖x̃‖ + ‖w‖·‖x - x̃‖. So the greatest logit is found exactly, and with it all that may lie less than `MARGIN` below.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from coreinfer_sim.engines.lean.intrinsics import address, serial
from coreinfer_sim.engines.lean.kernels import call_product, product_address
from coreinfer_sim.engines.lean.matrix import Array, Matrix
from coreinfer_sim.engines.lean.products import CODE_STEP, WEIGHTS, multiply, rounded

KIND = "Q6_0"
"""Of the copy: with fewer bits, the bound leaves too many rows."""
MARGIN = 3.0
"""Tokens that are e^-3 times as probable as the likeliest, or less, may have logits that are off by the bound."""
_SLACK = np.float32(1 + 1e-4)  # for what float32 rounds in the bound itself
_MARGIN = np.float32(MARGIN)
_ROWS = 4096


@dataclass(frozen=True, eq=False)
class CoarseHead:
    """The copy of an output head of floats without a bias, and what bounds its error."""

    copy: Matrix
    bounds: torch.Tensor
    """‖w - w̃‖ and ‖w‖ of each row, float32 [2, n_out]."""

    @classmethod
    def of(cls, head: Matrix) -> CoarseHead:
        """Round an output head."""
        copy = Matrix.of(head.weight, None, KIND)
        bounds = torch.empty(2, head.n_out)
        for begin in range(0, head.n_out, _ROWS):
            part = slice(begin, min(head.n_out, begin + _ROWS))
            exact = head.weight[part].float()
            bounds[0, part] = (exact - copy.widened(part.start, part.stop).T).norm(dim=1)
            bounds[1, part] = exact.norm(dim=1)
        return cls(copy, bounds)

    @cached_property
    def n_bytes(self) -> int:
        """Bytes that every token reads."""
        return self.copy.n_bytes + self.bounds.nbytes

    def loops(self, head: Matrix) -> tuple[Array, Array, int]:
        """Return what `logits_of` takes for a head: words of the copy, bounds, and the address of the product with a row."""
        return self.copy.words[None], self.bounds.numpy(), product_address(head.kind, 1)


def whole_head(head: Matrix) -> tuple[Array, Array, int]:
    """Return what `logits_of` takes for a head that is read as a whole."""
    return head.words[None], np.zeros((2, 0), np.float32), 0


@serial
def logits_of(head, loops, x, out, n_threads):
    """Set ``out`` [n_rows, n_out, filled up] to logits, and return how many exact rows were read behind a copy.

    Args:
        head: words of the head, int64 [1, N_WORDS].
        loops: see `CoarseHead.loops`.
        x: normalised states, float32 [n_rows, d_model].
        out: float32.
        n_threads: that products use.
    """
    copy, bounds, row_product = loops
    n, d_model, n_out = x.shape[0], x.shape[1], bounds.shape[1]
    codes, factors, sums = rounded(copy[0], x)
    multiply(n_threads, copy, x, codes, factors, sums, out)
    if n_out == 0:
        return 0
    row_bytes = head[0, CODE_STEP] // 16
    room = np.zeros(1, np.float32)
    errors = np.empty(n_out, np.float32)
    n_read = 0
    for r in range(n):
        # 1) the bound
        of_rounded, of_rest = np.float32(0.0), np.float32(0.0)
        for j in range(d_model):
            value = np.float32(codes[r, j]) * factors[r, j // 32]
            of_rounded += value * value
            of_rest += (x[r, j] - value) * (x[r, j] - value)
        of_rounded, of_rest = np.sqrt(of_rounded) * _SLACK, np.sqrt(of_rest) * _SLACK
        least = np.float32(-3.0e38)
        for i in range(n_out):
            errors[i] = bounds[0, i] * of_rounded + bounds[1, i] * of_rest
            least = max(least, out[r, i] - errors[i])
        # 2) exact rows
        for i in range(n_out):
            if out[r, i] + errors[i] >= least - _MARGIN:
                row = head[0, WEIGHTS] + i * row_bytes
                call_product(row_product, (row, 0, address(x[r]), 0, 0, 0, d_model, 1, address(room), 1))
                out[r, i] = room[0]
                n_read += 1
    return n_read
