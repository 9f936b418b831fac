"""Code for processors that are not at hand: it is compiled for them, and holds the instructions that it is meant to."""

from __future__ import annotations

import re

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from coreinfer_sim.engines.lean.formats import FORMATS
from coreinfer_sim.engines.lean.instructions import F32, I8, I32, I64, Products, products_of_features
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


def assembly(cpu, kind, n_x=1):
    """Return a tile's product as the assembly of a processor."""
    triple, how, _ = TARGETS[cpu]
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = ir.Module()
    module.triple = triple
    pointers = [kind.as_pointer() for kind in (I8, I8, I32, F32, I32, F32)]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [*pointers, I64, I64]), "tile")
    builder = ir.IRBuilder(function.append_basic_block())
    weights, scales, codes, factors, sums, out, n_in, stride = function.args
    inputs = Inputs(codes, factors, sums)
    emit_product(builder, FORMATS[kind], how, n_x, weights, scales, inputs, n_in, out, stride)
    builder.ret_void()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=2)
    return machine.emit_assembly(parsed)


@pytest.mark.parametrize("cpu", TARGETS)
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q6_K"])
def test_a_target_gets_its_instructions(cpu, kind):
    text = assembly(cpu, kind)
    assert re.search(TARGETS[cpu][2], text), text[:2000]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_type_is_compiled_for_every_target(kind):
    for cpu in ("icelake-server", "alderlake", "neoverse-n1"):
        assert re.search(TARGETS[cpu][2], assembly(cpu, kind, 4))


@pytest.mark.parametrize("cpu", FEATURES)
def test_features_decide(cpu):
    assert products_of_features(FEATURES[cpu]) is TARGETS[cpu][1]
