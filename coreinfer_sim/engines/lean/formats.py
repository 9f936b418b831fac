"""How matrices of few bits lie in memory: sixteen rows interleaved, so that one register holds four inputs of each.

A tile is sixteen outputs of a matrix. Its codes lie block by block, a block being 32 inputs: eight groups of 64 bytes, in
which four inputs of the first row are followed by four of the second, and so on. No row has to be summed across a register.

- codes of 4 bits: 256 bytes a block; byte ``i`` of the vector ``j`` holds group ``j`` in its low and group ``j + 4`` in its
  high half;
- of 5 and 6 bits: the lower four bits likewise; then the rest, 1 bit (64 bytes, group ``j`` at bit ``j``) or 2 bits
  (128 bytes, group ``j`` in vector ``j // 4`` at bit ``2 (j % 4)``);
- of 8 bits: 512 bytes;
- of 2 bits: 128 bytes, group ``j`` in vector ``j // 4`` at bit ``2 (j % 4)``; of 3 bits likewise, then 64 bytes with the third,
  group ``j`` at bit ``j``.

A high plane holds the upper bits of a type's codes in this way, with the scales; the lower bits lie elsewhere, row by row
(`planes`).

Scales lie beside the codes in the same order, sixteen rows at a time. The types are those of GGUF files
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), whose codes and scales are kept to the bit; Q6_0 is like Q4_0, with
6 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

TILE = 16
"""Outputs that are interleaved."""
BLOCK = 32
"""Inputs whose products are summed as integers."""
SUPER = 256
"""Inputs that share a scale of scales, in the types that have such."""


GROUP = 64
"""Inputs of one row whose lower bits are read at once."""


class Scales(Enum):
    """What turns a code into a weight."""

    HALF = "half"
    """float16 scale a block: scale · (code - offset)."""
    HALF_MIN = "half_min"
    """float16 scale and minimum a block: scale · code + minimum."""
    SUPER_MIN = "super_min"
    """8-bit scale and minimum a block, float16 scales of both every 256: d · scale · code - d_min · minimum."""
    SUPER_HALVES = "super_halves"
    """signed 8-bit scale every 16 inputs, float16 scale of those every 256: d · scale · (code - offset)."""


CODE_BYTES = {2: 128, 3: 192, 4: 256, 5: 320, 6: 384, 8: 512}
"""Of a tile and block, by the bits of a code."""
_SCALE_BYTES = {Scales.HALF: 32, Scales.HALF_MIN: 64, Scales.SUPER_MIN: 64 + 8 * 32, Scales.SUPER_HALVES: 32 + 16 * 16}


@dataclass(frozen=True)
class Format:
    """One type of packed weights."""

    name: str
    bits: int
    offset: int
    """What is subtracted from a whole code."""
    scales: Scales
    low_bits: int = 0
    """Bits of each code that lie elsewhere; the middle of what they can add stands for them."""

    @property
    def step(self) -> int:
        """By how much a weight, in units of its scale, grows with its code."""
        return 1 << self.low_bits

    @property
    def zero(self) -> float:
        """What is subtracted from ``step`` times the code; twice that is whole."""
        return self.offset - (self.step - 1) / 2

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of a tile and block."""
        return CODE_BYTES[self.bits]

    @property
    def filled(self) -> int:
        """A matrix has a multiple of so many inputs."""
        return max(self.span, GROUP) if self.low_bits else self.span

    @property
    def span(self) -> int:
        """Inputs that a record of scales is for."""
        return SUPER if self.scales in (Scales.SUPER_MIN, Scales.SUPER_HALVES) else BLOCK

    @property
    def scale_bytes(self) -> int:
        """Bytes of a tile's record of scales."""
        return _SCALE_BYTES[self.scales]

    @cached_property
    def number(self) -> int:
        """Place among all formats."""
        return list(FORMATS).index(self.name)


_WHOLE = (
    Format("Q4_0", 4, 8, Scales.HALF),
    Format("Q4_1", 4, 0, Scales.HALF_MIN),
    Format("Q5_0", 5, 16, Scales.HALF),
    Format("Q5_1", 5, 0, Scales.HALF_MIN),
    Format("Q6_0", 6, 32, Scales.HALF),
    Format("Q8_0", 8, 128, Scales.HALF),
    Format("Q4_K", 4, 0, Scales.SUPER_MIN),
    Format("Q5_K", 5, 0, Scales.SUPER_MIN),
    Format("Q6_K", 6, 32, Scales.SUPER_HALVES),
)
_LOW_BITS = {4: 2, 5: 2, 6: 2, 8: 4}
"""Of whole codes of so many bits."""
_PLANES = tuple(
    replace(whole, name=f"{whole.name} high", bits=whole.bits - _LOW_BITS[whole.bits], low_bits=_LOW_BITS[whole.bits])
    for whole in _WHOLE
)
FORMATS = {format_.name: format_ for format_ in (*_WHOLE, *_PLANES)}
HIGH = {whole.name: plane.name for whole, plane in zip(_WHOLE, _PLANES, strict=True)}
"""The formats of high planes, by those of whole codes."""
WHOLE = {plane: whole for whole, plane in HIGH.items()}
"""The other way round."""
