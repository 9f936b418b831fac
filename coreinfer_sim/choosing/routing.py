"""Predictors that route a prompt by its meaning to a cluster of an index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from coreinfer_sim.base.errors import GenerationError
from coreinfer_sim.base.settings import Mode
from coreinfer_sim.choosing.index_sets import IndexSets
from coreinfer_sim.choosing.predictors import check_read
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.choosing.statistics import LayerStatistics
from coreinfer_sim.index.clusters import Match
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.ranking import n_kept, top_ids

PRIOR_TOKENS = 64.0
"""τ: tokens of the prompt that count as much as its cluster; a constant that was chosen, not tuned."""


class Router:
    """Looks up the nearest cluster of prompts, of the same prompts only once: a predictor may be called again after prefill."""

    def __init__(self, index: SemanticIndex, mode: str) -> None:
        """Route by ``index``; ``mode`` is for messages."""
        self._index, self._mode = index, mode
        self._latest: tuple[list[str], list[Match]] = [], []

    def route(self, prompts: Sequence[str] | None) -> list[Match]:
        """Return each prompt's nearest cluster.

        Raises:
            GenerationError: there is no text.
        """
        if prompts is None:
            raise GenerationError(f"{self._mode} mode was given no prompt text; give the wrapper a tokenizer.")
        known, routed = self._latest
        if list(prompts) != known:
            routed = [match for (match,) in self._index.lookup(list(prompts))]
            self._latest = list(prompts), routed
        return routed


class HybridPredictor:
    """The nearest cluster as prior, the prompt's own activations as evidence.

    In each layer a neuron's score is λ · prior + (1 − λ) · evidence. The prior is the cluster's statistic
    (`SemanticIndex.statistics`), the evidence the prompt's own, each divided by its sum over the layer's neurons;
    λ is `prior_weight`. An expert that neither corpus nor prompt has reached stays dense.
    """

    mode = Mode.HYBRID.value
    needs_text = True

    def __init__(self, sets: IndexSets, alpha: float) -> None:
        """Keep the share of neurons that ``sets`` does, in its layers and ranked by its score; ``alpha`` makes C_α."""
        self._sets, self.index = sets, sets.index
        self._router = Router(sets.index, self.mode)
        self._rows = sets.index.rows_of_layers(sets.layers)
        self.alpha: float | None = alpha

    def select(
        self, prompts: Sequence[str] | None, statistics: LayerStatistics | None, n_rows: int
    ) -> list[NeuronSelection] | None:
        """Return each prompt's own selection."""
        if statistics is None:
            return None
        routed = self._router.route(prompts)
        return [self.choose(match, statistics, row) for row, match in enumerate(routed)]

    def choose(self, match: Match, statistics: LayerStatistics, row: int) -> NeuronSelection:
        """Return the selection of a batch's row whose nearest cluster is ``match``."""
        check_read(statistics, self.mode)
        prior, prior_ties = self._sets.index.statistics(match.cluster, self._sets.score)
        ids = {}
        for layer, place in self._rows.items():
            score, ties = _shares(prior[place]), _shares(prior_ties[place])
            own = statistics.get(layer)
            if own is not None and own.reached(row):
                weight = prior_weight(float(own.energy[row].sum()), match.confidence)
                score = weight * score + (1 - weight) * _shares(own.ranked_by(self._sets.score)[row])
                ties = weight * ties + (1 - weight) * _shares(own.activation[row])
            if score.any():
                ids[layer] = torch.from_numpy(top_ids(score, ties, n_kept(self._sets.keep_ratio, len(score))))
        return routed_by(match, NeuronSelection(self.mode, ids))


class SimilarityPredictor:
    """The core neurons of the semantic cluster nearest to the prompt; something else for an unfamiliar prompt."""

    mode = Mode.SIMILARITY.value
    needs_text = True

    def __init__(self, sets: IndexSets, fallback: HybridPredictor | NeuronSelection | None = None) -> None:
        """Take the clusters' ``sets``, and for unfamiliar prompts what ``fallback`` is; None: their cluster's all the same."""
        self._sets, self._fallback, self.index = sets, fallback, sets.index
        self._router = Router(sets.index, self.mode)
        self.alpha = fallback.alpha if isinstance(fallback, HybridPredictor) else None

    def select(
        self, prompts: Sequence[str] | None, statistics: LayerStatistics | None, n_rows: int
    ) -> list[NeuronSelection] | None:
        """Return each prompt's selection; prompts of one cluster share theirs.

        The prompts' statistics are needed only if one of them is unfamiliar and falls back on hybrid selection.
        """
        routed = self._router.route(prompts)
        reads = isinstance(self._fallback, HybridPredictor) and not all(match.confident for match in routed)
        if reads and statistics is None:
            return None
        return [self._choose(match, statistics, row) for row, match in enumerate(routed)]

    def _choose(self, match: Match, statistics: LayerStatistics | None, row: int) -> NeuronSelection:
        if match.confident or self._fallback is None:
            return self._sets.of_match(match)
        if isinstance(self._fallback, HybridPredictor):
            assert statistics is not None
            return self._fallback.choose(match, statistics, row)
        return routed_by(match, self._fallback)


def routed_by(match: Match, selection: NeuronSelection) -> NeuronSelection:
    """Return a selection that names the cluster which the prompt was routed to."""
    return replace(
        selection,
        cluster=match.cluster,
        similarity=match.similarity,
        label=match.label,
        confidence=match.confidence,
    )


def prior_weight(n_tokens: float, confidence: float) -> float:
    """Return λ = τ / (τ + n) · (1 + c) / 2, the weight of the cluster beside the prompt itself.

    Args:
        n_tokens: n, tokens of the prompt; at τ = 64 of them both would count the same, were the routing certain.
        confidence: c, of the routing, in [0, 1]; a prompt akin to no cluster halves the weight.
    """
    return PRIOR_TOKENS / (PRIOR_TOKENS + n_tokens) * (1 + confidence) / 2


def _shares(values: np.ndarray) -> np.ndarray:
    """Return not negative values [d_ff] divided by their sum; zeros stay zeros."""
    values = values.astype(np.float64)
    total = values.sum()
    return values / total if total > 0 else values
