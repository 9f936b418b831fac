"""Reading a prompt densely, with what a predictor or a score wants of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from coreinfer_sim.choosing.statistics import LayerStatistics, activation_statistics
from coreinfer_sim.engines.face import Engine
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.taps import recorded_activations


@dataclass(frozen=True)
class PromptRead:
    """A prompt as prefill has read it."""

    cache: Any
    logits: torch.Tensor
    """Of the tokens that follow the prompt's last positions, float32 [n_logits, vocabulary]."""
    statistics: LayerStatistics
    """Of the prompt's own tokens, one row; empty if none were asked for."""


def read_prompt(
    language_model: LanguageModel, engine: Engine, ids: torch.Tensor, alpha: float | None, n_logits: int = 1
) -> PromptRead:
    """Read a prompt with whatever MLPs are in the model now.

    Args:
        language_model: the model.
        engine: that will decode from there.
        ids: [1, n_positions].
        alpha: share of the positive activations that makes a token's core neurons; None: no statistics.
        n_logits: at how many of the last positions logits are wanted.
    """
    starts = np.array([0, ids.shape[1]])
    statistics: LayerStatistics = {}

    def add(layer: int, z: torch.Tensor) -> None:
        assert alpha is not None
        statistics[layer] = activation_statistics(z, starts, alpha)

    ids = ids.to(language_model.model.device)
    layers = language_model.layers if alpha is not None else []
    with engine.running(), recorded_activations(layers, add) as tap, torch.inference_mode():
        tap.set_mask(torch.ones_like(ids))
        output = language_model.model(input_ids=ids, use_cache=True, logits_to_keep=n_logits)
    return PromptRead(output.past_key_values, output.logits[0, -n_logits:].float(), statistics)
