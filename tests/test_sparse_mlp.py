"""A compact MLP equals the masked dense MLP, in every family, and leaves nothing behind."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from tiny_models import N_LAYERS, VOCABULARY, tiny_model

from coreinfer_sim.base.errors import IndexMismatchError
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.compact import compact_model, grouped_model, install, installed
from coreinfer_sim.models.mlps import dense_bytes, find_mlps, weight_shape


def token_ids(n_rows, n_positions, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (n_rows, n_positions), generator=generator)


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


class Snapshot:
    """The modules and weights of a model, to be compared with those of a later moment."""

    def __init__(self, model):
        self.model = model
        self.modules = dict(model.named_modules())
        self.weights = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}

    def check(self):
        modules = dict(self.model.named_modules())
        assert list(modules) == list(self.modules)
        assert all(modules[name] is module for name, module in self.modules.items())
        weights = self.model.state_dict(keep_vars=True)
        assert list(weights) == list(self.weights)
        for name, (tensor, value) in self.weights.items():
            assert weights[name] is tensor
            assert torch.equal(tensor, value)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules.values())


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


def test_compact_weights_are_copies_without_gradient(model):
    layers = find_mlps(model)
    compact = compact_model(layers, selection_of(layers, {1: 7}))
    assert list(compact) == [1]
    assert set(compact[1]) == set(layers[1].projections)
    for name, projection in compact[1].items():
        assert not any(parameter.requires_grad for parameter in projection.parameters())
        assert projection.weight.is_contiguous()
        assert projection.weight.data_ptr() != getattr(layers[1].owner, name).weight.data_ptr()


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


@pytest.mark.parametrize(
    ("number", "ids", "message"),
    [
        (0, [0, 48], "layer 0 .*0 to 47"),
        (1, [-1, 3], "layer 1 .*0 to 47"),
        (2, [], "layer 2 "),
        (3, [0], "names layer 3, but the model has 3 layers"),
        (-1, [0], "names layer -1"),
    ],
    ids=["too-large", "negative", "empty", "no-such-layer", "negative-layer"],
)
def test_check_refuses_ids_that_do_not_fit(models, number, ids, message):
    layers = find_mlps(models["llama"])
    selection = NeuronSelection("test", {number: torch.tensor(ids, dtype=torch.int64)})
    with pytest.raises(IndexMismatchError, match=message):
        selection.check(layers)


@pytest.mark.parametrize("ids", [[3, 3, 5], [7, 2]], ids=["twice", "descending"])
def test_check_refuses_ids_that_do_not_ascend(models, ids):
    """A neuron named twice would count twice in the output."""
    with pytest.raises(IndexMismatchError):
        NeuronSelection("test", {0: torch.tensor(ids)}).check(find_mlps(models["llama"]))


def test_check_refuses_a_mask_in_place_of_ids(models):
    mask = torch.zeros(48, dtype=torch.bool)
    mask[:20] = True
    with pytest.raises(IndexMismatchError):
        NeuronSelection("test", {0: mask}).check(find_mlps(models["llama"]))


def test_check_accepts_what_fits(models):
    layers = find_mlps(models["llama"])
    NeuronSelection("test", {0: torch.tensor([0, 47]), 2: torch.arange(48)}).check(layers)


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
    assert selection.mlp_bytes(layers) == n_bytes < dense_bytes(layers)
    assert selection.keep_ratio(layers) == pytest.approx((7 + tiny.d_ff + tiny.d_ff - 5) / (3 * tiny.d_ff))
    assert NeuronSelection("dense").mlp_bytes(layers) == dense_bytes(layers)
    assert NeuronSelection("dense").keep_ratio(layers) == 1.0


def test_merging_compensation_makes_no_copy_of_the_output_weights():
    from torch.utils._python_dispatch import TorchDispatchMode

    from coreinfer_sim.engines.compact import MERGED_ROWS, merge_delta
    from coreinfer_sim.index.compensated import LayerCompensation

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
