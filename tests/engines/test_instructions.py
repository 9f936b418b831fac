"""Code for processors that are not at hand: it is compiled for them, and holds the instructions that it is meant to."""

from __future__ import annotations

import ctypes
import re
from contextlib import contextmanager

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir
from numba.core.codegen import get_host_cpu_features

from coreinfer_sim.engines.lean.formats import FORMATS
from coreinfer_sim.engines.lean.instructions import (
    F32,
    I8,
    I32,
    I64,
    Products,
    line_product,
    load,
    offset_product,
    products_of_features,
    transposed,
    vector,
    whole,
)
from coreinfer_sim.engines.lean.output_code import emit_add_codes, emit_add_floats
from coreinfer_sim.engines.lean.record_code import emit_float_rows, emit_low_rows
from coreinfer_sim.engines.lean.rows import FLOATS
from coreinfer_sim.engines.lean.tiles import Inputs, emit_product

TARGETS = {
    "icelake-server": ("x86_64-unknown-linux-gnu", Products.VNNI_512, r"vpdpbusd\s.*%zmm"),
    "sapphirerapids": ("x86_64-unknown-linux-gnu", Products.VNNI_512, r"vpdpbusd\s.*%zmm"),
    "alderlake": ("x86_64-unknown-linux-gnu", Products.VNNI_256, r"vpdpbusd\s.*%ymm"),
    "haswell": ("x86_64-unknown-linux-gnu", Products.AVX2, r"vpmaddubsw\s.*%ymm"),
    "znver3": ("x86_64-unknown-linux-gnu", Products.AVX2, r"vpmaddubsw\s.*%ymm"),
    "neoverse-n1": ("aarch64-unknown-linux-gnu", Products.DOT, r"\bsdot\s"),
    "apple-m1": ("arm64-apple-macosx", Products.DOT, r"\bsdot(\.4s)?\s"),
    "cortex-a72": ("aarch64-unknown-linux-gnu", Products.PLAIN, r"\b(smlal|smull|mla)"),
    "nehalem": ("x86_64-unknown-linux-gnu", Products.PLAIN, r"\bpm(add|ul)"),
}
FEATURES = {
    "icelake-server": "+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512vnni,-avxvnni",
    "sapphirerapids": "+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512vnni,+avxvnni",
    "alderlake": "+avx2,+fma,+f16c,-avx512f,-avx512vnni,+avxvnni",
    "haswell": "+avx2,+fma,+f16c,-avx512f,-avx512vnni,-avxvnni",
    "znver3": "+avx2,+fma,+f16c,-avx512f,-avx512vnni,-avxvnni",
    "neoverse-n1": "+neon,+dotprod",
    "apple-m1": "+neon,+dotprod",
    "cortex-a72": "+neon,-dotprod",
    "nehalem": "+sse4.2,-avx2,-fma,-f16c",
}


def module_of(arguments, emit, triple):
    """Return a module with one function, whose code ``emit`` makes from a builder and the arguments."""
    module = ir.Module()
    module.triple = triple
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), "made")
    builder = ir.IRBuilder(function.append_basic_block())
    emit(builder, *function.args)
    builder.ret_void()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    return parsed


def compiled(cpu, arguments, emit):
    """Return such a function as the assembly of a processor."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple = TARGETS[cpu][0]
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=2)
    return machine.emit_assembly(module_of(arguments, emit, triple))


def pointers(*kinds):
    return [kind.as_pointer() for kind in kinds]


def assembly(cpu, kind, n_x=1):
    """Return a tile's product."""

    def emit(builder, weights, scales, codes, factors, sums, out, n_in, stride):
        inputs = Inputs(codes, factors, sums)
        emit_product(builder, FORMATS[kind], TARGETS[cpu][1], n_x, weights, scales, inputs, n_in, out, stride)

    return compiled(cpu, [*pointers(I8, I8, I32, F32, I32, F32), I64, I64], emit)


