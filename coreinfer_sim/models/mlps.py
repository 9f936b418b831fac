"""Where a model's MLPs are: one small adapter for each family, matched against the model's own modules.

To support a further family, add one `Family` to `FAMILIES`: the class name of the module that holds the
projections, and the names of the projections. Its model's own forward code keeps running, only narrower.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from coreinfer_sim.base.errors import UnsupportedModelError
from coreinfer_sim.models.offload import HostLinear
from coreinfer_sim.models.store import LayerStore
from coreinfer_sim.models.streaming import StreamedLinear

GATED = ("gate_proj", "up_proj")


@dataclass(frozen=True)
class Family:
    """How one family names the parts of its MLP."""

    name: str
    """What users call the family."""
    owner: str
    """Class name of the module that holds the projections."""
    inputs: tuple[str, ...]
    """Projections from d_model to d_ff: one if plain or fused, gate before up if gated."""
    output: str
    """Projection from d_ff to d_model; what it reads is the activation site."""
    fused: bool = False
    """The one input projection holds gate and up, one after the other."""
    post_norm: bool = False
    """A norm stands between the MLP's output and the residual stream."""

    @property
    def gated(self) -> bool:
        """Whether neurons are products of a gate and an up projection."""
        return self.fused or len(self.inputs) == 2


FAMILIES = (
    Family("Llama", "LlamaMLP", GATED, "down_proj"),
    Family("Mistral", "MistralMLP", GATED, "down_proj"),
    Family("Qwen2", "Qwen2MLP", GATED, "down_proj"),
    Family("Qwen3", "Qwen3MLP", GATED, "down_proj"),
    Family("Gemma", "GemmaMLP", GATED, "down_proj"),
    Family("Gemma 2", "Gemma2MLP", GATED, "down_proj", post_norm=True),
    Family("Gemma 3", "Gemma3MLP", GATED, "down_proj", post_norm=True),
    Family("Phi-3", "Phi3MLP", ("gate_up_proj",), "down_proj", fused=True),
    Family("OLMo-2", "Olmo2MLP", GATED, "down_proj", post_norm=True),
    Family("OPT", "OPTDecoderLayer", ("fc1",), "fc2"),
    Family("GPT-2", "GPT2MLP", ("c_fc",), "c_proj"),
    Family("GPT-NeoX", "GPTNeoXMLP", ("dense_h_to_4h",), "dense_4h_to_h"),
    Family("Falcon", "FalconMLP", ("dense_h_to_4h",), "dense_4h_to_h"),
    Family("Bloom", "BloomMLP", ("dense_h_to_4h",), "dense_4h_to_h"),
    Family("Phi-2", "PhiMLP", ("fc1",), "fc2"),
    Family("StarCoder2", "Starcoder2MLP", ("c_fc",), "c_proj"),
)
_BY_OWNER = {family.owner: family for family in FAMILIES}
_MIXTURE = re.compile(r"Experts$|SparseMoe|MoeBlock|MoEBlock|MoeMLP|MoE$|TopKRouter")


@dataclass(frozen=True)
class MLPLayer:
    """One layer's MLP inside a loaded model."""

    number: int
    family: Family
    owner: Any
    d_model: int
    """Width of the residual stream."""
    d_ff: int
    """Number of neurons of the dense MLP, also while a compact one is in its place."""
    n_bytes: int
    """Bytes of weights and biases that one token reads in the dense MLP."""
    store: LayerStore | None = None
    """Where the weights are if they are not in memory."""

    @property
    def output(self) -> Any:
        """The projection that reads the activation site."""
        return getattr(self.owner, self.family.output)

    @property
    def away(self) -> bool:
        """Whether the dense weights are not where the model computes, but on disk or in host memory."""
        return self.store is not None or isinstance(self.output, HostLinear)

    @property
    def post_norm(self) -> bool:
        """Whether a norm stands behind the MLP, in OPT-350m even behind the residual sum."""
        return self.family.post_norm or not getattr(self.owner, "do_layer_norm_before", True)

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of all projections in the owner."""
        return (*self.family.inputs, self.family.output)


def _mlp_layer(number: int, owner: Any) -> MLPLayer:
    family = _BY_OWNER[type(owner).__name__]
    for name in (*family.inputs, family.output):
        kind = type(getattr(owner, name))
        if kind not in (nn.Linear, Conv1D, FalconLinear, StreamedLinear, HostLinear):
            raise UnsupportedModelError(
                f"{name} of layer {number} is a {kind.__module__}.{kind.__name__}, expected a plain linear layer; merge "
                "adapters, and load the model without quantisation."
            )
    output = getattr(owner, family.output)
    d_model, d_ff = weight_shape(output)
    n_bytes = sum(module_bytes(getattr(owner, name)) for name in (*family.inputs, family.output))
    store = output.store if isinstance(output, StreamedLinear) else None
    return MLPLayer(number, family, owner, d_model, d_ff, n_bytes, store)


def weight_shape(projection: Any) -> tuple[int, int]:
    """Return (out features, in features) of a linear projection; Conv1D stores the transpose."""
    rows, columns = projection.weight.shape
    return (columns, rows) if isinstance(projection, Conv1D) else (rows, columns)


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
    """Find every layer's MLP, in the order of the model's layers.

    Raises:
        UnsupportedModelError: no known MLP, a mixture of experts, or an encoder-decoder model.
    """
    name = type(model).__name__
    mixture = sorted({type(m).__name__ for m in model.modules() if _MIXTURE.search(type(m).__name__)})
    if mixture:
        raise UnsupportedModelError(
            f"{name} is a mixture of experts ({mixture[0]}), which choose neurons by themselves; {_supported()}"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder model, expected a causal one; {_supported()}")
    owners = [module for module in model.modules() if type(module).__name__ in _BY_OWNER]
    if not owners:
        raise UnsupportedModelError(f"{name} holds no MLP of a known family; {_supported()}")
    layers = [_mlp_layer(number, owner) for number, owner in enumerate(owners)]
    widths = {(layer.d_model, layer.d_ff) for layer in layers}
    if len(widths) > 1:
        raise UnsupportedModelError(
            f"the layers of {name} differ in width ({sorted(widths)}), expected one d_ff; {_supported()}"
        )
    return layers


def _supported() -> str:
    return (
        f"supported are {', '.join(family.name for family in FAMILIES)} – a further family needs one entry in "
        "FAMILIES of coreinfer_sim/models/mlps.py."
    )


def dense_bytes(layers: Sequence[MLPLayer]) -> int:
    """Return the MLP bytes that one token reads in the dense model."""
    return sum(layer.n_bytes for layer in layers)


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
    return every - dense_bytes(layers) - sum(table.numel() * table.element_size() for table in tables.values())
