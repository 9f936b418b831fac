"""Decode through `torch.compile`: a static cache, and compact weights that are rewritten where they lie.

Shapes and addresses stay those of the first prompt, so that a change of cluster neither compiles anything anew nor, on a
GPU, records another CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig, StaticCache

from coreinfer_sim.engines.compact import Projections, linear_module

_STEP = 256
"""Positions by which static caches grow; another length is another shape."""


class FixedShapes:
    """What a model that decodes compiled holds from one call to the next."""

    def __init__(self, model: Any) -> None:
        """Hold nothing yet."""
        self._model = model
        self._cache: StaticCache | None = None
        self._cache_shape = (0, 0)
        self._placed: dict[int, Projections] = {}
        self._call: Callable[..., Any] | None = None
        self._config: CompileConfig | None = None

    def cache(self, n_sequences: int, n_positions: int, reuse: bool) -> StaticCache:
        """Return an empty cache with room for ``n_positions`` in every sequence.

        Args:
            n_sequences: rows times beams.
            n_positions: prompt and new tokens.
            reuse: take the last one where it is large enough; not for a caller that keeps what it is given.
        """
        n_positions = -(-n_positions // _STEP) * _STEP
        if not reuse:
            return StaticCache(config=self._model.config, max_cache_len=n_positions)
        if self._cache is None or self._cache_shape[0] != n_sequences or self._cache_shape[1] < n_positions:
            self._cache = StaticCache(config=self._model.config, max_cache_len=n_positions)
            self._cache_shape = n_sequences, n_positions
        self._cache.reset()
        return self._cache

    def compile_config(self) -> CompileConfig:
        """Return transformers' own settings, which on a GPU record CUDA graphs; here they also hold for a CPU."""
        config = CompileConfig()
        config._compile_all_devices = True  # type: ignore[assignment]  # else only accelerators compile
        return config

    def placed(self, projections: dict[int, Projections]) -> dict[int, Projections]:
        """Copy compact MLPs into the modules of the last ones, if the shapes are the same; a mixed batch stays as it is."""
        if not all(isinstance(module, nn.Linear) for part in projections.values() for module in part.values()):
            return projections
        if _shapes(projections) != _shapes(self._placed):
            self._placed = {
                number: {
                    name: linear_module(module.weight.clone(), _copy(module.bias)) for name, module in part.items()
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

    def call(self, forward: Callable[..., Any], config: CompileConfig | None) -> Callable[..., Any]:
        """Return the model's forward code, compiled as ``config`` says."""
        config = config or self.compile_config()
        if self._call is None or config != self._config:
            self._call, self._config = torch.compile(forward, **config.to_dict()), config
        return self._call

    def release(self) -> None:
        """Let go of cache and weights; what was compiled stays."""
        self._cache, self._cache_shape, self._placed = None, (0, 0), {}


def _copy(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.clone()


def _shapes(projections: dict[int, Projections]) -> dict[tuple[int, str], Any]:
    return {
        (number, name): (module.weight.shape, module.weight.dtype, module.bias is None)
        for number, part in projections.items()
        for name, module in part.items()
    }
