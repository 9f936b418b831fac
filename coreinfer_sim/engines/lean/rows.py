"""Code for rows of floats that lie one after the other, as in checkpoints and caches."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from coreinfer_sim.engines.lean.instructions import (
    F16,
    F32,
    I16,
    I32,
    Builder,
    Value,
    add_product,
    constant,
    intrinsic,
    load,
    picked,
    repeated,
    store,
    vector,
    whole,
    zeroed,
)

FLOAT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Of one value."""
FLOATS = tuple(FLOAT_BYTES)
"""Types of matrices that lie row by row."""
_WIDE = 16  # inputs of a row that are multiplied at a time
_FEW = 4  # rows that are read side by side, or sums of one row
_LONG = 4096  # inputs that the first-level cache does not hold beside weights
_SHORT = 256  # inputs of rows whose sums across a register would take as long as the products


def emit_rows(
    builder: Builder,
    kind: str,
    n_x: int,
    weights: Value,
    x: Value,
    n_in: Value,
    n_rows: Value,
    out: Value,
    stride: Value,
) -> None:
    """Do as `tiles.emit_product` for up to sixteen rows that lie one after the other, in one of the `FLOATS`.

    Memory is read fastest row by row. Long rows, whose inputs do not fit into the first-level cache, and short ones, such as
    those of a cache's keys, are read four at a time.
    """
    size = FLOAT_BYTES[kind]
    row_bytes = builder.mul(n_in, whole(size))

    def some(r: Value, first: Value, n: int, n_sums: int) -> None:
        """Multiply the rows first … first + n with the inputs r; each has so many sums of sixteen numbers."""
        sums = [[zeroed(builder, _WIDE) for _ in range(n_sums)] for _ in range(n)]
        starts = [builder.mul(builder.add(first, whole(i)), row_bytes) for i in range(n)]
        start = builder.mul(r, builder.mul(n_in, whole(4)))

        def from_to(begin: Value, n_steps: Value, n_at_once: int) -> Value:
            with cgutils.for_range(builder, n_steps) as loop:
                place = builder.add(begin, builder.mul(loop.index, whole(n_at_once * _WIDE)))
                for k in range(n_at_once):
                    at = builder.add(place, whole(k * _WIDE))
                    given = load(builder, x, builder.add(start, builder.mul(at, whole(4))), F32, _WIDE)
                    for i in range(n):
                        where = builder.add(starts[i], builder.mul(at, whole(size)))
                        add_product(builder, sums[i][k], widened_floats(builder, kind, weights, where, _WIDE), given)
            return builder.add(begin, builder.mul(n_steps, whole(n_at_once * _WIDE)))

        done = from_to(whole(0), builder.udiv(n_in, whole(n_sums * _WIDE)), n_sums)
        if n_sums > 1:
            done = from_to(done, builder.udiv(builder.sub(n_in, done), whole(_WIDE)), 1)
        totals = []
        for of_row in sums:
            total = builder.load(of_row[0])
            for other in of_row[1:]:
                total = builder.fadd(total, builder.load(other))
            totals.append(total)
        where = builder.add(first, builder.mul(stride, r))
        if n == _FEW:
            store(builder, _four_sums(builder, totals), out, where)
        else:
            builder.store(total_of(builder, totals[0]), builder.gep(out, [where]))
        with cgutils.for_range(builder, builder.sub(n_in, done)) as loop:  # what fills no vector
            at = builder.add(done, loop.index)
            given = load(builder, x, builder.add(start, builder.mul(at, whole(4))), F32, 1)
            for i in range(n):
                row = widened_floats(builder, kind, weights, builder.add(starts[i], builder.mul(at, whole(size))), 1)
                one = builder.extract_element(builder.fmul(row, given), ir.Constant(I32, 0))
                into = builder.gep(out, [builder.add(where, whole(i))])
                builder.store(builder.fadd(builder.load(into), one), into)

    with cgutils.for_range(builder, whole(n_x)) as inputs:
        is_long = builder.icmp_unsigned(">=", n_in, whole(_LONG))
        together = builder.or_(is_long, builder.icmp_unsigned("<=", n_in, whole(_SHORT)))
        n_fours = builder.select(together, builder.udiv(n_rows, whole(_FEW)), whole(0))
        with cgutils.for_range(builder, n_fours) as loop:
            some(inputs.index, builder.mul(loop.index, whole(_FEW)), _FEW, 1)
        done = builder.mul(n_fours, whole(_FEW))
        with cgutils.for_range(builder, builder.sub(n_rows, done)) as loop:
            some(inputs.index, builder.add(loop.index, done), 1, _FEW)


