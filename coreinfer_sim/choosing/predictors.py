"""Predictors: a prompt → the neurons that decode keeps.

Each returns a `NeuronSelection` and hides where the choice came from. Those that know the selection before prefill
need only the prompt's text; stability-guided and hybrid selection need the statistics of the prompt's own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from coreinfer_sim.base.errors import ConfigError, GenerationError
from coreinfer_sim.base.settings import Fallback, Mode, Score, check_ratio, parse_layers
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.choosing.statistics import SentenceStatistics, n_kept, top_ids
from coreinfer_sim.index.index import Match, SemanticIndex
from coreinfer_sim.models.mlps import MLPLayer

PromptStatistics = dict[int, SentenceStatistics]
"""By layer number, the statistics of every row of a batch, [n_rows, d_ff]."""
PRIOR_TOKENS = 64.0
"""τ: tokens of the prompt that count as much as its cluster; a constant that was chosen, not tuned."""


class Predictor(Protocol):
    """Chooses the neurons of each prompt of a batch."""

    mode: str
    """Name of the way of choosing."""
    needs_text: bool
    """Whether the prompts' text is read."""
    alpha: float | None
    """If the prompts' own activations may be read: the share that makes C_α; else None."""

    def select(
        self, prompts: Sequence[str] | None, statistics: PromptStatistics | None, n_rows: int
    ) -> list[NeuronSelection] | None:
        """Return one selection a row; rows that keep the same neurons share the mapping of ids.

        It is first called before prefill, without statistics. None says that these prompts need them; then they are
        read during prefill, at some cost, and it is called again.
        """
        ...


class FixedPredictor:
    """The same selection for every prompt: dense, random, global, or one that is given."""

    needs_text = False
    alpha: float | None = None

    def __init__(self, selection: NeuronSelection) -> None:
        """Always choose ``selection``."""
        self.mode = selection.mode
        self._selection = selection

    def select(
        self, prompts: Sequence[str] | None, statistics: PromptStatistics | None, n_rows: int
    ) -> list[NeuronSelection]:
        """Return the one selection for every row."""
        return [self._selection] * n_rows


class Router:
    """Looks prompts up, and the same prompts only once: a predictor may be asked again after prefill."""

    def __init__(self, index: SemanticIndex, mode: str) -> None:
        """Look up the nearest cluster; ``mode`` is for messages."""
        self._index, self._mode = index, mode
        self._latest: tuple[list[str], list[Match]] = [], []

    def route(self, prompts: Sequence[str] | None) -> list[Match]:
        """Return each prompt's nearest cluster."""
        if prompts is None:
            raise GenerationError(f"{self._mode} mode was given no prompt text; give the wrapper a tokenizer.")
        known, routed = self._latest
        if list(prompts) != known:
            routed = [match for (match,) in self._index.lookup(list(prompts))]
            self._latest = list(prompts), routed
        return routed


class SimilarityPredictor:
    """The core neurons of the semantic cluster nearest to the prompt; something else for an unfamiliar prompt."""

    mode = Mode.SIMILARITY.value
    needs_text = True

    def __init__(
        self,
        index: SemanticIndex,
        keep_ratio: float,
        score: Score,
        layers: str,
        fallback: HybridPredictor | NeuronSelection | None = None,
        compensated: bool = True,
    ) -> None:
        """Route by ``index`` to the nearest cluster, unfamiliar prompts to ``fallback``.

        See `SemanticIndex.selection` for the rest, and `make_fallback`.
        """
        self._index, self._keep_ratio, self._score, self._layers = index, keep_ratio, score, layers
        self._compensated = compensated
        self._router, self._fallback = Router(index, self.mode), fallback
        self.alpha = fallback.alpha if isinstance(fallback, HybridPredictor) else None
        self._by_cluster: dict[int, NeuronSelection] = {}

    def select(
        self, prompts: Sequence[str] | None, statistics: PromptStatistics | None, n_rows: int
    ) -> list[NeuronSelection] | None:
        """Return each prompt's selection; prompts of one cluster share theirs.

        The prompts' statistics are needed only if one of them is unfamiliar and falls back on hybrid selection.
        """
        routed = self._router.route(prompts)
        reads = isinstance(self._fallback, HybridPredictor) and not all(match.confident for match in routed)
        if reads and statistics is None:
            return None
        return [self._choose(match, statistics, row) for row, match in enumerate(routed)]

    def _choose(self, match: Match, statistics: PromptStatistics | None, row: int) -> NeuronSelection:
        if match.confident or self._fallback is None:
            return self._of_cluster(match)
        if isinstance(self._fallback, HybridPredictor):
            assert statistics is not None
            return self._fallback.choose(match, statistics, row)
        return replace(
            self._fallback,
            cluster=match.cluster,
            similarity=match.similarity,
            label=match.label,
            confidence=match.confidence,
        )

    def _of_cluster(self, match: Match) -> NeuronSelection:
        if match.cluster not in self._by_cluster:
            self._by_cluster[match.cluster] = self._index.selection(
                match, self._keep_ratio, self._score, self._layers, self._compensated
            )
        return replace(self._by_cluster[match.cluster], similarity=match.similarity, confidence=match.confidence)


