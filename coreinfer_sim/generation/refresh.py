"""Refreshing the selection of a prompt from the text that is being generated.

The statistics of generated tokens must be dense: a sparse pass sees only the neurons that are kept, so it could never
find one that is missing. Every few tokens, those decoded since are therefore read once more, all in one pass through
the dense MLPs, after a dense copy of the cache. What comes out is what prefill would have found in prompt and text
together; the cache that decodes is never touched.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import Mode
from coreinfer_sim.choosing.predictors import Predictor
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.choosing.statistics import PromptStatistics, SentenceStatistics, sentence_statistics
from coreinfer_sim.models.mlps import MLPLayer
from coreinfer_sim.models.taps import recorded_activations

_MODES = (Mode.STABILITY.value, Mode.HYBRID.value)
_DRIFT_TOKENS = 32
_DRIFTED = 0.9


@dataclass(frozen=True)
class Refresh:
    """When a selection is derived anew."""

    n_tokens: int
    """Tokens between two dense readings."""
    on_drift: bool = False
    """Only take a new selection that would lose clearly less energy over the newest tokens; see `drifted`."""


def parse_refresh(text: str, predictor: Predictor) -> Refresh:
    """Turn ``every:64`` or ``drift`` into when to refresh.

    Raises:
        ConfigError: the text is neither, or the predictor does not read the text.
    """
    if predictor.mode not in _MODES:
        raise ConfigError(
            f"refresh was given with mode {predictor.mode}, whose neurons do not come from the text, expected "
            f"{' or '.join(_MODES)}; leave it out."
        )
    if text == "drift":
        return Refresh(_DRIFT_TOKENS, on_drift=True)
    kind, _, number = text.partition(":")
    if kind != "every" or not number.isdecimal() or int(number) < 1:
        raise ConfigError(f"refresh is {text!r}, expected 'drift' or 'every:N' such as 'every:64'.")
    return Refresh(int(number))


class TextReader:
    """Reads one row's generated tokens densely, after a copy of the cache that prefill left."""

    def __init__(
        self, model: Any, layers: list[MLPLayer], cache: Any, alpha: float, statistics: PromptStatistics
    ) -> None:
        """Begin after the prompt, whose ``statistics`` the text's are added to."""
        self._model, self._layers, self._alpha = model, layers, alpha
        self._cache = copy.deepcopy(cache)
        self._pending: list[torch.Tensor] = []
        self.statistics = dict(statistics)
        self.reading = False

    def add(self, input_ids: torch.Tensor) -> int:
        """Note a decoded token [1, 1], and return how many have not been read."""
        self._pending.append(input_ids)
        return len(self._pending)

    def read(self) -> PromptStatistics:
        """Return the statistics of the tokens that have not been read; the dense MLPs must be in the model."""
        newest: dict[int, SentenceStatistics] = {}
        ids = torch.cat(self._pending, 1)
        self._pending.clear()

        def add(layer: int, z: torch.Tensor) -> None:
            newest[layer] = sentence_statistics(z, np.array([0, len(z)]), self._alpha)

        self.reading = True
        try:
            with recorded_activations(self._layers, add) as tap:
                tap.set_mask(torch.ones_like(ids))
                self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        finally:
            self.reading = False
        self.statistics = {layer: self.statistics[layer] + own for layer, own in newest.items()}
        return newest


def lost_energy(selection: NeuronSelection, statistics: PromptStatistics) -> float:
    """Return the share of one row's energy that a selection's sparse layers leave out, mean over those layers."""
    lost = []
    for layer, ids in selection.ids.items():
        energy = statistics[layer].energy[0].astype(np.float64)
        lost.append(1 - energy[ids.numpy()].sum() / max(energy.sum(), np.finfo(np.float64).tiny))
    return float(np.mean(lost)) if lost else 0.0


def drifted(selection: NeuronSelection, candidate: NeuronSelection, newest: PromptStatistics) -> bool:
    """Return whether the candidate loses under 90 % of the energy over the newest tokens that the selection loses.

    The dense reading is paid for already when this is asked; what it spares is cutting new compact weights for little.
    """
    return lost_energy(candidate, newest) < _DRIFTED * lost_energy(selection, newest)
