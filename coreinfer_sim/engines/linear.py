"""Linear layers of a model whose own code runs on a CPU, multiplied by one fixed rule.

torch reads some shapes of 16-bit weights at a twentieth of the memory's speed when few rows are multiplied, and processors
without instructions for a type multiply many rows slowly in it. So, whatever the clock says:

- fewer than `FEW` rows with 16-bit weights: our compiled loops, which read each weight once;
- more rows in a type that the processor has no instructions for: torch in float32, some weights at a time;
- everything else: torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear

from coreinfer_sim.engines.lean.intrinsics import bits
from coreinfer_sim.engines.lean.products import linear
from coreinfer_sim.models.loading import usable

FEW = 8
"""Rows below which a product is bound by reading its weights."""
_BLOCK = 1 << 21  # weights that are widened at a time
_LINEAR = (nn.Linear, FalconLinear)
_LOOPS = (torch.bfloat16, torch.float16)


class Product:
    """One linear layer's forward code, in place of its own; it holds the weights, but not the layer."""

    def __init__(self, layer: nn.Linear) -> None:
        """Multiply by the weights of ``layer``."""
        self.weight, self.bias = layer.weight, layer.bias
        dtype = self.weight.dtype
        # a transposed view would make the loops compile anew
        self.loops = dtype in _LOOPS and self.weight.is_contiguous()
        self.widens = usable(dtype, "cpu") is not dtype

    @functools.cached_property
    def arrays(self) -> tuple[Any, Any, Any]:
        """Weight, scale and bias as `products.linear` expects them."""
        n_out = len(self.weight)
        bias = np.zeros(n_out, np.float32) if self.bias is None else self.bias.detach().float().numpy()
        return bits(self.weight), np.ones(n_out, np.float32), bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., n_in] to [..., n_out]."""
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(-1, x.shape[-1])
        if self.loops and len(rows) < FEW:
            out = torch.empty(len(rows), len(self.weight))
            linear(*self.arrays, rows.detach().float().contiguous().numpy(), out.numpy())
            made = out.to(x.dtype)
        elif self.widens:
            made = widened_product(rows.float(), self.weight, self.bias).to(x.dtype)
        else:
            made = F.linear(rows, self.weight, self.bias)
        return made.reshape(*x.shape[:-1], len(self.weight))


def widened_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply float32 rows [n_rows, n_in] with a weight [n_out, n_in] of any type that is widened as it passes."""
    out = torch.empty(len(x), len(weight))
    step = max(1, _BLOCK // weight.shape[1])
    for begin in range(0, len(weight), step):
        torch.mm(x, weight[begin : begin + step].float().T, out=out[:, begin : begin + step])
    if bias is not None:
        out += bias
    return out


def use_products(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    """Let the linear layers on a CPU among modules multiply by the rule; return those that did not before."""
    changed = [module for module in modules if _is_linear(module) and "forward" not in vars(module)]
    for module in changed:
        module.forward = Product(module)  # type: ignore[assignment, method-assign]
    return changed


@contextmanager
def products_of(model: nn.Module) -> Iterator[None]:
    """Do so for all linear layers of a model within the block."""
    changed = use_products(model.modules())
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) in _LINEAR and module.weight.device.type == "cpu"