def row_assembly(cpu, kind):
    """Return the products with two rows of a record."""

    def emit(builder, rows, second, scales, x, codes, starts, n_in, out, following):
        if kind in FLOATS:
            emit_float_rows(builder, kind, rows, second, x, n_in, out, following)
        else:
            emit_low_rows(
                builder, FORMATS[kind], TARGETS[cpu][1], rows, second, scales, codes, starts, n_in, out, following
            )

    return compiled(cpu, [I8.as_pointer(), I64, *pointers(I8, I8, I8, I8), I64, *pointers(F32, I8)], emit)


def added_assembly(cpu, kind):
    """Return what adds four output rows to the outputs."""

    def emit(builder, places, factors, n, out):
        if kind in FLOATS:
            emit_add_floats(builder, kind, places, factors, n, out)
        else:
            emit_add_codes(builder, FORMATS[kind].bits, TARGETS[cpu][1], places, factors, n, out)

    return compiled(cpu, [*pointers(I64, F32), I64, *pointers(F32)], emit)


def line(how, product=line_product):
    """Return code that multiplies 64 codes with 64 inputs."""

    def emit(builder, codes, inputs, start, out):
        given = [load(builder, each, whole(0), I8, 64) for each in (codes, inputs)]
        begin = load(builder, builder.bitcast(start, I8.as_pointer()), whole(0), I32, 16)
        made = product(builder, how, *given, begin)
        builder.store(made, builder.bitcast(out, vector(I32, 16).as_pointer()), align=4)

    return pointers(I8, I8, I32, I32), emit


@pytest.mark.parametrize("cpu", TARGETS)
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q6_K"])
def test_a_target_gets_its_instructions(cpu, kind):
    text = assembly(cpu, kind)
    assert re.search(TARGETS[cpu][2], text), text[:2000]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_type_is_compiled_for_every_target(kind):
    for cpu in ("icelake-server", "alderlake", "neoverse-n1"):
        assert re.search(TARGETS[cpu][2], assembly(cpu, kind, 4))


HIGH = [name for name, format_ in FORMATS.items() if format_.low_bits]
FUSED = r"\b(vfn?m[as]\w*ps|fmla|fmadd)\b"
"""Products that are summed without being rounded before."""


@pytest.mark.parametrize("cpu", TARGETS)
def test_a_line_is_multiplied_by_a_targets_instructions(cpu):
    how = TARGETS[cpu][1]
    text = compiled(cpu, *line(how))
    assert re.search(TARGETS[cpu][2], text), text[:2000]
    n_products = {Products.VNNI_512: 1, Products.VNNI_256: 2, Products.AVX2: 2, Products.DOT: 4}.get(how)
    if n_products is not None:
        assert len(re.findall(r"\b(vpdpbusd|vpmaddubsw|sdot)", text)) == n_products


@pytest.mark.parametrize("cpu", TARGETS)
@pytest.mark.parametrize("kind", HIGH)
def test_lower_bits_are_multiplied_by_a_targets_instructions(cpu, kind):
    text = row_assembly(cpu, kind)
    assert re.search(TARGETS[cpu][2], text), text[:2000]
    assert re.search(r"\b(prefetcht\d|prfm)\b", text)
    if TARGETS[cpu][1] is not Products.PLAIN:
        assert not re.search(r"\b(vpmulld|vpmullw|pmullw)\b", text)  # bytes are not multiplied one by one


@pytest.mark.parametrize("cpu", TARGETS)
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", *FLOATS])
def test_output_rows_are_added_for_every_target(cpu, kind):
    text = added_assembly(cpu, kind)
    assert re.search(r"\b(prefetcht\d|prfm)\b", text)
    if cpu != "nehalem":
        assert re.search(FUSED, text), text[:2000]


