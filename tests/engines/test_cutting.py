"""Cut projections are copies, in every family; compensation is merged in place."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.cutting import MERGED_ROWS, compact_model, merge_delta
from coreinfer_sim.index.compensated import LayerCompensation
from coreinfer_sim.models.mlps import find_mlps


def test_compact_weights_are_copies_without_gradient(model):
    layers = find_mlps(model)
    compact = compact_model(layers, NeuronSelection("test", {1: torch.arange(3, 24, 3)}))
    assert list(compact) == [1]
    assert set(compact[1]) == set(layers[1].projections)
    for name, projection in compact[1].items():
        assert not any(parameter.requires_grad for parameter in projection.parameters())
        assert projection.weight.is_contiguous()
        assert projection.weight.data_ptr() != getattr(layers[1].owner, name).weight.data_ptr()


def test_merging_compensation_makes_no_copy_of_the_output_weights():
    sizes = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            sizes.append(made.numel())
            return made

    output, left = torch.randn(200, 32).bfloat16(), torch.randn(200, 32).bfloat16()
    expected = (output.float() + left.float()).bfloat16()
    with Noted():
        merge_delta(output, LayerCompensation(torch.zeros(200), left))
    assert torch.equal(output, expected)
    assert max(sizes) == MERGED_ROWS * 32
