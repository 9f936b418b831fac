"""The clustered corpus that the stages of a build work on, with the model that reads it: the same in every process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.rows import Row
from coreinfer_sim.base.settings import BuildConfig, members_within
from coreinfer_sim.index.clustering import Clustering
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import MLPLayer

UNSEEN_FILE = "unseen.json"
"""In the folder of a build: numbers of the sentences on which is measured what the index promises."""
_MOST_HELD = 48


@dataclass(frozen=True)
class CalibrationText:
    """One text as token ids, and how many of them are the prompt."""

    ids: Sequence[int]
    n_prompt: int


@dataclass(frozen=True)
class ClusteredCorpus:
    """What every process of a build has in memory."""

    language_model: LanguageModel
    sentences: Sequence[Row]
    clustering: Clustering
    """Of the sentences."""
    config: BuildConfig
    max_tokens: int
    """Longer texts are cut."""
    folder: Path
    """Of the build; each stage leaves its results there."""

    @cached_property
    def layers(self) -> list[MLPLayer]:
        """The layers whose statistics are recorded, and which become sparse."""
        return recorded_layers(self.language_model, self.config)

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

    @cached_property
    def unseen(self) -> np.ndarray:
        """Which sentences nothing is fitted to: those held out, and those of the promise, bool [n_sentences]."""
        unseen: np.ndarray = self.held_out.copy()
        path = self.folder / UNSEEN_FILE
        if path.exists():
            unseen[json.loads(path.read_text(encoding="utf-8"))] = True
        return unseen

    def _order(self) -> np.ndarray:
        return np.random.default_rng(self.config.seed).permutation(len(self.sentences))

    def texts(
        self, cluster: int | None, n_tokens: int, from_end: bool = False
    ) -> tuple[list[int], list[CalibrationText]]:
        """Tokenise ``n_tokens`` tokens of a cluster's sentences, or of the whole corpus's, in random order.

        Args:
            cluster: whose sentences; None: all.
            n_tokens: if there are as many, those left out that are `unseen`.
            from_end: the order's last sentences, the last first.

        Returns:
            The sentences' places in the corpus, and their texts.
        """
        order = self._order()
        order = order[~self.unseen[order]]
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

    def n_fitting_tokens(self) -> int:
        """Return the tokens of all sentences that may be fitted to, about."""
        return sum(
            min(sentence.n_tokens, self.max_tokens)
            for sentence, held in zip(self.sentences, self.unseen.tolist(), strict=True)
            if not held
        )

    def text(self, place: int) -> CalibrationText:
        """Tokenise the sentence at a place."""
        return calibration_text(self.language_model, self.sentences[place], self.max_tokens)


def recorded_layers(language_model: LanguageModel, config: BuildConfig) -> list[MLPLayer]:
    """Return the layers whose statistics a build records.

    Raises:
        ConfigError: the settings name none of the model's layers.
    """
    blocks = [layer.block for layer in language_model.layers]
    numbers = members_within(config.layers, blocks)
    if not numbers:
        raise ConfigError(f"layers is {config.layers!r}, which names none of {len(set(blocks))} layers.")
    return [language_model.layers[number] for number in numbers]


def calibration_text(language_model: LanguageModel, sentence: Row, max_tokens: int) -> CalibrationText:
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
