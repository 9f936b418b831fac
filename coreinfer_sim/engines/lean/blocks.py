"""A Llama-like model as the compiled loops take it, and which models are Llama-like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from coreinfer_sim.engines.lean.intrinsics import RELU, SILU
from coreinfer_sim.engines.lean.weights import Array, Product, vector
from coreinfer_sim.models.mlps import MLPLayer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that these loops can decode."""
_ROPES = ("default", "linear", "llama3", "yarn")  # those whose angles depend on the position alone
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_ACTIVATIONS = {"silu": SILU, "swish": SILU, "relu": RELU}
_SPARE = 256  # positions by which the table of angles grows


def unsupported(model: Any) -> str | None:
    """Return why a model cannot be decoded here, or None if it can."""
    config = model.config
    if config.model_type not in FAMILIES:
        return f"{config.model_type} is not among {', '.join(FAMILIES)}"
    if model.device.type != "cpu":
        return f"the model is on {model.device}, not on the CPU"
    if model.dtype not in _TYPES:
        return f"the weights are {model.dtype}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _ROPES:
        return f"its rotary positions are of type {rope}"
    if config.hidden_act not in _ACTIVATIONS:
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


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder layer without its MLP's weights."""

    norm: Array
    head_norms: Array
    """Of queries and keys, [2, head_dim], or [0, head_dim] if there are none."""
    q: Product
    k: Product
    v: Product
    o: Product
    mlp_norm: Array
    eps: np.float32
    mlp_eps: np.float32

    @classmethod
    def of(cls, block: Any, int8: bool) -> Block:
        """Take a decoder layer of transformers."""
        attention = block.self_attn
        norms = [getattr(attention, name).weight for name in ("q_norm", "k_norm") if hasattr(attention, name)]
        q, k, v, o = (Product.of(getattr(attention, f"{name}_proj"), int8) for name in "qkvo")
        return cls(
            vector(block.input_layernorm.weight),
            np.stack([vector(norm) for norm in norms]) if norms else np.zeros((0, attention.head_dim), np.float32),
            *(q, k, v, o),
            vector(block.post_attention_layernorm.weight),
            np.float32(block.input_layernorm.variance_epsilon),
            np.float32(block.post_attention_layernorm.variance_epsilon),
        )


class LeanModel:
    """All weights of a model outside its compact MLPs; its parameters are read where they lie."""

    def __init__(self, model: Any, layers: Sequence[MLPLayer], int8: bool) -> None:
        """Take a model that `unsupported` has nothing against; ``int8`` holds rounded copies of all products instead."""
        base = model.model
        self.embeddings = base.embed_tokens
        self.blocks = [Block.of(block, int8) for block in base.layers]
        self.norm, self.norm_eps = vector(base.norm.weight), np.float32(base.norm.variance_epsilon)
        self.head = Product.of(model.lm_head, int8)
        self.scaling = np.float32(base.layers[0].self_attn.scaling)
        self.kind = _ACTIVATIONS[model.config.hidden_act]
        self._rotary, self._layers, self._int8 = base.rotary_emb, layers, int8
        self._dense: dict[int, tuple[Product, Product, Product]] = {}
        self._angles = torch.zeros(2, 0, 0)

    def dense_mlp(self, number: int) -> tuple[Product, Product, Product]:
        """Return gate, up and down of a layer that stays dense, made when they are first used."""
        if number not in self._dense:
            layer = self._layers[number]
            gate, up, down = (Product.of(getattr(layer.owner, name), self._int8) for name in layer.projections)
            self._dense[number] = gate, up, down
        return self._dense[number]

    @cached_property
    def n_bytes(self) -> int:
        """Bytes that a token reads outside the MLPs: attention, norms and the output head."""
        products = [product for block in self.blocks for product in (block.q, block.k, block.v, block.o)]
        norms = [norm for block in self.blocks for norm in (block.norm, block.head_norms, block.mlp_norm)]
        return sum(p.n_bytes for p in (*products, self.head)) + sum(norm.nbytes for norm in (*norms, self.norm))

    def angles(self, positions: torch.Tensor) -> torch.Tensor:
        """Return cosine and sine of the rotary angles, [2, n_rows, head_dim]."""
        n = int(positions.max()) + 1
        if n > self._angles.shape[1]:
            every = torch.arange(max(2 * n, _SPARE))[None]
            self._angles = torch.stack(self._rotary(torch.zeros(1), every))[:, 0].contiguous()
        return self._angles[:, positions]
