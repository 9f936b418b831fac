"""Whether texts of like meaning have like core neurons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coreinfer_sim.analysis.experiment import SCORES, Experiment, Picture, Setting
from coreinfer_sim.analysis.intervals import Measure, Sums, ratio
from coreinfer_sim.analysis.pairs import common_of_pairs, pairs_of, shared_tokens
from coreinfer_sim.base.analysis_settings import AnalysisConfig
from coreinfer_sim.base.rows import Row

_LEAST = 8
"""Texts of a block whose pairs are ranked."""
_SIMILARITY, _SHUFFLED, _TOKENS, _BEYOND = "similarity", "shuffled pairs", "shared tokens", "similarity beyond tokens"
_KINDS = (_SIMILARITY, _SHUFFLED, _TOKENS, _BEYOND)


class Similarity(Experiment):
    """Spearman's correlation over the pairs within blocks of random texts, mean over blocks.

    The overlap of two texts' sets is ranked beside the cosine similarity of their embeddings, beside that of other pairs, and
    beside the tokens that they share; "beyond tokens" is the partial correlation with similarity, shared tokens held fixed.
    """

    @classmethod
    def picture(cls, _config: AnalysisConfig) -> Picture:
        """Say how the numbers are drawn."""
        return Picture(
            "Rank correlation of the core neurons that two texts share",
            x="layer",
            x_title="layer",
            y_title="Spearman's ρ with their",
            series=("measure",),
            where={"score": ("counts",)},
        )

    unit = "blocks"
    needs_encoder = True
    least_texts = _LEAST

    def __init__(self, setting: Setting) -> None:
        """Begin with no text."""
        super().__init__(setting)
        self.counted("blocks")
        self.counted("correlations", len(SCORES), setting.reader.n_layers + 1, len(_KINDS), kind=np.float64)

    def add(self, group: int, number: int, rows: Sequence[Row], ids: list[list[int]]) -> None:
        """Rank the pairs of a block, by each layer and by the mean over layers."""
        common = common_of_pairs(self.reader, ids, self.config.alpha, self.config.beta)
        if len(rows) < _LEAST:
            return
        embeddings = self.encoders[0].encode([row.prompt for row in rows])
        similarity = (embeddings @ embeddings.T)[pairs_of(len(rows))]
        others = np.random.default_rng([self.config.seed, number]).permutation(len(rows))
        shuffled = (embeddings[others] @ embeddings.T[:, others])[pairs_of(len(rows))]
        tokens = shared_tokens(ids)
        for score in range(len(SCORES)):
            layers = [*common[score], common[score].sum(axis=0)]
            self.sums["correlations"][group, score] += _correlations(np.array(layers), similarity, shuffled, tokens)
        self.sums["blocks"][group] += 1

    def measures(self, sums: Sums) -> list[Measure]:
        """Return the correlations by layer, and that of the overlap over all layers."""
        found = []
        for score, name in enumerate(SCORES):
            for place in (self.reader.n_layers, *range(self.reader.n_layers)):
                whole = place == self.reader.n_layers
                where = {"layers": "all"} if whole else {"layer": self.reader.layers[place].number}
                for kind, measure in enumerate(_KINDS):
                    value = ratio(sums["correlations"][score, place, kind], sums["blocks"])
                    found.append(Measure({"measure": measure, "score": name, **where}, value))
        return found


def _correlations(common: np.ndarray, similarity: np.ndarray, shuffled: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return each of `_KINDS` for overlaps [n_layers, n_pairs], as [n_layers, n_kinds]; 0 where all pairs are alike."""
    from scipy.stats import rankdata

    ranks = rankdata(np.vstack([common, similarity, shuffled, tokens]), axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    ranks /= np.maximum(np.linalg.norm(ranks, axis=1, keepdims=True), np.finfo(float).tiny)
    n = len(common)
    rho = ranks[:n] @ ranks[n:].T
    between = ranks[n] @ ranks[n + 2]
    room = (1 - rho[:, 2] ** 2) * (1 - between**2)
    beyond = (rho[:, 0] - rho[:, 2] * between) / np.sqrt(np.maximum(room, np.finfo(float).tiny))
    return np.column_stack([rho, np.where(room > 1e-12, beyond, 0.0)])
