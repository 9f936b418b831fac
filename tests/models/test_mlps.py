"""Finding the MLPs of every family, refusing the others, and knowing a model by its weights."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import N_LAYERS, tiny_bitnet, tiny_mamba, tiny_model, tiny_t5
from torch import nn

from coreinfer_sim.base.errors import ModelError, UnsupportedModelError
from coreinfer_sim.bench.shapes import parse_shape, random_model
from coreinfer_sim.models.mlps import dense_bytes, find_mlps, other_bytes
from coreinfer_sim.models.structure import weight_shape


def test_every_layer_is_found(tiny, model):
    layers = find_mlps(model)
    assert [layer.number for layer in layers] == list(range(N_LAYERS))
    assert {layer.family for layer in layers} == {tiny.family}
    assert {(layer.d_model, layer.d_ff) for layer in layers} == {(tiny.d_model, tiny.d_ff)}
    for layer in layers:
        assert weight_shape(layer.output) == (tiny.d_model, tiny.d_ff)
        n_out = sum(weight_shape(layer.projection(name))[0] for name in layer.inputs)
        assert n_out == tiny.d_ff * (2 if tiny.gated else 1)
        assert all(weight_shape(layer.projection(name))[1] == tiny.d_model for name in layer.inputs)


def test_layers_are_in_the_models_order(model):
    n_in_model = {id(module): number for number, module in enumerate(model.modules())}
    places = [n_in_model[id(layer.owner)] for layer in find_mlps(model)]
    assert places == sorted(places)
    assert len(set(places)) == N_LAYERS


def test_order_is_that_of_the_decoder_stack(models):
    model = models["llama"]
    assert all(layer.owner is block.mlp for layer, block in zip(find_mlps(model), model.model.layers, strict=True))
    model = models["opt"]
    blocks = model.model.decoder.layers
    assert all(layer.owner is block for layer, block in zip(find_mlps(model), blocks, strict=True))


def test_bytes_are_those_of_the_projections(tiny, model):
    n_inputs = 2 if tiny.gated else 1
    n_values = tiny.d_model * tiny.d_ff * (n_inputs + 1)
    if tiny.biases:
        n_values += n_inputs * tiny.d_ff + tiny.d_model
    layers = find_mlps(model)
    assert [layer.n_bytes for layer in layers] == [4 * n_values] * N_LAYERS
    assert dense_bytes(layers) == 4 * n_values * N_LAYERS
    assert [layer.n_bytes for layer in find_mlps(copy.deepcopy(model).bfloat16())] == [2 * n_values] * N_LAYERS


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (tiny_t5, "encoder-decoder"),
        (tiny_mamba, "holds no MLP"),
        (tiny_bitnet, r"model.layers.0.mlp of .*, a BitNetMLP, is no MLP"),
    ],
    ids=["t5", "mamba", "bitnet"],
)
def test_refusals_say_what_was_found(build, found):
    model = build()
    with pytest.raises(UnsupportedModelError, match=found) as refusal:
        find_mlps(model)
    assert isinstance(refusal.value, ModelError)
    assert type(model).__name__ in str(refusal.value)


def test_layers_of_unlike_width_are_refused():
    model = tiny_model("llama")
    wide = copy.deepcopy(model.config)
    wide.intermediate_size = 64
    model.model.layers[1].mlp = type(model.model.layers[1].mlp)(wide)
    with pytest.raises(UnsupportedModelError, match="differ in width.*48.*64.*expected one d_ff"):
        find_mlps(model)


@pytest.mark.parametrize("name", ["gate_proj", "down_proj"])
def test_wrapped_projections_are_refused(name):
    """An adapter or a quantised module holds more than its weight; cut as a plain one, it would be wrong unseen."""

    class Adapted(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    plain = getattr(mlp, name)
    adapted = Adapted(plain.in_features, plain.out_features, bias=False)
    adapted.weight = plain.weight
    setattr(mlp, name, adapted)
    with pytest.raises(UnsupportedModelError, match="Adapted"):
        find_mlps(model)


def test_bytes_per_token_by_hand():
    model = tiny_model("llama")
    layers = find_mlps(model)
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32  # queries, keys and values of half as many heads, output
    norms = (2 * N_LAYERS + 1) * 32
    assert dense_bytes(layers) == 4 * N_LAYERS * 3 * 32 * 48
    assert other_bytes(model, layers) == 4 * (N_LAYERS * attention + norms + 80 * 32)  # the head, not the embeddings


def test_a_shared_head_counts_once_and_position_tables_never():
    shape = parse_shape("smollm2-135m:layers=1")
    loaded = random_model(shape, "bfloat16", "cpu")
    attention = 2 * 576 * 576 + 2 * 576 * 192
    assert other_bytes(loaded.model, loaded.layers) == 2 * (attention + 3 * 576 + 49152 * 576)
    opt = tiny_model("opt")
    layers = find_mlps(opt)
    tables = opt.model.decoder.embed_tokens.weight.numel() + opt.model.decoder.embed_positions.weight.numel()
    every = sum(p.numel() for p in opt.parameters())
    assert other_bytes(opt, layers) + dense_bytes(layers) == 4 * (every - tables)


class Changed(nn.Module):
    """A gated MLP that computes something else than a gated MLP."""

    def __init__(self, plain, change):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            plain.gate_proj,
            plain.up_proj,
            plain.down_proj,
            plain.act_fn,
        )
        self.change = change

    def forward(self, x):
        return self.change(self, x)


def _normalised(mlp, x):
    z = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    return mlp.down_proj(z / z.norm(dim=-1, keepdim=True))


def _width_matters(mlp, x):
    z = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    return mlp.down_proj(z) * z.shape[-1]


def _reads_another(mlp, x):
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(2 * x))


def _runs_twice(mlp, x):
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) + 0 * mlp.up_proj(x))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_normalised, r"its neurons differ by [\d.]+ from activation\(gate\(x\)\) \* up\(x\)"),
        (_width_matters, r"without half of its neurons it differs by [\d.e+]+ from one where those are zero"),
        (_reads_another, "read different inputs"),
        (_runs_twice, "called .* times, expected once each"),
    ],
)
def test_an_mlp_that_computes_something_else_is_refused_by_layer_difference_and_type(change, found):
    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp = Changed(block.mlp, change)
    with pytest.raises(UnsupportedModelError, match=rf"model.layers.0.mlp of LlamaForCausalLM, a Changed, .*{found}"):
        find_mlps(model)


def test_one_layer_of_another_kind_is_refused():
    model = tiny_model("llama")
    model.model.layers[2].mlp.act_fn = nn.Softmax(-1)
    with pytest.raises(UnsupportedModelError, match="model.layers.2.mlp"):
        find_mlps(model)


def test_the_gate_is_found_by_what_it_computes():
    model = tiny_model("llama")
    for block in model.model.layers:
        mlp = Changed(block.mlp, lambda mlp, x: mlp.down_proj(mlp.gate_proj(x) * mlp.act_fn(mlp.up_proj(x))))
        block.mlp = mlp
    assert {layer.inputs for layer in find_mlps(model)} == {("up_proj", "gate_proj")}


def test_models_without_weights_are_verified_as_well():
    with torch.device("meta"):
        model = type(tiny_model("opt"))(tiny_model("opt").config)
    assert [layer.inputs for layer in find_mlps(model)] == [("fc1",)] * N_LAYERS
