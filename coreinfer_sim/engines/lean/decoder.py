"""A lean decode step for Llama-like models on a CPU: the model's own weights, without transformers' Python around them.

transformers spends about a millisecond a layer and token on its own code, and its products read some weight shapes at a
third of the memory's speed. Here a layer is two calls of a compiled loop (`decode_kernels`), whose weights are the
checkpoint's memory, and the cache is transformers' own, grown in place. All else – prefill, sampling, stopping – stays with
transformers' ``generate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer

from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.compact import (
    Projections,
    held_ids,
    linear_module,
    linear_parameters,
    merge_delta,
)
from coreinfer_sim.engines.lean import loops as kernels
from coreinfer_sim.index.compensated import LayerCompensation
from coreinfer_sim.models.loading import LEAN_FAMILIES
from coreinfer_sim.models.mlps import MLPLayer

_ROPES = ("default", "linear", "llama3", "yarn")  # those whose angles depend on the position alone
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_SPARE = 256  # positions by which a cache grows beyond what it holds

Array = np.ndarray[Any, Any]
Product = tuple[Array, Array, Array]
"""Weight [n_out, n_in], scale and bias [n_out], as `decode_kernels.linear` takes them."""


def unsupported(model: Any) -> str | None:
    """Return why a model cannot be decoded here, or None if it can."""
    config = model.config
    if config.model_type not in LEAN_FAMILIES:
        return f"{config.model_type} is not among {', '.join(LEAN_FAMILIES)}"
    if model.device.type != "cpu":
        return f"the model is on {model.device}, not on the CPU"
    if model.dtype not in _TYPES:
        return f"the weights are {model.dtype}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _ROPES:
        return f"its rotary positions are of type {rope}"
    if _activation_kind(model) is None:
        return f"its activation is {config.hidden_act}"
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window and (kinds is None or "sliding_attention" in kinds):
        return f"it attends to the {window} latest positions alone"
    attentions = [block.self_attn for block in model.get_decoder().layers]
    products = [getattr(attention, f"{name}_proj") for attention in attentions for name in "qkvo"]
    for product in (*products, model.get_output_embeddings()):
        if type(product) is not torch.nn.Linear:  # an adapter adds to what its weights give
            return f"it holds a {type(product).__name__} where a Linear was expected"
    return None


def _activation_kind(model: Any) -> int | None:
    return {"silu": kernels.SILU, "swish": kernels.SILU, "relu": kernels.RELU}.get(model.config.hidden_act)


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

    @property
    def n_bytes(self) -> int:
        """Bytes in memory."""
        return self.weight.nbytes + self.scale.nbytes + self.bias.nbytes + self.out_bias.nbytes


def neuron_mlp(
    layer: MLPLayer, ids: torch.Tensor, compensation: LayerCompensation | None = None, int8: bool = False
) -> NeuronMLP:
    """Cut a gated MLP down to the neurons ``ids`` [n_kept] and merge the compensation."""
    n = len(ids)
    gate_bias, up_bias, out_bias = (getattr(layer.owner, name).bias for name in layer.projections)
    if layer.store is not None:
        weight = torch.empty(n, 3, layer.d_model, dtype=layer.store.dtype)
        layer.store.read_neurons(ids, weight)
    else:
        parts = [linear_parameters(getattr(layer.owner, name))[0] for name in layer.projections]
        weight = torch.empty(n, 3, layer.d_model, dtype=parts[0].dtype)
        kernels.set_threads()
        kernels.gather_neurons(*(kernels.bits(part) for part in parts), ids.numpy(), kernels.bits(weight))
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


def modules(layers: Sequence[MLPLayer], compact: dict[int, NeuronMLP]) -> dict[int, Projections]:
    """Return compact MLPs as linear modules over the same memory, for sparse prefill."""
    made: dict[int, Projections] = {}
    for number, mlp in compact.items():
        weights = mlp.weight[:, 0], mlp.weight[:, 1], mlp.weight[:, 2].T
        biases = mlp.bias[:, 0], mlp.bias[:, 1], mlp.out_bias
        made[number] = {
            name: linear_module(weight, torch.from_numpy(bias).to(weight) if bias.any() else None)
            for name, weight, bias in zip(layers[number].projections, weights, biases, strict=True)
        }
    return made


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to int8 with one scale for each run of the last dimension: the largest magnitude becomes 127.

    Returns:
        int8 like ``weight``, and float32 scales without the last dimension.
    """
    scale = weight.abs().amax(-1).float().clamp_min(1e-30) / 127
    return (weight.float() / scale[..., None]).round_().to(torch.int8), scale


