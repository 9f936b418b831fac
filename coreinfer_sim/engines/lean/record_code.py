"""Code for the gate and up rows of one neuron's record: their products with the inputs.

Rows that a token chooses lie anywhere, so that the processor cannot foresee them: while one is read, the next is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir
from numba.core import cgutils

from coreinfer_sim.engines.lean.formats import BLOCK, GROUP, Format, Scales
from coreinfer_sim.engines.lean.instructions import (
    F16,
    F32,
    I8,
    I32,
    Builder,
    Products,
    Value,
    add_product,
    field,
    joined,
    line_product,
    load,
    offset_product,
    picked,
    prefetch,
    vector,
    whole,
    zeroed,
)
from coreinfer_sim.engines.lean.rows import FLOAT_BYTES, total_of, widened_floats

_WIDE = 16
_SUMS = 4
_LINE = 64
CACHE = 2
"""Into which the next record is asked for: the first one has room for too few requests."""


def emit_float_rows(
    builder: Builder, kind: str, rows: Value, second: Value | None, x: Value, n_in: Value, out: Value, following: Value
) -> None:
    """Set numbers of ``out`` to the products of float32 inputs with two rows of floats, the other ``second`` bytes behind.

    Without ``second`` there is one row. The same rows of the record ``following`` are read into the cache.
    """
    size = FLOAT_BYTES[kind]
    begins = [whole(0)] if second is None else [whole(0), second]
    sums = [[zeroed(builder, _WIDE) for _ in range(_SUMS)] for _ in begins]

    def products(begin: Value, n_steps: Value, n: int) -> Value:
        with cgutils.for_range(builder, n_steps) as loop:
            first = builder.add(begin, builder.mul(loop.index, whole(n * _WIDE)))
            for line in range(0, n * _WIDE * size, _LINE):
                at = builder.add(builder.mul(first, whole(size)), whole(line))
                for row in begins:
                    prefetch(builder, following, builder.add(at, row), CACHE)
            for k in range(n):
                at = builder.add(first, whole(k * _WIDE))
                given = load(builder, x, builder.mul(at, whole(4)), F32, _WIDE)
                place = builder.mul(at, whole(size))
                for of_row, row in zip(sums, begins, strict=True):
                    values = widened_floats(builder, kind, rows, builder.add(place, row), _WIDE)
                    add_product(builder, of_row[k], values, given)
        return builder.add(begin, builder.mul(n_steps, whole(n * _WIDE)))

    done = products(whole(0), builder.udiv(n_in, whole(_SUMS * _WIDE)), _SUMS)
    done = products(done, builder.udiv(builder.sub(n_in, done), whole(_WIDE)), 1)
    for number, of_row in enumerate(sums):
        total = builder.load(of_row[0])
        for other in of_row[1:]:
            total = builder.fadd(total, builder.load(other))
        builder.store(total_of(builder, total), builder.gep(out, [whole(number)]))
    with cgutils.for_range(builder, builder.sub(n_in, done)) as loop:  # what fills no vector
        at = builder.add(done, loop.index)
        given = load(builder, x, builder.mul(at, whole(4)), F32, 1)
        place = builder.mul(at, whole(size))
        for number, row in enumerate(begins):
            one = builder.fmul(widened_floats(builder, kind, rows, builder.add(place, row), 1), given)
            into = builder.gep(out, [whole(number)])
            builder.store(builder.fadd(builder.load(into), builder.extract_element(one, ir.Constant(I32, 0))), into)


def emit_low_rows(
    builder: Builder,
    format_: Format,
    how: Products,
    rows: Value,
    second: Value,
    scales: Value,
    codes: Value,
    starts: Value,
    n_in: Value,
    out: Value,
    following: Value,
) -> None:
    """Set two numbers of ``out`` to what the lower bits of two rows' codes add to the products with their high planes.

    Args:
        builder: where the code goes.
        format_: of the high plane.
        how: by which instructions integers are multiplied.
        rows: the lower bits of a row, as `record_rows.packed` lays them.
        second: bytes from it to the other row.
        scales: of the first row, float32, as `tiles.emit_scales` makes them for a tile, 64 bytes from one to the next; those of
            the other row lie behind room for two a block.
        codes: inputs, int8 [n_in].
        starts: int32 [n_in / 4], what the middle of the lower bits' range makes of four inputs, twice and negative.
        n_in: inputs, a multiple of 64.
        out: float32.
        following: the record whose rows are read into the cache.
    """
    n_scales = (2 if format_.scales is Scales.SUPER_HALVES else 1) * GROUP // BLOCK
    of_dots = ir.Constant(vector(I32, _WIDE), [place * n_scales // _WIDE % 2 for place in range(_WIDE)])
    sums = [[zeroed(builder, _WIDE) for _ in range(2)] for _ in range(2)]
    all_scales = builder.mul(builder.udiv(n_in, whole(BLOCK)), whole(2 * _LINE))

    def scales_of(place: Value) -> Value:
        single = [load(builder, scales, builder.add(place, whole(_LINE * k)), F32, 1) for k in range(n_scales)]
        pairs = [builder.shuffle_vector(*single[k : k + 2], of_dots) for k in range(0, n_scales, 2)]
        if len(pairs) == 1:
            return pairs[0]
        halves = [picked(builder, pair, range(_WIDE // 2)) for pair in pairs]
        return joined(builder, halves)

    def group(first: Value, of_rows: Sequence[Value], number: int) -> None:
        x = load(builder, codes, first, I8, GROUP)
        start = load(builder, starts, first, I32, _WIDE)
        place = builder.mul(first, whole(_LINE * n_scales // GROUP))
        for row, code in enumerate(of_rows):
            dots = line_product(builder, how, code, x, start)
            own = scales_of(builder.add(place, all_scales) if row else place)
            add_product(builder, sums[row][number % 2], builder.sitofp(dots, vector(F32, _WIDE)), own)

    def read(place: Value) -> tuple[Value, Value]:
        both = place, builder.add(place, second)
        for each in both:
            prefetch(builder, following, each, CACHE)
        return both

    def twice(line: Value, part: int) -> Value:
        return part_of_line(builder, line, format_.low_bits, part, 1)

    over_groups(builder, format_.low_bits, n_in, rows, read, twice, group)
    for number, of_row in enumerate(sums):
        total = builder.fadd(*(builder.load(each) for each in of_row))
        builder.store(total_of(builder, total), builder.gep(out, [whole(number)]))


def emit_code_row(
    builder: Builder,
    format_: Format,
    how: Products,
    row: Value,
    factors: Value,
    codes: Value,
    starts: Value,
    n_in: Value,
    out: Value,
    following: Value,
) -> None:
    """Set ``out`` to the product of rounded inputs with a row of whole codes, as `record_rows.code_rows` lays it.

    Args:
        builder: where the code goes.
        format_: Q8_0 or Q4_0.
        how: by which instructions integers are multiplied.
        row: codes, and their scales behind them.
        factors: of the inputs, float32, one every 32.
        codes: inputs, int8 [n_in].
        starts: int32 [n_in / 4], the offset of the codes times the sum of four inputs, negative.
        n_in: inputs, a multiple of 64.
        out: float32.
        following: the record whose row is read into the cache.
    """
    sums = [zeroed(builder, _WIDE) for _ in range(2)]
    n_parts = 8 // format_.bits
    behind = builder.udiv(n_in, whole(n_parts))
    of_dots = ir.Constant(vector(I32, _WIDE), [place * 2 // _WIDE for place in range(_WIDE)])

    def group(first: Value, number: int) -> None:
        place = builder.udiv(first, whole(n_parts))
        prefetch(builder, following, place, CACHE)
        line = load(builder, row, place, I8, GROUP // n_parts)
        if n_parts == 1:
            product = offset_product
        else:  # sixteen codes of a block in the lower halves of bytes, sixteen in the upper ones
            product = line_product
            both = joined(builder, [part_of_line(builder, line, format_.bits, part, 0) for part in range(2)])
            line = picked(builder, both, [k for part in (0, 32, 16, 48) for k in range(part, part + 16)])
        x = load(builder, codes, first, I8, GROUP)
        dots = product(builder, how, line, x, load(builder, starts, first, I32, _WIDE))
        block = builder.udiv(first, whole(BLOCK))
        scales = load(builder, row, builder.add(behind, builder.mul(block, whole(2))), F16, 2)
        by = builder.fmul(
            builder.fpext(scales, vector(F32, 2)), load(builder, factors, builder.mul(block, whole(4)), F32, 2)
        )
        own = builder.shuffle_vector(by, by, of_dots)
        add_product(builder, sums[number], builder.sitofp(dots, vector(F32, _WIDE)), own)

    n_lines = builder.udiv(n_in, whole(BLOCK // 2 * _LINE))
    with cgutils.for_range(builder, builder.add(n_lines, whole(1))) as loop:
        prefetch(builder, following, builder.add(behind, builder.mul(loop.index, whole(_LINE))), CACHE)
    n_pairs = builder.udiv(n_in, whole(2 * GROUP))
    with cgutils.for_range(builder, n_pairs) as loop:
        for number in range(2):
            first = builder.add(builder.mul(loop.index, whole(2 * GROUP)), whole(number * GROUP))
            group(first, number)
    done = builder.mul(n_pairs, whole(2 * GROUP))
    with cgutils.for_range(builder, builder.udiv(builder.sub(n_in, done), whole(GROUP))):
        group(done, 0)
    total = builder.fadd(*(builder.load(each) for each in sums))
    builder.store(total_of(builder, total), out)


def over_groups(
    builder: Builder,
    n_bits: int,
    n: Value,
    row: Value,
    places: Callable[[Value], Sequence[Value]],
    part_of: Callable[[Value, int], Value],
    group: Callable[[Value, Sequence[Value], int], None],
) -> None:
    """Go over all codes of few bits, 64 at a time: whole lines first, then groups of 64 by themselves.

    Args:
        builder: where the code goes.
        n_bits: of a code.
        n: how many codes; a multiple of 64.
        row: where they lie.
        places: what to read for bytes at a place, from ``row`` on.
        part_of: one of the parts of a line.
        group: takes the number of its first code, the codes that were read at each place, and which part they are.
    """
    n_parts = 8 // n_bits
    n_lines = builder.udiv(n, whole(GROUP * n_parts))
    with cgutils.for_range(builder, n_lines) as loop:
        lines = [load(builder, row, at, I8, _LINE) for at in places(builder.mul(loop.index, whole(_LINE)))]
        for part in range(n_parts):
            first = builder.mul(builder.add(builder.mul(loop.index, whole(n_parts)), whole(part)), whole(GROUP))
            group(first, [part_of(line, part) for line in lines], part)
    if n_parts == 1:
        return
    done = builder.mul(n_lines, whole(n_parts))
    with cgutils.for_range(builder, builder.sub(builder.udiv(n, whole(GROUP)), done)) as loop:
        number = builder.add(done, loop.index)
        n_bytes = GROUP // n_parts
        lines = [load(builder, row, at, I8, n_bytes) for at in places(builder.mul(number, whole(n_bytes)))]
        codes = [joined(builder, [part_of(line, part) for part in range(n_parts)]) for line in lines]
        group(builder.mul(number, whole(GROUP)), codes, 0)


def part_of_line(builder: Builder, line: Value, n_bits: int, number: int, to: int) -> Value:
    """Return one of the parts of some bytes of codes, its bits from place ``to`` on."""
    return field(builder, line, n_bits * number, n_bits, to)
