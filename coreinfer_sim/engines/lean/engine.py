"""The lean engine: a decode step for the models of `architectures` on a CPU, without transformers' Python around the weights.

transformers spends about a millisecond a layer and token on its own code, and its products read some weight shapes at a
third of the memory's speed. Here a step is one compiled call. Weights are the checkpoint's memory, or packed into few bits; the
cache is transformers' own, grown in place. All else – prefill, sampling, stopping – stays with transformers' ``generate``.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, cast

import numpy as np
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.settings import Weights
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.cutting import held_ids
from coreinfer_sim.engines.face import Engine
from coreinfer_sim.engines.lean.architectures import ARCHITECTURES
from coreinfer_sim.engines.lean.attention import cache_like, cache_loops
from coreinfer_sim.engines.lean.blocks import DenseMLP, LeanModel, skips_zeros, token_layout, unsupported
from coreinfer_sim.engines.lean.compact import WholeMLP, held_mlp, read_mlp
from coreinfer_sim.engines.lean.disk_records import DiskRecords
from coreinfer_sim.engines.lean.forced import forced_states
from coreinfer_sim.engines.lean.formats import TILE
from coreinfer_sim.engines.lean.intrinsics import set_threads
from coreinfer_sim.engines.lean.joined_rows import JoinedRows, LeanCall
from coreinfer_sim.engines.lean.kernels import host_products
from coreinfer_sim.engines.lean.kv_cache import refuses_cache
from coreinfer_sim.engines.lean.laid_out import load_laid_out, load_on_disk
from coreinfer_sim.engines.lean.matrix import Array, Matrix
from coreinfer_sim.engines.lean.measuring import FASTER_BY_TOKEN, Text, known_or_measured, named_histograms
from coreinfer_sim.engines.lean.refit import Take, read_by_token, refitted_mlps
from coreinfer_sim.engines.lean.step import decode_step
from coreinfer_sim.engines.lean.thresholds import Histograms
from coreinfer_sim.engines.lean.warm_up import warm_up
from coreinfer_sim.engines.linear import hand_over, hand_over_table, mlp_modules, products_of
from coreinfer_sim.engines.modules import grouped_model, installed_projections
from coreinfer_sim.engines.prepared import Prepared
from coreinfer_sim.engines.sizes import BytesRead, Planner
from coreinfer_sim.engines.steps import Group, Step, StepInputs
from coreinfer_sim.index.compensated import LayerCompensation, Refit
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import MLPLayer

PASS_TOKENS = 512
"""That one pass of prefill reads: its activations grow with them, and a few hundred are enough to be bound by arithmetic."""


class LeanEngine(Engine):
    """Decodes by compiled loops; see the module's docstring."""

    name: ClassVar[str] = "lean"
    skips_finished: ClassVar[bool] = True
    reads_by_token: ClassVar[bool] = True

    def __init__(self, model: Any, layers: Sequence[MLPLayer], config: DecodeConfig) -> None:
        """See `Engine`. Packed weights are held beside the model's own."""
        super().__init__(model, layers, config)
        warm_up(model.dtype)  # now, rather than within the first text
        self._weights = LeanModel(model, layers, config.weights_type)
        self._histograms: Histograms | None = None
        self._disk: DiskRecords | None = getattr(model, "laid_out_disk", None)
        self._took_over = False
        self._refit: tuple[Refit, Mapping[int, DenseMLP]] | None = None

    @classmethod
    def refuses(cls, model: Any, config: DecodeConfig) -> str | None:
        """Refuse models that the loops do not know."""
        return unsupported(model)

    @classmethod
    def warm_up(cls, model: Any) -> None:
        """Compile the loops, if the model is of a family that they decode."""
        if model.config.model_type in ARCHITECTURES:
            warm_up(model.dtype)

    @classmethod
    def load(
        cls, name: str, config: DecodeConfig, by_token: bool = False, progress: Progress | None = None
    ) -> LanguageModel | None:
        """Load a model whose weights are packed, or lie by neuron."""
        return load_laid_out(name, config.weights_type, by_token, progress)

    @classmethod
    def load_within(
        cls, name: str, config: DecodeConfig, planner: Planner, progress: Progress | None = None
    ) -> LanguageModel | None:
        """Load a model whose records of neurons lie on the disk."""
        return load_on_disk(name, config.weights_type, planner, progress)

    @classmethod
    def is_faster_by_token(cls, layout: str) -> bool:
        """Return what was measured for the instructions of this processor."""
        return layout in FASTER_BY_TOKEN.get(host_products(), ())

    @classmethod
    def layout_by_token(cls, model: Any, layers: Sequence[MLPLayer], config: DecodeConfig) -> str:
        """Return the types of the rows."""
        return token_layout(model, layers, config.weights_type)

    @classmethod
    def is_sparse_by_itself(cls, model: Any, layers: Sequence[MLPLayer], config: DecodeConfig) -> bool:
        """Return whether it has ReLU, with weights in memory."""
        return not layers[0].away and skips_zeros(model.config, config.weights_type)

    def calibrate(
        self,
        passages: Callable[[], Sequence[torch.Tensor]],
        progress: Progress | None = None,
        known: Mapping[str, Array] | None = None,
    ) -> None:
        """Take or measure how much each neuron is estimated to count at the positions of some texts."""
        weights, dtype = self._weights, self.model.dtype
        if self._histograms is None and weights.refuses_by_token() is None:
            self._histograms = known_or_measured(
                weights, self.layers, dtype, passages, progress or Progress(), known or {}
            )

    def histograms(self, texts: Sequence[Text], report: Callable[[int], None]) -> dict[str, Array]:
        """Measure how much each neuron is estimated to count at the positions that decode would reach."""
        if self._weights.refuses_by_token() is not None:
            return {}
        return named_histograms(self._weights, len(self.layers), self.model.dtype, texts, report)

    def values_by_token(self, texts: Sequence[Text], read_ratio: float, numbers: Container[int], take: Take) -> None:
        """Choose by the estimates and thresholds of decode."""
        self.check_by_token()
        assert self._histograms is not None
        found = self._histograms.thresholds(read_ratio)
        read_by_token(self._weights, self.model.dtype, texts, found, numbers, take)

    def refuses_call(self, cache: Any, mask: torch.Tensor, given: Mapping[str, Any]) -> str | None:
        """Refuse caches that do not grow, masks with gaps, and calls for more than logits."""
        if bool((mask.long().diff(dim=1) < 0).any()):
            return "the attention mask has gaps"
        if any(given.get(name) for name in ("output_attentions", "output_hidden_states")):
            return "attentions or hidden states were asked for"
        return refuses_cache(cache, self._weights.windows)

    @property
    def pass_tokens(self) -> int | None:
        """Long prompts take several passes, unless each would read the dense layers from disk anew."""
        return None if self.layers[0].away or self._disk is not None else PASS_TOKENS

    def running(self) -> AbstractContextManager[None]:
        """Let the linear layers of prefill multiply by the rule of `linear`."""
        return products_of(self.model)

    def take_over(self) -> None:
        """Let prefill multiply by the same weights as decode."""
        table, self._took_over = self._weights.table, True
        self._weights.hold_once()
        for name, matrix in self._weights.matrices():
            layer = self.model.get_submodule(name)
            if not isinstance(matrix, Matrix) or layer.weight.data_ptr() != matrix.weight.data_ptr():
                hand_over(layer, matrix)
        if table is not None:
            hand_over_table(self.model.get_input_embeddings(), table)
            table.rows(torch.zeros(1, dtype=torch.int64))  # compiles its loops now, rather than within the first text

    @property
    def reads_as_prefill(self) -> bool:
        """Unless it packed weights which prefill reads as they are stored."""
        return self._took_over or self.config.weights_type is Weights.STORED

    def cut(self, selection: NeuronSelection) -> Mapping[int, DenseMLP]:
        """Lay out held neurons; of layers on disk that the selection does not name, all neurons."""
        repairs, by_token = selection.compensation or {}, selection.read_ratio < 1
        named = held_ids(self.layers, selection)
        held = {number: self._held(number, ids, repairs.get(number), by_token) for number, ids in named.items()}
        if not by_token or selection.refit is None or held or self._disk is not None:
            return held
        if self._refit is None or self._refit[0] is not selection.refit:
            self._refit = selection.refit, refitted_mlps(self._weights, len(self.layers), selection.refit)
        return self._refit[1]

    def _held(self, number: int, ids: torch.Tensor, repair: LayerCompensation | None, by_token: bool) -> DenseMLP:
        layer = self.layers[number]
        if layer.store is not None:
            return read_mlp(layer, ids, repair)
        whole = self._weights.token_mlp(number) if by_token else self._weights.dense_mlp(number)
        return held_mlp(whole, ids, repair) if isinstance(whole, WholeMLP) else whole.held(ids, repair)

    @property
    def sharing(self) -> LeanEngine | None:
        """Unless weights come from the disk."""
        return None if self._disk is not None or self.layers[0].away else self

    @property
    def skips_zeros(self) -> bool:
        """Of ReLU, unless its weights lie on the disk."""
        return self._weights.skips_zeros

    def check_by_token(self) -> None:
        """Refuse models whose neurons lie elsewhere, and those that were not measured."""
        reason = self._weights.refuses_by_token()
        if reason is None and self._histograms is None:
            reason = "nothing was measured yet: the engine was not calibrated, which takes a tokenizer"
        if reason is not None:
            raise ConfigError(f"a read ratio below 1 was asked for, but {reason}.")

    def size(self, layers: Mapping[int, DenseMLP]) -> int:
        """Return the bytes of the compact MLPs."""
        return sum(mlp.n_bytes for mlp in layers.values())

    def dense_bytes(self, layer: MLPLayer) -> int:
        """Return the bytes of a layer that stays dense."""
        self._weights.dense_mlp(layer.number)
        return self._weights.dense_bytes(layer)

    def whole_bytes(self) -> int:
        """Return the MLP bytes that a dense step reads; what nothing was made of yet is as large as its rounded weights."""
        return sum(layer.n_bytes if layer.away else self._weights.dense_bytes(layer) for layer in self.layers)

    def other_bytes(self) -> int:
        """Return the bytes of attention, norms and the output head."""
        return self._weights.n_bytes

    def mounted(self, groups: Sequence[Group]) -> AbstractContextManager[None]:
        """Put linear modules over the same memory into the model."""
        modules = [
            {n: mlp_modules(self.layers[n], mlp.parts, self.model.dtype) for n, mlp in prepared.layers.items()}
            for _, prepared in groups
        ]
        return installed_projections(self.layers, grouped_model(self.layers, modules, [rows for rows, _ in groups]))

    def step(self, inputs: StepInputs, groups: Sequence[Group]) -> CausalLMOutputWithPast:
        """Decode one token in every row that has not finished; the others' logits are zero."""
        if inputs.ids.shape[1] > 1:  # transformers reads a text anew where it grows out of its rotary positions
            with self.running(), self.mounted(groups):
                output: CausalLMOutputWithPast = inputs.forward(**inputs.given)
            self.count(groups)
            self.call.chosen = {}
            return output
        return self.steps([Step(inputs, groups, self.call)])[0]

    def steps(self, each: Sequence[Step]) -> list[CausalLMOutputWithPast]:
        """Decode one token in every row of all calls in one compiled call; what rows read alike is read once."""
        n_threads, weights, rows, own = set_threads(), self._weights, JoinedRows(each), self.call
        # 1) what enters the layers, and what each row and group of rows reads there
        hidden = rows.joined(lambda inputs, picked: weights.embedded(inputs.ids[picked, 0], inputs.positions[picked]))
        cos, sin = rows.joined(lambda inputs, picked: weights.angles(inputs.positions)[:, :, picked], 2)
        starts = rows.joined(lambda inputs, picked: torch.from_numpy(inputs.starts)[picked])
        caches, positions = rows.adopt()
        mlps, *stacked = zip(*(self._mlps(prepared) for _, prepared in rows.parts), strict=True)
        # 2) all layers
        (words, thresholds), n_read = map(np.stack, stacked), rows.counts(mlps)
        made = np.empty((len(hidden), -(-weights.head.n_out // TILE) * TILE), np.float32)
        n_exact = decode_step(
            *(cache_loops(self.model.dtype), hidden, weights.description, words, thresholds, n_read),
            np.array([len(places) for places, _ in rows.parts]),
            np.concatenate([places for places, _ in rows.parts]),
            *(cos, sin, cache_like(self.model.dtype), caches, weights.n_keys, starts, positions),
            *(weights.head.words[None], weights.head_loops, made, n_threads),
        )
        rows.hand_back()
        # 3) what each call has read
        for one, (parts, n_own), chosen in zip(each, rows.parts_of_calls(n_read), rows.chosen(mlps), strict=True):
            self.call, one.call.chosen = one.call, chosen
            self._count(one.groups, parts, n_own)
            of_head = n_exact * sum(len(places) for places, _ in parts) // len(hidden)
            self.call.read += BytesRead(other=of_head * weights.head.n_bytes // weights.head.n_out)
        self.call = own
        # 4) logits
        logits = rows.parted(weights.logits(torch.from_numpy(made)[:, : weights.head.n_out]))
        return [
            CausalLMOutputWithPast(logits=of_call, past_key_values=one.inputs.cache)
            for of_call, one in zip(logits, each, strict=True)
        ]

    def _mlps(self, prepared: Prepared) -> tuple[list[DenseMLP], Array, Array]:
        """Return all layers' MLPs, their words and thresholds, made once a text."""
        ready = cast(LeanCall, self.call).ready
        if id(prepared) not in ready:
            whole = self._weights.token_mlp if prepared.selection.read_ratio < 1 else self._weights.dense_mlp
            mlps = [prepared.layers[n] if n in prepared.layers else whole(n) for n in range(len(self.layers))]
            words = np.stack([mlp.words for mlp in mlps])
            ready[id(prepared)] = prepared, mlps, words, self._thresholds(prepared, mlps)
        return ready[id(prepared)][1:]

    def _thresholds(self, prepared: Prepared, mlps: Sequence[DenseMLP]) -> Array:
        """Return from which estimate on neurons are read, float32 [n_layers]; 0: all are."""
        ratio = prepared.selection.read_ratio
        if ratio == 1 or self._histograms is None:  # see `check_by_token`
            return np.zeros(len(mlps), np.float32)
        return self._histograms.thresholds(ratio)

    def forced(self, ids: torch.Tensor, cache: Any, prepared: Prepared) -> torch.Tensor:
        """Feed all positions through the same weights; sums of products differ in their order alone, see `forced`."""
        mlps, _, thresholds = self._mlps(prepared)
        n_read = np.zeros((len(self.layers), 2), np.int64)

        def mlp(number: int, x: torch.Tensor) -> torch.Tensor:
            own = mlps[number]
            if isinstance(own, WholeMLP):
                return own.outputs(x, self._weights.kind)
            made, n_read[number, :] = own.outputs(x, self._weights.kind, thresholds[number])
            return made

        with torch.inference_mode():
            states = forced_states(self._weights, self.model.dtype, ids[0], cache, mlp)
            logits = self._weights.logits(self._weights.head.times(states))
        group: Group = [0], prepared
        self._count([group], [group], n_read[None], ids.shape[1])
        return logits

    def _count(
        self, groups: Sequence[Group], parts: Sequence[tuple[Any, Prepared]], n_read: Array, n_steps: int = 1
    ) -> None:
        """Count steps.

        Args:
            groups: all rows.
            parts: groups of the rows that have not ended.
            n_read: neurons of each layer that any row of a part has read, and the sum over its rows, [n_parts, n_layers, 2].
            n_steps: how many.
        """
        if all(isinstance(mlp, WholeMLP) for _, prepared in groups for mlp in self._mlps(prepared)[0]):
            self.count(groups, n_steps)
            return
        n_bytes, n_neurons, whole = 0, 0, {}
        for (rows, prepared), of_part in zip(parts, n_read.tolist(), strict=True):
            for mlp, (by_any, by_all) in zip(self._mlps(prepared)[0], of_part, strict=True):
                if isinstance(mlp, WholeMLP):
                    whole[id(mlp)] = mlp.n_bytes * n_steps  # what several leave dense is read once
                    n_neurons += mlp.n_ff * len(rows) * n_steps
                else:
                    n_bytes += mlp.bytes_read(by_any, n_steps, prepared.selection.read_ratio)
                    n_neurons += by_all
        if self._disk is not None:
            self.call.read += self._disk.end_step()
        n_all = sum(layer.d_ff for layer in self.layers) * sum(len(rows) for rows, _ in parts)
        self.count_read(groups, n_bytes + sum(whole.values()), n_neurons / n_all, n_steps)

    def release(self) -> None:
        """Let go of the latest call's cache, and forget what was counted on the way to its prompt."""
        if self._disk is not None:
            self._disk.end_step()
        super().release()

    def new_call(self) -> LeanCall:
        """Return a call without a cache."""
        return LeanCall()
