"""Cutting a layer's projections down to held neurons, as ordinary linear modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.index.compensated import LayerCompensation
from coreinfer_sim.models.mlps import MLPLayer, linear_parameters
from coreinfer_sim.models.offload import HostLinear
from coreinfer_sim.models.store import LayerStore
from coreinfer_sim.models.structure import linear_module

Projections = dict[str, Any]
_Parameters = tuple[torch.Tensor, torch.Tensor | None]
MERGED_ROWS = 64
"""Rows of the output weights that are merged with compensation at a time."""


def compact_projections(
    layer: MLPLayer, ids: torch.Tensor, compensation: LayerCompensation | None = None
) -> Projections:
    """Cut one layer's projections down to the neurons ``ids`` [n_kept] and merge the compensation.

    Returns:
        Linear modules by name: inputs [n_kept, d_model] (twice that if fused), output [d_model, n_kept].
    """
    inputs, output, bias = _kept(layer, ids) if layer.store is None else _read(layer, layer.store, ids)
    if compensation is not None:
        output = output.clone()
        merge_delta(output, compensation)
        added = compensation.bias.to(output, copy=True)  # a view would hold on to its file
        bias = added if bias is None else bias + added
    return {**_input_modules(layer, inputs), layer.output_name: _module(layer, output, bias)}


def compact_inputs(layer: MLPLayer, ids: torch.Tensor) -> Projections:
    """Cut just the input projections of a layer whose weights are in memory."""
    return _input_modules(layer, _kept_inputs(layer, ids.to(layer.output.weight.device)))


def _input_modules(layer: MLPLayer, inputs: list[_Parameters]) -> dict[str, nn.Linear]:
    """Make modules of cut input projections, gate and up apart."""
    if layer.fused:
        inputs = [_stacked(*inputs)]
    return {name: _module(layer, weight, offset) for name, (weight, offset) in zip(layer.inputs, inputs, strict=True)}


def _module(layer: MLPLayer, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    device = layer.output.device if isinstance(layer.output, HostLinear) else weight.device
    return linear_module(weight.contiguous().to(device), None if bias is None else bias.to(device))


def merge_delta(output: torch.Tensor, compensation: LayerCompensation) -> None:
    """Add the compensation to output weights [d_model, n_kept] in place, some rows at a time to need little memory."""
    if compensation.delta is None:
        return
    for begin in range(0, len(output), MERGED_ROWS):
        rows = slice(begin, begin + MERGED_ROWS)
        output[rows] = output[rows] + compensation.delta[rows].to(output.device).float()  # the sum is float32


_Cut = tuple[list[_Parameters], torch.Tensor, torch.Tensor | None]


def _kept(layer: MLPLayer, ids: torch.Tensor) -> _Cut:
    """Cut the inputs (gate and up apart), the output's columns [d_model, n_kept] and its bias from weights in memory."""
    ids = ids.to(layer.output.weight.device)
    weight, bias = linear_parameters(layer.output)
    return _kept_inputs(layer, ids), weight[:, ids], bias  # index_select of columns is slower on a CPU


def _kept_inputs(layer: MLPLayer, ids: torch.Tensor) -> list[_Parameters]:
    return [
        (part.index_select(0, rows), None if offset is None else offset[rows])
        for part, offset in (linear_parameters(layer.projection(name)) for name in layer.inputs)
        for rows in _halves(layer, ids)
    ]


def _read(layer: MLPLayer, store: LayerStore, ids: torch.Tensor) -> _Cut:
    """Do the same with weights on disk; biases are in memory."""
    neurons = store.read_neurons(ids)
    offsets = [
        None if bias is None else bias.detach()[rows]
        for bias in (layer.projection(name).bias for name in layer.inputs)
        for rows in _halves(layer, ids)
    ]
    bias = layer.output.bias
    inputs = [(neurons[:, place].contiguous(), offset) for place, offset in enumerate(offsets)]
    return inputs, neurons[:, -1].T.contiguous(), None if bias is None else bias.detach()


def _halves(layer: MLPLayer, ids: torch.Tensor) -> list[torch.Tensor]:
    return [ids, ids + layer.d_ff] if layer.fused else [ids]


def _stacked(first: _Parameters, second: _Parameters) -> _Parameters:
    """Put the outputs of two linear maps one after the other; a missing bias is zero beside one that is there."""
    weight = torch.cat([first[0], second[0].to(first[0])])
    if first[1] is None and second[1] is None:
        return weight, None
    biases = [w.new_zeros(len(w)) if b is None else b for w, b in (first, second)]
    return weight, torch.cat([biases[0], biases[1].to(biases[0])]).to(weight)


def compact_model(layers: Sequence[MLPLayer], selection: NeuronSelection) -> dict[int, Projections]:
    """Cut every layer that the selection names; of those away that it does not name, all neurons are fetched."""
    repairs = selection.compensation or {}
    return {
        number: compact_projections(layers[number], ids, repairs.get(number))
        for number, ids in held_ids(layers, selection).items()
    }


def held_ids(layers: Sequence[MLPLayer], selection: NeuronSelection) -> dict[int, torch.Tensor]:
    """Return the neurons that decode holds beside the model: a selection's, and all of dense layers that are away."""
    whole = {
        layer.number: torch.arange(layer.d_ff) for layer in layers if layer.away and layer.number not in selection.ids
    }
    return {**selection.ids, **whole}
