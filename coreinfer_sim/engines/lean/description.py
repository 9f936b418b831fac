"""A model's blocks, read from its modules and configuration, as the compiled loops take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from coreinfer_sim.engines.lean.architectures import Architecture
from coreinfer_sim.engines.lean.attention import OF_NONE
from coreinfer_sim.engines.lean.formats import TILE
from coreinfer_sim.engines.lean.intrinsics import GELU, GELU_TANH, RELU, RELU2, SILU
from coreinfer_sim.engines.lean.matrix import Array
from coreinfer_sim.engines.lean.norms import head_norm_kind, norm_bytes, norm_kind, norm_values
from coreinfer_sim.engines.lean.step import N_NORMS, Layers
from coreinfer_sim.models.structure import weight_shape

LINEAR = (nn.Linear, FalconLinear, Conv1D)
"""Modules that hold one matrix and a bias."""
ACTIVATIONS = {
    "silu": SILU,
    "swish": SILU,
    "relu": RELU,
    "relu2": RELU2,
    "gelu": GELU,
    "gelu_python": GELU,
    "gelu_new": GELU_TANH,
    "gelu_fast": GELU_TANH,
    "gelu_pytorch_tanh": GELU_TANH,
    "gelu_python_tanh": GELU_TANH,
}
_ACTIVATION_NAMES = ("hidden_activation", "hidden_act", "activation_function", "activation")
_KINDS = ("full_attention", "sliding_attention")


def activation_of(config: Any) -> str:
    """Return what a configuration calls the activation of its MLPs."""
    return next((str(found) for name in _ACTIVATION_NAMES if (found := getattr(config, name, None))), "none")


@dataclass(frozen=True)
class Blocks:
    """A model's modules in the order in which a step uses them."""

    model: Any
    architecture: Architecture

    @property
    def decoder(self) -> Any:
        """The module that holds the layers."""
        return self.model.get_submodule(self.architecture.decoder)

    @property
    def layers(self) -> Sequence[Any]:
        """All layers."""
        found: Sequence[Any] = getattr(self.decoder, self.architecture.layers)
        return found

    @property
    def attentions(self) -> list[Any]:
        """Of each layer."""
        return [getattr(layer, self.architecture.attention) for layer in self.layers]

    def norms(self) -> list[list[Any]]:
        """Return the norms of each layer, and last those before the head; None: there is none."""
        own = [
            [None if name is None else getattr(layer, name) for name in self.architecture.norms]
            for layer in self.layers
        ]
        return [*own, [getattr(self.decoder, self.architecture.last_norm), *[None] * (N_NORMS - 1)]]

    def head_norms(self, attention: Any) -> list[Any]:
        """Return the norms of queries and keys."""
        return [getattr(attention, name, None) for name in self.architecture.head_norms]

    def products(self, number: int) -> list[str]:
        """Return the names of the matrices of a layer's attention, the output last."""
        one = self.architecture
        names = (*one.inputs, one.output)
        return [f"{one.decoder}.{one.layers}.{number}.{one.attention}.{name}" for name in names]

    def heads(self, attention: Any) -> tuple[int, int, int]:
        """Return how many query heads and key heads an attention projects to, and head_dim."""
        one = self.architecture
        head_dim = int(getattr(attention, "head_dim", 0) or attention.head_size)
        n_heads = weight_shape(getattr(attention, one.output))[1] // head_dim
        outputs = [weight_shape(getattr(attention, name))[0] // head_dim for name in one.inputs]
        return n_heads, outputs[1] if len(outputs) == 3 else (outputs[0] - n_heads) // 2, head_dim

    def windows(self) -> list[int]:
        """Return how many positions each layer sees; 0: all."""
        config, n = self.model.config, len(self.layers)
        kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None) or 0
        if kinds is None:
            return [window] * n
        return [window if kind == "sliding_attention" else 0 for kind in kinds[:n]]

    def rope_kinds(self) -> list[str | None]:
        """Return which of its angles each layer has; None: no rotary positions. See `rotary.Angles`."""
        rotary = getattr(self.decoder, "rotary_emb", None)
        named = hasattr(rotary, "layer_types")
        kinds = self.model.config.layer_types if named else [""] * len(self.layers)
        return [
            kind if self.architecture.turns(attention) else None
            for kind, attention in zip(kinds, self.attentions, strict=False)
        ]

    def norm_bytes(self) -> int:
        """Return the bytes that a step reads of norms."""
        every = [norm for norms in self.norms() for norm in norms]
        every += [norm for attention in self.attentions for norm in self.head_norms(attention)]
        return sum(map(norm_bytes, every))

    def unsupported(self) -> str | None:
        """Return what of a model the loops do not know, or None."""
        config = self.model.config
        kinds = set(getattr(config, "layer_types", None) or ()) - set(_KINDS)
        if kinds:
            return f"it has layers of type {', '.join(sorted(kinds))}"
        name = activation_of(config)
        if name not in ACTIVATIONS:
            return f"its activation is {name}"
        for attention in self.attentions:
            for product in (getattr(attention, name) for name in (*self.architecture.inputs, self.architecture.output)):
                if type(product) not in LINEAR:  # an adapter adds to what its weights give
                    return f"it holds a {type(product).__name__} where a Linear was expected"
            n_heads, n_keys, head_dim = self.heads(attention)
            for norm, n in zip(self.head_norms(attention), (n_heads, n_keys), strict=True):
                if head_norm_kind(norm, head_dim, n) is None:
                    return f"its queries and keys pass through a {type(norm).__name__} of an unknown kind"
        for norm in (norm for norms in self.norms() for norm in norms):
            if norm_kind(norm) is None:
                return f"its norms are of type {type(norm).__name__}"
        return None

    def columns(self, attention: Any) -> list[int]:
        """Return where the outputs of each head begin: queries, keys and values, as the cache holds them."""
        one = self.architecture
        n_heads, n_keys, head_dim = self.heads(attention)
        n_shared = n_heads // n_keys
        if len(one.inputs) == 3:
            q, k = (-(-n * head_dim // TILE) * TILE for n in (n_heads, n_keys))
            starts = [0, q, q + k]
            found = [[start + n * head_dim for n in range(n_heads if start == 0 else n_keys)] for start in starts]
        elif one.by_key_head:
            group = (n_shared + 2) * head_dim
            found = [
                [n // n_shared * group + n % n_shared * head_dim for n in range(n_heads)],
                [n * group + n_shared * head_dim for n in range(n_keys)],
                [n * group + (n_shared + 1) * head_dim for n in range(n_keys)],
            ]
        else:
            firsts = [0, n_heads, n_heads + n_keys]
            found = [[(first + n) * head_dim for n in range(n_heads if first == 0 else n_keys)] for first in firsts]
        if one.copied_keys:
            found[1:] = [[part[n // n_shared] for n in range(n_heads)] for part in found[1:]]
        return [start for part in found for start in part]

    def describe(self, products: Array, turns: Sequence[int]) -> Layers:
        """Return what the loops read.

        Args:
            products: words of each layer's attention, int64 [n_layers, 4, N_WORDS].
            turns: table of angles of each layer.
        """
        norms, one = self.norms(), self.architecture
        d_model = weight_shape(getattr(self.attentions[0], one.output))[0]
        values = [[norm_values(norm, (d_model,)) for norm in each] for each in norms]
        of_heads = [self._head_norms(attention) for attention in self.attentions]
        of_head_eps = [float(each[2]) for each in of_heads] + [0.0]
        eps = [[*(float(value[1]) for value in each), own] for each, own in zip(values, of_head_eps, strict=True)]
        scaling = [_scaling(attention) for attention in self.attentions]
        return Layers(
            np.array([[norm_kind(norm) for norm in each] for each in norms], np.int64),
            np.stack([np.stack([value[0] for value in each]) for each in values]),
            np.array(eps, np.float32),
            np.array([kind for kind, _, _ in of_heads], np.int64),
            np.stack([weights for _, weights, _ in of_heads]),
            np.array([self.columns(attention) for attention in self.attentions], np.int64),
            products,
            np.array(self.windows(), np.int64),
            np.array(turns, np.int64),
            np.array([[factor, one.scores_cap] for factor in scaling], np.float32),
            int(one.interleaved),
            int(one.parallel),
            np.float32(one.added),
            ACTIVATIONS[activation_of(self.model.config)],
        )

    def _head_norms(self, attention: Any) -> tuple[int, Array, np.float32]:
        """Return kind, weights and biases [n_heads or 0, 2, head_dim] and ε of the norms of queries and keys."""
        n_heads, n_keys, head_dim = self.heads(attention)
        norms = self.head_norms(attention)
        if norms[0] is None:
            return OF_NONE, np.zeros((0, 2, head_dim), np.float32), np.float32(0)
        kind = head_norm_kind(norms[0], head_dim, n_heads)
        assert kind is not None  # as `unsupported` has nothing against it
        n_cached = n_heads if self.architecture.copied_keys else n_keys
        parts = []
        for norm, n in zip(norms, (n_heads, n_cached), strict=True):
            values, eps = norm_values(norm, (n, head_dim))
            parts.append(values.transpose(1, 0, 2))
        return kind, np.ascontiguousarray(np.concatenate(parts)), eps


def _scaling(attention: Any) -> float:
    """Return the factor of attention scores."""
    found = getattr(attention, "scaling", None)
    return float(attention.inv_norm_factor if found is None else found)
