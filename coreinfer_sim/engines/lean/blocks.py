"""A Llama-like model as the compiled loops take it, and which models are Llama-like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from coreinfer_sim.base.settings import Weights
from coreinfer_sim.engines.lean.compact import GatedMLP
from coreinfer_sim.engines.lean.formats import BLOCK, FORMATS, HIGH
from coreinfer_sim.engines.lean.head import CoarseHead, whole_head
from coreinfer_sim.engines.lean.intrinsics import RELU, SILU, float_name
from coreinfer_sim.engines.lean.matrix import Array, Matrix, from_codes, vector
from coreinfer_sim.engines.lean.planes import Biases, TokenMLP, of_stored, of_weights
from coreinfer_sim.engines.lean.planes import Weights as MLPWeights
from coreinfer_sim.engines.lean.record_part import RecordPart
from coreinfer_sim.engines.lean.relu_mlp import ReluMLP, fits, of_relu
from coreinfer_sim.models.gguf_codes import QuantisedTensor
from coreinfer_sim.models.mlps import MLPLayer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that these loops can decode."""
_ROPES = ("default", "linear", "llama3", "yarn")  # those whose angles depend on the position alone
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_ACTIVATIONS = {"silu": SILU, "swish": SILU, "relu": RELU}
_ROUNDED = {Weights.INT8: "Q8_0", Weights.INT4: "Q4_0"}
TOKEN_KINDS = {Weights.INT8: "Q8_0", Weights.INT4: "Q4_1"}
"""The formats to which MLPs are rounded that tokens read by neuron: two bits tell more of a code above a minimum."""
_HEAD = {Weights.INT8: "Q8_0", Weights.INT4: "Q6_0"}  # an output head loses most by few bits
DenseMLP = GatedMLP | TokenMLP | ReluMLP
_SPARE = 256  # positions by which the table of angles grows


def unsupported(model: Any) -> str | None:
    """Return why a model cannot be decoded here, or None if it can."""
    config = model.config
    if config.model_type not in FAMILIES:
        return f"{config.model_type} is not among {', '.join(FAMILIES)}"
    if model.device.type not in ("cpu", "meta"):  # meta: it has no weights yet
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


def rounded_kind(name: str, weights: Weights) -> str | None:
    """Return the format to which a module's weights are rounded; None: they are not."""
    return (_HEAD if name == "lm_head" else _ROUNDED).get(weights)


def skips_zeros(config: Any, weights: Weights) -> bool:
    """Return whether dense decode passes over neurons that are zero: those of ReLU, which it reads by neuron."""
    is_relu = config.model_type in FAMILIES and _ACTIVATIONS.get(config.hidden_act) == RELU
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
        gate, up = (own.get(f"model.layers.{layer.number}.mlp.{name}") for name in layer.projections[:2])
        found.add(floating if gate is None or up is None or gate.kind != up.kind else HIGH[gate.kind])
    return " and ".join(sorted(found))


