"""What the lean engine is made of: conversions of stored types, rounding, the growing cache."""

from __future__ import annotations

import numpy as np
import torch
from calls import generate, random_predictor, token_ids
from transformers import DynamicCache

from coreinfer_sim.engines.lean import kv_cache
from coreinfer_sim.engines.lean.intrinsics import bits, exp, narrowed, serial
from coreinfer_sim.generation.sparse_model import SparseModel


def test_narrowing_rounds_as_torch_does():
    """What a step writes into a 16-bit cache is what torch would store."""

    @serial
    def run(like, values, out):
        for i in range(len(values)):
            out[i] = narrowed(like[0], values[i])

    values = torch.randn(1000) * torch.logspace(-6, 6, 1000)
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.zeros(1000, dtype=dtype)
        run(bits(out), values.numpy(), bits(out))
        assert torch.equal(out, values.to(dtype))


def test_a_growing_cache_is_held_twice_in_one_layer_only(models, monkeypatch):
    model = models["llama"]
    monkeypatch.setattr(kv_cache, "SPARE", 2)
    copy, calls = kv_cache.roomy, []

    def noting(states, n_past, n_new):
        held = [layer.keys.untyped_storage().nbytes() for layer in cache.layers]
        calls.append((n_past, held))
        return copy(states, n_past, n_new)

    monkeypatch.setattr(kv_cache, "roomy", noting)
    cache = DynamicCache()
    sparse = SparseModel(model, random_predictor(model, 0.5), engine="lean")
    generate(sparse, token_ids(1, 3), 12, past_key_values=cache)
    n_layers = len(cache.layers)
    grown = [calls[i : i + 2 * n_layers] for i in range(0, len(calls), 2 * n_layers)]
    assert len(grown) > 2
    for growth in grown:  # keys and values of layer 0, of layer 1, …
        for place, (_, held) in enumerate(growth):
            done = place // 2
            assert len(set(held[:done])) <= 1 and len(set(held[done:])) <= 1  # those before have grown, the others not
            assert not done or held[0] > held[-1]


def test_exponential():
    @serial
    def run(x, out):
        for i in range(len(x)):
            out[i] = exp(x[i])

    x = np.linspace(-80, 80, 4001).astype(np.float32)
    out = np.empty_like(x)
    run(x, out)
    assert np.abs(out / np.exp(x.astype(np.float64)) - 1).max() < 3e-7
