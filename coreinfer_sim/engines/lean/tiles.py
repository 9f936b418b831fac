"""Code for one tile of a packed matrix: its products with one row of inputs or several, and its weights as float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from coreinfer_sim.engines.lean.formats import BLOCK, SUPER, TILE, Format, Scales
from coreinfer_sim.engines.lean.instructions import (
    F16,
    F32,
    I8,
    I32,
    Builder,
    Products,
    Value,
    add_product,
    bfloat16_bits,
    constant,
    field,
    load,
    prefetch,
    repeated,
    store,
    summed_products,
    vector,
    whole,
    zeroed,
)

_AHEAD = {2: (4096, 1), 3: (4096, 1), 4: (4096, 1), 5: (4096, 1), 6: (4096, 1), 8: (3072, 2)}
"""By how many bytes codes of so many bits are asked for before they are needed, and into which cache."""
_ROW = vector(F32, TILE)


@dataclass(frozen=True)
class Inputs:
    """Pointers to the rounded inputs of a product."""

    codes: Value
    """int8, four at a time as int32."""
    factors: Value
    """float32, one a block."""
    sums: Value
    """int32 sums of codes, one every 16."""


def emit_product(
    builder: Builder,
    format_: Format,
    how: Products,
    n_x: int,
    weights: Value,
    scales: Value,
    inputs: Inputs,
    n_in: Value,
    out: Value,
    stride: Value,
) -> None:
    """Set sixteen numbers of each of ``n_x`` rows of ``out``, ``stride`` floats apart, to a tile's products."""
    sums = [zeroed(builder, TILE) for _ in range(n_x)]
    # of the types with scales of scales: sums within such a span, by scales and by minima
    inner = [zeroed(builder, TILE) for _ in range(n_x)] if format_.span == SUPER else sums
    minima = [zeroed(builder, TILE) for _ in range(n_x)] if format_.scales is Scales.SUPER_MIN else inner
    n_blocks = builder.udiv(n_in, whole(BLOCK))
    of_codes = (0 if format_.low_bits else format_.offset, format_.bits)

    def block(number: Value, record: Value, small: Value) -> None:
        place = builder.mul(number, whole(format_.code_bytes))
        ahead, cache = _AHEAD[format_.bits]
        for line in range(0, format_.code_bytes, 64):
            prefetch(builder, weights, builder.add(place, whole(line + ahead)), cache)
        codes = codes_of(builder, format_, weights, place)
        factors, minimum = _factors(builder, format_, scales, record, small)
        for r in range(n_x):
            own = builder.add(number, builder.mul(n_blocks, whole(r)))
            of_input = repeated(builder, builder.load(builder.gep(inputs.factors, [own])), TILE)
            of_code = builder.fmul(of_input, constant(F32, TILE, 0.5)) if format_.low_bits else of_input
            fours = [_item(builder, inputs.codes, own, 8, j) for j in range(8)]
            halves = [_item(builder, inputs.sums, own, 2, j) for j in range(2)]
            n_factors = len(factors)
            totals = halves if n_factors == 2 else [builder.add(*halves)]
            n = 8 // n_factors
            for part, (factor, total) in enumerate(zip(factors, totals, strict=True)):
                chosen = slice(part * n, (part + 1) * n)
                dots = _whole_codes(
                    builder,
                    format_,
                    total,
                    summed_products(builder, how, codes[chosen], fours[chosen], total, *of_codes),
                )
                add_product(builder, inner[r], builder.sitofp(dots, _ROW), builder.fmul(factor, of_code))
            if minimum is not None:
                total = repeated(builder, builder.sitofp(totals[0], F32), TILE)
                add_product(builder, minima[r], minimum, builder.fmul(total, of_input))

    def over(number: Value) -> None:
        record = builder.mul(number, whole(format_.scale_bytes))
        for r in range(n_x):
            for variable in {id(inner[r]): inner[r], id(minima[r]): minima[r]}.values():
                builder.store(constant(F32, TILE, 0.0), variable)
        with cgutils.for_range(builder, whole(SUPER // BLOCK)) as loop:
            place = builder.add(builder.mul(number, whole(SUPER // BLOCK)), loop.index)
            block(place, record, _small(builder, format_, record, loop.index))
        for r in range(n_x):
            add_product(builder, sums[r], load_halves(builder, scales, record), builder.load(inner[r]))
            if format_.scales is Scales.SUPER_MIN:
                factor = load_halves(builder, scales, builder.add(record, whole(32)))
                add_product(builder, sums[r], builder.fneg(factor), builder.load(minima[r]))

    with cgutils.for_range(builder, builder.udiv(n_in, whole(format_.span))) as loop:
        if format_.span == SUPER:
            over(loop.index)
        else:
            record = builder.mul(loop.index, whole(format_.scale_bytes))
            block(loop.index, record, record)
    for r in range(n_x):
        store(builder, builder.load(sums[r]), out, builder.mul(stride, whole(r)))


def emit_unpacked(
    builder: Builder, format_: Format, weights: Value, scales: Value, n_in: Value, out: Value, stride: Value, size: int
) -> None:
    """Set ``out`` [n_in, 16], rows ``stride`` numbers apart, to a tile's weights, transposed.

    They are float32 (``size`` 4) or bfloat16 (2).
    """
    with cgutils.for_range(builder, builder.udiv(n_in, whole(BLOCK))) as loop:
        codes = codes_of(builder, format_, weights, builder.mul(loop.index, whole(format_.code_bytes)))
        n_within = whole(format_.span // BLOCK)
        record = builder.mul(builder.udiv(loop.index, n_within), whole(format_.scale_bytes))
        small = record
        if format_.span == SUPER:
            small = _small(builder, format_, record, builder.urem(loop.index, n_within))
        factors, minimum = _factors(builder, format_, scales, record, small)
        if format_.span == SUPER:
            outer = load_halves(builder, scales, record)
            factors = [builder.fmul(outer, factor) for factor in factors]
            if minimum is not None:
                of_minimum = load_halves(builder, scales, builder.add(record, whole(32)))
                minimum = builder.fneg(builder.fmul(of_minimum, minimum))
        offset, by = constant(F32, TILE, format_.zero), constant(F32, TILE, float(format_.step))
        for j, group in enumerate(codes):
            words = builder.bitcast(group, vector(I32, TILE))
            for i in range(4):
                code = builder.lshr(words, constant(I32, TILE, 8 * i)) if i else words
                code = builder.uitofp(builder.and_(code, constant(I32, TILE, 255)), _ROW)
                code = builder.fmul(code, by) if format_.low_bits else code
                factor = factors[j * len(factors) // 8]
                weight = builder.fmul(builder.fsub(code, offset), factor)
                if minimum is not None:
                    weight = builder.fadd(weight, minimum)
                row = builder.add(builder.mul(loop.index, whole(BLOCK)), whole(4 * j + i))
                made = weight if size == 4 else bfloat16_bits(builder, weight)
                store(builder, made, out, builder.mul(builder.mul(row, stride), whole(size)))


def emit_scales(builder: Builder, format_: Format, scales: Value, factors: Value, n_blocks: Value, out: Value) -> None:
    """Set ``out`` [n_blocks, 1 or 2, 16] to half of a tile's scales times the factors of the inputs' blocks."""
    n_within = whole(format_.span // BLOCK)
    with cgutils.for_range(builder, n_blocks) as loop:
        record = builder.mul(builder.udiv(loop.index, n_within), whole(format_.scale_bytes))
        small = record
        if format_.span == SUPER:
            small = _small(builder, format_, record, builder.urem(loop.index, n_within))
        made, _ = _factors(builder, format_, scales, record, small)
        by = builder.fmul(builder.load(builder.gep(factors, [loop.index])), ir.Constant(F32, 0.5))
        by = repeated(builder, by, TILE)
        if format_.span == SUPER:
            by = builder.fmul(by, load_halves(builder, scales, record))
        for part, scale in enumerate(made):
            place = builder.add(builder.mul(loop.index, whole(len(made))), whole(part))
            store(builder, builder.fmul(scale, by), out, builder.mul(place, whole(TILE)))


def _whole_codes(builder: Builder, format_: Format, total: Value, dots: Value) -> Value:
    """Turn sums of products with a high plane's codes into twice those with whole ones."""
    if not format_.low_bits:
        return dots
    added = repeated(builder, builder.mul(total, ir.Constant(I32, int(-2 * format_.zero))), TILE)
    return builder.add(builder.shl(dots, constant(I32, TILE, format_.low_bits + 1)), added)


def load_halves(builder: Builder, scales: Value, offset: Value) -> Value:
    """Load sixteen float16 as float32."""
    return builder.fpext(load(builder, scales, offset, F16, TILE), _ROW)


def _item(builder: Builder, array: Value, block: Value, n: int, place: int) -> Value:
    return builder.load(builder.gep(array, [builder.add(builder.mul(block, whole(n)), whole(place))]))


def codes_of(builder: Builder, format_: Format, weights: Value, place: Value) -> list[Value]:
    """Return a block's codes, eight vectors of 64 bytes."""

    def line(number: int) -> Value:
        return load(builder, weights, builder.add(place, whole(64 * number)), I8, 64)

    if format_.bits == 8:
        return [line(j) for j in range(8)]
    if format_.bits < 4:
        pair = [line(0), line(1)]
        codes = [field(builder, pair[j // 4], 2 * (j % 4), 2, 0) for j in range(8)]
        if format_.bits == 3:
            rest = line(2)
            codes = [builder.or_(code, field(builder, rest, j, 1, 2)) for j, code in enumerate(codes)]
        return codes
    low = [line(j) for j in range(4)]
    codes = [field(builder, low[j % 4], 4 * (j // 4), 4, 0) for j in range(8)]
    if format_.bits == 5:
        rest = line(4)
        return [builder.or_(code, field(builder, rest, j, 1, 4)) for j, code in enumerate(codes)]
    if format_.bits == 6:
        pair = [line(4), line(5)]
        return [builder.or_(code, field(builder, pair[j // 4], 2 * (j % 4), 2, 4)) for j, code in enumerate(codes)]
    return codes


def _small(builder: Builder, format_: Format, record: Value, within: Value) -> Value:
    """Return where the 8-bit scales of a block lie in a record of scales."""
    head = 64 if format_.scales is Scales.SUPER_MIN else 32
    return builder.add(builder.add(record, whole(head)), builder.mul(within, whole(32)))


def _factors(
    builder: Builder, format_: Format, scales: Value, record: Value, small: Value
) -> tuple[list[Value], Value | None]:
    """Return a block's scales, one or one each half, and its minimum, without the scales of scales."""

    def numbers(offset: Value, convert: Callable[..., Any], extend: Callable[..., Any]) -> Value:
        return convert(extend(load(builder, scales, offset, I8, TILE), vector(I32, TILE)), _ROW)

    after = builder.add(small, whole(16))
    if format_.scales is Scales.SUPER_MIN:
        first, second = (numbers(offset, builder.uitofp, builder.zext) for offset in (small, after))
        return [first], second
    if format_.scales is Scales.SUPER_HALVES:
        return [numbers(offset, builder.sitofp, builder.sext) for offset in (small, after)], None
    minimum = None
    if format_.scales is Scales.HALF_MIN:
        minimum = load_halves(builder, scales, builder.add(record, whole(32)))
    return [load_halves(builder, scales, record)], minimum
