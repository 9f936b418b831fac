"""A fingerprint of a model's weights that survives a change of dtype."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from transformers.pytorch_utils import Conv1D

from coreinfer_sim.models.mlps import MLPLayer

SKETCH_SIZE = 32
"""Weights of each layer that are sampled."""


def sketch_places(d_model: int, d_ff: int, n_layers: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return which rows and columns of each layer's down projection [d_model, d_ff] are sampled, [32] each."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randint(d_model, (SKETCH_SIZE,), generator=generator),
            torch.randint(d_ff, (SKETCH_SIZE,), generator=generator),
        )
        for _ in range(n_layers)
    ]


def weight_sketch(layers: Sequence[MLPLayer]) -> list[list[float]]:
    """Sample a few down-projection weights of every layer: a fingerprint that survives a change of dtype.

    Returns:
        [n_layers][32] values, from fixed pseudo-random places; of weights that were rounded, what they were before.
    """
    sketch = []
    places = sketch_places(layers[0].d_model, layers[0].d_ff, len(layers)) if layers else []
    for layer, (rows, columns) in zip(layers, places, strict=True):
        if layer.store is not None:
            values = layer.store.read_neurons(columns)[torch.arange(SKETCH_SIZE), -1, rows].float()
        elif hasattr(layer.output, "sketch"):
            values = layer.output.sketch
        else:
            weight = layer.output.weight.detach()
            if isinstance(layer.output, Conv1D):
                weight = weight.T
            values = weight[rows.to(weight.device), columns.to(weight.device)].float().cpu()
        sketch.append([float(f"{value:.6g}") for value in values.tolist()])
    return sketch


def weights_checksum(layers: Sequence[MLPLayer]) -> str:
    """Return a sha256 over `weight_sketch`."""
    return hashlib.sha256(json.dumps(weight_sketch(layers)).encode()).hexdigest()


def n_different_weights(expected: list[list[float]], layers: Sequence[MLPLayer]) -> int:
    """Return how many sampled weights differ from those of a sketch by more than rounding to 8 bits explains.

    Args:
        expected: an earlier `weight_sketch` of as many layers.
        layers: the MLPs that are compared with it.
    """
    n_different = 0
    for found, before in zip(weight_sketch(layers), expected, strict=True):
        a, b = torch.tensor(found), torch.tensor(before)
        slack = 2.0**-7 * b.abs() + 1e-3 * b.square().mean().sqrt()
        n_different += int(((a - b).abs() > slack).sum())
    return n_different
