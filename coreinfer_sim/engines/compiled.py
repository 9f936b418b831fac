"""Decode through `torch.compile`: a static cache, and compact weights that are rewritten where they lie.

Shapes and addresses stay those of the first prompt, so that a change of cluster neither compiles anything anew nor, on a
GPU, records another CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import CompileConfig, StaticCache

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.cutting import Projections, compact_model
from coreinfer_sim.engines.in_transformers import TransformersEngine
from coreinfer_sim.engines.sizes import Bytes
from coreinfer_sim.models.mixtures import is_mixture
from coreinfer_sim.models.structure import linear_module

_STEP = 256
"""Positions by which static caches grow; another length is another shape."""


class CompiledEngine(TransformersEngine):
    """The model's own forward code, compiled; made for GPUs."""

    name: ClassVar[str] = "compiled"

    def __init__(self, model: Any, layers: Sequence[Any], config: DecodeConfig) -> None:
        """See `Engine`."""
        super().__init__(model, layers, config)
        self._cache: StaticCache | None = None
        self._cache_shape = (0, 0)
        self._placed: dict[int, Projections] = {}
        self._call: Callable[..., Any] | None = None
        self._compile_config: CompileConfig | None = None

    @classmethod
    def refuses(cls, model: Any, config: DecodeConfig) -> str | None:
        """Refuse what `TransformersEngine` does, and mixtures, whose tokens decide which experts run."""
        if is_mixture(model):
            return "it compiles no mixture of experts"
        return super().refuses(model, config)

    @classmethod
    def plan(cls, neuron_bytes: float, n_held: Sequence[int], config: DecodeConfig) -> Bytes:
        """Held neurons are copied to a fixed place."""
        once = super().plan(neuron_bytes, n_held, config)
        return Bytes(2 * once.held, once.read)

    @classmethod
    def warm_up(cls, model: Any) -> None:
        """Nothing: the first text is what gets compiled."""

    def running(self) -> AbstractContextManager[None]:
        """Leave linear layers to torch, which compiles them."""
        return nullcontext()

    def cut(self, selection: NeuronSelection) -> Mapping[int, Projections]:
        """Cut the projections of each layer that the selection names."""
        return compact_model(self.layers, selection)

    def generate_options(self, n_sequences: int, n_positions: int, reuse: bool) -> dict[str, Any]:
        """Bring a static cache, and settings by which ``generate`` compiles."""
        return {
            "past_key_values": self._static_cache(n_sequences, n_positions, reuse),
            "compile_config": compile_settings(),
        }

    def compiled(self, forward: Callable[..., Any], config: CompileConfig | None) -> Callable[..., Any]:
        """Return the model's forward code, compiled as ``config`` says."""
        config = config or compile_settings()
        if self._call is None or config != self._compile_config:
            self._call, self._compile_config = torch.compile(forward, **config.to_dict()), config
        return self._call

    def placed(self, projections: dict[int, Projections]) -> dict[int, Projections]:
        """Copy compact MLPs into the modules of the last ones, if the shapes are the same; a mixed batch stays as it is."""
        if not all(isinstance(module, nn.Linear) for part in projections.values() for module in part.values()):
            return projections
        if _shapes(projections) != _shapes(self._placed):
            self._placed = {
                number: {
                    name: linear_module(module.weight.clone(), None if module.bias is None else module.bias.clone())
                    for name, module in part.items()
                }
                for number, part in projections.items()
            }
            return self._placed
        for number, part in projections.items():
            for name, module in part.items():
                target = self._placed[number][name]
                target.weight.copy_(module.weight)
                if module.bias is not None:
                    target.bias.copy_(module.bias)
        return self._placed

    def close(self) -> None:
        """Let go of cache and weights; what was compiled stays."""
        super().close()
        self._cache, self._cache_shape, self._placed = None, (0, 0), {}

    def _static_cache(self, n_sequences: int, n_positions: int, reuse: bool) -> StaticCache:
        """Return an empty cache with room for ``n_positions`` in every sequence."""
        n_positions = -(-n_positions // _STEP) * _STEP
        if not reuse:  # the caller keeps what it is given
            return StaticCache(config=self.model.config, max_cache_len=n_positions)
        if self._cache is None or self._cache_shape[0] != n_sequences or self._cache_shape[1] < n_positions:
            self._cache = StaticCache(config=self.model.config, max_cache_len=n_positions)
            self._cache_shape = n_sequences, n_positions
        self._cache.reset()
        return self._cache


def compile_settings() -> CompileConfig:
    """Return transformers' own settings, which on a GPU record CUDA graphs; here they also hold for a CPU."""
    config = CompileConfig()
    config._compile_all_devices = True  # type: ignore[assignment]  # else only accelerators compile
    return config


def _shapes(projections: dict[int, Projections]) -> dict[tuple[int, str], Any]:
    return {
        (number, name): (module.weight.shape, module.weight.dtype, module.bias is None)
        for number, part in projections.items()
        for name, module in part.items()
    }
