"""The lean engine: a decode step for Llama-like models on a CPU, without transformers' Python around the weights.

transformers spends about a millisecond a layer and token on its own code, and its products read some weight shapes at a
third of the memory's speed. Here a layer is two calls of a compiled loop, whose weights are the checkpoint's memory, and the
cache is transformers' own, grown in place. All else – prefill, sampling, stopping – stays with transformers' ``generate``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from coreinfer_sim.base.decode_settings import DecodeConfig, Prefill
from coreinfer_sim.base.settings import Weights
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.cutting import Projections, held_ids, linear_module
from coreinfer_sim.engines.face import Engine, Group, StepInputs
from coreinfer_sim.engines.lean.attention import attention
from coreinfer_sim.engines.lean.blocks import FAMILIES, Block, LeanModel, unsupported
from coreinfer_sim.engines.lean.forced import forced_logits
from coreinfer_sim.engines.lean.intrinsics import bits, set_threads
from coreinfer_sim.engines.lean.kv_cache import GrowingCache, refuses_cache
from coreinfer_sim.engines.lean.mlp import dense_mlp
from coreinfer_sim.engines.lean.mlp import neuron_mlp as run_neuron_mlp
from coreinfer_sim.engines.lean.products import output
from coreinfer_sim.engines.lean.warm_up import warm_up
from coreinfer_sim.engines.lean.weights import Array, NeuronMLP, neuron_mlp
from coreinfer_sim.engines.linear import products_of
from coreinfer_sim.engines.modules import grouped_model, installed_projections
from coreinfer_sim.engines.prepared import Prepared
from coreinfer_sim.models.mlps import MLPLayer


class LeanEngine(Engine):
    """Decodes by compiled loops; see the module's docstring."""

    name: ClassVar[str] = "lean"
    skips_finished: ClassVar[bool] = True

    def __init__(self, model: Any, layers: Sequence[MLPLayer], config: DecodeConfig) -> None:
        """See `Engine`. With int8 weights, rounded copies are held beside the model."""
        super().__init__(model, layers, config)
        self._int8 = config.weights is Weights.INT8
        warm_up(model.dtype, self._int8)  # now, rather than within the first text
        self._weights = LeanModel(model, layers, self._int8)
        self._cache = GrowingCache()

    @classmethod
    def refuses(cls, model: Any, config: DecodeConfig) -> str | None:
        """Refuse models that are not Llama-like, and sparse prefill with int8 weights."""
        reason = unsupported(model)
        if reason is None and config.weights is Weights.INT8 and config.prefill is Prefill.SPARSE:
            return "sparse prefill multiplies weights as they are stored"
        return reason

    @classmethod
    def warm_up(cls, model: Any) -> None:
        """Compile the loops, if the model is of a family that they decode."""
        if model.config.model_type in FAMILIES:
            warm_up(model.dtype)

    def refuses_call(self, cache: Any, mask: torch.Tensor, given: Mapping[str, Any]) -> str | None:
        """Refuse caches that do not grow, masks with gaps, and calls for more than logits."""
        if bool((mask.long().diff(dim=1) < 0).any()):
            return "the attention mask has gaps"
        if any(given.get(name) for name in ("output_attentions", "output_hidden_states")):
            return "attentions or hidden states were asked for"
        return refuses_cache(cache)

    def running(self) -> AbstractContextManager[None]:
        """Let the linear layers of prefill multiply by the rule of `linear`."""
        return products_of(self.model)

    def cut(self, selection: NeuronSelection) -> Mapping[int, NeuronMLP]:
        """Lay out held neurons one after the other; of layers on disk that the selection does not name, all neurons."""
        repairs = selection.compensation or {}
        return {
            number: neuron_mlp(self.layers[number], ids, repairs.get(number), self._int8)
            for number, ids in held_ids(self.layers, selection).items()
        }

    def size(self, layers: Mapping[int, NeuronMLP]) -> int:
        """Return the bytes of the compact MLPs."""
        return sum(mlp.n_bytes for mlp in layers.values())

    def dense_bytes(self, layer: MLPLayer) -> int:
        """Return the bytes of a layer that stays dense, rounded where weights are int8."""
        if not self._int8:
            return layer.n_bytes
        return sum(product.n_bytes for product in self._weights.dense_mlp(layer.number))

    def other_bytes(self) -> int:
        """Return the bytes of attention, norms and the output head."""
        return self._weights.n_bytes

    def mounted(self, groups: Sequence[Group]) -> AbstractContextManager[None]:
        """Put linear modules over the same memory into the model."""
        modules = [self._modules(prepared.layers) for _, prepared in groups]
        return installed_projections(self.layers, grouped_model(self.layers, modules, [rows for rows, _ in groups]))

    def step(self, inputs: StepInputs, groups: Sequence[Group]) -> CausalLMOutputWithPast:
        """Decode one token in every row that has not finished; the others' logits are zero."""
        set_threads()
        weights = self._weights
        # 1) the rows that go on, and the places of each group's among them
        n = inputs.n_copies
        of_group = [[row * n + i for row in rows for i in range(n)] for rows, _ in groups]
        of_group = [[row for row in rows if not inputs.finished[row]] for rows in of_group]
        rows = np.array(sorted(row for each in of_group for row in each), np.int64)
        place_of = {int(row): place for place, row in enumerate(rows)}
        parts = [
            (np.array([place_of[row] for row in own], np.int64), prepared)
            for own, (_, prepared) in zip(of_group, groups, strict=True)
            if own
        ]
        # 2) layer by layer
        n_past = self._cache.adopt(inputs.cache, 1)
        picked = torch.from_numpy(rows)
        hidden = weights.embeddings(inputs.ids[picked, 0]).detach().float().numpy().copy()
        cos, sin = (part.numpy() for part in weights.angles(inputs.positions[picked]))
        for number, block in enumerate(weights.blocks):
            products = (product.arrays for product in (block.q, block.k, block.v, block.o))
            keys, values = (bits(part) for part in self._cache.buffers[number])
            attention(
                *(hidden, block.norm, block.head_norms, block.eps, *products, cos, sin),
                *(keys, values, rows, inputs.starts[rows], n_past, weights.scaling),
            )
            for places, prepared in parts:
                self._mlp(number, block, hidden, places, prepared.layers.get(number))
        self._cache.hand_back(inputs.cache, n_past + 1)
        # 3) logits
        logits = torch.zeros(len(inputs.ids), len(weights.head.weight))
        whole = logits if len(rows) == len(logits) else torch.empty(len(rows), logits.shape[1])
        output(hidden, weights.norm, weights.norm_eps, *weights.head.arrays, whole.numpy())
        if whole is not logits:
            logits[picked] = whole
        self.count(groups)
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=inputs.cache)

    def forced(self, ids: torch.Tensor, cache: Any, prepared: Prepared) -> torch.Tensor:
        """Feed all positions through the same weights by torch's float32 products, which differ in the order of sums alone."""
        with torch.inference_mode():
            logits = forced_logits(self._weights, self.model.dtype, ids[0], cache, prepared.layers)
        self.count([([0], prepared)], ids.shape[1])
        return logits

    def release(self) -> None:
        """Let go of the latest call's cache."""
        self._cache.release()
        super().release()

    def _mlp(self, number: int, block: Block, hidden: Array, places: Array, compact: NeuronMLP | None) -> None:
        norm, kind = (places, block.mlp_norm, block.mlp_eps), self._weights.kind
        if compact is None:
            gate, up, down = (product.arrays for product in self._weights.dense_mlp(number))
            dense_mlp(hidden, *norm, gate, up, down, kind)
            return
        run_neuron_mlp(hidden, *norm, *compact.arrays, kind, torch.get_num_threads())

    def _modules(self, layers: Mapping[int, NeuronMLP]) -> dict[int, Projections]:
        """Return compact MLPs as linear modules over the same memory."""
        made: dict[int, Projections] = {}
        for number, mlp in layers.items():
            weights = mlp.weight[:, 0], mlp.weight[:, 1], mlp.weight[:, 2].T
            biases = mlp.bias[:, 0], mlp.bias[:, 1], mlp.out_bias
            made[number] = {
                name: linear_module(weight, torch.from_numpy(bias).to(weight) if bias.any() else None)
                for name, weight, bias in zip(self.layers[number].projections, weights, biases, strict=True)
            }
        return made
