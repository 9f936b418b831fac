"""The fingerprint of weights: the same in every dtype, another for other weights."""

from __future__ import annotations

import copy

import torch
from tiny_models import N_LAYERS, tiny_model

from coreinfer_sim.models.fingerprint import n_different_weights, weight_sketch
from coreinfer_sim.models.mlps import find_mlps


def test_sketch_is_made_of_the_output_weights(tiny, model):
    layers = find_mlps(model)
    sketch = weight_sketch(layers)
    assert [len(values) for values in sketch] == [32] * N_LAYERS
    assert sketch == weight_sketch(layers)
    for layer, values in zip(layers, sketch, strict=True):
        weights = {float(f"{value:.6g}") for value in layer.output.weight.flatten().tolist()}
        assert set(values) <= weights
        assert len(set(values)) > 20


def test_sketch_survives_a_change_of_dtype(model):
    sketches = {
        dtype: weight_sketch(find_mlps(copy.deepcopy(model).to(dtype)))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    for sketch in sketches.values():
        for dtype in sketches:
            assert n_different_weights(sketch, find_mlps(copy.deepcopy(model).to(dtype))) == 0


def test_sketch_differs_with_another_seed(tiny, model):
    other = find_mlps(tiny_model(tiny.key, seed=1))
    assert 0 < n_different_weights(weight_sketch(find_mlps(model)), other) <= 96


def test_sketch_differs_with_one_changed_layer():
    model = tiny_model("llama")
    sketch = weight_sketch(find_mlps(model))
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1.05)
    assert n_different_weights(sketch, find_mlps(model)) == 32


def test_sketch_differs_with_exchanged_layers():
    model = tiny_model("gpt2")
    sketch = weight_sketch(find_mlps(model))
    blocks = model.transformer.h
    blocks[0].mlp, blocks[1].mlp = blocks[1].mlp, blocks[0].mlp
    assert n_different_weights(sketch, find_mlps(model)) > 0
