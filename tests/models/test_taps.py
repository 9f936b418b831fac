"""What is read at the activation site is what the family's own formula gives."""

from __future__ import annotations

import pytest
import torch
from tiny_models import N_LAYERS, VOCABULARY
from torch import nn

from coreinfer_sim.base.errors import ModelError
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.modules import installed
from coreinfer_sim.models.mlps import find_mlps
from coreinfer_sim.models.taps import recorded_activations


def token_ids(n_rows, n_positions, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (n_rows, n_positions), generator=generator)


class Sink:
    """Keeps what arrives, in the order in which it does."""

    def __init__(self):
        self.calls = []

    def __call__(self, layer, z):
        self.calls.append((layer, z.clone()))

    def by_layer(self):
        return {layer: torch.cat([z for number, z in self.calls if number == layer]) for layer, _ in self.calls}


def hooks_of(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


@torch.no_grad()
def record(model, ids, mask=None, layers=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    sink = Sink()
    with recorded_activations(layers or find_mlps(model), sink) as tap:
        tap.set_mask(mask)
        model(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    return sink.by_layer()


@torch.no_grad()
def inputs_of(model, modules, ids):
    """What each module reads."""
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _m, args, n=n: seen.__setitem__(n, args[0].clone()))
        for n, module in enumerate(modules)
    ]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [seen[n].reshape(-1, seen[n].shape[-1]) for n in range(len(modules))]


def check_by_hand(model, modules, formula):
    ids = token_ids(2, 6)
    found = record(model, ids)
    for number, x in enumerate(inputs_of(model, modules, ids)):
        expected = formula(modules[number], x)
        assert found[number].shape == expected.shape == (12, find_mlps(model)[number].d_ff)
        torch.testing.assert_close(found[number], expected, atol=1e-5, rtol=1e-5)
    assert sorted(found) == list(range(N_LAYERS))


def test_gated_family_by_hand(models):
    model = models["llama"]

    def formula(mlp, x):
        gate = x @ mlp.gate_proj.weight.T
        return gate * torch.sigmoid(gate) * (x @ mlp.up_proj.weight.T)

    check_by_hand(model, [block.mlp for block in model.model.layers], formula)


def test_gated_family_with_relu_and_biases_by_hand(models):
    model = models["llama-relu-bias"]

    def formula(mlp, x):
        gate = x @ mlp.gate_proj.weight.T + mlp.gate_proj.bias
        return gate.clamp_min(0) * (x @ mlp.up_proj.weight.T + mlp.up_proj.bias)

    check_by_hand(model, [block.mlp for block in model.model.layers], formula)


def test_fused_family_by_hand(models):
    model = models["phi3"]

    def formula(mlp, x):
        gate, up = mlp.gate_up_proj.weight[:48], mlp.gate_up_proj.weight[48:]
        return (x @ gate.T) * torch.sigmoid(x @ gate.T) * (x @ up.T)

    check_by_hand(model, [block.mlp for block in model.model.layers], formula)


def test_plain_family_by_hand(models):
    model = models["gpt2"]

    def formula(mlp, x):
        h = x @ mlp.c_fc.weight + mlp.c_fc.bias  # stored as [in, out]
        return nn.functional.gelu(h, approximate="tanh")

    check_by_hand(model, [block.mlp for block in model.transformer.h], formula)


def test_opt_by_hand(models):
    """Its layers hold the projections themselves, and flatten the batch."""
    model = models["opt"]
    blocks = list(model.model.decoder.layers)
    ids = token_ids(2, 6)
    found = record(model, ids)
    for number, x in enumerate(inputs_of(model, [block.fc1 for block in blocks], ids)):
        expected = (x @ blocks[number].fc1.weight.T + blocks[number].fc1.bias).clamp_min(0)
        torch.testing.assert_close(found[number], expected, atol=1e-5, rtol=1e-5)
        assert (found[number] == 0).any()  # ReLU at work


def test_padding_is_excluded(tiny, model):
    """A padded batch gives what its rows give alone, one after the other."""
    long, short = token_ids(1, 8, seed=1), token_ids(1, 5, seed=2)
    batch = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    options = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if tiny.key != "bloom" else {}
    found = record(model, batch, mask, **options)
    single = [record(model, short), record(model, long)]
    for layer in range(N_LAYERS):
        expected = torch.cat([each[layer] for each in single])
        assert found[layer].shape == (13, tiny.d_ff)
        torch.testing.assert_close(found[layer], expected, atol=1e-4, rtol=1e-4)


def test_the_mask_holds_for_one_pass_and_is_set_anew(models):
    model, sink = models["llama"], Sink()
    with recorded_activations(find_mlps(model), sink) as tap, torch.no_grad():
        for kept in ([0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]):
            mask = torch.tensor([kept])
            tap.set_mask(mask)
            model(input_ids=token_ids(1, 4), attention_mask=mask, use_cache=False)
    assert [len(z) for layer, z in sink.calls if layer == 1] == [2, 4, 3]


def test_what_is_read_needs_no_gradient(models):
    model, sink = models["llama"], Sink()
    with recorded_activations(find_mlps(model), sink) as tap:
        ids = token_ids(1, 3)
        tap.set_mask(torch.ones_like(ids))
        model(input_ids=ids)  # with gradients
    assert not any(z.requires_grad for _, z in sink.calls)


def test_some_layers_only(models):
    model, sink = models["llama"], Sink()
    with recorded_activations(find_mlps(model)[1:], sink) as tap, torch.no_grad():
        ids = token_ids(1, 3)
        tap.set_mask(torch.ones_like(ids))
        model(input_ids=ids)
    assert [layer for layer, _ in sink.calls] == [1, 2]


def test_hooks_are_removed(models):
    model = models["llama"]
    layers = find_mlps(model)
    with recorded_activations(layers, Sink()) as tap:
        assert len(hooks_of(model)) == N_LAYERS
        tap.set_mask(torch.ones(1, 3))
        model(input_ids=token_ids(1, 3))
    assert hooks_of(model) == []


def test_hooks_are_removed_after_an_exception(models):
    model = models["llama"]

    def broken(layer, _z):
        if layer == 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), recorded_activations(find_mlps(model), broken) as tap:
        tap.set_mask(torch.ones(1, 3))
        model(input_ids=token_ids(1, 3))
    assert hooks_of(model) == []


def test_layers_that_are_never_reached_are_an_error(models):
    model, other = models["llama"], models["mistral"]
    layers = [find_mlps(model)[0], *find_mlps(other)[1:]]
    refused = pytest.raises(ModelError, match=r"layers \[1, 2\] were never reached.*expected all of 3")
    with refused, recorded_activations(layers, Sink()) as tap, torch.no_grad():
        tap.set_mask(torch.ones(1, 3))
        model(input_ids=token_ids(1, 3))
    assert hooks_of(model) == hooks_of(other) == []


def test_no_pass_at_all_is_an_error(models):
    with pytest.raises(ModelError, match="never reached"), recorded_activations(find_mlps(models["opt"]), Sink()):
        pass


def test_the_compact_mlp_holds_the_same_activations(model):
    """The kept neurons of the first layer see what they saw before; they only have no neighbours."""
    layers = find_mlps(model)
    kept = torch.arange(0, layers[0].d_ff, 3)
    ids = token_ids(1, 5)
    dense = record(model, ids)[0]
    with installed(layers, NeuronSelection("test", {0: kept})):
        compact = record(model, ids, layers=layers)[0]
    torch.testing.assert_close(compact, dense[:, kept], atol=1e-5, rtol=1e-5)
