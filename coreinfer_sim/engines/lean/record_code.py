"""Code for the parts of one neuron's record: products of a single row with the inputs, and adding a row to the outputs.

Rows that a token chooses lie anywhere, so that the processor cannot foresee them: while one is read, the next is asked for.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from coreinfer_sim.engines.lean.formats import BLOCK, TILE
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
from coreinfer_sim.engines.lean.tiles import load_halves

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
    n_bits: int,
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
        n_bits: of the lower part of a code.
        how: by which instructions integers are multiplied.
        rows: the lower bits of a row, 64 bytes for as many inputs as they hold: byte ``i`` has the input ``64 j + i`` at bit
            ``n_bits · j``.
        second: bytes from it to the other row.
        scales: of the first row's blocks times those of the inputs, float32, 64 bytes from one to the next; those of the other
            row lie behind all of them.
        codes: inputs, int8 [n_in].
        starts: int32, what half of the lower bits' range makes of four inputs, negative, [n_in / 4].
        n_in: inputs, a multiple of what 64 bytes hold.
        out: float32.
        following: the record whose rows are read into the cache.
    """
    n_parts = 8 // n_bits
    sums = [[zeroed(builder, _WIDE) for _ in range(2)] for _ in range(2)]
    all_scales = builder.mul(builder.udiv(n_in, whole(BLOCK)), whole(_LINE))
    with cgutils.for_range(builder, builder.udiv(n_in, whole(_LINE * n_parts))) as loop:
        at = builder.mul(loop.index, whole(_LINE))
        places = (at, builder.add(at, second))
        for place in places:
            prefetch(builder, following, place, _CACHE)
        lines = [load(builder, rows, place, I8, _LINE) for place in places]
        for part in range(n_parts):
            first = builder.mul(builder.add(builder.mul(loop.index, whole(n_parts)), whole(part)), whole(_LINE))
            x = load(builder, codes, first, I8, _LINE)
            start = load(builder, starts, first, I32, _WIDE)
            block = builder.mul(first, whole(_LINE // BLOCK))  # where the first block's scale lies
            for number, line in enumerate(lines):
                code = _part(builder, line, n_bits, part)
                dots = line_product(builder, how, code, x, start)
                own = builder.add(block, all_scales) if number else block
                two = [load(builder, scales, builder.add(own, whole(_LINE * k)), F32, 1) for k in range(2)]
                both = builder.shuffle_vector(*two, ir.Constant(vector(I32, _WIDE), [0] * 8 + [1] * 8))
                add_product(builder, sums[number][part % 2], builder.sitofp(dots, vector(F32, _WIDE)), both)
    for number, of_row in enumerate(sums):
        total = builder.fadd(*(builder.load(each) for each in of_row))
        builder.store(total_of(builder, total), builder.gep(out, [whole(number)]))


def emit_scales(builder: Builder, scales: Value, factors: Value, n_blocks: Value, out: Value) -> None:
    """Set ``out`` [n_blocks, 16] to a tile's float16 scales times the factors of the inputs' blocks."""
    with cgutils.for_range(builder, n_blocks) as loop:
        record = builder.mul(loop.index, whole(2 * TILE))
        factor = builder.load(builder.gep(factors, [loop.index]))
        made = builder.fmul(load_halves(builder, scales, record), repeated(builder, factor, TILE))
        store(builder, made, out, builder.mul(loop.index, whole(TILE)))


def _part(builder: Builder, line: Value, n_bits: int, number: int) -> Value:
    """Return one of the parts of 64 bytes of codes."""
    code = line
    if number:
        words = builder.bitcast(line, vector(I16, _LINE // 2))  # no processor shifts bytes
        shifted = builder.lshr(words, constant(I16, _LINE // 2, n_bits * number))
        code = builder.bitcast(shifted, vector(I8, _LINE))
    return builder.and_(code, constant(I8, _LINE, (1 << n_bits) - 1))


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
    """Add a factor times a row of ``n`` codes to outputs; a float16 scale for each 32 lies behind them.

    Codes of 8 bits are signed; of those of 4 bits, 8 stands for zero, and 64 bytes hold 64 in their low and 64 in their high
    halves. ``n`` fills whole lines of 64 bytes.
    """
    n_parts = 8 // n_bits
    n_blocks = builder.udiv(n, whole(BLOCK))
    n_bytes = builder.udiv(n, whole(n_parts))
    scales = _scales_behind(builder, row, n_bytes, factor, n_blocks)
    with cgutils.for_range(builder, builder.add(builder.udiv(n_blocks, whole(BLOCK)), whole(1))) as loop:
        prefetch(builder, following, builder.add(n_bytes, builder.mul(loop.index, whole(_LINE))), _CACHE)
    with cgutils.for_range(builder, builder.udiv(n, whole(_LINE * n_parts))) as loop:
        at = builder.mul(loop.index, whole(_LINE))
        prefetch(builder, following, at, _CACHE)
        line = load(builder, row, at, I8, _LINE)
        for part in range(n_parts):
            if n_bits == 4:
                codes = builder.sub(_part(builder, line, 4, part), constant(I8, _LINE, 8))
            for k in range(_LINE // BLOCK):
                block = builder.add(builder.mul(loop.index, whole(2 * n_parts)), whole(2 * part + k))
                by = repeated(builder, builder.load(builder.gep(scales, [block])), _WIDE)
                for half in range(2):
                    first = BLOCK * k + _WIDE * half
                    if n_bits == 4:
                        own = picked(builder, codes, range(first, first + _WIDE))
                    else:
                        own = load(builder, row, builder.add(at, whole(first)), I8, _WIDE)
                    wide = builder.sitofp(builder.sext(own, vector(I32, _WIDE)), vector(F32, _WIDE))
                    _add(builder, out, builder.add(builder.mul(block, whole(BLOCK)), whole(_WIDE * half)), wide, by)


def _scales_behind(builder: Builder, row: Value, n_bytes: Value, factor: Value, n_blocks: Value) -> Value:
    """Return where the scales behind the codes of a row lie as float32, times a factor; ``n_blocks`` is even."""
    made = builder.alloca(F32, size=n_blocks)

    def convert(begin: Value, n_steps: Value, width: int) -> Value:
        by = repeated(builder, factor, width)
        with cgutils.for_range(builder, n_steps) as loop:
            at = builder.add(begin, builder.mul(loop.index, whole(width)))
            halves = load(builder, row, builder.add(n_bytes, builder.mul(at, whole(2))), F16, width)
            store(builder, builder.fmul(builder.fpext(halves, vector(F32, width)), by), made, at)
        return builder.add(begin, builder.mul(n_steps, whole(width)))

    done = convert(whole(0), builder.udiv(n_blocks, whole(_WIDE)), _WIDE)
    convert(done, builder.udiv(builder.sub(n_blocks, done), whole(2)), 2)
    return made


def _add(builder: Builder, out: Value, at: Value, values: Value, by: Value) -> None:
    before = load(builder, builder.bitcast(out, I8.as_pointer()), builder.mul(at, whole(4)), F32, values.type.count)
    store(builder, fused(builder, values, by, before), out, at)
