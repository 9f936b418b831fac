"""Vector instructions as LLVM's intermediate language: what the tiles are made of, and integer products by processor.

A product of unsigned codes with signed inputs has four forms, chosen by the processor's instructions alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

from llvmlite import ir
from numba.core import cgutils

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
Builder = Any
Value = Any


class Products(Enum):
    """How a processor multiplies integers."""

    VNNI_512 = "avx512_vnni"
    """``vpdpbusd`` of 64 bytes."""
    VNNI_256 = "avx_vnni"
    """``vpdpbusd`` of 32 bytes."""
    AVX2 = "avx2"
    """``vpmaddubsw``, pairs summed in 16 bits as long as they fit."""
    DOT = "dotprod"
    """ARM's ``sdot`` of 16 bytes."""
    PLAIN = "plain"
    """Whatever the compiler makes of widened products."""


def products_of_features(features: str) -> Products:
    """Return how a processor multiplies, from features as LLVM lists them: ``+avx2,-avx512f,…``."""
    has = {name[1:] for name in features.split(",") if name.startswith("+")}
    if {"avx512f", "avx512bw", "avx512vnni"} <= has:
        return Products.VNNI_512
    if "avxvnni" in has:
        return Products.VNNI_256
    if {"avx2", "fma", "f16c"} <= has:
        return Products.AVX2
    return Products.DOT if "dotprod" in has else Products.PLAIN


def vector(kind: Any, n: int) -> Any:
    """Return the type of ``n`` values of a kind."""
    return ir.VectorType(kind, n)


def constant(kind: Any, n: int, value: float) -> Value:
    """Return a vector that holds one value ``n`` times."""
    return ir.Constant(vector(kind, n), [value] * n)


def whole(value: int) -> Value:
    """Return a 64-bit integer."""
    return ir.Constant(I64, value)


def undefined(kind: Any) -> Value:
    """Return a value of a type that nobody reads."""
    return ir.Constant(kind, ir.Undefined)


def repeated(builder: Builder, value: Value, n: int) -> Value:
    """Return a vector that holds a value ``n`` times."""
    empty = undefined(vector(value.type, n))
    first = builder.insert_element(empty, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, empty, constant(I32, n, 0))


def picked(builder: Builder, values: Value, places: Sequence[int]) -> Value:
    """Return the elements of a vector at some places."""
    return builder.shuffle_vector(values, undefined(values.type), ir.Constant(vector(I32, len(places)), list(places)))


def joined(builder: Builder, parts: Sequence[Value]) -> Value:
    """Return two or four vectors as one."""
    while len(parts) > 1:
        n = 2 * parts[0].type.count
        places = ir.Constant(vector(I32, n), list(range(n)))
        parts = [builder.shuffle_vector(*parts[i : i + 2], places) for i in range(0, len(parts), 2)]
    return parts[0]


def moved(builder: Builder, bytes_: Value, by: int) -> Value:
    """Return bytes whose bits are some places higher, or lower where ``by`` is negative; none must leave its byte."""
    if by == 0:
        return bytes_
    n = bytes_.type.count // 2
    words = builder.bitcast(bytes_, vector(I16, n))  # no processor shifts bytes
    shift = builder.shl if by > 0 else builder.lshr
    return builder.bitcast(shift(words, constant(I16, n, abs(by))), bytes_.type)


def field(builder: Builder, bytes_: Value, first: int, n: int, to: int) -> Value:
    """Move ``n`` bits of every byte from place ``first`` to place ``to``, and clear the others."""
    return builder.and_(moved(builder, bytes_, to - first), constant(I8, bytes_.type.count, ((1 << n) - 1) << to))


def transposed(builder: Builder, rows: Sequence[Value]) -> list[Value]:
    """Return sixteen vectors of sixteen numbers with rows and columns exchanged."""
    rows, n = list(rows), 16
    step = 1
    while step < n:  # halves of each pair of rows that lie ``step`` apart change places
        kept = ir.Constant(vector(I32, n), [i if not i & step else n + (i ^ step) for i in range(n)])
        other = ir.Constant(vector(I32, n), [i ^ step if not i & step else n + i for i in range(n)])
        made = list(rows)
        for i in range(n):
            if not i & step:
                a, b = rows[i], rows[i | step]
                made[i], made[i | step] = builder.shuffle_vector(a, b, kept), builder.shuffle_vector(a, b, other)
        rows, step = made, 2 * step
    return rows


