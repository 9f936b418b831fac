"""What the dense model makes of a text, and how far the model as it is now departs from it where decode would read."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from coreinfer_sim.build.calibration import CalibrationText


@dataclass(frozen=True)
class DenseReading:
    """The dense model's cache before a text's last tokens, and what it predicts after each of those."""

    ids: torch.Tensor
    """[1, n_tokens]."""
    n_last: int
    cache: Any
    log_probabilities: torch.Tensor
    """float32 [n_last, vocabulary]."""

    def again(self, model: Any) -> torch.Tensor:
        """Let the model as it is now read the last tokens after the dense cache; return its log-probabilities."""
        return _log_probabilities(model, self.ids, self.n_last, copy.deepcopy(self.cache))

    def divergence(self, model: Any) -> float:
        """Return the sum over the last tokens of KL(dense ‖ the model as it is now), in nats."""
        return float(F.kl_div(self.again(model), self.log_probabilities, reduction="sum", log_target=True))


def read_densely(model: Any, text: CalibrationText, n_last: int) -> DenseReading:
    """Read a text with the model, which is dense now; ``n_last`` is at least 1 and below the text's length."""
    ids = torch.tensor([list(text.ids)], device=model.device)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-n_last], use_cache=True, logits_to_keep=1).past_key_values
        return DenseReading(ids, n_last, cache, _log_probabilities(model, ids, n_last, copy.deepcopy(cache)))


def n_completion(text: CalibrationText) -> int:
    """Return how many of a text's tokens decode would read: the completion, but not the text's first token; below 1: none."""
    return min(len(text.ids) - text.n_prompt, len(text.ids) - 1)


def _log_probabilities(model: Any, ids: torch.Tensor, n_last: int, cache: Any) -> torch.Tensor:
    logits = model(input_ids=ids[:, -n_last:], past_key_values=cache, use_cache=True).logits[0]
    return F.log_softmax(logits.float(), -1)
