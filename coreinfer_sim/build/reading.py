"""What the dense model makes of texts, and how far the model as it is now departs from it where decode would read."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from coreinfer_sim.build.calibration import CalibrationText

_MOST_AT_ONCE = 32
_COPIES = 4
"""Of float32 predictions, about: dense, sparse, gradient and on the way."""


@dataclass(frozen=True)
class DenseReading:
    """The dense model's cache before the last tokens of some texts, and what it predicts after each of those tokens."""

    ids: torch.Tensor
    """Those tokens, padded on the right, [n_texts, n_positions]."""
    places: torch.Tensor
    """Of all tokens that are none of the padding in ``ids``, flattened, [n_last]."""
    cache: Any
    beside: dict[str, torch.Tensor]
    """What the model is given beside ids and cache."""
    log_probabilities: torch.Tensor
    """float32 [n_last, vocabulary], text by text."""

    @property
    def n_last(self) -> int:
        """Number of the last tokens of all texts."""
        return len(self.places)

    def again(self, model: Any) -> torch.Tensor:
        """Let the model as it is now read the last tokens after the dense cache; return its log-probabilities."""
        return _log_probabilities(model, self.ids, self.places, copy.deepcopy(self.cache), self.beside)

    def divergences(self, model: Any) -> torch.Tensor:
        """Return KL(dense ‖ the model as it is now) at each of the last tokens, in nats [n_last]."""
        return F.kl_div(self.again(model), self.log_probabilities, reduction="none", log_target=True).sum(-1)


def read_densely(model: Any, texts: Sequence[CalibrationText], n_last: Sequence[int]) -> DenseReading:
    """Read texts side by side with the model, which is dense now.

    Args:
        model: the causal language model.
        texts: one or more, of several no more than `texts_at_once` says. What comes before the last tokens is padded on the
            right too: padding on the left has positions at which attention sees nothing, of which not every
            implementation of it makes numbers.
        n_last: how many of each text's tokens are the last ones, 1 or more and fewer than all.
    """
    n_earlier = [len(text.ids) - n for text, n in zip(texts, n_last, strict=True)]
    n_before, n_after = max(n_earlier), max(n_last)
    ids = torch.zeros(len(texts), n_before + n_after, dtype=torch.int64)
    mask = torch.ones_like(ids)
    for row, (text, earlier, n) in enumerate(zip(texts, n_earlier, n_last, strict=True)):
        ids[row, :earlier] = torch.tensor(text.ids[:earlier])
        ids[row, n_before : n_before + n] = torch.tensor(text.ids[earlier:])
        mask[row, earlier:n_before] = 0
    rows = [torch.arange(n) + row * n_after for row, n in enumerate(n_last)]
    ids, places = ids.to(model.device), torch.cat(rows).to(model.device)
    beside: dict[str, torch.Tensor] = {}
    positions: dict[str, torch.Tensor] = {}
    if len(texts) > 1:
        beside = {"attention_mask": mask.to(model.device)}
        if "position_ids" in inspect.signature(model.forward).parameters:
            positions = {"position_ids": (mask.cumsum(1) - 1).to(model.device)}
    of_prompt = {name: value[:, :n_before] for name, value in {**beside, **positions}.items()}
    of_last = beside | {name: value[:, n_before:] for name, value in positions.items()}
    with torch.no_grad():
        cache = model.base_model(input_ids=ids[:, :n_before], use_cache=True, **of_prompt).past_key_values
        last = ids[:, n_before:]
        dense = _log_probabilities(model, last, places, copy.deepcopy(cache), of_last)
        return DenseReading(last, places, cache, of_last, dense)


def texts_at_once(model: Any, texts: Sequence[CalibrationText]) -> int:
    """Return how many texts are best read side by side.

    On a CPU more than one are slower, as they are padded; a GPU is idle between short ones, and takes as many as have
    room for their predictions in a quarter of its memory.
    """
    longest = max((len(text.ids) for text in texts), default=1)
    if model.device.type != "cuda" or not can_be_padded(model, longest):
        return 1
    n_bytes = _COPIES * 4 * longest * model.config.get_text_config().vocab_size
    return max(1, min(_MOST_AT_ONCE, torch.cuda.get_device_properties(model.device).total_memory // 4 // n_bytes))


def can_be_padded(model: Any, longest: int) -> bool:
    """Return whether attention reaches over texts of ``longest`` tokens and the padding amid them."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return window is None or window >= 2 * longest


def n_completion(text: CalibrationText) -> int:
    """Return how many of a text's tokens decode would read: the completion, but not the text's first token; below 1: none."""
    return min(len(text.ids) - text.n_prompt, len(text.ids) - 1)


def _log_probabilities(
    model: Any, ids: torch.Tensor, places: torch.Tensor, cache: Any, beside: dict[str, torch.Tensor]
) -> torch.Tensor:
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, **beside).logits
    return F.log_softmax(logits.flatten(0, 1)[places].float(), -1)
