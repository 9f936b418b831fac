"""Where a model's MLPs are: found by their structure, in the modules of its text part.

The model's own forward code keeps running, only narrower. An expert of a mixture is an MLP of its own. What is known by name is
listed in `_MIXTURE` and `_NORM_BEHIND`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from coreinfer_sim.base.errors import UnsupportedModelError
from coreinfer_sim.models.experts import Routing
from coreinfer_sim.models.finding import Found, found_mlps, place_of
from coreinfer_sim.models.mixtures import n_chosen
from coreinfer_sim.models.offload import HostLinear
from coreinfer_sim.models.store import LayerStore
from coreinfer_sim.models.streaming import StreamedLinear
from coreinfer_sim.models.structure import Arrangement, weight_shape

_MIXTURE = re.compile(r"Experts$|SparseMoe|MoeBlock|MoEBlock|MoeMLP|MoE$|TopKRouter")
"""Class names of mixtures of experts. By name, as experts that are stored in an unknown way are not found by their parts."""
_NORM_BEHIND = re.compile(r"post_?(feed_?forward|mlp|ffn)_?\w*norm|^post_norm2$")
"""Attributes of a layer whose norm stands behind its MLP. By name, as the layer alone does not run without its model."""
_NORMS_SUMS = ("openai-gpt",)
"""Types whose layers norm the sum of MLP and residual stream outside the MLP's module. By name for the same reason."""


@dataclass(frozen=True)
class MLPLayer:
    """One layer's MLP inside a loaded model."""

    number: int
    family: str
    """The model's type, such as ``llama``."""
    owner: Any
    """Module that holds the projections, some of them perhaps in modules of its own."""
    arrangement: Arrangement
    d_model: int
    """Width of the residual stream."""
    d_ff: int
    """Number of neurons of the dense MLP, also while a compact one is in its place."""
    n_bytes: int
    """Bytes of weights and biases of the dense MLP."""
    post_norm: bool = False
    """Whether a norm stands between the MLP and the residual stream, or, as in OPT-350m, behind their sum."""
    store: LayerStore | None = None
    """Where the weights are if they are not in memory."""
    path: str = ""
    """Of the owner in the model; of experts whose weights lie together, that of the module that holds them, and a number."""
    block: int = 0
    """The same number, but of a mixture of experts that of the model's layer, which holds several MLPs."""
    routing: Routing | None = None
    """Of an expert: says which tokens it computes; None: the MLP computes all."""
    share: float = 1.0
    """Of the tokens that pass through the MLP, on average over the experts of a layer."""

    @property
    def expert(self) -> int | None:
        """Number of an expert in its layer; None of an MLP that computes all tokens."""
        return None if self.routing is None else int(self.path.rpartition(".")[2])

    @property
    def title(self) -> str:
        """What it is called in messages."""
        return f"layer {self.block}" if self.expert is None else f"expert {self.expert} of layer {self.block}"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Paths of the projections from d_model to d_ff in the owner: one if plain or fused, gate before up if gated."""
        return self.arrangement.inputs

    @property
    def output_name(self) -> str:
        """Path of the projection from d_ff to d_model; what it reads is the activation site."""
        return self.arrangement.output

    @property
    def fused(self) -> bool:
        """Whether the one input projection holds gate and up, one after the other."""
        return self.arrangement.fused

    @property
    def gated(self) -> bool:
        """Whether neurons are products of a gate and an up projection."""
        return self.fused or len(self.inputs) == 2

    @property
    def output(self) -> Any:
        """The projection that reads the activation site."""
        return self.projection(self.output_name)

    @property
    def away(self) -> bool:
        """Whether the dense weights are not where the model computes, but on disk or in host memory."""
        return self.store is not None or isinstance(self.output, HostLinear)

    @property
    def projections(self) -> tuple[str, ...]:
        """Paths of all projections in the owner."""
        return (*self.inputs, self.output_name)

    def projection(self, path: str) -> Any:
        """Return the module at a path in the owner."""
        return self.owner.get_submodule(path)

    def put(self, path: str, module: nn.Module | None) -> None:
        """Put a module at a path in the owner."""
        parent, _, name = path.rpartition(".")
        setattr(self.owner.get_submodule(parent), name, module)


def linear_parameters(projection: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return weight [out, in] and bias [out] of a Linear or Conv1D; where an engine holds the weight, a widened copy."""
    widened = getattr(projection, "widened", None)
    weight = projection.weight.detach() if widened is None else widened()
    bias = projection.bias.detach() if projection.bias is not None else None
    return (weight.T if isinstance(projection, Conv1D) else weight), bias