@dataclass(frozen=True, eq=False)
class _Layer:
    """One decoder layer as the compiled loops take it."""

    norm: Array
    head_norms: Array
    q: Product
    k: Product
    v: Product
    o: Product
    mlp_norm: Array
    eps: np.float32
    mlp_eps: np.float32


Group = tuple[Sequence[int], dict[int, NeuronMLP]]
"""Rows of a batch, and the compact MLPs that they decode with; a layer that is not named stays dense."""


class LeanDecoder:
    """Decodes one token a row and call; see the module's docstring."""

    def __init__(self, model: Any, layers: Sequence[MLPLayer], int8: bool = False) -> None:
        """Take the weights of a model that `unsupported` has nothing against.

        Args:
            model: its parameters are read where they lie.
            layers: its MLPs, dense.
            int8: hold rounded copies (`quantized`) of all products instead; dense MLPs among them when one is first used.
        """
        kernels.warm_up(model.dtype, int8)  # now, rather than within the first text
        self._model, self._layers, self._int8 = model, layers, int8
        kind = _activation_kind(model)
        assert kind is not None
        self._kind = kind
        base = model.model
        self._blocks = [self._block(block) for block in base.layers]
        self._norm, self._norm_eps = _vector(base.norm.weight), np.float32(base.norm.variance_epsilon)
        self._head = self._product(model.lm_head)
        self._scaling = np.float32(base.layers[0].self_attn.scaling)
        self._dense: dict[int, tuple[Product, Product, Product]] = {}
        self._angles = torch.zeros(2, 0, 0)
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def n_bytes(self) -> int:
        """Bytes that a token reads outside the MLPs: attention, norms and the output head."""
        products = [
            self._head,
            *(product for block in self._blocks for product in (block.q, block.k, block.v, block.o)),
        ]
        return sum(array.nbytes for product in products for array in (product[0], product[2]))

    def _block(self, block: Any) -> _Layer:
        attention = block.self_attn
        norms = [getattr(attention, name).weight for name in ("q_norm", "k_norm") if hasattr(attention, name)]
        q, k, v, o = (self._product(getattr(attention, f"{name}_proj")) for name in "qkvo")
        return _Layer(
            _vector(block.input_layernorm.weight),
            np.stack([_vector(norm) for norm in norms]) if norms else np.zeros((0, attention.head_dim), np.float32),
            *(q, k, v, o),
            _vector(block.post_attention_layernorm.weight),
            np.float32(block.input_layernorm.variance_epsilon),
            np.float32(block.post_attention_layernorm.variance_epsilon),
        )

    def _product(self, linear: Any) -> Product:
        weight, bias = linear.weight.detach(), linear.bias
        scale = torch.ones(len(weight))
        if self._int8:
            weight, scale = quantized(weight)
        return kernels.bits(weight), scale.numpy(), np.zeros(len(weight), np.float32) if bias is None else _vector(bias)

    def compact(self, selection: NeuronSelection) -> dict[int, NeuronMLP]:
        """Return the compact MLPs of a selection by layer; of layers on disk it does not name, all neurons are read."""
        repairs = selection.compensation or {}
        return {
            number: neuron_mlp(self._layers[number], ids, repairs.get(number), self._int8)
            for number, ids in held_ids(self._layers, selection).items()
        }

    def mlp_bytes(self, selection: NeuronSelection) -> int:
        """Return the MLP bytes that a decoded token reads, in the type in which they are held."""
        if not self._int8:
            return selection.mlp_bytes(self._layers)
        n_neurons = sum(len(selection.ids.get(n, range(layer.d_ff))) for n, layer in enumerate(self._layers))
        return n_neurons * 3 * (self._layers[0].d_model + 4)

    def step(
        self, input_ids: torch.Tensor, cache: Any, positions: torch.Tensor, starts: Array, groups: Sequence[Group]
    ) -> torch.Tensor:
        """Decode one token in some rows of a batch.

        Args:
            input_ids: the newest token of every row, [n_batch, 1].
            cache: a DynamicCache of full attention; it grows by one position in all rows.
            positions: of the newest tokens, [n_batch].
            starts: first position of each row that is no padding, int64 [n_batch].
            groups: rows that are decoded, each once; the others' logits are zero.

        Returns:
            Logits, float32 [n_batch, 1, vocabulary].
        """
        kernels.set_threads()
        rows = np.array(sorted(row for group, _ in groups for row in group), np.int64)
        place_of = {int(row): place for place, row in enumerate(rows)}
        parts = [(np.array([place_of[row] for row in group], np.int64), mlps) for group, mlps in groups]
        n_past = self._adopt(cache)
        picked = torch.from_numpy(rows)
        hidden = self._model.model.embed_tokens(input_ids[picked, 0]).detach().float().numpy().copy()
        cos, sin = (part.numpy() for part in self._angles_of(positions[picked]))
        for number, block in enumerate(self._blocks):
            keys, values = (kernels.bits(part) for part in self._buffers[number])
            kernels.attention(
                *(hidden, block.norm, block.head_norms, block.eps, block.q, block.k, block.v, block.o, cos, sin),
                *(keys, values, rows, starts[rows], n_past, self._scaling),
            )
            for places, mlps in parts:
                self._mlp(number, block, hidden, places, mlps.get(number))
        for layer, (keys_buffer, values_buffer) in zip(cache.layers, self._buffers, strict=True):
            layer.keys, layer.values = keys_buffer[:, :, : n_past + 1], values_buffer[:, :, : n_past + 1]
        logits = torch.zeros(len(input_ids), len(self._head[0]))
        whole = logits if len(rows) == len(logits) else torch.empty(len(rows), logits.shape[1])
        kernels.output(hidden, self._norm, self._norm_eps, *self._head, whole.numpy())
        if whole is not logits:
            logits[picked] = whole
        return logits[:, None]

    def _mlp(self, number: int, block: _Layer, hidden: Array, places: Array, compact: NeuronMLP | None) -> None:
        norm = places, block.mlp_norm, block.mlp_eps
        if compact is None:
            kernels.dense_mlp(hidden, *norm, *self._dense_mlp(number), self._kind)
            return
        weight = kernels.bits(compact.weight)
        n_tasks = torch.get_num_threads()
        kernels.neuron_mlp(hidden, *norm, weight, compact.scale, compact.bias, compact.out_bias, self._kind, n_tasks)

    def _dense_mlp(self, number: int) -> tuple[Product, Product, Product]:
        if number not in self._dense:
            layer = self._layers[number]
            gate, up, down = (self._product(getattr(layer.owner, name)) for name in layer.projections)
            self._dense[number] = gate, up, down
        return self._dense[number]

    def _angles_of(self, positions: torch.Tensor) -> torch.Tensor:
        """Return cosine and sine of the rotary angles, [2, n_rows, head_dim]."""
        n = int(positions.max()) + 1
        if n > self._angles.shape[1]:
            every = torch.arange(max(2 * n, _SPARE))[None]
            self._angles = torch.stack(self._model.model.rotary_emb(torch.zeros(1), every))[:, 0].contiguous()
        return self._angles[:, positions]

    def _adopt(self, cache: Any) -> int:
        """Hold every layer's cache in a buffer with room for one more position; return how many it holds."""
        n_past = int(cache.get_seq_length())
        first = self._buffers[0][0] if self._buffers else None
        keys = cache.layers[0].keys
        if (
            first is None
            or keys.data_ptr() != first.data_ptr()
            or len(keys) != len(first)
            or n_past + 1 > first.shape[2]
        ):
            self._buffers = []
            for layer in cache.layers:  # each lets go of what it held before the next one is copied
                buffers = _roomy(layer.keys, n_past), _roomy(layer.values, n_past)
                self._buffers.append(buffers)
                layer.keys, layer.values = (buffer[:, :, :n_past] for buffer in buffers)
        return n_past

    def release(self) -> None:
        """Let go of the latest call's cache."""
        self._buffers = []


def takes(cache: Any) -> bool:
    """Return whether a cache can be grown in place: full attention, tensors that grow with the text."""
    layers = getattr(cache, "layers", None) or []
    return len(layers) > 0 and all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers)


def _roomy(states: torch.Tensor, n_past: int) -> torch.Tensor:
    """Copy cached states [n_batch, n_heads, n_past, head_dim] into a buffer that grows by half of them at least."""
    n_batch, n_heads, _, head_dim = states.shape
    buffer = states.new_zeros(n_batch, n_heads, n_past + max(_SPARE, n_past // 2), head_dim)
    buffer[:, :, :n_past] = states
    return buffer


def _vector(parameter: torch.Tensor) -> Array:
    return parameter.detach().float().contiguous().numpy()
