"""A model as the compiled loops take it, and which models they can decode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from coreinfer_sim.base.settings import Weights
from coreinfer_sim.engines.lean.architectures import Architecture, architecture_of
from coreinfer_sim.engines.lean.compact import WholeMLP
from coreinfer_sim.engines.lean.description import ACTIVATIONS, LINEAR, Blocks, activation_of
from coreinfer_sim.engines.lean.formats import BLOCK, FORMATS, HIGH
from coreinfer_sim.engines.lean.head import CoarseHead, whole_head
from coreinfer_sim.engines.lean.intrinsics import RELU, RELU2, float_name
from coreinfer_sim.engines.lean.matrix import Linear, Matrix, by_projection, from_codes, halves
from coreinfer_sim.engines.lean.mlp_loops import nonzero_loop
from coreinfer_sim.engines.lean.planes import TokenMLP, of_stored, of_weights
from coreinfer_sim.engines.lean.products import N_WORDS
from coreinfer_sim.engines.lean.relu_mlp import ReluMLP, fits, of_relu
from coreinfer_sim.engines.lean.rotary import Angles, refuses_ropes
from coreinfer_sim.models.gguf_codes import QuantisedTensor
from coreinfer_sim.models.mlps import MLPLayer

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROUNDED = {Weights.INT8: "Q8_0", Weights.INT4: "Q4_0"}
TOKEN_KINDS = {Weights.INT8: "Q8_0", Weights.INT4: "Q4_1"}
"""The formats to which MLPs are rounded that tokens read by neuron: two bits tell more of a code above a minimum."""
_HEAD = {Weights.INT8: "Q8_0", Weights.INT4: "Q6_0"}  # an output head loses most by few bits
DenseMLP = WholeMLP | TokenMLP | ReluMLP
HEAD = "lm_head"


def unsupported(model: Any) -> str | None:
    """Return why a model cannot be decoded here, or None if it can."""
    found = architecture_of(model.config)
    if isinstance(found, str):
        return found
    if model.device.type not in ("cpu", "meta"):  # meta: it has no weights yet
        return f"the model is on {model.device}, not on the CPU"
    if model.dtype not in _TYPES:
        return f"the weights are {model.dtype}"
    head = model.get_output_embeddings()
    if type(head) not in LINEAR:
        return f"it holds a {type(head).__name__} where a Linear was expected"
    return refuses_ropes(model.config) or Blocks(model, found).unsupported()


def rounded_kind(name: str, weights: Weights) -> str | None:
    """Return the format to which a module's weights are rounded; None: they are not."""
    return (_HEAD if name == HEAD else _ROUNDED).get(weights)


def skips_zeros(config: Any, weights: Weights) -> bool:
    """Return whether dense decode passes over neurons that are zero: those of ReLU, which it reads by neuron."""
    found = architecture_of(config)
    if isinstance(found, str) or not found.packs:
        return False
    is_relu = ACTIVATIONS.get(activation_of(config)) in (RELU, RELU2)
    return is_relu and fits(config.hidden_size, rounded_kind("", weights))


def token_layout(model: Any, layers: Sequence[MLPLayer], weights: Weights) -> str:
    """Return the types of the rows that tokens choose among, as `TokenMLP.kind` names them."""
    kind = TOKEN_KINDS.get(weights)
    if kind is not None:
        return HIGH[kind]
    floating = "bfloat16" if weights is Weights.BF16 else float_name(model.dtype)
    own = getattr(model, "own_codes", {}) if weights is Weights.STORED else {}
    found = set()
    for layer in layers:
        kinds = {
            None if codes is None else codes.layout
            for codes in (own.get(f"model.layers.{layer.number}.mlp.{name}") for name in layer.inputs)
        }
        (kind,) = kinds if len(kinds) == 1 else {None}
        found.add(floating if kind is None else HIGH[kind])
    return " and ".join(sorted(found))