def module_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def find_mlps(model: Any) -> list[MLPLayer]:
    """Find the MLP of every layer of a model's text part, in the order of the model's layers; of a mixture those of all experts.

    Every kind of layer is verified: see `structure.verify` and `mixtures.verify_experts`.

    Raises:
        UnsupportedModelError: no MLP, or one that computes something else; experts that are stored in an unknown way, or an
            encoder-decoder model.
    """
    name = type(model).__name__
    text = model.config.get_text_config()
    modules = dict(_text_modules(model, text))
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder model, expected a causal one; name a decoder.")
    d_model = _width_of(model, text)
    found = found_mlps(name, modules, d_model)
    mixture = sorted({type(m).__name__ for m in modules.values() if _MIXTURE.search(type(m).__name__)})
    if mixture and not any(each.routing for each in found):
        raise _unknown_mixture(name, mixture[0])
    if not found:
        raise UnsupportedModelError(
            f"{name} holds no MLP: no layer has linear layers from {d_model} features to more and back; name another model."
        )
    widths = {weight_shape(each.owner.get_submodule(each.arrangement.output)) for each in found}
    if len(widths) > 1:
        raise UnsupportedModelError(
            f"the layers of {name} differ in width ({sorted(widths)}), expected one d_ff; name a model of equal layers."
        )
    chosen, is_mixture = n_chosen(text), any(each.routing for each in found)
    n_experts = Counter(place_of(each.path) for each in found if each.routing)
    layers = []
    for number, each in enumerate(found):
        place = place_of(each.path)
        layer = _mlp_layer(number, str(text.model_type), each, modules[place])
        if is_mixture:
            share = min(1.0, chosen / n_experts[place]) if each.routing and chosen else 1.0
            layer = replace(layer, block=int(place.rpartition(".")[2]), share=share)
        layers.append(layer)
    return layers


def check_dense(layers: Sequence[MLPLayer], what: str) -> None:
    """Raise UnsupportedModelError if MLPs are experts of a mixture, with which ``what`` does not work."""
    if any(layer.routing for layer in layers):
        raise UnsupportedModelError(
            f"{what} was asked for, but {layers[0].family} is a mixture of experts, where it is not known how; leave it out, or "
            "name a dense model."
        )


def _unknown_mixture(name: str, experts: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} is a mixture of experts ({experts}) that are stored in a way that is not known, expected gate_up_proj or "
        "up_proj with down_proj for all experts, or a list of MLPs; name another model."
    )


def _text_modules(model: Any, text: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model with their paths, without models of their own for images and sounds."""
    kinds = (type(model.config), type(text))
    others: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(others) and others:
            continue
        if isinstance(module, PreTrainedModel) and type(module.config) not in kinds:
            others = (*others, f"{path}.")
        else:
            yield path, module


def _width_of(model: Any, text: Any) -> int:
    width = getattr(text, "hidden_size", None)
    return int(width if width else model.get_input_embeddings().weight.shape[1])


def _mlp_layer(number: int, family: str, found: Found, block: nn.Module) -> MLPLayer:
    owner, arrangement = found.owner, found.arrangement
    output = owner.get_submodule(arrangement.output)
    d_model, d_ff = weight_shape(output)
    projections = [owner.get_submodule(path) for path in (*arrangement.inputs, arrangement.output)]
    tensors = [tensor for each in projections for tensor in (each.weight, each.bias) if tensor is not None]
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    store = output.store if isinstance(output, StreamedLinear) else None
    post_norm = (
        arrangement.norm
        or family in _NORMS_SUMS
        or any(
            _NORM_BEHIND.search(name) for name, module in block.named_children() if not isinstance(module, nn.Identity)
        )
    )
    return MLPLayer(
        number, family, owner, arrangement, d_model, d_ff, n_bytes, post_norm, store, found.path, number, found.routing
    )


def dense_bytes(layers: Sequence[MLPLayer]) -> int:
    """Return the MLP bytes that one token reads in the dense model; of experts those of as many as a token takes."""
    return round(sum(layer.n_bytes * layer.share for layer in layers))


def compact_bytes(layer: MLPLayer, n_kept: int, compensated: bool = False) -> int:
    """Return the bytes of a compact MLP: all weights shrink with the neurons, but not the output bias.

    Args:
        layer: the dense MLP.
        n_kept: neurons that stay.
        compensated: compensation is merged, which brings an output bias to those that have none.
    """
    has_bias = compensated or layer.output.bias is not None
    return _neuron_bytes(layer) * n_kept + (_output_bias_bytes(layer) if has_bias else 0)


def mlp_bytes(layers: Sequence[MLPLayer], ids: Mapping[int, torch.Tensor], compensated: Container[int] = ()) -> int:
    """Return the MLP bytes that one decoded token reads.

    Args:
        layers: the model's MLPs.
        ids: kept neurons by layer, [n_kept]; the other layers stay dense.
        compensated: layers with compensation.
    """
    return sum(
        compact_bytes(layer, len(ids[layer.number]), layer.number in compensated)
        if layer.number in ids
        else layer.n_bytes
        for layer in layers
    )


def n_within(layer: MLPLayer, keep_ratio: float) -> int:
    """Return how many neurons a compensated MLP holds within a share of the dense MLP's bytes, at least one."""
    room = keep_ratio * layer.n_bytes - _output_bias_bytes(layer)
    return int(min(layer.d_ff, max(1, room // _neuron_bytes(layer))))


def _output_bias_bytes(layer: MLPLayer) -> int:
    return layer.d_model * int(layer.output.weight.element_size())


def _neuron_bytes(layer: MLPLayer) -> int:
    own_bias = _output_bias_bytes(layer) if layer.output.bias is not None else 0
    return (layer.n_bytes - own_bias) // layer.d_ff


def other_bytes(model: Any, layers: Sequence[MLPLayer]) -> int:
    """Return the bytes of weights outside the MLPs that one decoded token reads.

    Embedding tables are not counted, as a token reads one row of them, but an output head that shares one is.
    """
    every = module_bytes(model)
    head = model.get_output_embeddings()
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    if head is not None:
        tables.pop(id(head.weight), None)
    return (
        every
        - sum(layer.n_bytes for layer in layers)
        - sum(table.numel() * table.element_size() for table in tables.values())
    )
