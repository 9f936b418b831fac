"""Compact MLPs with merged compensation compute what they should."""

from __future__ import annotations

import torch
from compensation_cases import drawn
from tiny_models import VOCABULARY

from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.cutting import compact_model
from coreinfer_sim.engines.modules import install
from coreinfer_sim.index.compensated import LayerCompensation
from coreinfer_sim.models.mlps import compact_bytes, find_mlps, linear_parameters


@torch.no_grad()
def reads_of(model, layer, ids):
    """Return activation site and output of a layer's MLP, each [n_tokens, width]."""
    found = {}
    hook = layer.output.register_forward_hook(lambda _m, i, o: found.update(z=i[0], y=o.clone()))
    model(ids, use_cache=False)
    hook.remove()
    return [found[name].reshape(-1, found[name].shape[-1]) for name in "zy"]


def test_merged_weights_give_the_compensated_output(model):
    layers = find_mlps(model)
    layer = layers[0]
    input_ids = torch.randint(4, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    z, _ = reads_of(model, layer, input_ids)
    kept = torch.arange(0, layer.d_ff, 3)
    weight, bias = linear_parameters(layer.output)
    repair = LayerCompensation(drawn(layer.d_model, seed=1), drawn(layer.d_model, len(kept), seed=2))
    wanted = z[:, kept] @ (weight[:, kept] + repair.delta).T + repair.bias + (0 if bias is None else bias)
    compact = compact_model(layers, NeuronSelection("test", {0: kept}, compensation={0: repair}))
    n_bytes = sum(p.numel() * p.element_size() for module in compact[0].values() for p in module.parameters())
    dense = install(layers, compact)
    try:
        _, found = reads_of(model, layer, input_ids)
    finally:
        install(layers, dense)
    assert torch.allclose(found, wanted, atol=2e-4 * wanted.abs().max())
    assert compact_bytes(layer, len(kept), compensated=True) == n_bytes
