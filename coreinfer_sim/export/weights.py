"""The weights of a model whose decode-phase MLPs are the model: what every export format starts from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from coreinfer_sim.choosing.index_sets import IndexSets
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.cutting import Projections, compact_projections
from coreinfer_sim.engines.llamacpp.router import DENSE, GLOBAL
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import MLPLayer, linear_parameters
from coreinfer_sim.models.structure import weight_shape

WIDTH_STEP = 64
"""Widths are multiples of this, which kernels like."""


@dataclass(frozen=True)
class Source:
    """Which set of neurons of which index is exported, and how; every exported model says so."""

    model: str
    index: str
    index_sha256: str
    """Of the index's manifest without the profile, which says nothing of what is in a set."""
    which: int | str
    """A cluster's number, GLOBAL or DENSE."""
    keep_ratio: float
    compensated: bool
    weights: str
    """Type of the weights."""

    @property
    def title(self) -> str:
        """What files are called after."""
        return self.which if isinstance(self.which, str) else f"cluster-{self.which:04d}"


@dataclass(frozen=True)
class CompactWeights:
    """A model's parameters by name, float or half as loaded, with the compact MLPs in place of the dense ones."""

    parameters: dict[str, torch.Tensor]
    """Under the names and shapes of torch's Linear; GPT-2's transposed matrices come out upright."""
    widths: list[int]
    """Neurons of each layer, padding included, [n_layers]."""
    n_padding: int
    """Neurons that are zeros, over all layers."""
    has_bias: bool
    """Whether the MLPs have biases that the dense ones lack."""
    mlp_weights: frozenset[str]
    """Names of the MLPs' matrices, which are upright whatever the model stores."""


def exported_selection(
    index: SemanticIndex, which: int | str, keep_ratio: float, compensated: bool = True
) -> NeuronSelection:
    """Return the set of a cluster, GLOBAL or DENSE: compensated where the index has that, else by energy.

    Without compensation the number of neurons is rounded up to a multiple of WIDTH_STEP, by further core neurons.
    """
    if which == DENSE:
        return NeuronSelection(DENSE)
    cluster = None if which == GLOBAL else int(which)
    if compensated and index.manifest.holds_sets(keep_ratio):
        sets = IndexSets(index, keep_ratio)
        return sets.of_corpus() if cluster is None else sets.of_cluster(cluster)
    d_ff = index.manifest.model.d_ff
    width = min(d_ff, _rounded_up(keep_ratio * d_ff))
    return NeuronSelection("statistics", index.core_neurons(cluster, width / d_ff), cluster=cluster)


def compact_weights(language_model: LanguageModel, selection: NeuronSelection, one_width: bool) -> CompactWeights:
    """Cut a model down to a selection.

    Args:
        language_model: the dense model.
        selection: of its neurons; layers that it does not name stay whole.
        one_width: pad every layer to the widest, for formats that know one width only.
    """
    selection.check(language_model.layers)
    repairs = selection.compensation or {}
    compact: dict[int, Projections] = {}
    for layer in language_model.layers:
        ids = selection.ids.get(layer.number, torch.arange(layer.d_ff))
        compact[layer.number] = compact_projections(layer, ids, repairs.get(layer.number))
    needed = [weight_shape(compact[layer.number][layer.output_name])[1] for layer in language_model.layers]
    widths = [min(_rounded_up(n), max(n, layer.d_ff)) for n, layer in zip(needed, language_model.layers, strict=True)]
    if one_width:
        widths = [max(widths)] * len(widths)
    parameters = _without_mlps(language_model)
    biased = any(module.bias is not None for modules in compact.values() for module in modules.values())
    had_bias = any(
        layer.projection(name).bias is not None for layer in language_model.layers for name in layer.projections
    )
    mlp_weights = []
    for layer, width in zip(language_model.layers, widths, strict=True):
        padded = _padded_parameters(layer, compact[layer.number], width)
        padded = {f"{_name_of(language_model, layer)}.{name}": value for name, value in padded.items()}
        mlp_weights += [name for name in padded if name.endswith(".weight")]
        parameters.update(padded)
    n_padding = sum(widths) - sum(needed)
    return CompactWeights(parameters, widths, n_padding, biased and not had_bias, frozenset(mlp_weights))


def _padded_parameters(layer: MLPLayer, modules: Projections, width: int) -> dict[str, torch.Tensor]:
    """Return a compact MLP's parameters by name, padded to ``width`` neurons with zeros."""
    padded = {}
    for name, module in modules.items():
        weight, bias = linear_parameters(module)
        if name == layer.output_name:
            weight = _padded(weight, width, 1)
        else:
            parts = 2 if layer.fused else 1
            weight = torch.cat([_padded(part, width, 0) for part in weight.chunk(parts)])
            bias = None if bias is None else torch.cat([_padded(part, width, 0) for part in bias.chunk(parts)])
        padded[f"{name}.weight"] = weight
        if bias is not None:
            padded[f"{name}.bias"] = bias
    return padded


def needed_bytes(weights: CompactWeights, bytes_per_value: float) -> int:
    """Return the bytes of the distinct parameters on disk."""
    distinct = {value.data_ptr(): value.numel() for value in weights.parameters.values()}
    return round(sum(distinct.values()) * bytes_per_value)


def _without_mlps(language_model: LanguageModel) -> dict[str, torch.Tensor]:
    prefixes = tuple(
        f"{_name_of(language_model, layer)}.{name}." for layer in language_model.layers for name in layer.projections
    )
    state = language_model.model.state_dict()
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}


def _name_of(language_model: LanguageModel, layer: MLPLayer) -> str:
    names: dict[int, str] = {id(module): name for name, module in language_model.model.named_modules()}
    return names[id(layer.owner)]


def _rounded_up(width: float) -> int:
    return math.ceil(width / WIDTH_STEP) * WIDTH_STEP


def _padded(values: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    missing = width - values.shape[dim]
    if missing == 0:
        return values
    shape = list(values.shape)
    shape[dim] = missing
    return torch.cat([values, values.new_zeros(shape)], dim)
