"""Code that makes whole weights of what lies by neuron, for products of many rows: tiles of codes, and widened output rows."""

from __future__ import annotations

from collections.abc import Sequence

from numba.core import cgutils

from coreinfer_sim.engines.lean.formats import BLOCK, CODE_BYTES, GROUP, TILE, Format
from coreinfer_sim.engines.lean.instructions import (
    F16,
    F32,
    I8,
    I32,
    Builder,
    Value,
    bfloat16_bits,
    constant,
    field,
    fused,
    load,
    moved,
    picked,
    repeated,
    store,
    transposed,
    vector,
    whole,
)
from coreinfer_sim.engines.lean.record_code import over_groups, part_of_line
from coreinfer_sim.engines.lean.tiles import codes_of


def emit_whole_tile(
    builder: Builder, format_: Format, high: Value, low: Value, stride: Value, n_rows: Value, n_in: Value, out: Value
) -> None:
    """Set ``out`` to the whole codes of a tile, as `packing.lay_codes` lays them, from both planes.

    Args:
        builder: where the code goes.
        format_: of the high plane.
        high: its codes of the tile.
        low: the lower bits of its first row.
        stride: bytes from row to row of them.
        n_rows: of the tile; what stands in place of further ones is not said.
        n_in: inputs, a multiple of 64.
        out: bytes.
    """
    n_low, bits = format_.low_bits, format_.bits + format_.low_bits
    kind = vector(I8, GROUP)
    last = builder.sub(n_rows, whole(1))
    starts = []
    for lane in range(TILE):
        number = builder.select(builder.icmp_signed("<", whole(lane), last), whole(lane), last)
        starts.append(builder.mul(number, stride))
    code_bytes = CODE_BYTES[bits]

    def read(place: Value) -> list[Value]:
        return [builder.add(place, start) for start in starts]

    def group(first: Value, of_rows: Sequence[Value], _: int) -> None:
        lanes = transposed(builder, [builder.bitcast(each, vector(I32, TILE)) for each in of_rows])
        for half in range(GROUP // BLOCK):
            block = builder.add(builder.udiv(first, whole(BLOCK)), whole(half))
            upper = codes_of(builder, format_, high, builder.mul(block, whole(format_.code_bytes)))
            codes = [
                builder.or_(moved(builder, each, n_low), builder.bitcast(lanes[8 * half + j], kind))
                for j, each in enumerate(upper)
            ]
            to = builder.mul(block, whole(code_bytes))
            for number, line in enumerate(_lines(builder, bits, codes)):
                store(builder, line, out, builder.add(to, whole(GROUP * number)))

    over_groups(builder, n_low, n_in, low, read, lambda line, part: part_of_line(builder, line, n_low, part, 0), group)


def _lines(builder: Builder, bits: int, codes: Sequence[Value]) -> list[Value]:
    """Return a block's codes, eight vectors of bytes, in few bits as they lie in a tile."""
    if bits == 8:
        return list(codes)
    low = [builder.and_(code, constant(I8, GROUP, 15)) for code in codes] if bits > 4 else list(codes)
    made = [builder.or_(low[j], moved(builder, low[j + 4], 4)) for j in range(4)]
    if bits == 4:
        return made
    n = bits - 4
    rest = [field(builder, code, 4, n, n * (j % (8 // n))) for j, code in enumerate(codes)]
    for begin in range(0, 8, 8 // n):
        together = rest[begin]
        for each in rest[begin + 1 : begin + 8 // n]:
            together = builder.or_(together, each)
        made.append(together)
    return made


def emit_widened_row(builder: Builder, n_bits: int, row: Value, n: Value, out: Value, size: int) -> None:
    """Set ``out`` [n] to an output row of codes, see `record_rows.output_rows`, in float32 (``size`` 4) or bfloat16 (2)."""
    n_parts = 8 // n_bits
    n_blocks = builder.udiv(n, whole(BLOCK))
    behind = _behind(builder, row, builder.udiv(n, whole(n_parts)), builder.mul(n_blocks, whole(n_parts)))
    wide = vector(F32, TILE)

    def part_of(line: Value, part: int) -> Value:
        return line if n_bits == 8 else part_of_line(builder, line, n_bits, part, 0)

    def number_of(place: Value) -> Value:
        return repeated(builder, builder.load(builder.gep(behind, [place])), TILE)

    def group(first: Value, codes: Sequence[Value], _: int) -> None:
        for begin in range(0, GROUP, TILE):
            block = builder.add(builder.udiv(first, whole(BLOCK)), whole(begin // BLOCK))
            own = picked(builder, codes[0], [_place(begin + k) for k in range(TILE)])
            values = builder.uitofp(builder.zext(own, vector(I32, TILE)), wide)
            if n_bits == 8:
                made = builder.fmul(builder.fsub(values, constant(F32, TILE, 128.0)), number_of(block))
            else:
                made = fused(builder, values, number_of(block), number_of(builder.add(block, n_blocks)))
            at = builder.mul(builder.add(first, whole(begin)), whole(size))
            store(builder, made if size == 4 else bfloat16_bits(builder, made), out, at)

    over_groups(builder, n_bits, n, row, lambda place: (place,), part_of, group)


def _place(number: int) -> int:
    """Return where an output's code lies among 64: fours of them change places, so that rows interleave in their order."""
    return 16 * (number % 16 // 4) + 4 * (number // 16) + number % 4


def _behind(builder: Builder, row: Value, n_bytes: Value, n: Value) -> Value:
    """Return where the ``n`` float16 behind the codes of a row lie as float32; ``n`` is even."""
    made = builder.alloca(F32, size=n)

    def convert(begin: Value, n_steps: Value, width: int) -> Value:
        with cgutils.for_range(builder, n_steps) as loop:
            at = builder.add(begin, builder.mul(loop.index, whole(width)))
            halves = load(builder, row, builder.add(n_bytes, builder.mul(at, whole(2))), F16, width)
            store(builder, builder.fpext(halves, vector(F32, width)), made, at)
        return builder.add(begin, builder.mul(n_steps, whole(width)))

    done = convert(whole(0), builder.udiv(n, whole(TILE)), TILE)
    convert(done, builder.udiv(builder.sub(n, done), whole(2)), 2)
    return made
