"""Perplexity where MLPs have a token's core neurons alone, or those of its text: what α and β cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from coreinfer_sim.analysis.experiment import Experiment, Picture, Setting, core_masks
from coreinfer_sim.analysis.intervals import Measure, Sums, ratio
from coreinfer_sim.analysis.reading import Edit
from coreinfer_sim.analysis.texts import Batch
from coreinfer_sim.base.analysis_settings import AnalysisConfig
from coreinfer_sim.base.rows import Row
from coreinfer_sim.choosing.statistics import ActivationStatistics, activation_statistics

SHARES = (0.2, 0.4, 0.7)
_POSITIVE, _SIZE = "token: positive values", "token: by size"
_OF_TEXT = ("text: counts", "text: energy")
_WAYS = (
    *((_POSITIVE, share) for share in (*SHARES, 1.0)),
    *((_SIZE, share) for share in SHARES),
    *((name, share) for name in _OF_TEXT for share in SHARES),
)


class AlphaBeta(Experiment):
    """All tokens of a text are read with the neurons that are left, as the paper measures it.

    A token keeps the top share α of its positive activations, or of all that are not zero by their size; a text keeps the top
    share β by either score, of the activations that the dense model had on it.
    """

    @classmethod
    def picture(cls, _config: AnalysisConfig) -> Picture:
        """Say how the numbers are drawn."""
        return Picture(
            "Perplexity where neurons are left out",
            x="share",
            x_title="share of neurons that are kept",
            y_title="perplexity over dense",
            series=("kept",),
            where={"measure": ("perplexity over dense",)},
            is_log=True,
        )

    def __init__(self, setting: Setting) -> None:
        """Begin with no text."""
        super().__init__(setting)
        self.counted("tokens")
        self.counted("dense", kind=np.float64)
        self.counted("losses", len(_WAYS), kind=np.float64)

    def add(self, group: int, number: int, rows: Sequence[Row], ids: list[list[int]]) -> None:
        """Score a block with each way."""
        for batch in self.reader.scored(ids):
            statistics: dict[int, ActivationStatistics] = {}
            self.sums["dense"][group] += self.reader.losses(batch, self._noted(batch, statistics)).sum()
            self.sums["tokens"][group] += int(batch.attention_mask[:, 1:].sum())
            for place, (name, share) in enumerate(_WAYS):
                edit = self._of_text(batch, statistics, name, share) if name in _OF_TEXT else _of_token(name, share)
                self.sums["losses"][group, place] += self.reader.losses(batch, edit).sum()

    def _noted(self, batch: Batch, statistics: dict[int, ActivationStatistics]) -> Edit:
        """Change nothing, and note each text's statistics by layer."""
        is_token = batch.attention_mask.flatten().bool()
        n_rows, n_positions = batch.attention_mask.shape

        def note(place: int, z: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            kept = is_token.to(z.device)[positions]
            rows = (positions[kept] // n_positions).cpu().numpy()
            starts = np.searchsorted(rows, np.arange(n_rows + 1))
            statistics[place] = activation_statistics(z[kept], starts, self.config.alpha)
            return z

        return note

    def _of_text(self, batch: Batch, statistics: dict[int, ActivationStatistics], name: str, share: float) -> Edit:
        masks = {
            place: torch.from_numpy(core_masks(found, share)[_OF_TEXT.index(name)])
            for place, found in statistics.items()
        }
        n_positions = batch.attention_mask.shape[1]

        def kept(place: int, z: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return z * masks[place].to(z.device)[positions // n_positions]

        return kept

    def measures(self, sums: Sums) -> list[Measure]:
        """Return the perplexity of each way as a multiple of the dense model's."""
        n = sums["tokens"]
        found = [
            Measure(
                {"measure": "perplexity over dense", "kept": name, "share": share},
                math.exp(min(ratio(sums["losses"][place] - sums["dense"], n), 700.0)),
                is_ratio=True,
            )
            for place, (name, share) in enumerate(_WAYS)
        ]
        return [*found, Measure({"measure": "perplexity, dense"}, math.exp(ratio(sums["dense"], n)), is_ratio=True)]


def _of_token(name: str, share: float) -> Edit:
    def kept(_place: int, z: torch.Tensor, _positions: torch.Tensor) -> torch.Tensor:
        by = z.abs() if name == _SIZE else z
        return z * top_of_tokens(by, share)

    return kept


def top_of_tokens(values: torch.Tensor, share: float) -> torch.Tensor:
    """Mark the top share of each token's positive values, bool [n_tokens, d_ff]."""
    if share == 1.0 or not len(values):  # an expert may get no token
        return values > 0
    counts = activation_statistics(values, np.arange(len(values) + 1), share).counts
    return torch.from_numpy(counts > 0).to(values.device)