def emit_mixed(
    builder: Builder, kind: str, rows: Value, factors: Value, n_in: Value, n_rows: Value, out: Value
) -> None:
    """Set ``out`` [n_in] to the sum of rows that lie one after the other, each times its factor."""
    row_bytes = builder.mul(n_in, whole(FLOAT_BYTES[kind]))

    def columns(first: Value, n: int, width: int) -> None:
        """Sum ``n`` times ``width`` columns from ``first`` on."""
        sums = [zeroed(builder, width) for _ in range(n)]
        with cgutils.for_range(builder, n_rows) as loop:
            factor = repeated(builder, builder.load(builder.gep(factors, [loop.index])), width)
            start = builder.mul(loop.index, row_bytes)
            for k, variable in enumerate(sums):
                place = builder.add(start, builder.mul(builder.add(first, whole(k * width)), whole(FLOAT_BYTES[kind])))
                add_product(builder, variable, widened_floats(builder, kind, rows, place, width), factor)
        for k, variable in enumerate(sums):
            store(builder, builder.load(variable), out, builder.add(first, whole(k * width)))

    done = whole(0)
    for n, width in ((_FEW, _WIDE), (1, _WIDE), (1, 1)):
        n_steps = builder.udiv(builder.sub(n_in, done), whole(n * width))
        with cgutils.for_range(builder, n_steps) as steps:
            columns(builder.add(done, builder.mul(steps.index, whole(n * width))), n, width)
        done = builder.add(done, builder.mul(n_steps, whole(n * width)))


def emit_widened(builder: Builder, kind: str, values: Value, n: Value, out: Value) -> None:
    """Set ``out`` to ``n`` values of a floating type as float32."""

    def some(begin: Value, n_steps: Value, width: int) -> None:
        with cgutils.for_range(builder, n_steps) as loop:
            place = builder.add(begin, builder.mul(loop.index, whole(width)))
            wide = widened_floats(builder, kind, values, builder.mul(place, whole(FLOAT_BYTES[kind])), width)
            store(builder, wide, out, place)

    n_steps = builder.udiv(n, whole(_WIDE))
    some(whole(0), n_steps, _WIDE)
    done = builder.mul(n_steps, whole(_WIDE))
    some(done, builder.sub(n, done), 1)


def total_of(builder: Builder, values: Value) -> Value:
    """Return the sum of sixteen float32."""
    function = intrinsic(builder, f"llvm.vector.reduce.fadd.v{_WIDE}f32", F32, [F32, values.type])
    return builder.call(function, [ir.Constant(F32, 0.0), values], fastmath=("reassoc",))


def _four_sums(builder: Builder, rows: list[Value]) -> Value:
    """Return the sums of four vectors of sixteen numbers."""
    n = _WIDE
    while n > 4:  # halves onto each other
        n //= 2
        rows = [builder.fadd(picked(builder, row, range(n)), picked(builder, row, range(n, 2 * n))) for row in rows]
    pairs = []
    for a, b in (rows[:2], rows[2:]):  # a0 + a2, a1 + a3, b0 + b2, b1 + b3
        low = builder.shuffle_vector(a, b, ir.Constant(vector(I32, 4), [0, 1, 4, 5]))
        pairs.append(builder.fadd(low, builder.shuffle_vector(a, b, ir.Constant(vector(I32, 4), [2, 3, 6, 7]))))
    even = builder.shuffle_vector(*pairs, ir.Constant(vector(I32, 4), [0, 2, 4, 6]))
    return builder.fadd(even, builder.shuffle_vector(*pairs, ir.Constant(vector(I32, 4), [1, 3, 5, 7])))


def widened_floats(builder: Builder, kind: str, weights: Value, offset: Value, n: int) -> Value:
    """Load ``n`` values of a floating type as float32."""
    if kind == "float32":
        return load(builder, weights, offset, F32, n)
    if kind == "float16":
        return builder.fpext(load(builder, weights, offset, F16, n), vector(F32, n))
    words = builder.zext(load(builder, weights, offset, I16, n), vector(I32, n))
    return builder.bitcast(builder.shl(words, constant(I32, n, 16)), vector(F32, n))
