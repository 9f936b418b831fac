"""Code that adds output rows of chosen neurons, the ends of their records, to the outputs, four at a time."""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir
from numba.core import cgutils

from coreinfer_sim.engines.lean.formats import BLOCK
from coreinfer_sim.engines.lean.instructions import (
    F16,
    F32,
    I8,
    I32,
    I64,
    Builder,
    Products,
    Value,
    constant,
    fused,
    intrinsic,
    line_product,
    load,
    offset_product,
    prefetch,
    repeated,
    store,
    vector,
    whole,
)
from coreinfer_sim.engines.lean.record_code import CACHE, over_groups, part_of_line
from coreinfer_sim.engines.lean.rows import FLOAT_BYTES, widened_floats

_WIDE = 16
_LINE = 64
TOGETHER = 4
"""Rows of codes that are added at once."""


def emit_add_floats(builder: Builder, kind: str, places: Value, factors: Value, n: Value, out: Value) -> None:
    """Add a row of ``n`` floats to float32 outputs, times its factor: more rows at once are read no faster.

    Args:
        builder: where the code goes.
        kind: of the floats.
        places: addresses of the row, and of the one that is then read, which is read into the cache.
        factors: float32 [1].
        n: of a row.
        out: float32.
    """
    size = FLOAT_BYTES[kind]
    (row,), (following,) = _rows_at(builder, places, 1)
    number = builder.load(factors)

    def add(begin: Value, n_steps: Value, width: int) -> Value:
        by = repeated(builder, number, width)
        with cgutils.for_range(builder, n_steps) as loop:
            at = builder.add(begin, builder.mul(loop.index, whole(width)))
            place = builder.mul(at, whole(size))
            if width > 1:
                prefetch(builder, following, place, CACHE)
            before = _outputs_at(builder, out, at, width)
            store(builder, fused(builder, widened_floats(builder, kind, row, place, width), by, before), out, at)
        return builder.add(begin, builder.mul(n_steps, whole(width)))

    width = max(_WIDE, _LINE // size)
    done = add(whole(0), builder.udiv(n, whole(width)), width)
    add(done, builder.sub(n, done), 1)


def emit_add_codes(
    builder: Builder, n_bits: int, how: Products, places: Value, factors: Value, n: Value, out: Value
) -> None:
    """Add four rows of ``n`` codes, a multiple of 64, as `record_rows.output_rows` lays them; arguments as for `emit_add_floats`.

    A block's four factors, times the rows' scales, are rounded to 8 bits with a scale of their own, as inputs are, so that four
    codes of one output are multiplied at once.
    """
    n_parts = 8 // n_bits
    n_blocks = builder.udiv(n, whole(BLOCK))
    n_bytes = builder.udiv(n, whole(n_parts))
    rows, following = _rows_at(builder, places, TOGETHER)
    values, starts, scales, added = _rounded_factors(builder, n_bits, rows, n_bytes, factors, n_blocks)
    n_behind = builder.udiv(builder.mul(n_blocks, whole(2 * n_parts)), whole(_LINE))
    with cgutils.for_range(builder, builder.add(n_behind, whole(1))) as loop:
        at = builder.add(n_bytes, builder.mul(loop.index, whole(_LINE)))
        for row in following:
            prefetch(builder, row, at, CACHE)

    def read(place: Value) -> list[Value]:
        for row in following:
            prefetch(builder, row, place, CACHE)
        return [builder.add(place, builder.sub(_address(builder, row), _address(builder, rows[0]))) for row in rows]

    def part_of(line: Value, part: int) -> Value:
        return line if n_bits == 8 else part_of_line(builder, line, n_bits, part, 0)

    def group(first: Value, codes: Sequence[Value], _: int) -> None:
        for number, together in enumerate(_by_output(builder, codes)):
            block = builder.add(builder.udiv(first, whole(BLOCK)), whole(number * _WIDE // BLOCK))
            word = builder.load(builder.gep(values, [block]))
            x = builder.bitcast(repeated(builder, word, _WIDE), vector(I8, _LINE))
            start = repeated(builder, builder.load(builder.gep(starts, [block])), _WIDE)
            product = offset_product if n_bits == 8 else line_product
            dots = product(builder, how, together, x, start)
            by = repeated(builder, builder.load(builder.gep(scales, [block])), _WIDE)
            at = builder.add(first, whole(_WIDE * number))
            before = _outputs_at(builder, out, at, _WIDE)
            if n_bits == 4:
                before = builder.fadd(before, repeated(builder, builder.load(builder.gep(added, [block])), _WIDE))
            store(builder, fused(builder, builder.sitofp(dots, vector(F32, _WIDE)), by, before), out, at)

    over_groups(builder, n_bits, n, rows[0], read, part_of, group)


def _rows_at(builder: Builder, places: Value, n: int) -> tuple[list[Value], list[Value]]:
    """Return pointers to the rows that are read, and to those that follow."""
    numbers = [builder.load(builder.gep(places, [whole(k)])) for k in range(2 * n)]
    pointers = [builder.inttoptr(number, I8.as_pointer()) for number in numbers]
    return pointers[:n], pointers[n:]


def _address(builder: Builder, pointer: Value) -> Value:
    return builder.ptrtoint(pointer, I64)


def _outputs_at(builder: Builder, out: Value, at: Value, width: int) -> Value:
    return load(builder, builder.bitcast(out, I8.as_pointer()), builder.mul(at, whole(4)), F32, width)


def _by_output(builder: Builder, rows: Sequence[Value]) -> list[Value]:
    """Return 64 codes of four rows as four vectors, in which the four codes of an output lie side by side.

    Bytes and then pairs are interleaved within sixteen bytes, which all processors do fast; rows are laid out so that outputs
    come in their order.
    """

    def interleaved(a: Value, b: Value, size: int, high: bool) -> Value:
        places = []
        for lane in range(0, _LINE, 16):
            for k in range(0, 8, size):
                begin = lane + 8 * high + k
                places += [*range(begin, begin + size), *range(_LINE + begin, _LINE + begin + size)]
        return builder.shuffle_vector(a, b, ir.Constant(vector(I32, _LINE), places))

    made = []
    for high in (False, True):
        first, second = interleaved(rows[0], rows[1], 1, high), interleaved(rows[2], rows[3], 1, high)
        made += [interleaved(first, second, 2, False), interleaved(first, second, 2, True)]
    return made


def _rounded_factors(
    builder: Builder, n_bits: int, rows: Sequence[Value], n_bytes: Value, factors: Value, n_blocks: Value
) -> tuple[Value, Value, Value, Value]:
    """Round the factors of four rows times their scales, block by block.

    Returns:
        Four signed bytes a block, int32 [n_blocks]; the sum of their products with a middle code, negative, likewise; their
        scales, float32 [n_blocks]; and what minima and codes in the middle add, likewise.
    """
    values, starts, scales, added = (builder.alloca(kind, size=n_blocks) for kind in (I32, I32, F32, F32))
    behind, middle = builder.mul(n_blocks, whole(2)), 1 << (n_bits - 1)  # bytes of the scales; about which codes lie

    def convert(begin: Value, n_steps: Value, width: int) -> Value:
        kind = vector(F32, width)
        by = [repeated(builder, builder.load(builder.gep(factors, [whole(k)])), width) for k in range(TOGETHER)]
        rounding = intrinsic(builder, f"llvm.rint.v{width}f32", kind, [kind])
        magnitude = intrinsic(builder, f"llvm.fabs.v{width}f32", kind, [kind])
        with cgutils.for_range(builder, n_steps) as loop:
            at = builder.add(begin, builder.mul(loop.index, whole(width)))
            place = builder.add(n_bytes, builder.mul(at, whole(2)))

            def halves(row: Value, place: Value) -> Value:
                return builder.fpext(load(builder, row, place, F16, width), kind)

            scaled = [builder.fmul(halves(row, place), factor) for row, factor in zip(rows, by, strict=True)]
            most = builder.call(magnitude, [scaled[0]])
            for each in scaled[1:]:
                other = builder.call(magnitude, [each])
                most = builder.select(builder.fcmp_ordered(">", other, most), other, most)
            zero = constant(F32, width, 0.0)
            inverse = builder.fdiv(constant(F32, width, 127.0), most)
            inverse = builder.select(builder.fcmp_ordered(">", most, zero), inverse, zero)
            word = total_code = constant(I32, width, 0)
            for k, each in enumerate(scaled):
                code = builder.fptosi(builder.call(rounding, [builder.fmul(each, inverse)]), vector(I32, width))
                total_code = builder.add(total_code, code)
                code = builder.and_(code, constant(I32, width, 255))
                word = builder.or_(word, builder.shl(code, constant(I32, width, 8 * k)) if k else code)
            _store_words(builder, word, values, at)
            _store_words(builder, builder.mul(total_code, constant(I32, width, -middle)), starts, at)
            store(builder, builder.fmul(most, constant(F32, width, 1 / 127)), scales, at)
            if n_bits == 4:
                lowest = builder.add(place, behind)
                total = constant(F32, width, 0.0)
                for row, factor, own in zip(rows, by, scaled, strict=True):
                    total = fused(builder, own, constant(F32, width, float(middle)), total)
                    total = fused(builder, halves(row, lowest), factor, total)
                store(builder, total, added, at)
        return builder.add(begin, builder.mul(n_steps, whole(width)))

    done = convert(whole(0), builder.udiv(n_blocks, whole(_WIDE)), _WIDE)
    convert(done, builder.udiv(builder.sub(n_blocks, done), whole(2)), 2)
    return values, starts, scales, added


def _store_words(builder: Builder, words: Value, out: Value, at: Value) -> None:
    builder.store(words, builder.bitcast(builder.gep(out, [at]), words.type.as_pointer()), align=4)
