"""A model's weights as the compiled loops read them: where the checkpoint has them, or rounded to int8.

What every step of every layer asks for is made once: views and sums took a tenth of a small model's step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from coreinfer_sim.engines.cutting import merge_delta
from coreinfer_sim.engines.lean.intrinsics import bits, set_threads
from coreinfer_sim.engines.lean.mlp import gather_neurons
from coreinfer_sim.engines.linear import widened_product
from coreinfer_sim.index.compensated import LayerCompensation
from coreinfer_sim.models.mlps import MLPLayer, linear_parameters

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Product:
    """A linear map: weight [n_out, n_in] in its stored type or int8, scale and bias of each output, float32 [n_out]."""

    weight: torch.Tensor
    scale: Array
    bias: Array

    @classmethod
    def of(cls, linear: Any, int8: bool) -> Product:
        """Take a linear layer's own weights, or their rounded copy."""
        weight, bias = linear.weight.detach(), linear.bias
        scale = torch.ones(len(weight))
        if int8:
            weight, scale = quantized(weight)
        return cls(weight, scale.numpy(), np.zeros(len(weight), np.float32) if bias is None else vector(bias))

    @cached_property
    def arrays(self) -> tuple[Array, Array, Array]:
        """Weight, scale and bias as the loops expect them."""
        return bits(self.weight), self.scale, self.bias

    @cached_property
    def n_bytes(self) -> int:
        """Bytes that one product reads; a scale belongs to int8 weights alone."""
        scale = self.scale.nbytes if self.weight.dtype is torch.int8 else 0
        return self.weight.nbytes + scale + (self.bias.nbytes if self.bias.any() else 0)

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply many float32 rows [n_rows, n_in], in torch."""
        y = widened_product(x, self.weight)
        return y.mul_(torch.from_numpy(self.scale)).add_(torch.from_numpy(self.bias))


@dataclass(frozen=True, eq=False)
class NeuronMLP:
    """A compact gated MLP, neuron by neuron: what one token reads lies in one piece."""

    weight: torch.Tensor
    """Gate row, up row and down column of each neuron, [n_kept, 3, d_model]; int8 or a floating type."""
    scale: Array
    """Of each of those, float32 [n_kept, 3]."""
    bias: Array
    """Of gate and up, float32 [n_kept, 2]."""
    out_bias: Array
    """Float32 [d_model]."""

    @cached_property
    def arrays(self) -> tuple[Array, Array, Array, Array]:
        """Weight, scale and biases as the loop expects them."""
        return bits(self.weight), self.scale, self.bias, self.out_bias

    @cached_property
    def n_bytes(self) -> int:
        """Bytes in memory; scales that are 1 and biases that are 0 are not counted."""
        parts = [self.weight.nbytes]
        parts += [self.scale.nbytes] if self.weight.dtype is torch.int8 else []
        parts += [part.nbytes for part in (self.bias, self.out_bias) if part.any()]
        return sum(parts)


def neuron_mlp(
    layer: MLPLayer, ids: torch.Tensor, compensation: LayerCompensation | None = None, int8: bool = False
) -> NeuronMLP:
    """Cut a gated MLP down to the neurons ``ids`` [n_kept] and merge the compensation."""
    gate_bias, up_bias, out_bias = (getattr(layer.owner, name).bias for name in layer.projections)
    n = len(ids)
    if layer.store is not None:
        weight = torch.empty(n, 3, layer.d_model, dtype=layer.store.dtype)
        layer.store.read_neurons(ids, weight)
    else:
        parts = [linear_parameters(getattr(layer.owner, name))[0] for name in layer.projections]
        weight = torch.empty(n, 3, layer.d_model, dtype=parts[0].dtype)
        set_threads()
        gather_neurons(*(bits(part) for part in parts), ids.numpy(), bits(weight))
    bias = torch.zeros(n, 2)
    for part, own in enumerate((gate_bias, up_bias)):
        if own is not None:
            bias[:, part] = own.detach()[ids].float()
    added = torch.zeros(layer.d_model) if out_bias is None else out_bias.detach().float()
    if compensation is not None:
        added = added + compensation.bias.float()
        merge_delta(weight[:, 2].T, compensation)
    scale = torch.ones(n, 3)
    if int8:
        weight, scale = quantized(weight)
    return NeuronMLP(weight, scale.numpy(), bias.numpy(), added.numpy())


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to int8 with one scale for each run of the last dimension: the largest magnitude becomes 127.

    Returns:
        int8 like ``weight``, and float32 scales without the last dimension.
    """
    scale = weight.abs().amax(-1).float().clamp_min(1e-30) / 127
    return (weight.float() / scale[..., None]).round_().to(torch.int8), scale


def vector(parameter: torch.Tensor) -> Array:
    """Return a parameter as a float32 array."""
    return parameter.detach().float().contiguous().numpy()
