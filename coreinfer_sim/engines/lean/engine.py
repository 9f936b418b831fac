"""The lean engine: a decode step for Llama-like models on a CPU, without transformers' Python around the weights.

transformers spends about a millisecond a layer and token on its own code, and its products read some weight shapes at a
third of the memory's speed. Here a step is one compiled call. Weights are the checkpoint's memory, or packed into few bits; the
cache is transformers' own, grown in place. All else – prefill, sampling, stopping – stays with transformers' ``generate``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.cutting import Projections, held_ids
from coreinfer_sim.engines.face import Engine, Group, StepInputs
from coreinfer_sim.engines.lean.attention import cache_loops
from coreinfer_sim.engines.lean.blocks import FAMILIES, LeanModel, unsupported
from coreinfer_sim.engines.lean.compact import GatedMLP, held_mlp, read_mlp
from coreinfer_sim.engines.lean.forced import forced_logits
from coreinfer_sim.engines.lean.formats import TILE
from coreinfer_sim.engines.lean.intrinsics import bits, set_threads
from coreinfer_sim.engines.lean.kv_cache import GrowingCache, refuses_cache
from coreinfer_sim.engines.lean.laid_out import load_laid_out
from coreinfer_sim.engines.lean.step import decode_step
from coreinfer_sim.engines.lean.warm_up import warm_up
from coreinfer_sim.engines.linear import hand_over, hand_over_table, matrix_module, products_of
from coreinfer_sim.engines.modules import grouped_model, installed_projections
from coreinfer_sim.engines.prepared import Prepared
from coreinfer_sim.index.compensated import LayerCompensation
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import MLPLayer

PASS_TOKENS = 512
"""That one pass of prefill reads: its activations grow with them, and a few hundred are enough to be bound by arithmetic."""


class LeanEngine(Engine):
    """Decodes by compiled loops; see the module's docstring."""

    name: ClassVar[str] = "lean"
    skips_finished: ClassVar[bool] = True

    def __init__(self, model: Any, layers: Sequence[MLPLayer], config: DecodeConfig) -> None:
        """See `Engine`. Packed weights are held beside the model's own."""
        super().__init__(model, layers, config)
        warm_up(model.dtype)  # now, rather than within the first text
        self._weights = LeanModel(model, layers, config.weights)
        self._words: dict[int, tuple[Prepared, np.ndarray[Any, Any]]] = {}
        self._cache = GrowingCache()

    @classmethod
    def refuses(cls, model: Any, config: DecodeConfig) -> str | None:
        """Refuse models that are not Llama-like."""
        return unsupported(model)

    @classmethod
    def warm_up(cls, model: Any) -> None:
        """Compile the loops, if the model is of a family that they decode."""
        if model.config.model_type in FAMILIES:
            warm_up(model.dtype)

    @classmethod
    def load(cls, name: str, config: DecodeConfig, progress: Progress | None = None) -> LanguageModel | None:
        """Load a model whose weights are packed."""
        return load_laid_out(name, config.weights, progress)

    def refuses_call(self, cache: Any, mask: torch.Tensor, given: Mapping[str, Any]) -> str | None:
        """Refuse caches that do not grow, masks with gaps, and calls for more than logits."""
        if bool((mask.long().diff(dim=1) < 0).any()):
            return "the attention mask has gaps"
        if any(given.get(name) for name in ("output_attentions", "output_hidden_states")):
            return "attentions or hidden states were asked for"
        return refuses_cache(cache)

    @property
    def pass_tokens(self) -> int | None:
        """Long prompts take several passes, unless each would read the dense layers from disk anew."""
        return None if self.layers[0].away else PASS_TOKENS

    def running(self) -> AbstractContextManager[None]:
        """Let the linear layers of prefill multiply by the rule of `linear`."""
        return products_of(self.model)

    def take_over(self) -> None:
        """Let prefill multiply by the same weights as decode."""
        table = self._weights.table
        for name, matrix in self._weights.matrices():
            layer = self.model.get_submodule(name)
            if layer.weight.data_ptr() != matrix.weight.data_ptr():
                hand_over(layer, matrix)
        if table is not None:
            hand_over_table(self.model.get_input_embeddings(), table)
            self._weights.embedded(
                torch.zeros(1, dtype=torch.int64)
            )  # compiles its loops now, rather than within the first text

    def cut(self, selection: NeuronSelection) -> Mapping[int, GatedMLP]:
        """Lay out held neurons; of layers on disk that the selection does not name, all neurons."""
        repairs = selection.compensation or {}
        return {
            number: self._held(number, ids, repairs.get(number))
            for number, ids in held_ids(self.layers, selection).items()
        }

    def _held(self, number: int, ids: torch.Tensor, repair: LayerCompensation | None) -> GatedMLP:
        layer = self.layers[number]
        if layer.store is not None:
            return read_mlp(layer, ids, repair)
        return held_mlp(self._weights.dense_mlp(number), ids, repair)

    def size(self, layers: Mapping[int, GatedMLP]) -> int:
        """Return the bytes of the compact MLPs."""
        return sum(mlp.n_bytes for mlp in layers.values())

    def dense_bytes(self, layer: MLPLayer) -> int:
        """Return the bytes of a layer that stays dense."""
        return self._weights.dense_mlp(layer.number).n_bytes

    def other_bytes(self) -> int:
        """Return the bytes of attention, norms and the output head."""
        return self._weights.n_bytes

    def mounted(self, groups: Sequence[Group]) -> AbstractContextManager[None]:
        """Put linear modules over the same memory into the model."""
        modules = [self._modules(prepared.layers) for _, prepared in groups]
        return installed_projections(self.layers, grouped_model(self.layers, modules, [rows for rows, _ in groups]))

    def step(self, inputs: StepInputs, groups: Sequence[Group]) -> CausalLMOutputWithPast:
        """Decode one token in every row that has not finished; the others' logits are zero."""
        n_threads, weights = set_threads(), self._weights
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
        # 2) all layers
        n_past = self._cache.adopt(inputs.cache, 1)
        picked = torch.from_numpy(rows)
        hidden = weights.embedded(inputs.ids[picked, 0]).numpy().copy()
        cos, sin = (part.numpy() for part in weights.angles(inputs.positions[picked]))
        of_parts = np.stack([self._mlp_words(prepared) for _, prepared in parts])
        n_rows = len(inputs.ids)
        made = np.empty((len(rows), -(-weights.head.n_out // TILE) * TILE), np.float32)
        decode_step(
            *(cache_loops(self.model.dtype), hidden, weights.norms, weights.head_norms, weights.eps),
            *(weights.products, of_parts),
            *(np.array([len(places) for places, _ in parts]), np.concatenate([places for places, _ in parts])),
            *(cos, sin, bits(self._cache.buffers[0][0]), self._cache.addresses, self._cache.shape),
            *(rows, inputs.starts[rows], n_past, weights.scaling, weights.kind),
            *(weights.head.words[None], made, n_threads),
        )
        self._cache.hand_back(inputs.cache, n_past + 1)
        # 3) logits
        logits = torch.from_numpy(made)[:, : weights.head.n_out]
        if len(rows) < n_rows:
            whole = torch.zeros(n_rows, weights.head.n_out)
            whole[picked] = logits
            logits = whole
        self.count(groups)
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=inputs.cache)

    def _mlp_words(self, prepared: Prepared) -> np.ndarray[Any, Any]:
        """Return the words of all layers' MLPs, int64 [n_layers, 3, N_WORDS]."""
        if id(prepared) not in self._words:
            layers = range(len(self.layers))
            mlps = [prepared.layers[n] if n in prepared.layers else self._weights.dense_mlp(n) for n in layers]
            self._words[id(prepared)] = prepared, np.stack([mlp.words for mlp in mlps])
        return self._words[id(prepared)][1]

    def forced(self, ids: torch.Tensor, cache: Any, prepared: Prepared) -> torch.Tensor:
        """Feed all positions through the same weights; sums of products differ in their order alone, see `forced`."""
        with torch.inference_mode():
            logits = forced_logits(self._weights, self.model.dtype, ids[0], cache, prepared.layers)
        self.count([([0], prepared)], ids.shape[1])
        return logits

    def release(self) -> None:
        """Let go of the latest call's cache."""
        self._cache.release()
        self._words = {}
        super().release()

    def _modules(self, layers: Mapping[int, GatedMLP]) -> dict[int, Projections]:
        """Return compact MLPs as linear modules over the same memory."""
        return {
            number: {
                name: matrix_module(part, self.model.dtype)
                for name, part in zip(self.layers[number].projections, mlp.parts, strict=True)
            }
            for number, mlp in layers.items()
        }
