"""A linear map as the compiled loops read it: where the checkpoint has it, or packed into few bits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from coreinfer_sim.engines.lean.formats import FORMATS, TILE, Scales
from coreinfer_sim.engines.lean.intrinsics import float_name, float_type, set_threads
from coreinfer_sim.engines.lean.kernels import MANY, product_address, unpacked_address
from coreinfer_sim.engines.lean.packing import gathered, lay, packed_floats, room
from coreinfer_sim.engines.lean.products import N_WORDS, UNPACKED, multiply, product, rounded_rows, unpack, unpack_rows
from coreinfer_sim.models.gguf_codes import QuantisedTensor

__all__ = [
    "Array",
    "Joined",
    "Linear",
    "Matrix",
    "by_projection",
    "filled_bias",
    "float_type",
    "from_codes",
    "scales_of",
    "vector",
    "warm_up_products",
]
Array = np.ndarray[Any, Any]
_BLOCK = 1 << 21  # weights that are widened at a time
_NARROWED = 1 << 20  # weights that are made bfloat16 at a time: 2 MB
_ROWS = 64  # of packed products, whose inputs then stay in the caches


class Linear(Protocol):
    """What a linear layer of a model may multiply by."""

    @property
    def n_out(self) -> int:
        """Outputs."""
        ...

    @property
    def n_in(self) -> int:
        """Inputs."""
        ...

    def widened(self) -> torch.Tensor:
        """Return the weights, float32 [n_in, n_out]."""
        ...

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply many float32 rows [n_rows, n_in]."""
        ...

    def times_narrowed(self, x: torch.Tensor) -> torch.Tensor:
        """Do so where the processor multiplies matrices of bfloat16."""
        ...

    def of_few(self, x: Array) -> torch.Tensor:
        """Multiply few float32 rows [n_rows, n_in]."""
        ...