@pytest.mark.parametrize("cpu", TARGETS)
@pytest.mark.parametrize("kind", FLOATS)
def test_rows_of_floats_are_multiplied_for_every_target(cpu, kind):
    text = row_assembly(cpu, kind)
    if cpu != "nehalem":
        assert re.search(FUSED, text), text[:2000]


def runs_here(how):
    """Whether this processor has the instructions."""
    has = {name[1:] for name in get_host_cpu_features().split(",") if name.startswith("+")}
    needed = {Products.VNNI_512: {"avx512f", "avx512bw", "avx512vnni"}, Products.VNNI_256: {"avx512vl", "avx512vnni"}}
    return needed.get(how, {how.value} if how is not Products.PLAIN else set()) <= has


@contextmanager
def running(arguments, emit):
    """Compile code for this processor; gives a function that takes arrays."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    triple, host = llvm.get_process_triple(), {"cpu": llvm.get_host_cpu_name(), "features": get_host_cpu_features()}
    machine = llvm.Target.from_triple(triple).create_target_machine(opt=2, **host)
    engine = llvm.create_mcjit_compiler(module_of(arguments, emit, triple), machine)
    engine.finalize_object()
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(arguments))(engine.get_function_address("made"))
    yield lambda *arrays: function(*(each.ctypes.data for each in arrays))


@pytest.mark.parametrize("how", [how for how in Products if runs_here(how)])
def test_sums_of_a_line_are_right(how):
    """By every way that runs here, codes and inputs at their ends too."""
    rng = np.random.default_rng(0)
    with running(*line(how)) as function:
        for code, given in ((None, None), (30, 127), (30, -127), (30, -128), (0, -128)):
            codes = rng.integers(0, 31, 64, np.uint8) if code is None else np.full(64, code, np.uint8)
            x = rng.integers(-127, 128, 64, np.int8) if given is None else np.full(64, given, np.int8)
            start, out = rng.integers(-(2**20), 2**20, 16, np.int32), np.zeros(16, np.int32)
            function(codes, x, start, out)
            expected = (codes.astype(np.int32) * x).reshape(16, 4).sum(1) + start
            assert (out == expected).all()


@pytest.mark.parametrize("how", [how for how in Products if runs_here(how)])
def test_sums_of_whole_bytes_are_right(how):
    """Which hold 1 to 255 about 128; pairs of their products do not fit into 16 bits."""
    rng = np.random.default_rng(0)
    with running(*line(how, offset_product)) as function:
        for code, given in ((None, None), (255, 127), (255, -127), (1, 127), (1, -127), (128, 127)):
            codes = rng.integers(1, 256, 64, np.uint8) if code is None else np.full(64, code, np.uint8)
            x = rng.integers(-127, 128, 64, np.int8) if given is None else np.full(64, given, np.int8)
            start, out = -128 * x.astype(np.int32).reshape(16, 4).sum(1), np.zeros(16, np.int32)
            function(codes, x, np.ascontiguousarray(start, np.int32), out)
            assert (out == ((codes.astype(np.int32) - 128) * x).reshape(16, 4).sum(1)).all()


def test_rows_and_columns_are_exchanged():
    """Of sixteen vectors of sixteen numbers."""

    def emit(builder, given, out):
        where, to = (builder.bitcast(each, I8.as_pointer()) for each in (given, out))
        rows = [load(builder, where, whole(64 * k), I32, 16) for k in range(16)]
        for k, row in enumerate(transposed(builder, rows)):
            builder.store(row, builder.bitcast(builder.gep(to, [whole(64 * k)]), row.type.as_pointer()), align=4)

    numbers, out = np.arange(256, dtype=np.int32).reshape(16, 16), np.zeros((16, 16), np.int32)
    with running(pointers(I32, I32), emit) as function:
        function(numbers, out)
    assert (out == numbers.T).all()


@pytest.mark.parametrize("cpu", FEATURES)
def test_features_decide(cpu):
    assert products_of_features(FEATURES[cpu]) is TARGETS[cpu][1]
