"""Experts of mixtures as MLPs of their own: found, verified, read, and refused where they are stored in another way."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from calls import Snapshot, token_ids
from mixtures import TYPES, mixtral_of_own_experts, saved
from tiny_models import N_LAYERS, save_tiny_checkpoint, tiny_mixtral
from tiny_types import tiny_of_type, tried
from torch import nn

from coreinfer_sim.base.errors import ModelError, UnsupportedModelError
from coreinfer_sim.models.budgeted import load_within
from coreinfer_sim.models.experts import places_of
from coreinfer_sim.models.loading import load_model
from coreinfer_sim.models.mlps import dense_bytes, find_mlps, other_bytes
from coreinfer_sim.models.taps import recorded_activations


@torch.no_grad()
def record(model, ids, mask=None):
    """Activations of all experts that a pass reaches, by number."""
    found = {}
    mask = torch.ones_like(ids) if mask is None else mask
    with recorded_activations(find_mlps(model), lambda number, z: found.__setitem__(number, z.clone())) as tap:
        tap.set_mask(mask)
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return found


@torch.no_grad()
def inputs_of(model, modules, ids):
    """What each module is called with."""
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _m, given, n=n: seen.__setitem__(n, given))
        for n, module in enumerate(modules)
    ]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [seen[n] for n in range(len(modules))]


@pytest.mark.parametrize("model_type", TYPES)
def test_a_mixture_is_decoded_compactly_expert_by_expert(model_type):
    model = tiny_of_type(model_type)
    layers = find_mlps(model)
    assert [layer.number for layer in layers] == list(range(len(layers)))
    experts = [layer for layer in layers if layer.expert is not None]
    assert [(layer.block, layer.expert) for layer in experts] == [(block, n) for block in range(2) for n in range(4)]
    assert {layer.d_ff for layer in layers} == {48} and {layer.share for layer in experts} == {0.5}
    assert len(layers) - len(experts) == (2 if model_type == "qwen2_moe" else 0)  # shared experts of the same width
    assert tried(model_type).reason is None


def test_what_is_read_of_an_expert_is_what_the_router_sends_there():
    model, ids = tiny_mixtral(), token_ids(2, 6)
    found = record(model, ids)
    modules = [block.mlp.experts for block in model.model.layers]
    for layer in find_mlps(model):
        experts = modules[layer.block]
        x, chosen, _ = inputs_of(model, modules, ids)[layer.block]
        tokens = (chosen == layer.expert).any(-1)
        gate, up = F.linear(x, experts.gate_up_proj[layer.expert]).chunk(2, -1)
        expected = (F.silu(gate) * up) * tokens[:, None]
        if tokens.any():
            torch.testing.assert_close(found[layer.number], expected.detach(), atol=1e-5, rtol=1e-5)
        else:
            assert layer.number not in found
    assert len(found) > 2 * N_LAYERS


def test_padding_is_left_out_of_what_experts_read():
    model, ids = tiny_mixtral(), token_ids(1, 6)
    padded = F.pad(ids, (0, 3))
    found = record(model, padded, (torch.arange(9) < 6).long()[None])
    for number, z in record(model, ids).items():
        torch.testing.assert_close(found[number], z, atol=1e-5, rtol=1e-5)


def test_weights_have_one_place_and_nothing_of_the_model_changes():
    model, ids = tiny_mixtral(), token_ids(1, 6)
    before, logits = Snapshot(model), model(ids).logits
    layers = find_mlps(model)
    stored = model.model.layers[1].mlp.experts.down_proj
    assert layers[4].output.weight.data_ptr() == stored[0].data_ptr()
    assert layers[6].output.weight.data_ptr() == stored[2].data_ptr()
    record(model, ids)
    assert torch.equal(model(ids).logits, logits)
    assert [layer.owner for layer in find_mlps(model)] == [layer.owner for layer in layers]
    before.check()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.experts.down_proj += 1
    assert torch.equal(find_mlps(other)[4].output.weight, stored[0] + 1)
    assert torch.equal(model(ids).logits, logits)


def test_bytes_are_those_of_the_experts_that_a_token_takes():
    model = tiny_mixtral()
    layers = find_mlps(model)
    one = 4 * 3 * 32 * 48
    assert [layer.n_bytes for layer in layers] == [one] * 4 * N_LAYERS
    assert dense_bytes(layers) == 2 * one * N_LAYERS
    every = sum(parameter.numel() for parameter in model.parameters()) - model.model.embed_tokens.weight.numel()
    assert other_bytes(model, layers) == 4 * every - 4 * one * N_LAYERS


def test_experts_that_are_modules_of_their_own_are_read_the_same():
    ids = token_ids(2, 7)
    ids[1, :3] = ids[0, :3]  # hidden states that are equal
    expected, model = record(tiny_mixtral(), ids), mixtral_of_own_experts()
    before, logits = Snapshot(model), model(ids).logits
    layers = find_mlps(model)
    assert [(layer.block, layer.expert) for layer in layers] == [(b, n) for b in range(N_LAYERS) for n in range(4)]
    assert {layer.inputs for layer in layers} == {("w1", "w3")} and {layer.share for layer in layers} == {0.5}
    found = record(model, ids)
    for number, z in expected.items():
        torch.testing.assert_close(found[number], z, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(ids).logits, logits)
    before.check()


def test_rows_are_found_among_others_each_once():
    among = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [5.0, 6.0]])
    assert places_of(among[[3, 0, 2]], among).tolist() == [3, 0, 2]
    assert places_of(among[[]], among).tolist() == []
    assert places_of(torch.tensor([[1.0, 2.5]]), among) is None
    assert places_of(among[[0, 2, 0]], among) is None


def test_experts_that_read_other_rows_than_their_layer_are_refused():
    model = mixtral_of_own_experts()
    for block in model.model.layers:
        block.mlp.experts[1].register_forward_pre_hook(lambda _module, given: (2 * given[0],))
    with pytest.raises(ModelError, match="an expert reads rows that its layer has not read"):
        record(model, token_ids(2, 9))


class Scaled(nn.Module):
    """Experts that give something else than experts do."""

    def __init__(self, experts):
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = experts.gate_up_proj, experts.down_proj, experts.act_fn

    def forward(self, x, chosen, weights):
        out = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            tokens, places = torch.where(chosen == number)
            z = self.act_fn(F.linear(x[tokens], self.gate_up_proj[number]).chunk(2, -1)[0])
            out.index_add_(0, tokens, F.linear(z, self.down_proj[number]) * weights[tokens, places, None])
        return out


def test_experts_that_compute_something_else_are_refused_by_layer_difference_and_type():
    model = tiny_mixtral()
    for block in model.model.layers:
        block.mlp.experts = Scaled(block.mlp.experts)
    says = r"model.layers.0.mlp.experts of MixtralForCausalLM, a Scaled, .* its experts differ by [\d.e-]+ from what it gives"
    with pytest.raises(UnsupportedModelError, match=says):
        find_mlps(model)


def test_experts_that_are_stored_in_an_unknown_way_are_refused():
    with pytest.raises(
        UnsupportedModelError, match="JetMoeForCausalLM is a mixture of experts .* a way that is not known"
    ):
        find_mlps(tiny_of_type("jetmoe"))


def test_models_without_weights_are_found_as_well():
    with torch.device("meta"):
        model = type(tiny_mixtral())(tiny_mixtral().config)
    assert len(find_mlps(model)) == 4 * N_LAYERS


def test_a_checkpoint_is_loaded_whole(tmp_path):
    model = tiny_mixtral()
    loaded = load_model(saved(tmp_path, model))
    for one, other in zip(loaded.layers, find_mlps(model), strict=True):
        assert torch.equal(one.output.weight, other.output.weight)


def test_packed_experts_are_refused(tmp_path):
    model = tiny_of_type("gpt_oss")
    model.config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    with pytest.raises(UnsupportedModelError, match=r"are quantised \(MXFP4\), expected plain ones") as refusal:
        load_model(saved(tmp_path, model))
    assert "\n" not in str(refusal.value)


def test_a_memory_budget_is_refused(tmp_path):
    name = saved(tmp_path, tiny_mixtral())
    with pytest.raises(
        UnsupportedModelError, match="a memory budget was asked for, but mixtral is a mixture of experts"
    ):
        load_within(name, lambda _model, _shape: 64)
    assert load_within(save_tiny_checkpoint(tmp_path / "llama"), lambda _model, _shape: 64).layers[0].routing is None
