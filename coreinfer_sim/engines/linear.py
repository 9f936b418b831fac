"""Linear layers of a model whose own code runs on a CPU, multiplied by one fixed rule.

torch reads some shapes of 16-bit weights at a twentieth of the memory's speed when few rows are multiplied, and processors
without instructions for a type multiply many rows slowly in it. So, whatever the clock says:

- fewer than `FEW` rows with 16-bit weights: our compiled loops, which read each weight once;
- more rows in a type that the processor has no instructions for: torch in float32, some weights at a time;
- everything else: torch.

Packed weights are multiplied by integer products; but by `MANY` rows or more, where the processor has matrix instructions for
bfloat16 (AMX), they are made bfloat16 some at a time and multiplied in torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from coreinfer_sim.base.memory import advise
from coreinfer_sim.base.processor import processor_features
from coreinfer_sim.engines.lean.formats import TILE
from coreinfer_sim.engines.lean.matrix import Linear, Matrix, by_projection
from coreinfer_sim.models.loading import usable
from coreinfer_sim.models.mlps import MLPLayer

FEW = 8
"""Rows below which a product is bound by reading its weights."""
MANY = 128
"""Rows from which on making packed weights bfloat16 pays where the processor multiplies matrices of them."""
_BLOCK = 1 << 21  # weights that are widened at a time
_LINEAR = (nn.Linear, FalconLinear)
_LOOPS = (torch.bfloat16, torch.float16)


class Product:
    """One linear layer's forward code, in place of its own; it holds the weights, but not the layer."""

    def __init__(self, layer: nn.Linear) -> None:
        """Multiply by the weights of ``layer``."""
        self.weight, self.bias = layer.weight, layer.bias
        dtype = self.weight.dtype
        self.widens = usable(dtype, "cpu") is not dtype

    @functools.cached_property
    def matrix(self) -> Matrix | None:
        """The weights as decode's loops read them; None where torch reads them."""
        loops = self.weight.dtype in _LOOPS and self.weight.is_contiguous()  # a transposed view would be copied
        return Matrix.of(self.weight, self.bias) if loops else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., n_in] to [..., n_out]."""
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) < FEW and self.matrix is not None:
            made = self.matrix.of_few(rows.detach().float().contiguous().numpy()).to(x.dtype)
        elif self.widens:
            made = widened_product(rows.float(), self.weight, self.bias).to(x.dtype)
        else:
            made = F.linear(rows, self.weight, self.bias)
        return made.reshape(*x.shape[:-1], len(self.weight))


class MatrixProduct:
    """The forward code of a linear layer whose weights are a `Matrix`."""

    def __init__(self, matrix: Linear) -> None:
        """Multiply by a matrix."""
        self.matrix = matrix

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., n_in] to [..., n_out]."""
        rows = x.reshape(-1, x.shape[-1]).detach().float().contiguous()
        if len(rows) < FEW:
            made = self.matrix.of_few(rows.numpy())
        elif len(rows) >= MANY and has_matrix_products():
            made = self.matrix.times_narrowed(rows)
        else:
            made = self.matrix.times(rows)
        return made.to(x.dtype).reshape(*x.shape[:-1], self.matrix.n_out)


@functools.cache
def has_matrix_products() -> bool:
    """Return whether the processor multiplies matrices of bfloat16."""
    return "amx_bf16" in processor_features()


class MappedProduct:
    """The forward code of a large linear layer without a bias whose weights are mapped from a file: some outputs at a time.

    What was read does not stay in this process' memory.
    """

    def __init__(self, layer: nn.Linear) -> None:
        """Multiply by the weights of ``layer``."""
        self.weight = layer.weight
        self._step = max(TILE, _BLOCK // layer.in_features // TILE * TILE)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., n_in] to [..., n_out]."""
        made = []
        for part in self.weight.split(self._step):
            piece = nn.Linear(part.shape[1], len(part), bias=False, device="meta", dtype=part.dtype)
            piece.weight = nn.Parameter(part, requires_grad=False)
            made.append(Product(piece)(x))
            advise(part, "MADV_DONTNEED")
        return torch.cat(made, -1)


def mlp_modules(layer: MLPLayer, parts: Sequence[Linear], dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return an MLP's maps as linear modules over the same memory, by the names of a layer's projections."""
    named = by_projection(layer.projections, parts, layer.fused)
    return {name: matrix_module(part, dtype) for name, part in named.items()}


def matrix_module(matrix: Linear, dtype: torch.dtype) -> nn.Linear:
    """Return a linear layer that multiplies by a matrix; its own weight takes no memory."""
    layer = nn.Linear(matrix.n_in, matrix.n_out, bias=False, device="meta", dtype=dtype).requires_grad_(False).eval()
    layer.forward = MatrixProduct(matrix)  # type: ignore[assignment, method-assign]
    return layer


def hand_over(layer: nn.Linear, matrix: Linear) -> None:
    """Let a linear layer multiply by a matrix for good, and let go of its own weight."""
    layer.forward = MatrixProduct(matrix)  # type: ignore[assignment, method-assign]
    dtype, turned = layer.weight.dtype, isinstance(layer, Conv1D)  # which holds the transpose
    layer.widened = lambda: (matrix.widened() if turned else matrix.widened().T).contiguous().to(dtype)  # type: ignore[assignment]
    layer.weight = _nothing_like(layer.weight)


def hand_over_table(table: nn.Embedding, matrix: Matrix) -> None:
    """Let a table of embeddings take its rows from a matrix for good, and let go of its own."""
    dtype, scale = table.weight.dtype, getattr(table, "embed_scale", None)

    def rows(ids: torch.Tensor) -> torch.Tensor:
        kept, places = ids.unique(return_inverse=True)
        found = matrix.rows(kept).to(dtype)[places]
        return found if scale is None else found * scale.to(dtype)

    table.forward = rows  # type: ignore[assignment, method-assign]
    table.weight = _nothing_like(table.weight)


def _nothing_like(weight: torch.Tensor) -> nn.Parameter:
    """Return a parameter of a shape, type and device that takes no memory; who reads it all the same gets no numbers."""
    return nn.Parameter(torch.full((), torch.nan, dtype=weight.dtype).expand(weight.shape), requires_grad=False)


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
