"""One row under forced decode: dense prefill, then every completion token as the engine that decodes reads it.

As in `generate`, the prompt is read densely (or, if wanted, sparsely too), and its last position predicts the completion's
first token. That token is therefore not scored: every token that is comes from held neurons alone. They go through the
engine many positions at a time, which gives the logits of single steps (`Engine.forced`).
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

from coreinfer_sim.base.chats import plain
from coreinfer_sim.base.decode_settings import SamplingConfig
from coreinfer_sim.base.errors import CorpusError
from coreinfer_sim.base.rows import Row
from coreinfer_sim.choosing.predictors import FixedPredictor
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.choosing.statistics import ActivationStatistics, LayerStatistics, activation_statistics
from coreinfer_sim.engines.face import Engine
from coreinfer_sim.engines.prepared import Prepared
from coreinfer_sim.evaluation.rows import joined
from coreinfer_sim.generation.reading import read_prompt
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.generation.watch import generate_options
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.prompts import Message, prompt_ids
from coreinfer_sim.models.taps import recorded_activations

_SCORED_AT_ONCE = 8
"""Tokens; what is made of their logits over a large vocabulary then stays in the cache."""


@dataclass(frozen=True)
class CaseScore:
    """What one contender made of one completion."""

    n_tokens: int
    loss: float
    """Sum over tokens of the negative log-likelihood, in nats."""
    kl: float
    """Sum over tokens of KL(dense ‖ contender), in nats."""
    n_same_top: int
    """Tokens at which the likeliest token is the dense model's."""
    mlp_bytes: int
    """That a token read in the MLPs, counted by the engine."""
    total_bytes: int
    """That a token read in all weights."""
    read_ratio: float
    """Share of the model's neurons that a token read in full."""


