"""Reading a prompt: in passes over a part of it each, and densely with what a predictor or a score wants of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from coreinfer_sim.base.memory import reusing_memory
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


def passes_of(given: Mapping[str, Any], most: int | None) -> Iterator[Mapping[str, Any]]:
    """Split a forward pass over a prompt into equal ones, which hold less memory beside weights and cache.

    Args:
        given: to the model's forward pass, the cache included.
        most: tokens, of all rows together, that one pass reads; None: all.

    Yields:
        What to give to each pass. A call that wants more than logits, or whose mask is made already, stays whole.
    """
    ids: torch.Tensor = given["input_ids"]
    mask, places = given.get("attention_mask"), given.get("position_ids")
    more = any(given.get(name) for name in ("output_attentions", "output_hidden_states"))
    plain = mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2)
    if most is None or ids.numel() <= most or more or not plain or given.get("past_key_values") is None:
        yield given
        return
    n_rows, n_positions = ids.shape
    n_passes = -(-n_positions // max(1, most // n_rows))
    ends = [(number + 1) * n_positions // n_passes for number in range(n_passes)]
    for begin, end in zip([0, *ends], ends, strict=False):
        part = {"input_ids": ids[:, begin:end]}
        if mask is not None:  # it also covers what the cache holds already
            part["attention_mask"] = mask[:, : mask.shape[1] - n_positions + end]
        if places is not None:
            part["position_ids"] = places[..., begin:end]
        yield {**given, **part}


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
    statistics: LayerStatistics = {}

    def add(layer: int, z: torch.Tensor) -> None:
        assert alpha is not None
        own = activation_statistics(z, np.array([0, len(z)]), alpha)
        statistics[layer] = statistics[layer] + own if layer in statistics else own

    model: Any = language_model.model
    cache = DynamicCache(config=model.config)
    given = {"input_ids": ids.to(model.device), "past_key_values": cache, "use_cache": True}
    layers = language_model.layers if alpha is not None else []
    logits, n_left = [], ids.shape[1]
    with engine.running(), recorded_activations(layers, add) as tap, torch.inference_mode(), reusing_memory():
        for part in passes_of(given, engine.pass_tokens):
            tap.set_mask(torch.ones_like(part["input_ids"]))
            n_left -= part["input_ids"].shape[1]
            n_kept = n_logits - n_left  # of this pass; the model takes 0 for all
            output = model(**part, logits_to_keep=max(1, n_kept))
            logits += [output.logits[0, -n_kept:].float()] if n_kept > 0 else []
    return PromptRead(cache, torch.cat(logits), statistics)
