"""Scores under forced sparse decode: dense prefill, then every completion token under the decode-phase model.

As in `generate`, the prompt is read densely, and its last position predicts the completion's first token. That token is
therefore not scored: every token that is comes from the compact MLPs. All of them go through in one pass, which gives the
same logits as decoding them one by one.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from coreinfer_sim.activations import recorded_activations
from coreinfer_sim.core_neurons import SentenceStatistics, sentence_statistics
from coreinfer_sim.errors import CorpusError
from coreinfer_sim.evaluation.rows import Row, joined
from coreinfer_sim.models import LanguageModel
from coreinfer_sim.predictors import PromptStatistics


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


class Case:
    """One row, tokenised, with its dense prefill and dense scores."""

    def __init__(
        self, language_model: LanguageModel, row: Row, max_tokens: int, alpha: float, reference: Case | None = None
    ) -> None:
        """Read the prompt densely.

        Args:
            language_model: the dense model.
            row: prompt and completion.
            max_tokens: the prompt is cut on the left, the completion on the right, to half of this each.
            alpha: of the prompt's own token-wise core neurons.
            reference: the same row under the model that all are compared with; None: under this one.
        """
        self.row = row
        tokenizer, self._model, self._alpha = language_model.tokenizer, language_model.model, alpha
        prompt, completion = joined(row.prompt, row.completion)
        ids = tokenizer(prompt)["input_ids"][-max_tokens // 2 :]
        new = tokenizer(completion, add_special_tokens=False)["input_ids"][: max_tokens // 2]
        device = self._model.device
        if not ids or len(new) < 2:
            raise CorpusError(
                f"row {row.id} of {row.set_name} has {len(ids)} prompt tokens and {len(new)} completion tokens, expected at "
                "least 1 and 2; leave it out."
            )
        self._decoded = torch.tensor([new[:-1]], device=device)
        self._targets = torch.tensor(new[1:], device=device)
        self._cache: Any = None
        self.statistics: PromptStatistics = {}
        self._prefill(language_model, torch.tensor([ids], device=device), alpha)
        self._reference: torch.Tensor = self._logits() if reference is None else reference._reference
        self.reference_loss = self._score(self._reference).loss

    def _prefill(self, language_model: LanguageModel, ids: torch.Tensor, alpha: float) -> None:
        starts = np.array([0, ids.shape[1]])

        def add(layer: int, z: torch.Tensor) -> None:
            self.statistics[layer] = sentence_statistics(z, starts, alpha)

        with recorded_activations(language_model.layers, add) as tap, torch.inference_mode():
            tap.set_mask(torch.ones_like(ids))
            self._cache = self._model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

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

    def score(self) -> Score:
        """Score the completion under whatever MLPs are in the model now."""
        return self._score(self._logits())

    def _logits(self) -> torch.Tensor:
        """Return float32 logits of the completion tokens, [n_tokens, vocabulary]."""
        cache = copy.deepcopy(self._cache)
        with torch.inference_mode():
            return self._model(input_ids=self._decoded, past_key_values=cache, use_cache=True).logits[0].float()

    def _score(self, logits: torch.Tensor) -> Score:
        own, dense = F.log_softmax(logits, -1), F.log_softmax(self._reference, -1)
        return Score(
            n_tokens=len(self._targets),
            loss=float(F.nll_loss(own, self._targets, reduction="sum")),
            kl=float(F.kl_div(own, dense, reduction="sum", log_target=True)),
            n_same_top=int((logits.argmax(-1) == self._reference.argmax(-1)).sum()),
        )
