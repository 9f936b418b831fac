"""How soon a text's core neurons are those that it ends with, and how many change with more tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from coreinfer_sim.analysis.experiment import SCORES, Experiment, Picture, Setting, core_masks
from coreinfer_sim.analysis.intervals import Measure, Sums, ratio
from coreinfer_sim.analysis.texts import Batch
from coreinfer_sim.base.analysis_settings import AnalysisConfig
from coreinfer_sim.base.errors import CorpusError
from coreinfer_sim.base.progress import counted
from coreinfer_sim.base.rows import Row
from coreinfer_sim.choosing.statistics import ActivationStatistics, activation_statistics
from coreinfer_sim.index.ranking import n_kept

_POSITIONS = (8, 16, 32, 64, 100, 128, 200, 256, 300, 400, 512, 1024, 2048)
_MORE = (8, 16, 32, 64)
_FINAL, _OTHER, _MOVED = "overlap with the final set", "overlap with another text's final set", "share that changes"


class Stability(Experiment):
    """Texts are cut to one length, so that all positions are of the same texts."""

    @classmethod
    def picture(cls, _config: AnalysisConfig) -> Picture:
        """Say how the numbers are drawn."""
        return Picture(
            "A text's core neurons so far, and those that it ends with",
            x="position",
            x_title="tokens read",
            y_title="share in common",
            series=("measure", "score"),
            where={"layers": ("all",), "more": (None,)},
        )

    unit = measured = "long"

    def __init__(self, setting: Setting) -> None:
        """Begin with no text.

        Raises:
            CorpusError: texts are cut before the length that is looked at.
        """
        super().__init__(setting)
        length = self.config.length
        if setting.reader.max_tokens < length:
            raise CorpusError(
                f"texts are cut to {setting.reader.max_tokens} tokens, expected {length} or more, which stability looks at; give "
                "a larger max_tokens or a smaller length."
            )
        self.positions = [each for each in _POSITIONS if each < length] + [length]
        self.moves = [(each, more) for each in self.positions for more in _MORE if each + more <= length]
        self.ends = sorted({*self.positions, *(each + more for each, more in self.moves)})
        self.counted("long")
        self.counted("pairs")
        for name, n in (("final", len(self.positions)), ("kept", len(self.moves)), ("other", 1)):
            self.counted(name, len(SCORES), setting.reader.n_layers, n)

    def add(self, group: int, number: int, rows: Sequence[Row], ids: list[list[int]]) -> None:
        """Compare the sets of a block's texts after some tokens with those after more."""
        length = self.config.length
        texts = [each[:length] for each in ids if len(each) >= length]
        final: dict[int, list[np.ndarray]] = {}

        def take(place: int, z: torch.Tensor, batch: Batch) -> None:
            segments = [*range(len(batch.places))]
            starts = np.concatenate([[0], *(row * length + np.array(self.ends) for row in segments)])
            parts = activation_statistics(z, starts, self.config.alpha)
            for row in segments:
                own = slice(row * len(self.ends), (row + 1) * len(self.ends))
                so_far = ActivationStatistics(
                    *(getattr(parts, name)[own].cumsum(axis=0) for name in ("counts", "energy", "activation"))
                )
                masks = dict(zip(self.ends, core_masks(so_far, self.config.beta).swapaxes(0, 1), strict=True))
                for at, position in enumerate(self.positions):
                    self.sums["final"][group, :, place, at] += _common(masks[position], masks[length])
                for at, (position, more) in enumerate(self.moves):
                    self.sums["kept"][group, :, place, at] += _common(masks[position], masks[position + more])
                final.setdefault(place, []).append(masks[length])

        self.reader.activations(texts, take)
        self.sums["long"][group] += len(texts)
        self.sums["pairs"][group] += max(0, len(texts) - 1)
        for place, masks in final.items():
            for one, other in pairwise(masks):
                self.sums["other"][group, :, place, 0] += _common(one, other)

    def check(self) -> None:
        """Raise CorpusError if no text was long enough."""
        if not self.sums["long"].any():
            raise CorpusError(
                f"none of {counted(len(self.texts), 'text')} has {self.config.length} tokens, which stability looks at; give "
                "longer ones or a smaller length."
            )

    def measures(self, sums: Sums) -> list[Measure]:
        """Return overlaps as shares of a set, as a mean over layers and by layer."""
        size, n = n_kept(self.config.beta, self.reader.d_ff), sums["long"]
        found = []
        for score, name in enumerate(SCORES):
            for layer in ("all", *range(self.reader.n_layers)):
                of = slice(None) if layer == "all" else slice(layer, layer + 1)
                where = {"layers": "all"} if layer == "all" else {"layer": self.reader.layers[layer].number}
                more = {"score": name, **where}

                def mean(values: np.ndarray, of: slice = of, score: int = score) -> float:
                    return float(values[score, of].mean())

                for at, position in enumerate(self.positions):
                    labels = {"measure": _FINAL, **more, "position": position, "more": None}
                    found.append(Measure(labels, ratio(mean(sums["final"][..., at]), size * n)))
                    if layer == "all":
                        value = ratio(mean(sums["other"][..., 0]), size * sums["pairs"])
                        found.append(Measure({**labels, "measure": _OTHER}, value))
                for at, (position, further) in enumerate(self.moves):
                    labels = {"measure": _MOVED, **more, "position": position, "more": further}
                    found.append(Measure(labels, 1 - ratio(mean(sums["kept"][..., at]), size * n)))
        return found

    def remarks(self) -> list[str]:
        """Say how many texts were long enough."""
        n = int(self.sums["long"].sum())
        return [
            f"{n:,} of {counted(len(self.texts), 'text')} have {self.config.length} tokens, the others are left out"
        ]


def _common(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Count what two sets have in common by each score, [n_scores]."""
    found: np.ndarray = (one & other).sum(axis=-1)
    return found
