"""Contenders are read from text."""

from __future__ import annotations

from coreinfer_sim.base.settings import Mode
from coreinfer_sim.bench.specs import GGUF_TYPES, parse_spec, parse_specs


def test_contenders_are_read_from_text():
    assert (parse_spec("dense").kind, parse_spec("dense:f32").dtype) == ("dense", "float32")
    spec = parse_spec("sparse:0.5:bf16:int8:engine=lean:seed=2")
    assert (spec.mode, spec.ratio, spec.dtype, spec.needs_index) == (Mode.SIMILARITY, 0.5, "bfloat16", True)
    assert spec.options == {"weights": "int8", "engine": "lean", "seed": 2}
    assert (parse_spec("global").ratio, parse_spec("offload").ratio, parse_spec("offload:0.3").ratio) == (0.4, 0.5, 0.3)
    assert parse_spec("ours-dense:engine=lean").mode is Mode.DENSE
    assert {parse_spec(f"llamacpp:{kind}").dtype for kind in GGUF_TYPES} == set(GGUF_TYPES)
    assert [spec.text for spec in parse_specs(["dense", " dense", "random:0.4"])] == ["dense", "random:0.4"]
