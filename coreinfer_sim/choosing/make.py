"""Makes the predictor of a mode."""

from __future__ import annotations

from collections.abc import Sequence

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import Fallback, Mode, Score, check_ratio, parse_layers
from coreinfer_sim.choosing.compatibility import check_model
from coreinfer_sim.choosing.index_sets import IndexSets, default_sets
from coreinfer_sim.choosing.predictors import FixedPredictor, Predictor, StabilityPredictor, random_selection
from coreinfer_sim.choosing.routing import HybridPredictor, SimilarityPredictor
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.mlps import MLPLayer

_ALPHA = 0.4
"""Where no index says it."""


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
    # 1) Which layers
    if sparse_layers is None:
        sparse_layers = ":" if index is None else index.recorded
    numbers = sorted(parse_layers(sparse_layers, len(layers)))
    if not numbers:
        raise ConfigError(f"layers is {sparse_layers!r}, which names none of the model's {len(layers)} layers.")
    if index is not None:
        check_model(index, layers)
    # 2) Modes that need no index
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
        alpha = index.manifest.settings.alpha if index is not None else _ALPHA
    if mode is Mode.STABILITY:
        return StabilityPredictor(keep_ratio, score, numbers, alpha)
    # 3) Modes that take sets from the index
    if index is None:
        raise ConfigError(f"mode {mode.value} needs an index; build one with 'coreinfer-sim build-index'.")
    sets = IndexSets(index, keep_ratio, score, sparse_layers, compensated)
    if mode is Mode.GLOBAL:
        return FixedPredictor(sets.of_corpus())
    if mode is Mode.HYBRID:
        return HybridPredictor(sets, alpha)
    if fallback is None:
        fallback = Fallback.GLOBAL if sets.compensated else Fallback.HYBRID
    return SimilarityPredictor(sets, make_fallback(Fallback(fallback), sets, alpha))


def make_fallback(fallback: Fallback, sets: IndexSets, alpha: float) -> HybridPredictor | NeuronSelection | None:
    """Make what similarity mode does for unfamiliar prompts; None: their cluster's set all the same."""
    if fallback is Fallback.HYBRID:
        return HybridPredictor(sets, alpha)
    if fallback is Fallback.GLOBAL:
        return sets.of_corpus()
    return NeuronSelection(Mode.DENSE.value) if fallback is Fallback.DENSE else None