class StabilityPredictor:
    """The prompt's own core neurons, taken during prefill: CoreInfer's C_α^β, or by energy as in GRIFFIN."""

    mode = Mode.STABILITY.value
    needs_text = False

    def __init__(self, keep_ratio: float, score: Score, layers: Sequence[int], alpha: float = 0.4) -> None:
        """Keep ``keep_ratio`` (β) of each of ``layers``, ranked by ``score``."""
        self._keep_ratio, self._score, self._layers = keep_ratio, score, set(layers)
        self.alpha: float | None = alpha

    def select(
        self, prompts: Sequence[str] | None, statistics: PromptStatistics | None, n_rows: int
    ) -> list[NeuronSelection] | None:
        """Return each row's own selection."""
        if statistics is None:
            return None
        check_read(statistics, self.mode)
        return [
            NeuronSelection(
                self.mode,
                {
                    number: torch.from_numpy(self._ids(layer, row))
                    for number, layer in statistics.items()
                    if number in self._layers
                },
            )
            for row in range(n_rows)
        ]

    def _ids(self, statistics: SentenceStatistics, row: int) -> np.ndarray:
        score = statistics.ranked_by(self._score)
        return top_ids(score[row], statistics.activation[row], n_kept(self._keep_ratio, score.shape[1]))


class HybridPredictor:
    """The nearest cluster as prior, the prompt's own activations as evidence.

    In each layer a neuron's score is λ · prior + (1 − λ) · evidence. The prior is the cluster's statistic
    (`SemanticIndex.statistics`), the evidence the prompt's own, each divided by its sum over the layer's neurons;
    λ is `prior_weight`.
    """

    mode = Mode.HYBRID.value
    needs_text = True

    def __init__(
        self,
        index: SemanticIndex,
        keep_ratio: float,
        score: Score,
        layers: str,
        alpha: float,
    ) -> None:
        """Keep ``keep_ratio`` of each of ``layers``, ranked by ``score``."""
        self._index, self._keep_ratio, self._score = index, keep_ratio, score
        self._router = Router(index, self.mode)
        self._rows = index.rows_of_layers(layers)
        self.alpha: float | None = alpha

    def select(
        self, prompts: Sequence[str] | None, statistics: PromptStatistics | None, n_rows: int
    ) -> list[NeuronSelection] | None:
        """Return each prompt's own selection."""
        if statistics is None:
            return None
        routed = self._router.route(prompts)
        return [self.choose(match, statistics, row) for row, match in enumerate(routed)]

    def choose(self, match: Match, statistics: PromptStatistics, row: int) -> NeuronSelection:
        """Return the selection of a batch's row whose nearest cluster is ``match``."""
        check_read(statistics, self.mode)
        prior, prior_ties = self._index.statistics(match.cluster, self._score)
        ids = {}
        for layer, place in self._rows.items():
            own = statistics[layer]
            weight = prior_weight(float(own.energy[row].sum()), match.confidence)
            score = weight * _shares(prior[place]) + (1 - weight) * _shares(own.ranked_by(self._score)[row])
            ties = weight * _shares(prior_ties[place]) + (1 - weight) * _shares(own.activation[row])
            ids[layer] = torch.from_numpy(top_ids(score, ties, n_kept(self._keep_ratio, len(score))))
        return NeuronSelection(
            self.mode, ids, match.cluster, match.similarity, match.label, confidence=match.confidence
        )


def make_fallback(
    fallback: Fallback,
    index: SemanticIndex,
    keep_ratio: float,
    score: Score,
    layers: str,
    alpha: float,
    compensated: bool = True,
) -> HybridPredictor | NeuronSelection | None:
    """Make what similarity mode does for unfamiliar prompts."""
    if fallback is Fallback.HYBRID:
        return HybridPredictor(index, keep_ratio, score, layers, alpha)
    if fallback is Fallback.GLOBAL:
        return index.global_selection(keep_ratio, score, layers, compensated)
    return NeuronSelection(Mode.DENSE.value) if fallback is Fallback.DENSE else None


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