def load(builder: Builder, pointer: Value, offset: Value, kind: Any, n: int) -> Value:
    """Load ``n`` values from so many bytes behind a pointer to bytes."""
    where = builder.bitcast(builder.gep(pointer, [offset]), vector(kind, n).as_pointer())
    return builder.load(where, align=1)


def intrinsic(builder: Builder, name: str, result: Any, arguments: Sequence[Any]) -> Any:
    """Return one of LLVM's own functions, declared in the builder's module."""
    module = builder.module
    known = module.globals.get(name)
    return known if known is not None else ir.Function(module, ir.FunctionType(result, arguments), name)


def fused(builder: Builder, a: Value, b: Value, c: Value) -> Value:
    """Return a · b + c of float vectors, rounded once where the processor can."""
    name = f"llvm.fmuladd.v{a.type.count}f32"
    return builder.call(intrinsic(builder, name, a.type, [a.type] * 3), [a, b, c])


def zeroed(builder: Builder, n: int) -> Value:
    """Return a variable of ``n`` float32 that is zero at first."""
    made = cgutils.alloca_once(builder, vector(F32, n))
    builder.store(constant(F32, n, 0.0), made)
    return made


def add_product(builder: Builder, variable: Value, a: Value, b: Value) -> None:
    """Add a · b to a variable."""
    builder.store(fused(builder, a, b, builder.load(variable)), variable)


def bfloat16_bits(builder: Builder, values: Value) -> Value:
    """Return float32 as the bits of bfloat16, rounded to nearest even."""
    n = values.type.count
    words = builder.bitcast(values, vector(I32, n))
    last = builder.and_(builder.lshr(words, constant(I32, n, 16)), constant(I32, n, 1))
    rounded = builder.add(words, builder.add(last, constant(I32, n, 0x7FFF)))
    return builder.trunc(builder.lshr(rounded, constant(I32, n, 16)), vector(I16, n))


def store(builder: Builder, values: Value, out: Value, place: Value) -> None:
    """Store float32 from a place of an array on."""
    builder.store(values, builder.bitcast(builder.gep(out, [place]), values.type.as_pointer()), align=4)


