"""Contenders are read from text."""

from __future__ import annotations

import pytest

from coreinfer_sim.base.errors import ConfigError
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


def test_a_share_that_tokens_read():
    spec = parse_spec("all:int8:read_ratio=0.5")
    assert (spec.mode, spec.ratio, spec.needs_index, spec.by_token) == (Mode.ALL, None, False, True)
    assert spec.options == {"weights": "int8", "read_ratio": 0.5}
    assert (parse_spec("all").ratio, parse_spec("all").by_token) == (None, False)
    assert parse_spec("sparse:read_ratio=0.3").ratio is None  # all are held
    assert (parse_spec("sparse:0.6:read_ratio=0.3").ratio, parse_spec("all:read_ratio=1").by_token) == (0.6, False)
    fast, exact = (parse_spec(f"sparse:profile={name}") for name in ("fast", "exact"))
    assert (fast.ratio, fast.by_token, fast.needs_index, exact.by_token) == (None, True, True, False)
    with pytest.raises(ConfigError, match="'fsat' is no profile"):
        parse_spec("sparse:profile=fsat")
    with pytest.raises(ConfigError, match="'half' is no read_ratio; expected .*OPTION .*read_ratio"):
        parse_spec("all:read_ratio=half")
    for text in ("dense:read_ratio=0.5", "offload:read_ratio=0.5", "llamacpp:read_ratio=0.5"):
        with pytest.raises(ConfigError, match="cannot be read"):
            parse_spec(text)
