"""Compiled code for tiles, called by its address: one function for each type of weights and number of input rows.

Each is compiled when it is first needed, and kept on the disk by numba.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from coreinfer_sim.engines.lean import formats, instructions, output_code, record_code, rows, tiles, whole_code
from coreinfer_sim.engines.lean.formats import FORMATS
from coreinfer_sim.engines.lean.instructions import F32, I8, I32, I64, products_of_features
from coreinfer_sim.engines.lean.output_code import emit_add_codes, emit_add_floats
from coreinfer_sim.engines.lean.record_code import emit_code_row, emit_float_rows, emit_low_rows
from coreinfer_sim.engines.lean.rows import FLOATS, emit_mixed, emit_rows, emit_widened
from coreinfer_sim.engines.lean.tiles import Inputs, emit_product, emit_scales, emit_unpacked
from coreinfer_sim.engines.lean.whole_code import emit_whole_tile, emit_widened_row

MANY = 4
"""Rows of inputs that one reading of a tile serves."""
_PRODUCT = types.void(*[types.int64] * 10)
_FIVE = types.void(*[types.int64] * 5)
_NAMES = (*FORMATS, *FLOATS)
_SOURCES = (formats, instructions, output_code, record_code, rows, tiles, whole_code)


def host_products() -> Any:
    """Return how the code that is compiled here multiplies integers."""
    return products_of_features(get_host_cpu_features())


@intrinsic(prefer_literal=True)
def _product(_context, number, n_x, weights, scales, x, codes, factors, sums, n_in, n_rows, out, stride):
    name, n = _NAMES[number.literal_value], n_x.literal_value

    def code(context, builder, _signature, args):
        w, s, x, q, f, t, n_in, n_rows, out, stride = args[2:]
        weights, scales = (builder.inttoptr(each, I8.as_pointer()) for each in (w, s))
        result = builder.inttoptr(out, F32.as_pointer())
        if name in FLOATS:
            of_x = builder.inttoptr(x, I8.as_pointer())
            emit_rows(builder, name, n, weights, of_x, n_in, n_rows, result, stride)
        else:
            kinds = (I32, F32, I32)
            inputs = Inputs(*(builder.inttoptr(p, k.as_pointer()) for p, k in zip((q, f, t), kinds, strict=True)))
            format_ = FORMATS[name]
            emit_product(builder, format_, host_products(), n, weights, scales, inputs, n_in, result, stride)
        return context.get_dummy_value()

    return types.void(number, n_x, *[types.int64] * 10), code


@intrinsic(prefer_literal=True)
def _unpacked(_context, number, size, weights, scales, n_in, out, stride):
    format_, n_bytes = FORMATS[_NAMES[number.literal_value]], size.literal_value

    def code(context, builder, _signature, args):
        w, s, n_in, out, stride = args[2:]
        weights, scales, to = (builder.inttoptr(each, I8.as_pointer()) for each in (w, s, out))
        emit_unpacked(builder, format_, weights, scales, n_in, to, stride, n_bytes)
        return context.get_dummy_value()

    return types.void(number, size, *[types.int64] * 5), code


@intrinsic(prefer_literal=True)
def _mixed(_context, number, rows, factors, n_in, n_rows, out):
    name = _NAMES[number.literal_value]

    def code(context, builder, _signature, args):
        rows, factors, n_in, n_rows, out = args[1:]
        result, by = (builder.inttoptr(each, F32.as_pointer()) for each in (out, factors))
        emit_mixed(builder, name, builder.inttoptr(rows, I8.as_pointer()), by, n_in, n_rows, result)
        return context.get_dummy_value()

    return types.void(number, *[types.int64] * 5), code


@intrinsic(prefer_literal=True)
def _widened(_context, number, values, n, out):
    name = _NAMES[number.literal_value]

    def code(context, builder, _signature, args):
        values, n, out = args[1:]
        from_, to = builder.inttoptr(values, I8.as_pointer()), builder.inttoptr(out, F32.as_pointer())
        emit_widened(builder, name, from_, n, to)
        return context.get_dummy_value()

    return types.void(number, *[types.int64] * 3), code


@intrinsic(prefer_literal=True)
def _rows(_context, number, n_rows, rows, second, scales, x, codes, starts, n_in, out, following):
    name, n = _NAMES[number.literal_value], n_rows.literal_value

    def code(context, builder, _signature, args):
        rows, second, scales, x, codes, starts, n_in, out, following = args[2:]
        rows, scales, x, codes, starts, following = (
            builder.inttoptr(each, I8.as_pointer()) for each in (rows, scales, x, codes, starts, following)
        )
        result = builder.inttoptr(out, F32.as_pointer())
        if name in FLOATS:
            emit_float_rows(builder, name, rows, second if n == 2 else None, x, n_in, result, following)
            return context.get_dummy_value()
        how, format_ = host_products(), FORMATS[name]
        if n == 2:
            emit_low_rows(builder, format_, how, rows, second, scales, codes, starts, n_in, result, following)
        else:
            emit_code_row(builder, format_, how, rows, scales, codes, starts, n_in, result, following)
        return context.get_dummy_value()

    return types.void(number, n_rows, *[types.int64] * 9), code


@intrinsic(prefer_literal=True)
def _scaled(_context, number, scales, factors, n_blocks, out):
    format_ = FORMATS[_NAMES[number.literal_value]]

    def code(context, builder, _signature, args):
        scales, factors, n_blocks, out = args[1:]
        by, result = (builder.inttoptr(each, F32.as_pointer()) for each in (factors, out))
        emit_scales(builder, format_, builder.inttoptr(scales, I8.as_pointer()), by, n_blocks, result)
        return context.get_dummy_value()

    return types.void(number, *[types.int64] * 4), code


@intrinsic(prefer_literal=True)
def _added(_context, number, places, factors, n, out):
    name = _NAMES[number.literal_value]

    def code(context, builder, _signature, args):
        places, factors, n, out = args[1:]
        rows = builder.inttoptr(places, I64.as_pointer())
        by, result = (builder.inttoptr(each, F32.as_pointer()) for each in (factors, out))
        if name in FLOATS:
            emit_add_floats(builder, name, rows, by, n, result)
        else:
            emit_add_codes(builder, FORMATS[name].bits, host_products(), rows, by, n, result)
        return context.get_dummy_value()

    return types.void(number, *[types.int64] * 4), code


@intrinsic(prefer_literal=True)
def _whole_tile(_context, number, high, low, stride, n_rows, n_in, out):
    format_ = FORMATS[_NAMES[number.literal_value]]

    def code(context, builder, _signature, args):
        high, low, stride, n_rows, n_in, out = args[1:]
        of_high, of_low, to = (builder.inttoptr(each, I8.as_pointer()) for each in (high, low, out))
        emit_whole_tile(builder, format_, of_high, of_low, stride, n_rows, n_in, to)
        return context.get_dummy_value()

    return types.void(number, *[types.int64] * 6), code


@intrinsic(prefer_literal=True)
def _widened_row(_context, number, size, row, n, out):
    n_bits, n_bytes = FORMATS[_NAMES[number.literal_value]].bits, size.literal_value

    def code(context, builder, _signature, args):
        row, n, out = args[2:]
        where, to = (builder.inttoptr(each, I8.as_pointer()) for each in (row, out))
        emit_widened_row(builder, n_bits, where, n, to, n_bytes)
        return context.get_dummy_value()

    return types.void(number, size, *[types.int64] * 3), code


def _calling(n: int) -> Any:
    """Return an intrinsic that calls a compiled function with ``n`` integers by its address."""

    @intrinsic
    def call(_context, address, arguments):
        def code(context, builder, _signature, args):
            kind = ir.FunctionType(ir.VoidType(), [I64] * n)
            function = builder.inttoptr(args[0], kind.as_pointer())
            builder.call(function, [builder.extract_value(args[1], place) for place in range(n)])
            return context.get_dummy_value()

        return types.void(types.int64, types.UniTuple(types.int64, n)), code

    return call


call_product = _calling(10)
"""Call what `product_address` has named with a tuple of its ten arguments."""
call_widened = _calling(3)
"""Call what `widened_address` or `widened_row_address` has named with a tuple of its three arguments."""
call_five = _calling(5)
"""Call what `unpacked_address`, `mixed_address` or `added_address` has named with a tuple of its five arguments."""
call_whole_tile = _calling(6)
"""Call what `whole_tile_address` has named with a tuple of its six arguments."""
call_rows = _calling(9)
"""Call what `rows_address`, or `mlp_loops`, has named with a tuple of its nine arguments."""


def kept(signature: Any, function: Any, *made_for: str | int, sources: tuple[ModuleType, ...] = _SOURCES) -> int:
    """Compile a function that C can call, kept on the disk where there is a place for it; return its address.

    Each is kept in files of its own: numba numbers the functions of one name, and two processes that compile at the same time
    would give one number to two of them.

    Args:
        signature: of numba.
        function: to compile.
        *made_for: what tells it from others of its name.
        sources: modules whose code it is made of.
    """
    function.__qualname__ = "-".join(
        str(each).replace(" ", "-") for each in (function.__name__, *made_for, _made_from(sources))
    )
    try:
        made = numba.cfunc(signature, cache=True, error_model="numpy")(function)
    except RuntimeError:
        made = numba.cfunc(signature, error_model="numpy")(function)
    _ALIVE.append(made)
    where = made.address
    assert where is not None
    return int(where)


_ALIVE: list[Any] = []


@functools.cache
def _made_from(sources: tuple[ModuleType, ...]) -> int:
    """Return a number of the sources of the code: numba looks at those of one file alone when it reuses what it has kept."""
    text = b"".join(Path(str(module.__file__)).read_bytes() for module in sources)
    return int(hashlib.sha256(text).hexdigest()[:12], 16)


@functools.cache
def product_address(name: str, n_x: int) -> int:
    """Return the address of a tile's product for ``n_x`` rows of inputs.

    Its arguments, all integers: addresses of weights and scales; of x, its codes, factors and sums (`products.quantise`);
    n_in, a multiple of the type's span; rows of the tile; address of the first output; floats from one row of outputs to
    the next.
    """
    number = _NAMES.index(name)

    def product(w, s, x, q, f, t, n_in, n_rows, out, stride):
        _product(number, n_x, w, s, x, q, f, t, n_in, n_rows, out, stride)

    return kept(_PRODUCT, product, name, n_x)


@functools.cache
def unpacked_address(name: str, size: int = 4) -> int:
    """Return the address of what widens a tile: addresses of weights and scales, n_in, address of the result, its stride."""
    number = _NAMES.index(name)

    def unpacked(w, s, n_in, out, stride):
        _unpacked(number, size, w, s, n_in, out, stride)

    return kept(_FIVE, unpacked, name, size)


@functools.cache
def mixed_address(name: str) -> int:
    """Return the address of a weighted sum of rows of a floating type: addresses of rows and factors, n_in, n_rows, result."""
    number = _NAMES.index(name)

    def mixed(rows, factors, n_in, n_rows, out):
        _mixed(number, rows, factors, n_in, n_rows, out)

    return kept(_FIVE, mixed, name)


@functools.cache
def widened_address(name: str) -> int:
    """Return the address of what widens values of a floating type: addresses of the values, their number, the result."""
    number = _NAMES.index(name)

    def widened(values, n, out):
        _widened(number, values, n, out)

    return kept(types.void(*[types.int64] * 3), widened, name)


@functools.cache
def rows_address(name: str, n_rows: int = 2) -> int:
    """Return the address of products with rows of a record: two of floats, or of the lower bits beside a high plane.

    Or one, of floats or whole codes. Its arguments: address of the first row, and bytes to the second; addresses of scales, of
    one row of codes those of its inputs; of x, its codes and starts; n_in; addresses of the results and of the record that is
    read next. See `record_code`.
    """
    number = _NAMES.index(name)

    def products(rows, second, scales, x, codes, starts, n_in, out, following):
        _rows(number, n_rows, rows, second, scales, x, codes, starts, n_in, out, following)

    return kept(types.void(*[types.int64] * 9), products, name, n_rows)


@functools.cache
def scales_address(name: str) -> int:
    """Return the address of `tiles.emit_scales`: addresses of scales and factors, n_blocks, address of the result; 0."""
    number = _NAMES.index(name)

    def scaled(scales, factors, n_blocks, out, _):
        _scaled(number, scales, factors, n_blocks, out)

    return kept(_FIVE, scaled, name)


@functools.cache
def whole_tile_address(name: str) -> int:
    """Return the address of `whole_code.emit_whole_tile`: addresses of planes, stride, n_rows, n_in, address of the result."""
    number = _NAMES.index(name)

    def whole_tile(high, low, stride, n_rows, n_in, out):
        _whole_tile(number, high, low, stride, n_rows, n_in, out)

    return kept(types.void(*[types.int64] * 6), whole_tile, name)


@functools.cache
def widened_row_address(name: str, size: int) -> int:
    """Return the address of `whole_code.emit_widened_row` for values of ``size`` bytes: addresses of the row, n, the result."""
    number = _NAMES.index(name)

    def widened_row(row, n, out):
        _widened_row(number, size, row, n, out)

    return kept(types.void(*[types.int64] * 3), widened_row, name, size)


@functools.cache
def added_address(name: str) -> int:
    """Return the address of what adds four output rows: addresses of their places and factors, n, address of the outputs; 0."""
    number = _NAMES.index(name)

    def added(places, factors, n, out, _):
        _added(number, places, factors, n, out)

    return kept(_FIVE, added, name)
