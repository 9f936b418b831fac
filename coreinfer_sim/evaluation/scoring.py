"""Scores under forced sparse decode: dense prefill, then every completion token under the decode-phase model.

As in `generate`, the prompt is read densely (or, if wanted, sparsely too), and its last position predicts the completion's
first token. That token is therefore not scored: every token that is comes from the compact MLPs. All of them go through in
one pass, which gives the same logits as decoding them one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from coreinfer_sim.base.errors import CorpusError
from coreinfer_sim.choosing.statistics import PromptStatistics, SentenceStatistics, sentence_statistics
from coreinfer_sim.evaluation.rows import Row, joined
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.taps import recorded_activations

_SCORED_AT_ONCE = 8
"""Tokens; what is made of their logits over a large vocabulary then stays in the cache."""


@dataclass(frozen=True)
class Score:
    """What one contender made of one completion."""

    n_tokens: int
    loss: float
    """Sum over tokens of the negative log-likelihood, in nats."""
    kl: float
    """Sum over tokens of KL(dense ‖ contender), in nats."""
    n_same_top: int
    """Tokens at which the likeliest token is the dense model's."""


@dataclass(frozen=True)
class Prefill:
    """A prompt as the dense model has read it."""

    cache: Any
    logits: torch.Tensor
    """Of the tokens that follow the prompt's last positions, float32 [n_logits, vocabulary]."""
    statistics: PromptStatistics
    """Of the prompt's own tokens, one row; empty if none were asked for."""


def prefill(language_model: LanguageModel, ids: torch.Tensor, alpha: float | None, n_logits: int = 1) -> Prefill:
    """Read a prompt densely.

    Args:
        language_model: the model, dense at this moment.
        ids: [1, n_positions].
        alpha: share of the positive activations that makes a token's core neurons; None: no statistics.
        n_logits: at how many of the last positions logits are wanted.
    """
    starts = np.array([0, ids.shape[1]])
    statistics: PromptStatistics = {}

    def add(layer: int, z: torch.Tensor) -> None:
        assert alpha is not None
        statistics[layer] = sentence_statistics(z, starts, alpha)

    layers = language_model.layers if alpha is not None else []
    with recorded_activations(layers, add) as tap, torch.inference_mode():
        tap.set_mask(torch.ones_like(ids))
        output = language_model.model(input_ids=ids, use_cache=True, logits_to_keep=n_logits)
    return Prefill(output.past_key_values, output.logits[0, -n_logits:].float(), statistics)


def decoded_logits(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Feed tokens [1, n_tokens] after a cache, which is left as it was, and return float32 logits [n_tokens, vocabulary].

    The MLPs are whatever is in the model now. One pass gives the same logits as one token at a time.
    """
    with torch.inference_mode():
        return model(input_ids=ids, past_key_values=copy.deepcopy(cache), use_cache=True).logits[0].float()


def _cut(tokenizer: Any, ids: list[int], most: int) -> list[int]:
    """Cut a prompt on the left; a first token that stands before every text, without which models fail, stays."""
    if len(ids) <= most:
        return ids
    first = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    return [*first, *ids[len(ids) - most + len(first) :]]


class Case:
    """One row, tokenised, with its dense prefill and dense scores."""

    def __init__(
        self, language_model: LanguageModel, row: Row, max_tokens: int, alpha: float, reference: Case | None = None
    ) -> None:
        """Read the prompt densely.

        Args:
            language_model: the dense model.
            row: prompt and completion.
            max_tokens: the prompt is cut on the left, behind what the tokenizer puts first, the completion on the right, to
                half of this each.
            alpha: of the prompt's own token-wise core neurons.
            reference: the same row under the model that all are compared with; None: under this one.
        """
        self.row = row
        self._model, self._alpha = language_model.model, alpha
        self._tokenizer = tokenizer = language_model.tokenizer
        ends = self._model.generation_config.eos_token_id
        self._ends = ends if isinstance(ends, list) else [tokenizer.eos_token_id if ends is None else ends]
        prompt, completion = joined(row.prompt, row.completion)
        ids = _cut(tokenizer, tokenizer(prompt)["input_ids"], -(-max_tokens // 2))
        new = tokenizer(completion, add_special_tokens=False)["input_ids"][: max_tokens // 2]
        device = self._model.device
        if not ids or len(new) < 2:
            raise CorpusError(
                f"row {row.id} of {row.set_name} has {len(ids)} prompt tokens and {len(new)} completion tokens, expected at "
                "least 1 and 2; leave it out."
            )
        self._language_model = language_model
        self._ids = torch.tensor([ids], device=device)
        self._decoded = torch.tensor([new[:-1]], device=device)
        self._targets = torch.tensor(new[1:], device=device)
        self._prompt = self._dense = prefill(language_model, self._ids, alpha)
        self.statistics = self._prompt.statistics
        self._reference: torch.Tensor = (
            F.log_softmax(self._logits(), -1) if reference is None else reference._reference
        )  # log-probabilities, which every score needs
        self.reference_loss = self._score(self._reference).loss

    def oracle_statistics(self, language_model: LanguageModel) -> PromptStatistics:
        """Return the statistics of the decoded tokens themselves, which no predictor can know."""
        found: dict[int, SentenceStatistics] = {}
        starts = np.array([0, self._decoded.shape[1]])

        def add(layer: int, z: torch.Tensor) -> None:
            found[layer] = sentence_statistics(z, starts, self._alpha)

        with recorded_activations(language_model.layers, add) as tap:
            tap.set_mask(torch.ones_like(self._decoded))
            self._logits()
        return found

    @contextmanager
    def read_sparsely(self) -> Iterator[None]:
        """In the block, decode after the prompt as whatever MLPs are in the model now have read it."""
        self._prompt = prefill(self._language_model, self._ids, None)
        try:
            yield
        finally:
            self._prompt = self._dense

    def score(self) -> Score:
        """Score the completion under whatever MLPs are in the model now."""
        return self._score(self._logits())

    def generate(self, max_new_tokens: int) -> str:
        """Continue the prompt greedily under whatever MLPs are in the model now, to an end token or the limit.

        The first token is the prefill's choice, as in the command `generate`; all later ones are decoded. A plain
        loop, because transformers' own would run the checkpoint's sampling defaults and prefill again.
        """
        cache = copy.deepcopy(self._prompt.cache)
        token = int(self._prompt.logits[-1].argmax())
        new: list[int] = []
        with torch.inference_mode():
            while token not in self._ends:
                new.append(token)
                if len(new) == max_new_tokens:
                    break
                ids = torch.tensor([[token]], device=self._model.device)
                token = int(self._model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1].argmax())
        return str(self._tokenizer.decode(new, skip_special_tokens=True))

    def _logits(self) -> torch.Tensor:
        """Return float32 logits of the completion tokens, [n_tokens, vocabulary]."""
        return decoded_logits(self._model, self._decoded, self._prompt.cache)

    def _score(self, logits: torch.Tensor) -> Score:
        loss = kl = 0.0
        n_same_top = 0
        parts = (tensor.split(_SCORED_AT_ONCE) for tensor in (logits, self._reference, self._targets))
        for part, dense, targets in zip(*parts, strict=True):
            own = F.log_softmax(part, -1)
            loss += float(F.nll_loss(own, targets, reduction="sum"))
            kl += float(F.kl_div(own, dense, reduction="sum", log_target=True))
            n_same_top += int((part.argmax(-1) == dense.argmax(-1)).sum())
        return Score(n_tokens=len(self._targets), loss=loss, kl=kl, n_same_top=n_same_top)
