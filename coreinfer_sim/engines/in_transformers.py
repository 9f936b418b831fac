"""The model's own forward code, over narrower projections: every family, on any device."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.base.settings import Weights
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.cutting import Projections, compact_model
from coreinfer_sim.engines.face import Engine
from coreinfer_sim.engines.lean.matrix import warm_up_products
from coreinfer_sim.engines.linear import products_of, use_products
from coreinfer_sim.engines.modules import grouped_model, install
from coreinfer_sim.engines.prepared import Prepared
from coreinfer_sim.engines.steps import Group, StepInputs
from coreinfer_sim.models.mlps import MLPLayer, module_bytes, other_bytes


class TransformersEngine(Engine):
    """Puts compact MLPs into the model and calls it."""

    name: ClassVar[str] = "transformers"

    def __init__(self, model: Any, layers: Sequence[MLPLayer], config: DecodeConfig) -> None:
        """See `Engine`."""
        super().__init__(model, layers, config)
        self._on_cpu = model.device.type == "cpu"
        self._other_bytes = other_bytes(model, layers)  # now, while the model is dense
        self._mounted: tuple[Sequence[Group], dict[int, Projections]] | None = None
        if self._on_cpu:
            self.warm_up(model)  # now, rather than within the first text

    @classmethod
    def refuses(cls, model: Any, config: DecodeConfig) -> str | None:
        """Refuse weights of another type than the checkpoint's."""
        return None if config.weights_type is Weights.STORED else "it multiplies weights as they are stored"

    @classmethod
    def warm_up(cls, model: Any) -> None:
        """Compile the loops of linear layers with 16-bit weights."""
        if model.dtype in (torch.bfloat16, torch.float16):
            warm_up_products(model.dtype)

    def running(self) -> AbstractContextManager[None]:
        """On a CPU linear layers multiply by the rule of `linear`; on a GPU torch does by itself."""
        return products_of(self.model) if self._on_cpu else nullcontext()

    def cut(self, selection: NeuronSelection) -> Mapping[int, Projections]:
        """Cut the projections of each layer that the selection names."""
        return self.cut_from(self.layers, selection)

    def cut_from(self, layers: Sequence[MLPLayer], selection: NeuronSelection) -> dict[int, Projections]:
        """Cut from given layers."""
        made = compact_model(layers, selection)
        if self._on_cpu:
            use_products(module for parts in made.values() for module in parts.values())
        return made

    def size(self, layers: Mapping[int, Projections]) -> int:
        """Return the bytes of the projections."""
        return sum(module_bytes(module) for parts in layers.values() for module in parts.values())

    @contextmanager
    def mounted(self, groups: Sequence[Group]) -> Iterator[None]:
        """Put compact MLPs in place for the block."""
        self._mount(groups)
        try:
            yield
        finally:
            self._unmount()

    def step(self, inputs: StepInputs, groups: Sequence[Group]) -> Any:
        """Call the model's own forward code; the compact MLPs stay in place for the next step."""
        self._mount(groups)
        output = inputs.forward(**inputs.given)
        self.count(groups)
        return output

    def forced(self, ids: torch.Tensor, cache: Any, prepared: Prepared) -> torch.Tensor:
        """Feed all positions through the model in one pass."""
        groups = [([0], prepared)]
        with self.mounted(groups), self.running(), torch.inference_mode():
            output = self.model(input_ids=ids, past_key_values=copy.deepcopy(cache), use_cache=True)
        self.count(groups, ids.shape[1])
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def other_bytes(self) -> int:
        """Return the bytes of all weights outside the MLPs but embedding tables, of which a token reads one row."""
        return self._other_bytes

    def release(self) -> None:
        """Leave the model dense."""
        self._unmount()
        super().release()

    def placed(self, projections: dict[int, Projections]) -> dict[int, Projections]:
        """Return projections as they are put into the model."""
        return projections

    def _mount(self, groups: Sequence[Group]) -> None:
        if self._mounted is not None and self._mounted[0] is groups:
            return
        self._unmount()
        compacts = [dict(prepared.layers) for _, prepared in groups]
        together = grouped_model(self.layers, compacts, [rows for rows, _ in groups])
        self._mounted = groups, install(self.layers, self.placed(together))

    def _unmount(self) -> None:
        if self._mounted is not None:
            install(self.layers, self._mounted[1])
            self._mounted = None
