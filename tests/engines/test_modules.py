"""A compact MLP equals the masked dense MLP, in every family, and leaves nothing behind."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from calls import Snapshot, token_ids
from tiny_models import N_LAYERS, tiny_model

from coreinfer_sim.base.errors import IndexMismatchError
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.cutting import compact_model
from coreinfer_sim.engines.modules import grouped_model, install, installed
from coreinfer_sim.models.mlps import dense_bytes, find_mlps, mlp_bytes
from coreinfer_sim.models.structure import weight_shape


def random_ids(d_ff, n, seed):
    return torch.randperm(d_ff, generator=torch.Generator().manual_seed(seed))[:n].sort().values


def selection_of(layers, counts, seed=0):
    """Choose ``counts[layer]`` neurons by chance in each layer."""
    ids = {number: random_ids(layers[number].d_ff, n, 100 * seed + number) for number, n in counts.items()}
    return NeuronSelection("test", ids)


@torch.no_grad()
def logits_of(model, ids):
    return model(ids, use_cache=False).logits


@contextmanager
def masked(layers, selection):
    """Zero the dropped neurons where the output projection reads them."""

    def masker(kept):
        def zero(_module, inputs):
            (z,) = inputs
            mask = torch.zeros(z.shape[-1], dtype=torch.bool)
            mask[kept] = True
            return (torch.where(mask, z, torch.zeros_like(z)),)

        return zero

    hooks = [layers[n].output.register_forward_pre_hook(masker(kept)) for n, kept in selection.ids.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_compact_equals_masked_dense(model):
    layers = find_mlps(model)
    selection = selection_of(layers, {0: 17, 2: layers[2].d_ff // 2})  # unlike widths, and layer 1 stays dense
    ids = token_ids(2, 9)
    dense = logits_of(model, ids)
    with masked(layers, selection):
        expected = logits_of(model, ids)
    with installed(layers, selection):
        assert [weight_shape(layer.output)[1] for layer in layers] == [17, layers[1].d_ff, layers[2].d_ff // 2]
        found = logits_of(model, ids)
    assert (found - expected).abs().max() <= 1e-5
    assert (dense - expected).abs().max() > 1e-2  # dropping neurons is no small thing here


def test_one_neuron_is_enough(model):
    layers = find_mlps(model)
    selection = NeuronSelection("test", {number: torch.tensor([number]) for number in range(N_LAYERS)})
    ids = token_ids(1, 4)
    with masked(layers, selection):
        expected = logits_of(model, ids)
    with installed(layers, selection):
        found = logits_of(model, ids)
    assert (found - expected).abs().max() <= 1e-5


def test_all_neurons_give_the_dense_logits(model):
    layers = find_mlps(model)
    everything = NeuronSelection("test", {layer.number: torch.arange(layer.d_ff) for layer in layers})
    ids = token_ids(2, 9)
    dense = logits_of(model, ids)
    originals = [layer.output for layer in layers]
    with installed(layers, everything):
        assert all(layer.output is not original for layer, original in zip(layers, originals, strict=True))
        found = logits_of(model, ids)
    assert (found - dense).abs().max() <= 1e-5


def test_the_empty_selection_changes_nothing(models):
    model = models["llama"]
    before = Snapshot(model)
    with installed(find_mlps(model), NeuronSelection("dense")):
        before.check()


def test_the_model_is_restored(model):
    layers, before = find_mlps(model), Snapshot(model)
    selection = selection_of(layers, {0: 5, 1: 9, 2: 13})
    with installed(layers, selection):
        assert all(
            getattr(layer.owner, name) not in before.modules.values() for layer in layers for name in layer.projections
        )
        logits_of(model, token_ids(1, 3))
    before.check()


def test_the_model_is_restored_after_an_exception(model):
    layers, before = find_mlps(model), Snapshot(model)
    with pytest.raises(ZeroDivisionError), installed(layers, selection_of(layers, {0: 5, 2: 13})):
        logits_of(model, token_ids(1, 3))
        raise ZeroDivisionError
    before.check()


def test_a_refused_selection_changes_nothing(models):
    model = models["llama"]
    layers, before = find_mlps(model), Snapshot(model)
    wrong = NeuronSelection("test", {0: torch.tensor([0]), 1: torch.tensor([layers[1].d_ff])})
    with pytest.raises(IndexMismatchError), installed(layers, wrong):
        pytest.fail("the block ran")
    before.check()


def three_selections(layers):
    """Unlike widths in every layer; the second leaves layer 1 dense, the third names layer 1 alone."""
    d_ff = layers[0].d_ff
    return [
        selection_of(layers, {0: 11, 1: 19, 2: d_ff - 1}, seed=1),
        selection_of(layers, {0: 23, 2: 3}, seed=2),
        selection_of(layers, {1: 6}, seed=3),
    ]


@pytest.mark.parametrize("n_positions", [1, 5])
def test_a_batch_of_unlike_selections_equals_its_rows(model, n_positions):
    layers, before = find_mlps(model), Snapshot(model)
    selections = three_selections(layers)
    owner_of = [0, 1, 0, 2, 1]
    ids = token_ids(len(owner_of), n_positions)
    rows = [[0, 2], [1, 4], [3]]
    single = []
    for row, number in enumerate(owner_of):
        with installed(layers, selections[number]):
            single.append(logits_of(model, ids[row : row + 1]))
    compact = [compact_model(layers, selection) for selection in selections]
    replaced = install(layers, grouped_model(layers, compact, rows))
    try:
        together = logits_of(model, ids)
    finally:
        install(layers, replaced)
    assert (together - torch.cat(single)).abs().max() <= 1e-5
    assert (single[0] - logits_of(model, ids[:1])).abs().max() > 1e-2
    before.check()


def test_a_batch_of_unlike_selections_with_beams(model):
    """Every prompt's beams lie one after the other."""
    layers = find_mlps(model)
    selections = three_selections(layers)
    ids = token_ids(6, 1)
    single = []
    for row in range(6):
        with installed(layers, selections[[2, 0, 1][row // 2]]):
            single.append(logits_of(model, ids[row : row + 1]))
    compact = [compact_model(layers, selection) for selection in selections]
    replaced = install(layers, grouped_model(layers, compact, [[1], [2], [0]]))
    try:
        together = logits_of(model, ids)
    finally:
        install(layers, replaced)
    assert (together - torch.cat(single)).abs().max() <= 1e-5


def test_one_group_needs_no_grouping(models):
    layers = find_mlps(models["llama"])
    compact = compact_model(layers, selection_of(layers, {0: 3}))
    assert grouped_model(layers, [compact], [[0, 1]]) is compact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = tiny_model("phi3").to(dtype)
    layers = find_mlps(model)
    selection = selection_of(layers, {0: 17, 1: 30, 2: 5})
    ids = token_ids(2, 6)
    with masked(layers, selection):
        expected = logits_of(model, ids)
    with installed(layers, selection):
        found = logits_of(model, ids)
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


def test_bytes_and_keep_ratio_are_those_of_the_installed_modules(tiny, model):
    layers = find_mlps(model)
    selection = selection_of(layers, {0: 7, 2: tiny.d_ff - 5})
    with installed(layers, selection):
        n_bytes = sum(
            parameter.numel() * parameter.element_size()
            for layer in layers
            for name in layer.projections
            for parameter in getattr(layer.owner, name).parameters()
        )
    assert mlp_bytes(layers, selection.ids) == n_bytes < dense_bytes(layers)
    assert selection.keep_ratio(layers) == pytest.approx((7 + tiny.d_ff + tiny.d_ff - 5) / (3 * tiny.d_ff))
    assert mlp_bytes(layers, {}) == dense_bytes(layers)
    assert NeuronSelection("dense").keep_ratio(layers) == 1.0