class LeanModel:
    """All weights of a model as the compiled loops read them, but for those of held neurons.

    Matrices are read where the checkpoint has them, taken from the codes of a GGUF file, or rounded.
    """

    def __init__(self, model: Any, layers: Sequence[MLPLayer], weights: Weights) -> None:
        """Take a model that `unsupported` has nothing against."""
        base = model.model
        self._model, self._layers, self._weights = model, layers, weights
        # 1) attention, embeddings and the output head
        attentions = [block.self_attn for block in base.layers]
        self.attention = [
            tuple(self._matrix(f"model.layers.{n}.self_attn.{name}_proj") for name in "qkvo")
            for n in range(len(attentions))
        ]
        self.head = self._matrix("lm_head")
        coarse: CoarseHead | None = getattr(model, "laid_out_head", None)
        self.head_loops = whole_head(self.head) if coarse is None else coarse.loops(self.head)
        self._head_bytes = self.head.n_bytes if coarse is None else coarse.n_bytes
        # 2) norms and what else is small
        norms = [(block.input_layernorm, block.post_attention_layernorm) for block in base.layers]
        norms.append((base.norm, base.norm))
        self.norms = np.stack([np.stack([vector(norm.weight) for norm in pair]) for pair in norms])
        self.eps = np.array([[norm.variance_epsilon for norm in pair] for pair in norms], np.float32)
        self.head_norms = np.stack([_head_norms(attention) for attention in attentions])
        self.scaling = np.float32(attentions[0].scaling)
        self.kind = _ACTIVATIONS[model.config.hidden_act]
        # 3) words, which the loops read
        self.products = np.stack([np.stack([part.words for part in parts]) for parts in self.attention])
        laid_out: dict[int, TokenMLP | ReluMLP] = getattr(model, "laid_out_mlps", {})
        self._dense: dict[int, DenseMLP] = dict(laid_out)
        self._by_token = {number: mlp for number, mlp in laid_out.items() if isinstance(mlp, TokenMLP)}
        self.skips_zeros = not self._by_token and not layers[0].away and skips_zeros(model.config, weights)
        self._rotary, self._angles = base.rotary_emb, torch.zeros(2, 0, 0)

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
        weight = linear.weight
        if self._weights is Weights.BF16:
            weight = weight.to(torch.bfloat16)
        return Matrix.of(weight, linear.bias, rounded_kind(name, self._weights))

    @cached_property
    def table(self) -> Matrix | None:
        """Embeddings as a packed matrix; None: they stay as they are."""
        own = getattr(self._model, "own_codes", {}).get("model.embed_tokens")
        laid_out: Matrix | None = getattr(self._model, "laid_out", {}).get("model.embed_tokens")
        if laid_out is not None:
            return laid_out
        if self._model.config.tie_word_embeddings:
            return self.head if self.head.packed else None
        return from_codes(own, None) if own is not None and self._weights is Weights.STORED else None

    def matrices(self) -> Iterator[tuple[str, Matrix | RecordPart]]:
        """Yield all matrices with the names of their modules; of layers on the disk, those in memory."""
        for number, parts in enumerate(self.attention):
            for name, part in zip("qkvo", parts, strict=True):
                yield f"model.layers.{number}.self_attn.{name}_proj", part
            if not self._layers[number].away:
                mlp: tuple[Matrix | RecordPart, ...] = self.dense_mlp(number).parts
                for name, own in zip(self._layers[number].projections, mlp, strict=True):
                    yield f"model.layers.{number}.mlp.{name}", own
        yield "lm_head", self.head

    def dense_mlp(self, number: int) -> DenseMLP:
        """Return the MLP of a layer that stays dense, made when it is first used."""
        if number not in self._dense and self.skips_zeros:
            self._dense[number] = of_relu(*self._weights_of(number), rounded_kind("", self._weights))
        elif number not in self._dense:
            projections = self._layers[number].projections
            self._dense[number] = GatedMLP(*(self._matrix(f"model.layers.{number}.mlp.{name}") for name in projections))
        return self._dense[number]

    def dense_bytes(self, layer: MLPLayer) -> int:
        """Return the bytes of a dense MLP, without making it."""
        made, kind = self._dense.get(layer.number), rounded_kind("", self._weights)
        if made is not None:
            return made.dense_bytes if isinstance(made, TokenMLP) else made.n_bytes
        if kind is None:
            return layer.n_bytes
        return 3 * layer.d_ff * layer.d_model * (2 + BLOCK * FORMATS[kind].bits // 8) // BLOCK

    def token_mlp(self, number: int) -> TokenMLP:
        """Return the MLP of a layer of which tokens read a share, made when it is first used."""
        if number not in self._by_token:
            weights, biases = self._weights_of(number)
            if self._weights is Weights.STORED:
                own = getattr(self._model, "own_codes", {})
                codes = [own.get(f"model.layers.{number}.mlp.{name}") for name in self._layers[number].projections]
                mlp = of_stored(codes, partial(_exact, weights, codes), biases)
            else:
                mlp = of_weights(weights, biases, TOKEN_KINDS.get(self._weights))
            self._by_token[number] = mlp
        return self._by_token[number]

    def _weights_of(self, number: int) -> tuple[MLPWeights, Biases]:
        """Return a layer's gate, up and down projection as they are read, and their biases."""
        names = self._layers[number].projections
        gate, up, down = (self._model.get_submodule(f"model.layers.{number}.mlp.{name}") for name in names)
        weights = gate.weight, up.weight, down.weight
        if self._weights is Weights.BF16:
            weights = weights[0].to(torch.bfloat16), weights[1].to(torch.bfloat16), weights[2].to(torch.bfloat16)
        return weights, (gate.bias, up.bias, down.bias)

    def hold_once(self) -> None:
        """Let what lies by neuron be the dense MLPs too, where there are none yet."""
        self._dense = {**self._by_token, **self._dense}

    def refuses_by_token(self) -> str | None:
        """Return why tokens cannot read a share of this model's neurons, or None if they can."""
        if any(layer.away for layer in self._layers):
            return "the MLP weights lie on the disk"
        if getattr(self._model, "laid_out", {}) and not self._by_token:
            return "the model was opened without a read ratio"
        return None

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of tokens, float32 [n, d_model]."""
        if self.table is not None:
            return self.table.rows(ids)
        embeddings: torch.Tensor = self._model.model.embed_tokens(ids).detach().float()
        return embeddings

    @cached_property
    def n_bytes(self) -> int:
        """Bytes that a token reads outside the MLPs: attention, norms and the output head, or the copy in its first stage."""
        parts = [part for parts in self.attention for part in parts]
        norms: int = self.norms.nbytes - self.norms[-1, 1].nbytes + self.head_norms.nbytes  # the last is there twice
        return sum(part.n_bytes for part in parts) + self._head_bytes + norms

    def angles(self, positions: torch.Tensor) -> torch.Tensor:
        """Return cosine and sine of the rotary angles, [2, n_rows, head_dim]."""
        n = int(positions.max()) + 1
        if n > self._angles.shape[1]:
            every = torch.arange(max(2 * n, _SPARE))[None]
            self._angles = torch.stack(self._rotary(torch.zeros(1), every))[:, 0].contiguous()
        return self._angles[:, positions]


def _exact(
    weights: Sequence[torch.Tensor], codes: Sequence[QuantisedTensor | None], part: int, dtype: torch.dtype | None
) -> torch.Tensor:
    """Return one of an MLP's weights, in float32 from the file's codes rather than from what transformers made of them."""
    own = codes[part]
    return weights[part] if dtype is None or own is None else from_codes(own, None).widened().T.to(dtype)


def _head_norms(attention: Any) -> Array:
    """Return the weights of the queries' and keys' own norms, [2, head_dim], or [0, head_dim] if there are none."""
    norms = [getattr(attention, name).weight for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    return np.stack([vector(norm) for norm in norms]) if norms else np.zeros((0, attention.head_dim), np.float32)