@dataclass(frozen=True, eq=False)
class Matrix:
    """Weights [n_out, n_in] of a floating type, or of one of the `formats`, with a bias."""

    kind: str
    """Name of a format, or of a floating type."""
    n_out: int
    n_in: int
    weight: torch.Tensor
    """Floats [n_out, n_in], contiguous; or codes [n_tiles, n_blocks, code_bytes]."""
    scales: torch.Tensor | None
    """Of packed weights, [n_tiles, n_spans, scale_bytes]."""
    bias: torch.Tensor | None
    """Float32, filled up to a multiple of 16."""

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None = None, rounded: str | None = None) -> Matrix:
        """Take a matrix where it lies, or its copy rounded to Q8_0, Q6_0 or Q4_0."""
        n_out, n_in = weight.shape
        if rounded is None:
            return cls(float_name(weight.dtype), n_out, n_in, weight.detach().contiguous(), None, filled_bias(bias))
        return cls(rounded, n_out, n_in, *packed_floats(weight, rounded), filled_bias(bias))

    @cached_property
    def packed(self) -> bool:
        """Whether the weights are codes with scales; their inputs are rounded to 8 bits."""
        return self.scales is not None

    @cached_property
    def n_filled(self) -> int:
        """Inputs, filled up to the format's span."""
        return self.weight.shape[1] * 32 if self.packed else self.n_in

    @cached_property
    def words(self) -> Array:
        """What `products.multiply` reads, int64 [N_WORDS]."""
        scales = self.scales
        row = self.weight.shape[1] * (self.weight.shape[2] if self.packed else self.weight.element_size() * TILE)
        words = [
            product_address(self.kind, 1),
            product_address(self.kind, MANY),
            self.weight.data_ptr(),
            0 if scales is None else scales.data_ptr(),
            0 if self.bias is None else self.bias.data_ptr(),
            self.n_out,
            self.n_filled,
            row,
            0 if scales is None else scales.shape[1] * scales.shape[2],
            int(self.packed),
            unpacked_address(self.kind) if self.packed else 0,
            *(0, 0, 0),
        ]
        assert len(words) == N_WORDS
        return np.array(words, np.int64)

    @cached_property
    def n_bytes(self) -> int:
        """Bytes that one product reads: weights, scales and bias."""
        return sum(part.nbytes for part in (self.weight, self.scales, self.bias) if part is not None)

    def widened(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Return the weights of the outputs first … last, float32 [n_in, n]; ``first`` is a multiple of 16."""
        last = self.n_out if last is None else min(last, self.n_out)
        if not self.packed:
            return self.weight[first:last].float().T
        n = -(-(last - first) // TILE)
        out = torch.empty(self.n_filled, n * TILE)
        set_threads()
        unpack(self.words, self.words[UNPACKED], first // TILE, n, out.data_ptr(), 4)
        return out[: self.n_in, : last - first]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the weights of the outputs ``ids`` [n], float32 [n, n_in]: of a table, the embeddings of tokens."""
        if not self.packed:
            return self.weight[ids].float()
        out = torch.empty(len(ids), self.n_in)
        unpack_rows(self.words, ids.numpy(), out.numpy())
        return out

    def of_few(self, x: Array) -> torch.Tensor:
        """Multiply float32 rows [n_rows, n_in] by the loops of decode, which read each weight once for four rows."""
        out = np.empty((len(x), -(-self.n_out // TILE) * TILE), np.float32)
        product(set_threads(), self.words[None], x, out)
        return torch.from_numpy(out)[:, : self.n_out]

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply many float32 rows [n_rows, n_in]: packed weights by the loops of decode, floats in torch, some at a time."""
        if self.packed:
            out = torch.empty(len(x), -(-self.n_out // TILE) * TILE)
            n_threads, words = set_threads(), self.words[None]
            for part, into in zip(x.contiguous().split(_ROWS), out.split(_ROWS), strict=True):
                multiply(n_threads, words, part.numpy(), *rounded_rows(words[0], part.numpy()), into.numpy())
            return out[:, : self.n_out]
        out = torch.empty(len(x), self.n_out)
        step = max(TILE, _BLOCK // self.n_in // TILE * TILE)
        for begin in range(0, self.n_out, step):
            torch.mm(x, self.widened(begin, begin + step), out=out[:, begin : begin + step])
        if self.bias is not None:
            out += self.bias[: self.n_out]
        return out

    def times_narrowed(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply many float32 rows [n_rows, n_in]: packed weights are made bfloat16 some at a time, for a product in torch."""
        if not self.packed:
            return self.times(x)
        function = unpacked_address(self.kind, 2)

        def narrow(first: int, n_tiles: int, out: int) -> None:
            unpack(self.words, function, first, n_tiles, out, 2)

        return narrowed_product(self, x, narrow)

    def outputs(self, ids: torch.Tensor) -> Matrix:
        """Return the map to some outputs [n] alone, its codes as they are."""
        bias = None if self.bias is None else self.bias[ids]
        if self.scales is None:
            return Matrix(self.kind, len(ids), self.n_in, self.weight[ids], None, filled_bias(bias))
        weight, scales = gathered(FORMATS[self.kind], self.weight, self.scales, ids)
        return Matrix(self.kind, len(ids), self.n_in, weight, scales, filled_bias(bias))

    def part(self, first: int, last: int) -> Matrix:
        """Return the map to the outputs first … last alone: over the same memory, but for a packed one that cuts a tile."""
        bias = None if self.bias is None else filled_bias(self.bias[first:last])
        if self.scales is None:
            return Matrix(self.kind, last - first, self.n_in, self.weight[first:last], None, bias)
        if first % TILE or (last % TILE and last < self.n_out):
            return self.outputs(torch.arange(first, last))
        tiles = slice(first // TILE, -(-last // TILE))
        return Matrix(self.kind, last - first, self.n_in, self.weight[tiles], self.scales[tiles], bias)


@dataclass(frozen=True, eq=False)
class Joined:
    """Maps whose outputs follow each other: one linear layer that holds gate and up."""

    parts: tuple[Linear, ...]

    @property
    def n_out(self) -> int:
        """Outputs of all."""
        return sum(part.n_out for part in self.parts)

    @property
    def n_in(self) -> int:
        """Inputs, which are common."""
        return self.parts[0].n_in

    def widened(self) -> torch.Tensor:
        """Return the weights, float32 [n_in, n_out]."""
        return torch.cat([part.widened() for part in self.parts], 1)

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply many float32 rows [n_rows, n_in]."""
        return torch.cat([part.times(x) for part in self.parts], 1)

    def times_narrowed(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply many float32 rows [n_rows, n_in] where the processor multiplies matrices of bfloat16."""
        return torch.cat([part.times_narrowed(x) for part in self.parts], 1)

    def of_few(self, x: Array) -> torch.Tensor:
        """Multiply few float32 rows [n_rows, n_in]."""
        return torch.cat([part.of_few(x) for part in self.parts], 1)


def narrowed_product(matrix: Matrix, x: torch.Tensor, narrow: Callable[[int, int, int], None]) -> torch.Tensor:
    """Multiply float32 rows [n_rows, n_in] with packed weights that are made bfloat16 some at a time.

    Args:
        matrix: for its sizes and bias.
        x: the rows.
        narrow: sets bfloat16 [n_filled, 16 · n], an address, to the weights of the tiles from the first on, transposed; takes the
            first tile, n and the address.

    Returns:
        Float32 [n_rows, n_out].
    """
    n_threads, n_in = set_threads(), matrix.n_filled
    given, out = F.pad(x.bfloat16(), (0, n_in - matrix.n_in)), torch.empty(len(x), matrix.n_out)
    step = max(1, _NARROWED // n_in // TILE // n_threads) * n_threads
    room = torch.empty(n_in * step * TILE, dtype=torch.bfloat16)
    for first in range(0, len(matrix.weight), step):
        n_tiles = min(step, len(matrix.weight) - first)
        part = room[: n_in * n_tiles * TILE].view(n_in, -1)
        narrow(first, n_tiles, part.data_ptr())
        columns = out[:, first * TILE : (first + n_tiles) * TILE]
        columns.copy_(torch.mm(given, part)[:, : columns.shape[1]])
    return out if matrix.bias is None else out.add_(matrix.bias[: matrix.n_out])


def by_projection(names: Sequence[str], parts: Sequence[Linear], fused: bool) -> dict[str, Linear]:
    """Return an MLP's maps by the names of a model's projections, of which one may hold gate and up."""
    own = [Joined(tuple(parts[:2])), parts[2]] if fused else parts
    return dict(zip(names, own, strict=True))


def from_codes(tensor: QuantisedTensor, bias: torch.Tensor | None) -> Matrix:
    """Lay out the codes and scales of a GGUF file's matrix, as they are."""
    format_ = FORMATS[tensor.layout]
    codes, scales = room(format_, tensor.n_out, tensor.n_in)
    set_threads()
    for begin, part, scales_of in tensor.rows():
        lay(format_, part, scales_of, begin, codes, scales)
    return Matrix(format_.name, tensor.n_out, tensor.n_in, codes, scales, filled_bias(bias))


def halves(tensor: QuantisedTensor | None) -> list[QuantisedTensor | None]:
    """Return the codes of gate and up of a matrix that holds both."""
    if tensor is None:
        return [None, None]
    half = tensor.n_out // 2
    return [tensor.part(0, half), tensor.part(half, 2 * half)]


def filled_bias(bias: torch.Tensor | None) -> torch.Tensor | None:
    """Return a bias as float32, filled up to a multiple of 16; None if it is zero."""
    if bias is None or not bool(bias.any()):
        return None
    filled = torch.zeros(-(-len(bias) // TILE) * TILE)
    filled[: len(bias)] = bias.detach().float()
    return filled


def vector(parameter: torch.Tensor) -> Array:
    """Return a parameter as a float32 array."""
    return parameter.detach().float().contiguous().numpy()


@functools.cache
def warm_up_products(dtype: torch.dtype) -> None:
    """Compile products with weights of a floating type alone, or load them where that was done before."""
    Matrix.of(torch.zeros(8, 8, dtype=dtype)).of_few(np.ones((1, 8), np.float32))


def scales_of(matrix: Matrix, first: int, last: int) -> torch.Tensor:
    """Return the scales of some outputs, one for each input, float32 [n, n_filled]."""
    assert matrix.scales is not None
    kind = FORMATS[matrix.kind].scales
    records = matrix.scales[first // TILE : -(-last // TILE)]
    scales = records[..., : 2 * TILE].contiguous().view(torch.float16).float()  # [n_tiles, n_spans, 16]
    if kind is Scales.SUPER_MIN:
        inner = records[..., 4 * TILE :].unflatten(2, (-1, 2, TILE))[..., 0, :]
    elif kind is Scales.SUPER_HALVES:
        inner = records[..., 2 * TILE :].contiguous().view(torch.int8).unflatten(2, (-1, TILE))
    else:
        inner = torch.ones(1, 1, 1, 1)
    scales = (scales[:, :, None] * inner).flatten(1, 2)
    n = matrix.n_filled // scales.shape[1]
    expanded: torch.Tensor = scales.transpose(1, 2).flatten(0, 1)[: last - first].repeat_interleave(n, 1)
    return expanded
