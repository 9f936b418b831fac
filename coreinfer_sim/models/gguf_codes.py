"""Codes and scales of quantised tensors in GGUF files, as they stand there.

The blocks are those of ggml (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h): 32 weights with a scale of
their own, or 256 with scales of scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import gguf
import numpy as np
import torch

from coreinfer_sim.models.gguf_names import GGUFNames

Array = np.ndarray[Any, Any]
Parts = dict[str, Array]
_ROWS = 4096  # that are taken apart at a time; a multiple of 16


@dataclass(frozen=True, eq=False)
class QuantisedTensor:
    """A matrix [n_out, n_in] of a GGUF file whose codes can be taken as they are."""

    kind: str
    """ggml's name of its type, such as ``Q4_K``."""
    n_out: int
    n_in: int
    raw: Array
    """uint8 [n_out, bytes of a row], in the file's memory map."""
    order: Array | None = None
    """Which of the file's rows each output is; None: they are in order."""

    @property
    def layout(self) -> str:
        """The type that the codes are of as they are taken: of Q3_K, which has scales as Q6_K has, those of a Q6_K."""
        return _TAKEN_AS.get(self.kind, self.kind)

    def part(self, first: int, last: int) -> QuantisedTensor:
        """Return the outputs first … last alone."""
        if self.order is not None:
            return replace(self, n_out=last - first, order=self.order[first:last])
        return replace(self, n_out=last - first, raw=self.raw[first:last])

    def rows(self) -> Iterator[tuple[int, Array, Parts]]:
        """Yield codes and scales of some rows at a time.

        Yields:
            Number of the first row; codes uint8 [n_rows, n_in]; ``scale`` and ``minimum`` of each block and float16 ``d`` and
            ``d_min`` of 256 weights, [n_rows, …], as far as the type has them.
        """
        block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]][1]
        for begin in range(0, self.n_out, _ROWS):
            part = slice(begin, begin + _ROWS)
            raw = self.raw[part] if self.order is None else self.raw[self.order[part]]
            codes, parts = _TAKEN_APART[self.kind](raw.reshape(len(raw), -1, block_bytes))
            yield begin, codes.reshape(len(raw), self.n_in), parts


def _halves(blocks: Array, first: int) -> Array:
    """Return the float16 at a place of each block, [n_rows, n_blocks]."""
    return np.ascontiguousarray(blocks[..., first : first + 2]).view(np.float16)[..., 0]


def _nibbles(bytes_: Array) -> Array:
    """Return the low halves of bytes, and then the high ones."""
    return np.concatenate([bytes_ & 15, bytes_ >> 4], -1)


def _fifth(blocks: Array, first: int) -> Array:
    """Return one bit for each of 32 weights."""
    return np.unpackbits(blocks[..., first : first + 4], axis=-1, bitorder="little")


def _q4(with_minimum: bool) -> Callable[[Array], tuple[Array, Parts]]:
    def taken(blocks: Array) -> tuple[Array, Parts]:
        parts = {"scale": _halves(blocks, 0)} | ({"minimum": _halves(blocks, 2)} if with_minimum else {})
        return _nibbles(blocks[..., 4 if with_minimum else 2 :]), parts

    return taken


def _q5(with_minimum: bool) -> Callable[[Array], tuple[Array, Parts]]:
    def taken(blocks: Array) -> tuple[Array, Parts]:
        parts = {"scale": _halves(blocks, 0)} | ({"minimum": _halves(blocks, 2)} if with_minimum else {})
        first = 4 if with_minimum else 2
        return _nibbles(blocks[..., first + 4 :]) | (_fifth(blocks, first) << 4), parts

    return taken


def _q8_0(blocks: Array) -> tuple[Array, Parts]:
    return blocks[..., 2:] ^ 128, {"scale": _halves(blocks, 0)}


