"""Code for the parts of one neuron's record: products of a single row with the inputs, and adding a row to the outputs.

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
    I16,
    I32,
    Builder,
    Products,
    Value,
    add_product,
    constant,
    fused,
    joined,
    line_product,
    load,
    picked,
    prefetch,
    repeated,
    store,
    vector,
    whole,
    zeroed,
)
from coreinfer_sim.engines.lean.rows import FLOAT_BYTES, total_of, widened_floats

_WIDE = 16
_SUMS = 4
_LINE = 64
_CACHE = 2  # into which the next record is asked for: the first one has room for too few requests


def emit_float_rows(
    builder: Builder, kind: str, rows: Value, second: Value, x: Value, n_in: Value, out: Value, following: Value
) -> None:
    """Set two numbers of ``out`` to the products of float32 inputs with two rows of floats, the other ``second`` bytes behind.

    The two rows of the record ``following`` are read into the cache.
    """
    size = FLOAT_BYTES[kind]
    sums = [[zeroed(builder, _WIDE) for _ in range(_SUMS)] for _ in range(2)]

    def products(begin: Value, n_steps: Value, n: int) -> Value:
        with cgutils.for_range(builder, n_steps) as loop:
            first = builder.add(begin, builder.mul(loop.index, whole(n * _WIDE)))
            for line in range(0, n * _WIDE * size, _LINE):
                at = builder.add(builder.mul(first, whole(size)), whole(line))
                for place in (at, builder.add(at, second)):
                    prefetch(builder, following, place, _CACHE)
            for k in range(n):
                at = builder.add(first, whole(k * _WIDE))
                given = load(builder, x, builder.mul(at, whole(4)), F32, _WIDE)
                place = builder.mul(at, whole(size))
                for of_row, where in zip(sums, (place, builder.add(place, second)), strict=True):
                    add_product(builder, of_row[k], widened_floats(builder, kind, rows, where, _WIDE), given)
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
        for number, where in enumerate((place, builder.add(place, second))):
            one = builder.fmul(widened_floats(builder, kind, rows, where, 1), given)
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
            prefetch(builder, following, each, _CACHE)
        return both

    def twice(line: Value, part: int) -> Value:
        return _part(builder, line, format_.low_bits, part, 1)

    _over_groups(builder, format_.low_bits, n_in, rows, read, twice, group)
    for number, of_row in enumerate(sums):
        total = builder.fadd(*(builder.load(each) for each in of_row))
        builder.store(total_of(builder, total), builder.gep(out, [whole(number)]))


def _over_groups(
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


def _part(builder: Builder, line: Value, n_bits: int, number: int, to: int) -> Value:
    """Return one of the parts of some bytes of codes, its bits from place ``to`` on."""
    n, first = line.type.count, n_bits * number
    if first != to:
        words = builder.bitcast(line, vector(I16, n // 2))  # no processor shifts bytes
        shift = builder.lshr if first > to else builder.shl
        line = builder.bitcast(shift(words, constant(I16, n // 2, abs(first - to))), vector(I8, n))
    return builder.and_(line, constant(I8, n, ((1 << n_bits) - 1) << to))


def emit_add_floats(
    builder: Builder, kind: str, row: Value, factor: Value, n: Value, out: Value, following: Value
) -> None:
    """Add a factor times a row of ``n`` floats to float32 outputs."""
    size = FLOAT_BYTES[kind]

    def add(begin: Value, n_steps: Value, width: int) -> Value:
        by = repeated(builder, factor, width)
        with cgutils.for_range(builder, n_steps) as loop:
            at = builder.add(begin, builder.mul(loop.index, whole(width)))
            if width > 1:
                prefetch(builder, following, builder.mul(at, whole(size)), _CACHE)
            _add(builder, out, at, widened_floats(builder, kind, row, builder.mul(at, whole(size)), width), by)
        return builder.add(begin, builder.mul(n_steps, whole(width)))

    width = max(_WIDE, _LINE // size)
    done = add(whole(0), builder.udiv(n, whole(width)), width)
    add(done, builder.sub(n, done), 1)


def emit_add_codes(
    builder: Builder, n_bits: int, row: Value, factor: Value, n: Value, out: Value, following: Value
) -> None:
    """Add a factor times a row of ``n`` codes to outputs, a multiple of 64.

    Codes of 8 bits are signed, and float16 scales, one for each 32, lie behind them. Those of 4 bits are not, and minima lie
    behind their scales.
    """
    n_parts = 8 // n_bits
    n_blocks = builder.udiv(n, whole(BLOCK))
    n_bytes = builder.udiv(n, whole(n_parts))
    n_behind = builder.mul(n_blocks, whole(n_parts))
    scales = _behind(builder, row, n_bytes, factor, n_behind)
    with cgutils.for_range(builder, builder.add(builder.udiv(n_behind, whole(_LINE // 2)), whole(1))) as loop:
        prefetch(builder, following, builder.add(n_bytes, builder.mul(loop.index, whole(_LINE))), _CACHE)

    def read(place: Value) -> tuple[Value]:
        prefetch(builder, following, place, _CACHE)
        return (place,)

    def part_of(line: Value, part: int) -> Value:
        return line if n_bits == 8 else _part(builder, line, n_bits, part, 0)

    def number_of(place: Value) -> Value:
        return repeated(builder, builder.load(builder.gep(scales, [place])), _WIDE)

    def group(first: Value, codes: Sequence[Value], _: int) -> None:
        for k in range(GROUP // BLOCK):
            block = builder.add(builder.udiv(first, whole(BLOCK)), whole(k))
            by = number_of(block)
            added = number_of(builder.add(block, n_blocks)) if n_bits == 4 else None
            for begin in range(BLOCK * k, BLOCK * (k + 1), _WIDE):
                own = picked(builder, codes[0], range(begin, begin + _WIDE))
                extend = builder.zext if n_bits == 4 else builder.sext
                wide = builder.sitofp(extend(own, vector(I32, _WIDE)), vector(F32, _WIDE))
                _add(builder, out, builder.add(first, whole(begin)), wide, by, added)

    _over_groups(builder, n_bits, n, row, read, part_of, group)


def _behind(builder: Builder, row: Value, n_bytes: Value, factor: Value, n: Value) -> Value:
    """Return where the ``n`` float16 behind the codes of a row lie as float32, times a factor; ``n`` is even."""
    made = builder.alloca(F32, size=n)

    def convert(begin: Value, n_steps: Value, width: int) -> Value:
        by = repeated(builder, factor, width)
        with cgutils.for_range(builder, n_steps) as loop:
            at = builder.add(begin, builder.mul(loop.index, whole(width)))
            halves = load(builder, row, builder.add(n_bytes, builder.mul(at, whole(2))), F16, width)
            store(builder, builder.fmul(builder.fpext(halves, vector(F32, width)), by), made, at)
        return builder.add(begin, builder.mul(n_steps, whole(width)))

    done = convert(whole(0), builder.udiv(n, whole(_WIDE)), _WIDE)
    convert(done, builder.udiv(builder.sub(n, done), whole(2)), 2)
    return made


def _add(builder: Builder, out: Value, at: Value, values: Value, by: Value, added: Value | None = None) -> None:
    before = load(builder, builder.bitcast(out, I8.as_pointer()), builder.mul(at, whole(4)), F32, values.type.count)
    if added is not None:
        before = builder.fadd(before, added)
    store(builder, fused(builder, values, by, before), out, at)
