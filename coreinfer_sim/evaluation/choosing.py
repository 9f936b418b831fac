"""The selections of contenders, each cluster's made only once."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import torch

from coreinfer_sim.base.decode_settings import SelectionConfig
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import Mode, Score
from coreinfer_sim.choosing.index_sets import IndexSets
from coreinfer_sim.choosing.make import predictor_of
from coreinfer_sim.choosing.predictors import Predictor
from coreinfer_sim.choosing.selection import NeuronSelection, refitted
from coreinfer_sim.choosing.statistics import ActivationStatistics
from coreinfer_sim.evaluation.cases import Case
from coreinfer_sim.evaluation.contenders import NEED_INDEX, Contender
from coreinfer_sim.index.compensated import Refit
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.ranking import n_kept, top_ids
from coreinfer_sim.models.loading import LanguageModel

_RANKED_BY = {"stability": Score.PAPER, "griffin": Score.ENERGY}
"""Contenders that take the prompt's own neurons, in stability mode."""


class Chooser:
    """Makes the selections of contenders for a case.

    All make the layers sparse that the index recorded, so that they are compared at equal bytes; without an index, all layers.
    """

    def __init__(
        self, language_model: LanguageModel, index: SemanticIndex | None, seed: int, refit: Refit | None = None
    ) -> None:
        """Choose among the neurons of a model.

        Args:
            language_model: whose neurons they are.
            index: needed by those that route by meaning.
            seed: of random choices.
            refit: of an index that is still to be written.
        """
        self._refit = refit
        self._language_model, self._index, self._seed = language_model, index, seed
        self._numbers = list(range(len(language_model.layers))) if index is None else index.manifest.settings.layers
        self._clusters: dict[tuple[Contender, int], NeuronSelection] = {}
        self._predictors: dict[Contender, Predictor] = {}

    def choose(self, contender: Contender, case: Case) -> NeuronSelection:
        """Return a contender's selection for a case.

        Raises:
            ConfigError: the contender needs an index, or sets that the index does not hold.
        """
        index, ratio = self._index, contender.keep_ratio
        if index is None and contender.name in NEED_INDEX:
            raise ConfigError(f"the contender {contender.name} needs an index; give one.")
        if contender.compensated and index is not None and not index.manifest.holds_sets(ratio):
            raise ConfigError(
                f"{index.name} holds no sets compensated at keep ratio {ratio:g}, but {contender} needs them; name another "
                "keep ratio, or build the index with compensation."
            )
        if contender.name == "oracle":
            return replace(self._oracle(contender, case), read_ratio=contender.read_ratio)
        if contender.name == "random-cluster" and index is not None:
            return replace(self._random_cluster(index, contender, case), read_ratio=contender.read_ratio)
        if contender not in self._predictors:
            self._predictors[contender] = predictor_of(self._config(contender), self._language_model.layers, index)
        chosen = self._predictors[contender].select([case.row.prompt], case.statistics, n_rows=1)
        assert chosen is not None
        return chosen[0] if self._refit is None else refitted(chosen[0], self._refit)

    def _config(self, contender: Contender) -> SelectionConfig:
        own = contender.name in _RANKED_BY
        return SelectionConfig(
            mode=Mode.STABILITY if own else Mode(contender.name),
            keep_ratio=contender.keep_ratio,
            score=_RANKED_BY[contender.name] if own else contender.score,
            fallback=contender.fallback,
            compensated=contender.compensated,
            read_ratio=contender.read_ratio,
            seed=self._seed,
        )

    def _oracle(self, contender: Contender, case: Case) -> NeuronSelection:
        statistics = case.oracle_statistics()

        def ids(s: ActivationStatistics) -> torch.Tensor:
            n = n_kept(contender.keep_ratio, s.energy.shape[1])
            return torch.from_numpy(top_ids(s.energy[0], s.activation[0], n))

        reached = [number for number in self._numbers if number in statistics]  # not all experts are, by few tokens
        return NeuronSelection(contender.name, {number: ids(statistics[number]) for number in reached})

    def _random_cluster(self, index: SemanticIndex, contender: Contender, case: Case) -> NeuronSelection:
        row = zlib.crc32(f"{case.row.set_name}/{case.row.id}".encode())  # the same draw when a log is continued
        cluster = int(np.random.default_rng([self._seed, row]).integers(len(index)))
        key = contender, cluster
        if key not in self._clusters:
            sets = IndexSets(index, contender.keep_ratio, contender.score, None, contender.compensated)
            self._clusters[key] = replace(sets.of_cluster(cluster), mode=contender.name)
        return self._clusters[key]
