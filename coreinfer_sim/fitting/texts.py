"""The corpus that compensation is fitted to, trained on and compared on, with the model that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from coreinfer_sim.base.corpus import Sentence
from coreinfer_sim.base.settings import BuildConfig, CompensationConfig
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.fitting.calibration import CalibrationText
from coreinfer_sim.index.clustering import Clustering
from coreinfer_sim.index.compensated import load_compensated, save_compensated
from coreinfer_sim.models.loading import LanguageModel

_MOST_HELD = 48


@dataclass(frozen=True)
class CalibrationCorpus:
    """What the compensation stages of a build share."""

    language_model: LanguageModel
    sentences: Sequence[Sentence]
    clustering: Clustering
    """Of the sentences."""
    config: BuildConfig
    """With compensation."""
    max_tokens: int
    """Longer texts are cut."""
    folder: Path
    """Of the build."""

    @property
    def settings(self) -> CompensationConfig:
        """Of the compensation."""
        assert self.config.compensation is not None
        return self.config.compensation

    @property
    def n_clusters(self) -> int:
        """Of the index."""
        return len(self.clustering.centroids)

    @cached_property
    def held_out(self) -> np.ndarray:
        """Which sentences no set is fitted to, so that sets can be compared on them, bool [n_sentences].

        They are at most an eighth of each cluster.
        """
        held = np.zeros(len(self.sentences), bool)
        order = self._order()
        for cluster in range(self.n_clusters):
            members = order[self.clustering.assignment[order] == cluster]
            held[members[len(members) - min(_MOST_HELD, len(members) // 8) :]] = True
        return held

    def _order(self) -> np.ndarray:
        return np.random.default_rng(self.config.seed).permutation(len(self.sentences))

    def texts(
        self, cluster: int | None, n_tokens: int, from_end: bool = False
    ) -> tuple[list[int], list[CalibrationText]]:
        """Tokenise ``n_tokens`` tokens of a cluster's sentences, or of the whole corpus's, in random order.

        Args:
            cluster: whose sentences; None: all.
            n_tokens: if there are as many, those left out that are held out.
            from_end: the order's last sentences, the last first.

        Returns:
            The sentences' places in the corpus, and their texts.
        """
        order = self._order()
        order = order[~self.held_out[order]]
        if from_end:
            order = order[::-1]
        if cluster is not None:
            order = order[self.clustering.assignment[order] == cluster]
        texts: list[CalibrationText] = []
        n_found = 0
        for i in order:
            if n_found >= n_tokens:
                break
            texts.append(self.text(i))
            n_found += len(texts[-1].ids)
        return order[: len(texts)].tolist(), texts

    def text(self, place: int) -> CalibrationText:
        """Tokenise the sentence at a place."""
        return calibration_text(self.language_model, self.sentences[place], self.max_tokens)

    def load(self, path: Path) -> NeuronSelection:
        """Read a compensated set from the build folder."""
        layers = self.language_model.layers
        ids, repairs = load_compensated(path, layers[0].d_model, len(layers))
        return NeuronSelection("compensated", ids, compensation=repairs)


def save_selection(path: Path, selection: NeuronSelection) -> None:
    """Write a selection with its compensation."""
    assert selection.compensation is not None
    save_compensated(path, selection.ids, selection.compensation)


def calibration_text(language_model: LanguageModel, sentence: Sentence, max_tokens: int) -> CalibrationText:
    """Tokenise a sentence and find where its prompt ends; where the text is the prompt alone, in its middle.

    A text that is too long loses the prompt's beginning and the completion's end, so that of either half is left.
    """
    tokenizer = language_model.tokenizer
    place = sentence.text.find(sentence.prompt)
    end = place + len(sentence.prompt)
    ids = tokenizer(sentence.text, verbose=False)["input_ids"]
    if place < 0 or not sentence.text[end:].strip():
        ids = ids[:max_tokens]
        return CalibrationText(ids, len(ids) // 2)
    n_prompt = min(len(tokenizer(sentence.text[:end], verbose=False)["input_ids"]), len(ids) - 1)
    ids = ids[: max(n_prompt + max_tokens // 2, max_tokens)]
    n_cut = max(0, len(ids) - max_tokens)
    return CalibrationText([*ids[:1], *ids[n_cut + 1 :]], max(0, n_prompt - n_cut))