class LeanModel:
    """All weights of a model as the compiled loops read them, but for those of held neurons.

    Matrices are read where the checkpoint has them, taken from the codes of a GGUF file, or rounded.
    """

    def __init__(self, model: Any, layers: Sequence[MLPLayer], weights: Weights) -> None:
        """Take a model that `unsupported` has nothing against."""
        found = architecture_of(model.config)
        assert isinstance(found, Architecture)
        self.architecture, self.blocks = found, Blocks(model, found)
        self._model, self._layers, self._weights = model, layers, weights
        names = {id(module): name for name, module in model.named_modules()}
        self._owners = [names[id(layer.owner)] for layer in layers]
        self._table_name = names[id(model.get_input_embeddings())]
        # 1) attention and the output head
        self._names = [self.blocks.products(number) for number in range(len(layers))]
        self.attention = [[self._matrix(name) for name in of_layer] for of_layer in self._names]
        self.head = self._matrix(HEAD)
        coarse: CoarseHead | None = getattr(model, "laid_out_head", None)
        self.head_loops = whole_head(self.head) if coarse is None else coarse.loops(self.head)
        self._head_bytes = self.head.n_bytes if coarse is None else coarse.n_bytes
        # 2) all that is small
        self._angles = Angles(model.config, getattr(self.blocks.decoder, "rotary_emb", None), self.blocks.rope_kinds())
        words = np.zeros((len(layers), 4, N_WORDS), np.int64)
        for number, parts in enumerate(self.attention):
            words[number, : len(parts) - 1] = [part.words for part in parts[:-1]]
            words[number, 3] = parts[-1].words
        self.description = self.blocks.describe(words, self._angles.turns)
        self.kind = self.description.activation
        n_heads, n_keys, _ = self.blocks.heads(self.blocks.attentions[0])
        self.n_keys = n_heads if found.copied_keys else n_keys
        """Key heads that the cache holds."""
        self.windows = self.description.windows.tolist()
        self._mlps: dict[int, dict[str, Matrix]] = {}
        """Matrices by the names of the projections, of the layers that were made."""
        laid_out: dict[int, TokenMLP | ReluMLP] = getattr(model, "laid_out_mlps", {})
        self._dense: dict[int, DenseMLP] = dict(laid_out)
        self._by_token = {number: mlp for number, mlp in laid_out.items() if isinstance(mlp, TokenMLP)}
        of_file = bool(getattr(model, "own_codes", {}))  # or it was laid out, matrix by matrix
        of_file |= f"{self._owners[0]}.{layers[0].output_name}" in getattr(model, "laid_out", {})
        self.skips_zeros = (
            not self._by_token and not layers[0].away and not of_file and skips_zeros(model.config, weights)
        )
        if self.skips_zeros:
            nonzero_loop()  # compiled now, rather than within the first text

    def _matrix(self, name: str) -> Matrix:
        """Return the matrix of a linear layer in the type that was asked for."""
        laid_out = getattr(self._model, "laid_out", {})
        if name in laid_out:
            found: Matrix = laid_out[name]
            return found
        linear = self._model.get_submodule(name)
        own = getattr(self._model, "own_codes", {}).get(name)
        if self._weights is Weights.STORED and own is not None:
            return from_codes(own, linear.bias)
        weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
        if self._weights is Weights.BF16:
            weight = weight.to(torch.bfloat16)
        return Matrix.of(weight, linear.bias, rounded_kind(name, self._weights))

    @cached_property
    def table(self) -> Matrix | None:
        """Embeddings as a packed matrix; None: they stay as they are."""
        own = getattr(self._model, "own_codes", {}).get(self._table_name)
        laid_out: Matrix | None = getattr(self._model, "laid_out", {}).get(self._table_name)
        if laid_out is not None:
            return laid_out
        if self._model.config.tie_word_embeddings:
            return self.head if self.head.packed else None
        return from_codes(own, None) if own is not None and self._weights is Weights.STORED else None

    def matrices(self) -> Iterator[tuple[str, Linear]]:
        """Yield all matrices with the names of their modules; of layers on the disk, those in memory."""
        for number, parts in enumerate(self.attention):
            yield from zip(self._names[number], parts, strict=True)
            layer, owner = self._layers[number], self._owners[number]
            if not layer.away:
                mlp = self.dense_mlp(number)
                own: dict[str, Linear] = dict(self._mlps.get(number, {}))
                if not isinstance(mlp, WholeMLP):
                    own = by_projection(layer.projections, mlp.parts, layer.fused)
                for name, part in own.items():
                    yield f"{owner}.{name}", part
        yield HEAD, self.head

    def dense_mlp(self, number: int) -> DenseMLP:
        """Return the MLP of a layer that stays dense, made when it is first used."""
        if number not in self._dense and self.skips_zeros:
            weights, biases = self._weights_of(number)
            self._dense[number] = of_relu(weights, biases, rounded_kind("", self._weights))
        elif number not in self._dense:
            layer = self._layers[number]
            own = {name: self._matrix(f"{self._owners[number]}.{name}") for name in layer.projections}
            *inputs, down = own.values()
            if layer.fused:
                inputs = [inputs[0].part(0, layer.d_ff), inputs[0].part(layer.d_ff, 2 * layer.d_ff)]
            self._mlps[number], self._dense[number] = own, WholeMLP(tuple(inputs), down)
        return self._dense[number]

    def dense_bytes(self, layer: MLPLayer) -> int:
        """Return the bytes of a dense MLP, without making it."""
        made, kind = self._dense.get(layer.number), rounded_kind("", self._weights)
        if made is not None:
            return made.dense_bytes if isinstance(made, TokenMLP) else made.n_bytes
        if kind is None:
            return layer.n_bytes
        n_parts = 3 if layer.gated else 2
        return n_parts * layer.d_ff * layer.d_model * (2 + BLOCK * FORMATS[kind].bits // 8) // BLOCK

    def token_mlp(self, number: int) -> TokenMLP:
        """Return the MLP of a layer of which tokens read a share, made when it is first used."""
        if number not in self._by_token:
            layer, owner = self._layers[number], self._owners[number]
            (gate, up, down), offsets = self._weights_of(number)
            weights, biases = (gate, up, down), (offsets[0], offsets[1], offsets[2])
            if self._weights is Weights.STORED:
                own = getattr(self._model, "own_codes", {})
                codes = [own.get(f"{owner}.{name}") for name in layer.projections]
                codes[:1] = halves(codes[0]) if layer.fused else codes[:1]
                mlp = of_stored(codes, partial(_exact, weights, codes), biases)
            else:
                mlp = of_weights(weights, biases, TOKEN_KINDS.get(self._weights))
            self._by_token[number] = mlp
        return self._by_token[number]

    def _weights_of(self, number: int) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """Return a layer's gate and up, or input projection, and its output projection as they are read, and their biases."""
        layer, owner = self._layers[number], self._owners[number]
        modules = [self._model.get_submodule(f"{owner}.{name}") for name in layer.projections]
        weights, biases = [module.weight for module in modules], [module.bias for module in modules]
        if layer.fused:
            weights[:1] = weights[0].split(layer.d_ff)
            biases[:1] = [None, None] if biases[0] is None else biases[0].split(layer.d_ff)
        if self._weights is Weights.BF16:
            weights = [weight.to(torch.bfloat16) for weight in weights]
        return weights, biases

    def hold_once(self) -> None:
        """Let what lies by neuron be the dense MLPs too, where there are none yet."""
        self._dense = {**self._by_token, **self._dense}

    def refuses_by_token(self) -> str | None:
        """Return why tokens cannot read a share of this model's neurons, or None if they can."""
        if any(layer.away for layer in self._layers):
            return "the MLP weights lie on the disk"
        if not self._layers[0].gated:
            return "its MLPs have no gates"
        if getattr(self._model, "laid_out", {}) and not self._by_token:
            return "the model was opened without a read ratio"
        return None

    def embedded(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return what enters the first layer for tokens [n] at positions [n], float32 [n, d_model], to be overwritten."""
        module, one = self._model.get_input_embeddings(), self.architecture
        if self.table is None:
            found: torch.Tensor = module(ids).detach().float()
        else:
            scale = getattr(module, "embed_scale", None)
            found = self.table.rows(ids)
            found = found if scale is None else found.mul_(float(scale.to(self._model.dtype)))
        if one.embedding != 1:
            found = found * one.embedding
        if one.positions is not None:
            learned = getattr(self.blocks.decoder, one.positions).weight
            found = found + learned[positions + one.first_position].detach().float()
        return found

    @cached_property
    def n_bytes(self) -> int:
        """Bytes that a token reads outside the MLPs: attention, norms and the output head, or the copy in its first stage."""
        parts = [part for parts in self.attention for part in parts]
        return sum(part.n_bytes for part in parts) + self._head_bytes + self.blocks.norm_bytes()

    def angles(self, positions: torch.Tensor, text: bool = False) -> torch.Tensor:
        """Return cosine and sine of the rotary angles of one step's positions, or of a text's; see `rotary.Angles`."""
        return self._angles.of_text(positions) if text else self._angles.of(positions)

    def logits(self, products: torch.Tensor) -> torch.Tensor:
        """Return the logits from what the output head's matrix gives [n, vocabulary], which is overwritten."""
        one = self.architecture
        if one.logits != 1:
            products *= one.logits
        if one.logits_cap:
            products.div_(one.logits_cap).tanh_().mul_(one.logits_cap)
        return products


def _exact(
    weights: Sequence[torch.Tensor], codes: Sequence[QuantisedTensor | None], part: int, dtype: torch.dtype | None
) -> torch.Tensor:
    """Return one of an MLP's weights, in float32 from the file's codes rather than from what transformers made of them."""
    own = codes[part]
    return weights[part] if dtype is None or own is None else from_codes(own, None).widened().T.to(dtype)
