"""Weights as they come back from llama.cpp's quantised formats: what one would take instead of sparsity.

The model is rounded to a format and decodes through transformers, in the model's own type; bytes are those of the format.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.base.settings import Weights
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.face import Engine
from coreinfer_sim.engines.in_transformers import TransformersEngine
from coreinfer_sim.engines.prepared import Prepared
from coreinfer_sim.engines.registry import choose_engines
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import MLPLayer, find_mlps, module_bytes

FORMATS = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}
BITS = {"q8_0": 8.5, "q4_0": 4.5}
"""Bits a weight, scales included."""
_OF_HEAD = {"q4_0": "q8_0"}
"""Format of the output head where it is another: llama.cpp keeps it at 6 or, where its width does not go into blocks of 256,
8 bits in a file of 4, as much of the quality is there."""
_BLOCK = 32


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return a weight matrix [n_out, n_in] as it comes back from a format, in its own dtype."""
    n_in = weight.shape[1]
    padded = torch.nn.functional.pad(weight.float(), (0, -n_in % _BLOCK)).cpu().numpy()
    restored = gguf.quants.dequantize(gguf.quants.quantize(padded, FORMATS[kind]), FORMATS[kind])[:, :n_in]
    return torch.from_numpy(np.ascontiguousarray(restored)).to(weight)


def rounded_model(language_model: LanguageModel, kind: str) -> LanguageModel:
    """Return a model whose matrices are rounded to a format, the output head to that of `_OF_HEAD`."""
    model = copy.deepcopy(language_model.model)
    head = model.get_output_embeddings()
    for module in model.modules():
        of_module = _OF_HEAD.get(kind, kind) if module is head else kind
        if isinstance(module, torch.nn.Linear):
            made = rounded(module.weight.data, of_module)
        elif isinstance(module, Conv1D):  # its weight lies the other way round
            made = rounded(module.weight.data.T, of_module).T.contiguous()
        else:
            continue
        module.weight = torch.nn.Parameter(made, requires_grad=False)
    return replace(language_model, model=model, layers=find_mlps(model))


class FormatEngine(TransformersEngine):
    """Decodes a rounded model; compact MLPs are cut from the whole one, so that compensation is merged before rounding."""

    def __init__(self, whole: Sequence[MLPLayer], rounded_to: LanguageModel, kind: str, config: DecodeConfig) -> None:
        """Decode ``rounded_to``, with MLPs cut from the layers ``whole`` and rounded to ``kind``."""
        super().__init__(rounded_to.model, rounded_to.layers, config)
        self._whole, self._kind = whole, kind

    def cut(self, selection: NeuronSelection) -> Mapping[int, Any]:
        """Cut from the whole layers, then round."""
        made = self.cut_from(self._whole, selection)
        for parts in made.values():
            for module in parts.values():
                module.weight = torch.nn.Parameter(rounded(module.weight.data, self._kind), requires_grad=False)
        return made

    def mlp_bytes(self, held: Sequence[Prepared]) -> int:
        """Return the MLP bytes of a step in the format."""
        return round(super().mlp_bytes(held) * self._share(self._kind))

    def other_bytes(self) -> int:
        """Return the bytes outside the MLPs in the format."""
        head = self.model.get_output_embeddings()
        head_bytes = 0 if head is None else module_bytes(head)
        others = super().other_bytes() - head_bytes
        return round(others * self._share(self._kind) + head_bytes * self._share(_OF_HEAD.get(self._kind, self._kind)))

    def _share(self, kind: str) -> float:
        return BITS[kind] / (8 * int(self.model.dtype.itemsize))


def engine_for(language_model: LanguageModel, weights: str, config: DecodeConfig) -> tuple[LanguageModel, Engine]:
    """Return what decodes a contender's weights: the engine that decode takes, or a rounded model for a file format.

    Raises:
        ConfigError: no engine can run the model with these weights.
    """
    if weights in FORMATS:
        model = rounded_model(language_model, weights)
        return model, FormatEngine(language_model.layers, model, weights, replace(config, engine="transformers"))
    own_codes = getattr(language_model.model, "own_codes", {})
    wide = Weights.BF16 if own_codes else Weights.STORED
    kind = wide if weights == "16bit" else Weights(weights)
    engines, _ = choose_engines(language_model.model, language_model.layers, replace(config, weights=kind))
    return language_model, engines[0]