def _super_parts(blocks: Array) -> Parts:
    """Return the 6-bit scales and minima of Q4_K and Q5_K, which lie in twelve bytes."""
    low, middle, high = (blocks[..., first : first + 4] for first in (4, 8, 12))
    scale = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], -1)
    minimum = np.concatenate([middle & 63, (high >> 4) | ((middle >> 2) & 48)], -1)
    return {"d": _halves(blocks, 0), "d_min": _halves(blocks, 2), "scale": scale, "minimum": minimum}


def _q4_k(blocks: Array) -> tuple[Array, Parts]:
    return _nibbles(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)), _super_parts(blocks)


def _q5_k(blocks: Array) -> tuple[Array, Parts]:
    codes = _nibbles(blocks[..., 48:].reshape(*blocks.shape[:2], 4, 32)).reshape(*blocks.shape[:2], 8, 32)
    fifth = (blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return codes | (fifth << 4), _super_parts(blocks)


def _q6_k(blocks: Array) -> tuple[Array, Parts]:
    shape = blocks.shape[:2]
    low = _nibbles(blocks[..., :128].reshape(*shape, 2, 64)).reshape(*shape, 2, 4, 32)
    high = (blocks[..., 128:192].reshape(*shape, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    return low | (high << 4), {"d": _halves(blocks, 208), "scale": blocks[..., 192:208].view(np.int8)}


def _q3_k(blocks: Array) -> tuple[Array, Parts]:
    """Return the codes as those of a Q6_K, whose zero is 32 rather than 4."""
    shape = blocks.shape[:2]
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    low = ((blocks[..., 32:96].reshape(*shape, 2, 1, 32) >> shifts) & 3).reshape(*shape, 8, 32)
    third = (blocks[..., None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    # sixteen scales of six bits in twelve bytes: the lower four bits of two in each of eight, then the upper two of four
    lows = _nibbles(blocks[..., 96:104])
    highs = ((blocks[..., None, 104:108] >> shifts) & 3).reshape(*shape, 16)
    scale = (lows | (highs << 4)).astype(np.int8) - np.int8(32)
    return (low | (third << 2)) + np.uint8(28), {"d": _halves(blocks, 108), "scale": scale}


_TAKEN_APART: dict[str, Callable[[Array], tuple[Array, Parts]]] = {
    "Q4_0": _q4(False),
    "Q4_1": _q4(True),
    "Q5_0": _q5(False),
    "Q5_1": _q5(True),
    "Q8_0": _q8_0,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
_TAKEN_AS = {"Q3_K": "Q6_K"}
"""Whose codes those of other types become, exactly."""


def stored_dtype(kind: str) -> torch.dtype:
    """Return the floating type in which a tensor of one of ggml's types is read: its own, or bfloat16 for quantised ones."""
    return {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)


def main_dtype(path: str) -> torch.dtype:
    """Return the floating type in which most weights of a file are read."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        dtype = stored_dtype(tensor.tensor_type.name)
        sizes[dtype] = sizes.get(dtype, 0) + int(tensor.n_elements)
    return max(sizes, key=lambda each: sizes[each], default=torch.bfloat16)


def own_codes(reader: gguf.GGUFReader, names: GGUFNames, tied: bool) -> dict[str, QuantisedTensor]:
    """Return the matrices of a file whose codes can be taken as they are, by the modules' names.

    Args:
        reader: of the file.
        names: of its tensors.
        tied: the embeddings are the output head, too.
    """
    found = {}
    for tensor in reader.tensors:
        kind, name = tensor.tensor_type.name, names.find(str(tensor.name))
        if name is not None and kind in _TAKEN_APART and len(tensor.shape) == 2:
            n_in, n_out = (int(n) for n in tensor.shape)
            order = names.order(str(tensor.name), n_out)
            found[name.rpartition(".")[0]] = QuantisedTensor(kind, n_out, n_in, tensor.data, order)
    table = names.modules.get("token_embd", "")
    if tied and table in found:
        found.setdefault("lm_head", found[table])
    return found


def unread_codes(reader: gguf.GGUFReader) -> list[str]:
    """Return the types of a file's quantised matrices whose codes are not taken as they are."""
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    return sorted(kinds - {*_TAKEN_APART, "F32", "F16", "BF16", "F64"})