def check_read(statistics: PromptStatistics, mode: str) -> None:
    """Raise GenerationError if prefill read no token."""
    if not statistics:
        raise GenerationError(f"{mode} mode read no prompt tokens; it needs at least one in this call.")


def random_selection(
    layers: Sequence[MLPLayer], numbers: Sequence[int], keep_ratio: float, seed: int
) -> NeuronSelection:
    """Choose neurons by chance, the floor that every predictor must beat."""
    generator = torch.Generator().manual_seed(seed)
    return NeuronSelection(
        Mode.RANDOM.value,
        {
            number: torch.randperm(layers[number].d_ff, generator=generator)[: n_kept(keep_ratio, layers[number].d_ff)]
            .sort()
            .values
            for number in numbers
        },
    )


def default_sets(
    index: SemanticIndex, mode: Mode, score: Score = Score.ENERGY, compensated: bool = True
) -> tuple[float, bool]:
    """Return what `SemanticIndex.wanted_sets` does for who names no keep ratio, in a mode; only some can be compensated."""
    fitted = mode in (Mode.GLOBAL, Mode.SIMILARITY) and score is Score.ENERGY
    return index.wanted_sets(compensated=compensated and fitted)


def make_predictor(
    mode: Mode | str,
    layers: Sequence[MLPLayer],
    index: SemanticIndex | None = None,
    *,
    keep_ratio: float | None = None,
    score: Score | str = Score.ENERGY,
    sparse_layers: str | None = None,
    alpha: float | None = None,
    seed: int = 0,
    fallback: Fallback | str | None = None,
    compensated: bool = True,
) -> Predictor:
    """Make the predictor of a mode.

    Args:
        mode: similarity, hybrid, stability, global, random or dense.
        layers: the model's MLPs.
        index: needed by similarity, hybrid and global, which then must belong to the model.
        keep_ratio: share of d_ff that is kept; None takes that of `default_sets`.
        score: energy or paper.
        sparse_layers: slice of the layers that become sparse, such as ``4:``; None: those that the index recorded, without
            one all.
        alpha: for stability and hybrid; None takes the index's α, or 0.4.
        seed: for random.
        fallback: for similarity; what unfamiliar prompts get: hybrid, dense, global, or none (their cluster all the same).
            None: global where compensated sets decode, which no prompt-derived set can be, else hybrid.
        compensated: for similarity and global; take the index's compensated sets where it has them and its profile, where
            no keep ratio is given, is not of plain ones.

    Raises:
        ConfigError: a setting is out of range or missing.
        IndexMismatchError: the index belongs to another model.
    """
    mode, score = Mode(mode), Score(score)
    if sparse_layers is None:
        sparse_layers = ":" if index is None else index.recorded
    numbers = sorted(parse_layers(sparse_layers, len(layers)))
    if not numbers:
        raise ConfigError(f"layers is {sparse_layers!r}, which names none of the model's {len(layers)} layers.")
    if index is not None:
        index.check_model(layers)
    if mode is Mode.DENSE:
        return FixedPredictor(NeuronSelection(mode.value))
    if keep_ratio is None:
        if index is None:
            raise ConfigError(f"mode {mode.value} was given no keep ratio and no index to take it from; give one.")
        keep_ratio, compensated = default_sets(index, mode, score, compensated)
    check_ratio("keep ratio", keep_ratio)
    if mode is Mode.RANDOM:
        return FixedPredictor(random_selection(layers, numbers, keep_ratio, seed))
    if alpha is None:
        alpha = index.manifest.settings.alpha if index is not None else 0.4
    if mode is Mode.STABILITY:
        return StabilityPredictor(keep_ratio, score, numbers, alpha)
    if index is None:
        raise ConfigError(f"mode {mode.value} needs an index; build one with 'coreinfer-sim build-index'.")
    if mode is Mode.GLOBAL:
        return FixedPredictor(index.global_selection(keep_ratio, score, sparse_layers, compensated))
    if mode is Mode.HYBRID:
        return HybridPredictor(index, keep_ratio, score, sparse_layers, alpha)
    if fallback is None:
        has_fitted = compensated and score is Score.ENERGY and index.has_compensation(keep_ratio)
        fallback = Fallback.GLOBAL if has_fitted else Fallback.HYBRID
    otherwise = make_fallback(Fallback(fallback), index, keep_ratio, score, sparse_layers, alpha, compensated)
    return SimilarityPredictor(index, keep_ratio, score, sparse_layers, otherwise, compensated)
