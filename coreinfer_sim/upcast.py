"""Prefill in 16 bits on a CPU that cannot multiply them: weights are widened block by block and multiplied as float32.

Such a CPU multiplies bfloat16 matrices about ten times as slowly as float32 ones. Widening costs one pass over a weight,
which the many tokens of a prompt share; a block stays in the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

_BLOCK = 2**21  # weights that are widened at a time


def _widened_product(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    weight, rows = linear.weight, x.reshape(-1, x.shape[-1]).float()
    out = torch.empty(len(rows), len(weight))
    step = max(1, _BLOCK // weight.shape[1])
    for begin in range(0, len(weight), step):
        torch.mm(rows, weight[begin : begin + step].float().T, out=out[:, begin : begin + step])
    if linear.bias is not None:
        out += linear.bias
    return out.to(x.dtype).reshape(*x.shape[:-1], len(weight))


def _product(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Multiply as `nn.Linear` does, in float32 where ``x`` has rows enough to pay for it."""
    if x.numel() // x.shape[-1] < 4 or x.requires_grad or linear.weight.requires_grad and torch.is_grad_enabled():
        return F.linear(x, linear.weight, linear.bias)
    return _widened_product(linear, x)


@contextmanager
def upcast_products(model: nn.Module) -> Iterator[None]:
    """Let a model's 16-bit linear layers multiply in float32 within the block; their weights stay as they are."""
    changed = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
    for module in changed:
        module.forward = functools.partial(_product, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in changed:
            del module.forward