def prefetch(builder: Builder, pointer: Value, offset: Value, cache: int) -> None:
    """Ask for the cache line at an offset, into the first or second cache."""
    function = intrinsic(builder, "llvm.prefetch.p0", ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    read, near, data = (ir.Constant(I32, value) for value in (0, 4 - cache, 1))
    builder.call(function, [builder.gep(pointer, [offset]), read, near, data])


def summed_products(
    builder: Builder,
    how: Products,
    codes: Sequence[Value],
    inputs: Sequence[Value],
    total: Value,
    offset: int,
    bits: int,
) -> Value:
    """Return Σ (code - offset) · input of sixteen rows, int32 [16].

    Args:
        builder: where the code goes.
        how: by which instructions.
        codes: vectors of 64 bytes, four inputs of sixteen rows each; unsigned.
        inputs: the four signed bytes that belong to each, as an int32.
        total: int32 sum of all inputs.
        offset: see `formats.Format`; as is ``bits``.
        bits: of a code.
    """
    if how is Products.AVX2:
        return _by_pairs(builder, codes, inputs, total, offset, bits)
    if how is Products.DOT:
        return _by_signed(builder, codes, inputs, total, offset, bits)
    start = _start(builder, total, offset)
    if how is Products.PLAIN:
        return _by_widening(builder, codes, inputs, start)
    n = 16 if how is Products.VNNI_512 else 8
    name, kind = f"llvm.x86.avx512.vpdpbusd.{n * 32}", vector(I32, n)
    function = intrinsic(builder, name, kind, [kind, vector(I8, 4 * n), vector(I8, 4 * n)])
    n_parts = 16 // n
    # two sums at least, as a product takes five cycles and one begins with each
    sums = [[repeated(builder, start, n)] * n_parts, [constant(I32, n, 0)] * n_parts]
    for number, (code, four) in enumerate(zip(codes, inputs, strict=True)):
        parts = sums[number % 2]
        x = builder.bitcast(repeated(builder, four, n), vector(I8, 4 * n))
        for p in range(n_parts):
            parts[p] = builder.call(function, [parts[p], _part(builder, code, p, n_parts), x])
    return joined(builder, [builder.add(a, b) for a, b in zip(*sums, strict=True)])


def line_product(builder: Builder, how: Products, codes: Value, inputs: Value, start: Value) -> Value:
    """Return int32 [16]: of four unsigned bytes of ``codes`` and signed ones of ``inputs`` each the products' sum, plus start.

    Codes are less than 128 on processors that multiply signed bytes, or sum pairs of products in 16 bits.
    """
    n = {Products.VNNI_512: 16, Products.VNNI_256: 8, Products.AVX2: 8, Products.DOT: 4, Products.PLAIN: 16}[how]
    made = []
    for p in range(16 // n):
        own = [
            picked(builder, each, range(p * k * n, (p + 1) * k * n))
            for each, k in ((codes, 4), (inputs, 4), (start, 1))
        ]
        made.append(_four_products(builder, how, n, *own))
    return joined(builder, made)


def offset_product(builder: Builder, how: Products, codes: Value, inputs: Value, start: Value) -> Value:
    """Return int32 [16]: of four unsigned bytes of ``codes`` less 128, and signed ones of ``inputs``, the products' sum.

    Args:
        builder: where the code goes.
        how: by which instructions.
        codes: 64 bytes.
        inputs: 64 bytes above -128.
        start: int32 [16], -128 times the sum of each four inputs.
    """
    if how in (Products.VNNI_512, Products.VNNI_256, Products.PLAIN):
        return line_product(builder, how, codes, inputs, start)
    signed = builder.xor(codes, constant(I8, 64, -128))
    if how is Products.DOT:
        return line_product(builder, how, signed, inputs, constant(I32, 16, 0))
    # AVX2: pairs of such products do not fit into 16 bits, unless the sign of an input goes to the code
    bytes_ = vector(I8, 32)
    sign = intrinsic(builder, "llvm.x86.avx2.psign.b", bytes_, [bytes_, bytes_])
    magnitude = intrinsic(builder, "llvm.abs.v32i8", bytes_, [bytes_, I1])
    made = []
    for p in range(2):
        own, x = _part(builder, signed, p, 2), _part(builder, inputs, p, 2)
        of_x = builder.call(magnitude, [x, ir.Constant(I1, 0)])
        made.append(_four_products(builder, how, 8, of_x, builder.call(sign, [own, x]), constant(I32, 8, 0)))
    return joined(builder, made)


def _four_products(builder: Builder, how: Products, n: int, codes: Value, inputs: Value, start: Value) -> Value:
    """Return int32 [n] likewise, by one instruction or two."""
    kind, bytes_ = vector(I32, n), vector(I8, 4 * n)
    if how in (Products.VNNI_512, Products.VNNI_256):
        function = intrinsic(builder, f"llvm.x86.avx512.vpdpbusd.{n * 32}", kind, [kind, bytes_, bytes_])
        return builder.call(function, [start, codes, inputs])
    if how is Products.DOT:
        function = intrinsic(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", kind, [kind, bytes_, bytes_])
        return builder.call(function, [start, codes, inputs])
    if how is Products.AVX2:
        words = vector(I16, 2 * n)
        pairs = intrinsic(builder, "llvm.x86.avx2.pmadd.ub.sw", words, [bytes_, bytes_])
        wide = intrinsic(builder, "llvm.x86.avx2.pmadd.wd", kind, [words, words])
        products = builder.call(pairs, [codes, inputs])
        return builder.add(start, builder.call(wide, [products, constant(I16, 2 * n, 1)]))
    numbers = vector(I32, 4 * n)
    products = builder.mul(builder.zext(codes, numbers), builder.sext(inputs, numbers))
    for place in range(4):
        start = builder.add(start, picked(builder, products, range(place, 4 * n, 4)))
    return start


def _start(builder: Builder, total: Value, offset: int) -> Value:
    return builder.mul(total, ir.Constant(I32, -offset)) if offset else ir.Constant(I32, 0)


def _part(builder: Builder, values: Value, number: int, n_parts: int) -> Value:
    if n_parts == 1:
        return values
    n = values.type.count // n_parts
    return picked(builder, values, range(number * n, (number + 1) * n))


def _by_pairs(
    builder: Builder, codes: Sequence[Value], inputs: Sequence[Value], total: Value, offset: int, bits: int
) -> Value:
    """AVX2: bytes are multiplied and pairs of them summed in 16 bits, which hold so many pairs of codes of so many bits.

    Pairs of 8-bit codes do not fit; there the sign of a code goes to the input.
    """
    bytes_, words, numbers = vector(I8, 32), vector(I16, 16), vector(I32, 8)
    pairs = intrinsic(builder, "llvm.x86.avx2.pmadd.ub.sw", words, [bytes_, bytes_])
    wide = intrinsic(builder, "llvm.x86.avx2.pmadd.wd", numbers, [words, words])
    signed = intrinsic(builder, "llvm.x86.avx2.psign.b", bytes_, [bytes_, bytes_])
    magnitude = intrinsic(builder, "llvm.abs.v32i8", bytes_, [bytes_, I1])
    most = {2: 8, 3: 8, 4: 8, 5: 4, 6: 2, 8: 1}[bits]
    start = ir.Constant(I32, 0) if bits == 8 else _start(builder, total, offset)
    sums, pending = [repeated(builder, start, 8)] * 2, [None, None]
    for number, (code, four) in enumerate(zip(codes, inputs, strict=True)):
        x = builder.bitcast(repeated(builder, four, 8), bytes_)
        for p in range(2):
            part, of = _part(builder, code, p, 2), x
            if bits == 8:
                part = builder.xor(part, constant(I8, 32, -128))
                of = builder.call(signed, [x, part])
                part = builder.call(magnitude, [part, ir.Constant(I1, 0)])
            product = builder.call(pairs, [part, of])
            waiting = product if pending[p] is None else builder.add(pending[p], product)
            pending[p] = waiting
            if (number + 1) % most == 0 or number + 1 == len(codes):
                sums[p] = builder.add(sums[p], builder.call(wide, [waiting, constant(I16, 16, 1)]))
                pending[p] = None
    return joined(builder, sums)


def _by_signed(
    builder: Builder, codes: Sequence[Value], inputs: Sequence[Value], total: Value, offset: int, bits: int
) -> Value:
    """ARM: both sides are signed; codes of 8 bits lose their offset, smaller ones are signed as they are."""
    kind, bytes_ = vector(I32, 4), vector(I8, 16)
    function = intrinsic(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", kind, [kind, bytes_, bytes_])
    start = ir.Constant(I32, 0) if bits == 8 else _start(builder, total, offset)
    sums = [repeated(builder, start, 4)] * 4
    for code, four in zip(codes, inputs, strict=True):
        x = builder.bitcast(repeated(builder, four, 4), bytes_)
        for p in range(4):
            part = _part(builder, code, p, 4)
            if bits == 8:
                part = builder.xor(part, constant(I8, 16, -128))
            sums[p] = builder.call(function, [sums[p], part, x])
    return joined(builder, sums)


def _by_widening(builder: Builder, codes: Sequence[Value], inputs: Sequence[Value], start: Value) -> Value:
    total = repeated(builder, start, 16)
    numbers = vector(I32, 64)
    for code, four in zip(codes, inputs, strict=True):
        x = builder.sext(builder.bitcast(repeated(builder, four, 16), vector(I8, 64)), numbers)
        product = builder.mul(builder.zext(code, numbers), x)
        for place in range(4):
            total = builder.add(total, picked(builder, product, range(place, 64, 4)))
    return total