class Case:
    """One row, tokenised, with its dense prefill and dense scores."""

    def __init__(
        self,
        language_model: LanguageModel,
        engine: Engine,
        row: Row,
        max_tokens: int,
        alpha: float | None,
    ) -> None:
        """Read the prompt densely, and make the reference that all are compared with.

        Args:
            language_model: the dense model.
            engine: decodes it.
            row: prompt and completion.
            max_tokens: the prompt is cut on the left, behind what the tokenizer puts first, the completion on the right, to
                half of this each.
            alpha: of the prompt's own token-wise core neurons; None: no contender chooses by its activations.

        Raises:
            CorpusError: the row has no prompt token, or fewer than two completion tokens.
        """
        self.row = row
        self._language_model, self.engine, self._alpha = language_model, engine, alpha
        # 1) tokens
        tokenizer = language_model.tokenizer
        prompt, completion = joined(row.prompt, row.completion)
        if row.history and tokenizer.chat_template is not None:
            messages: list[Message] = [{"role": turn.role, "content": turn.content} for turn in row.history]
            read = prompt_ids(tokenizer, language_model.name, messages, chat=True)[0].tolist()
        else:
            read = tokenizer(f"{plain(row.history)}\n" if row.history else prompt)["input_ids"]
        ids = _cut(tokenizer, read, -(-max_tokens // 2))
        new = tokenizer(completion, add_special_tokens=False)["input_ids"][: max_tokens // 2]
        if not ids or len(new) < 2:
            raise CorpusError(
                f"row {row.id} of {row.set_name} has {len(ids)} prompt tokens and {len(new)} completion tokens, expected at "
                "least 1 and 2; leave it out."
            )
        device = language_model.model.device
        self.prompt_ids = torch.tensor([ids], device=device)
        """[1, n_positions]."""
        self._decoded = torch.tensor([new[:-1]], device=device)
        self._targets = torch.tensor(new[1:], device=device)
        # 2) dense prefill
        self._prompt = self._dense = read_prompt(language_model, engine, self.prompt_ids, alpha)
        # 3) what all are compared with: log-probabilities, which every score needs
        (dense,) = engine.prepare([NeuronSelection("dense")])
        self._reference = F.log_softmax(self._logits(dense), -1)
        self.reference_loss = self._scored(self._reference).loss

    def under(self, language_model: LanguageModel, engine: Engine) -> Case:
        """Return the row under a model with other weights, compared with what this one's made of it.

        Where weights are the engine's own, the model that reads prompts is the same, and the prompt is not read again.
        """
        case = copy.copy(self)
        case._language_model, case.engine = language_model, engine
        if language_model is not self._language_model or type(engine) is not type(self.engine):
            case._prompt = case._dense = read_prompt(language_model, engine, self.prompt_ids, self._alpha)
        return case

    @property
    def statistics(self) -> LayerStatistics:
        """Of the prompt's own tokens, as a dense prefill reads them; empty without alpha."""
        return self._dense.statistics

    def oracle_statistics(self) -> LayerStatistics:
        """Return the statistics of the decoded tokens themselves, which no predictor can know."""
        alpha = self._alpha
        assert alpha is not None
        found: dict[int, ActivationStatistics] = {}
        starts = np.array([0, self._decoded.shape[1]])

        def add(layer: int, z: torch.Tensor) -> None:
            found[layer] = activation_statistics(z, starts, alpha)

        model: Any = self._language_model.model
        with self.engine.running(), recorded_activations(self._language_model.layers, add) as tap:
            tap.set_mask(torch.ones_like(self._decoded))
            with torch.inference_mode():
                model(input_ids=self._decoded, past_key_values=copy.deepcopy(self._prompt.cache), use_cache=True)
        return found

    @contextmanager
    def read_sparsely(self, held: Prepared) -> Iterator[None]:
        """In the block, decode after the prompt as the held neurons have read it."""
        with self.engine.mounted([([0], held)]):
            self._prompt = read_prompt(self._language_model, self.engine, self.prompt_ids, None)
        try:
            yield
        finally:
            self._prompt = self._dense

    def score(self, held: Prepared) -> CaseScore:
        """Score the completion with held neurons."""
        return self._scored(self._logits(held))

    def generate(self, selection: NeuronSelection, max_new_tokens: int) -> str:
        """Continue the prompt greedily, as the command `generate` does, to an end token or the limit."""
        model = self._language_model
        sparse = SparseModel(model.model, FixedPredictor(selection), config=self.engine.config, engines=[self.engine])
        options = generate_options(SamplingConfig(max_new_tokens))
        output = sparse.generate(self.prompt_ids, pad_token_id=model.tokenizer.pad_token_id, **options)
        return str(model.tokenizer.decode(output[0, self.prompt_ids.shape[1] :], skip_special_tokens=True))

    def _logits(self, held: Prepared) -> torch.Tensor:
        """Return float32 logits of the completion tokens, [n_tokens, vocabulary]."""
        self.engine.release()
        return self.engine.forced(self._decoded, self._prompt.cache, held)

    def _scored(self, logits: torch.Tensor) -> CaseScore:
        loss = kl = 0.0
        n_same_top = 0
        parts = (tensor.split(_SCORED_AT_ONCE) for tensor in (logits, self._reference, self._targets))
        for part, dense, targets in zip(*parts, strict=True):
            own = F.log_softmax(part, -1)
            loss += float(F.nll_loss(own, targets, reduction="sum"))
            kl += float(F.kl_div(own, dense, reduction="sum", log_target=True))
            n_same_top += int((part.argmax(-1) == dense.argmax(-1)).sum())
        read = self.engine.read()
        return CaseScore(len(self._targets), loss, kl, n_same_top, read.mlp_per_step, read.per_step, read.read_ratio)


def _cut(tokenizer: Any, ids: list[int], most: int) -> list[int]:
    """Cut a prompt on the left; a first token that stands before every text, without which models fail, stays."""
    if len(ids) <= most:
        return ids
    first = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    return [*first, *ids[len(ids) - most + len(first) :]]
