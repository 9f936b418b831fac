"""What the dense model makes of texts, and how far the model as it is now departs from it where decode would read.

Texts are read in packs: several in one row, one after the other, each seeing itself alone. A pass over a row of some
hundred tokens takes little longer than one over fifty, as it reads the same weights.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from coreinfer_sim.fitting.clustered_corpus import CalibrationText

TOKENS_AT_ONCE = {"cpu": 512, "cuda": 4096}
"""Of a pack, by device: with so many a pass is bound by arithmetic."""
LENGTH_STEP = 32
"""Rows are filled up to multiples of so many tokens: of hundreds of lengths, each would have matrix products prepared for
itself alone and leave gaps of its own size in memory, among which the next one's are looked for."""
_COPIES = 4
"""Of float32 predictions, about: dense, sparse, gradient and on the way."""


@dataclass(frozen=True)
class DenseReading:
    """The dense model's cache before the last tokens of some texts, and what it predicts after each of those tokens."""

    n_last: int
    """Number of the last tokens of all texts."""
    ids: torch.Tensor
    """Those tokens, text by text, and filling, [n_last and more]."""
    places: torch.Tensor
    """Their places in their texts, [n_last and more]."""
    seen: torch.Tensor
    """Which text each token in the cache is of, and after it each of the last ones, [n_earlier + n_last and more]."""
    cache: Any
    log_probabilities: torch.Tensor
    """float32 [n_last and more, vocabulary]."""

    def divergences(self, model: Any) -> torch.Tensor:
        """Return KL(dense ‖ the model as it is now) at each of the last tokens, in nats [n_last]."""
        now = _log_probabilities(model, self.ids, self.seen, self.places, copy.deepcopy(self.cache))
        return F.kl_div(now, self.log_probabilities, reduction="none", log_target=True).sum(-1)[: self.n_last]


def read_densely(model: Any, texts: Sequence[CalibrationText], n_last: Sequence[int]) -> DenseReading:
    """Read texts with the model, which is dense now.

    Args:
        model: the causal language model.
        texts: one, or a pack of `packs`.
        n_last: how many of each text's tokens are the last ones, 1 or more and fewer than all.
    """
    device, n_counted = model.device, sum(n_last)
    n_filling = [-n % LENGTH_STEP for n in (sum(len(text.ids) for text in texts) - n_counted, n_counted)]
    if any(n_filling) and sum(len(text.ids) for text in texts) + sum(n_filling) <= _most_at_once(model):
        texts, n_last = [*texts, CalibrationText([0] * sum(n_filling), 0)], [*n_last, n_filling[1]]
    n_earlier = [len(text.ids) - n for text, n in zip(texts, n_last, strict=True)]
    parts = list(zip(texts, n_earlier, strict=True))
    before = torch.cat([torch.tensor(text.ids[:n], dtype=torch.int64) for text, n in parts]).to(device)
    last = torch.cat([torch.tensor(text.ids[n:], dtype=torch.int64) for text, n in parts]).to(device)
    places_before = torch.cat([torch.arange(n) for _, n in parts]).to(device)
    places = torch.cat([torch.arange(n, len(text.ids)) for text, n in parts]).to(device)
    numbers = torch.arange(len(texts)).repeat(2)
    seen = numbers.repeat_interleave(torch.tensor([*n_earlier, *n_last])).to(device)
    with torch.no_grad():
        beside = _beside(model, seen[: len(before)], places_before)
        cache = model.base_model(input_ids=before[None], use_cache=True, **beside).past_key_values
        dense = _log_probabilities(model, last, seen, places, copy.deepcopy(cache))
    return DenseReading(n_counted, last, places, seen, cache, dense)


def packs(model: Any, texts: Sequence[CalibrationText]) -> Iterator[list[int]]:
    """Divide the places of texts into packs that the model reads at once, in their order.

    A text is a pack by itself if it is long or the model cannot be told which tokens belong together.
    """
    most = _most_at_once(model)
    pack: list[int] = []
    n_found = 0
    for place, text in enumerate(texts):
        if pack and n_found + len(text.ids) > most:
            yield pack
            pack, n_found = [], 0
        pack.append(place)
        n_found += len(text.ids)
    if pack:
        yield pack


def _most_at_once(model: Any) -> int:
    """Return the most tokens of a pack of several texts."""
    config = model.config.get_text_config()
    positions = "position_ids" in inspect.signature(model.forward).parameters
    if not positions or getattr(config, "alibi", False):  # places come from the mask, which a pack needs for itself
        return 0
    most = TOKENS_AT_ONCE.get(model.device.type, TOKENS_AT_ONCE["cpu"])
    if model.device.type == "cuda":
        room = torch.cuda.get_device_properties(model.device).total_memory // 4
        most = min(most, room // (_COPIES * 4 * config.vocab_size))
    window = getattr(config, "sliding_window", None)
    return most if window is None else min(most, window - 1)  # farther back its cache forgets


def n_completion(text: CalibrationText) -> int:
    """Return how many of a text's tokens decode would read: the completion, but not the text's first token; below 1: none."""
    return min(len(text.ids) - text.n_prompt, len(text.ids) - 1)


def _beside(model: Any, seen: torch.Tensor, places: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what the model is given beside the ids of a pack, so that each token sees its own text alone.

    Args:
        model: the causal language model.
        seen: which text each token is of that is in the cache or read now, [n_seen].
        places: of those that are read now, the last ones, in their texts, [n_read].
    """
    if int(seen.max()) == 0:  # one text, in whose order the model reads by itself
        return {}
    now = torch.arange(len(seen) - len(places), len(seen), device=seen.device)
    visible = (seen[now, None] == seen) & (now[:, None] >= torch.arange(len(seen), device=seen.device))
    mask = torch.zeros(visible.shape, dtype=model.dtype, device=seen.device)
    mask.masked_fill_(~visible, torch.finfo(model.dtype).min)
    return {"attention_mask": mask[None, None], "position_ids": places[None]}


def _log_probabilities(
    model: Any, ids: torch.Tensor, seen: torch.Tensor, places: torch.Tensor, cache: Any
) -> torch.Tensor:
    beside = _beside(model, seen, places)
    logits = model(input_ids=ids[None], past_key_values=cache, use_cache=True, **beside).logits
    return F.log_softmax(logits[0].float(), -1)
