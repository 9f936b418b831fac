"""Makes the predictor of a mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from coreinfer_sim.base.decode_settings import SelectionConfig, with_settings
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import Fallback, Mode, check_ratio, members_within
from coreinfer_sim.choosing.compatibility import check_model
from coreinfer_sim.choosing.index_sets import IndexSets, default_sets
from coreinfer_sim.choosing.predictors import (
    FixedPredictor,
    Predictor,
    ReadingPredictor,
    StabilityPredictor,
    random_selection,
)
from coreinfer_sim.choosing.routing import HybridPredictor, SimilarityPredictor
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.mlps import MLPLayer

_ALPHA = 0.4
"""Where no index says it."""


def make_predictor(
    mode: Mode | str, layers: Sequence[MLPLayer], index: SemanticIndex | None = None, **settings: Any
) -> Predictor:
    """Make the predictor of a mode.

    Args:
        mode: similarity, hybrid, stability, global, random, all or dense.
        layers: the model's MLPs.
        index: needed by similarity, hybrid and global, which then must belong to the model.
        **settings: further fields of `SelectionConfig`, such as ``keep_ratio=0.8``.

    Raises:
        ConfigError: a setting is out of range or missing.
        IndexMismatchError: the index belongs to another model.
    """
    if index is not None:
        check_model(index, layers)
    return predictor_of(with_settings({"mode": mode, **settings}, (SelectionConfig(),))[0], layers, index)


def predictor_of(config: SelectionConfig, layers: Sequence[MLPLayer], index: SemanticIndex | None = None) -> Predictor:
    """Make the predictor that settings ask for, as `make_predictor` does, of an index that has been checked.

    The layers' weights may be rounded ones of the index's model.
    """
    read_ratio = config.read_ratio
    if read_ratio is None or read_ratio == 1:
        return _holding(config, layers, index)
    if config.keep_ratio is None:
        config = replace(config, keep_ratio=1.0)
    if config.fallback is None:
        config = replace(config, fallback=Fallback.DENSE)
    return ReadingPredictor(_holding(config, layers, index), read_ratio, index)


def _holding(config: SelectionConfig, layers: Sequence[MLPLayer], index: SemanticIndex | None) -> Predictor:
    """Make the predictor of what is held."""
    mode, keep_ratio, compensated = config.named_mode, config.keep_ratio, config.compensated
    # 1) Which layers
    sparse_layers = config.sparse_layers
    if sparse_layers is None:
        sparse_layers = ":" if index is None else index.recorded
    blocks = [layer.block for layer in layers]
    numbers = members_within(sparse_layers, blocks)
    if not numbers:
        raise ConfigError(f"layers is {sparse_layers!r}, which names none of the model's {len(set(blocks))} layers.")
    # 2) Modes that need no index
    if mode in (Mode.DENSE, Mode.ALL):
        return FixedPredictor(NeuronSelection(mode.value))
    if keep_ratio is None:
        if index is None:
            if mode in (Mode.SIMILARITY, Mode.HYBRID, Mode.GLOBAL):
                raise ConfigError(f"mode {mode.value} needs an index; build one with 'coreinfer-sim build-index'.")
            raise ConfigError(f"mode {mode.value} has no index to take the keep ratio from; give a keep ratio.")
        keep_ratio, compensated = default_sets(index, mode, config.score, compensated)
    check_ratio("keep ratio", keep_ratio)
    if mode is Mode.RANDOM:
        return FixedPredictor(random_selection(layers, numbers, keep_ratio, config.seed))
    alpha = config.alpha
    if alpha is None:
        alpha = index.manifest.settings.alpha if index is not None else _ALPHA
    if mode is Mode.STABILITY:
        return StabilityPredictor(keep_ratio, config.score, numbers, alpha)
    # 3) Modes that take sets from the index
    if index is None:
        raise ConfigError(f"mode {mode.value} needs an index; build one with 'coreinfer-sim build-index'.")
    sets = IndexSets(index, keep_ratio, config.score, sparse_layers, compensated)
    if mode is Mode.GLOBAL:
        return FixedPredictor(sets.of_corpus())
    if mode is Mode.HYBRID:
        return HybridPredictor(sets, alpha)
    fallback = config.fallback
    if fallback is None:  # a compensated set is better than any that is taken from the prompt
        fallback = Fallback.GLOBAL if sets.compensated else Fallback.HYBRID
    return SimilarityPredictor(sets, make_fallback(fallback, sets, alpha))


def make_fallback(fallback: Fallback, sets: IndexSets, alpha: float) -> HybridPredictor | NeuronSelection | None:
    """Make what similarity mode does for unfamiliar prompts; None: their cluster's set all the same."""
    if fallback is Fallback.HYBRID:
        return HybridPredictor(sets, alpha)
    if fallback is Fallback.GLOBAL:
        return sets.of_corpus()
    return NeuronSelection(Mode.DENSE.value) if fallback is Fallback.DENSE else None
