"""How activations differ by layer: how many are positive, how few carry the energy, and how much of that is fixed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from coreinfer_sim.analysis.alpha_beta import top_of_tokens
from coreinfer_sim.analysis.experiment import SCORES, Experiment, Picture, Setting, core_masks
from coreinfer_sim.analysis.intervals import Measure, Sums, ratio
from coreinfer_sim.analysis.texts import Batch
from coreinfer_sim.base.analysis_settings import AnalysisConfig
from coreinfer_sim.base.rows import Row
from coreinfer_sim.choosing.statistics import activation_statistics
from coreinfer_sim.index.ranking import n_kept

_OFTEN = 0.9
_UNIT = 2.0**-30
"""Of energies, which are added as integers."""
_MEASURES = (
    "positive activations",
    "energy in a token's own top share",
    "energy in its text's set by counts",
    "energy in its text's set by energy",
    "in common with the token before",
    "in common with another text by counts",
    "in common with another text by energy",
    f"in the top share of {_OFTEN:.0%} of the tokens",
)


class Layers(Experiment):
    """A token's top share are β of the neurons that are not zero for it, by the size of the activation."""

    @classmethod
    def picture(cls, _config: AnalysisConfig) -> Picture:
        """Say how the numbers are drawn."""
        return Picture(
            "Activations by layer",
            x="layer",
            x_title="layer",
            y_title="share",
            series=("measure",),
            where={},
        )

    def __init__(self, setting: Setting) -> None:
        """Begin with no text."""
        super().__init__(setting)
        n_layers = setting.reader.n_layers
        self.counted("tokens")
        self.counted("followed")
        self.counted("pairs")
        for name in ("positive", "top_energy", "adjacent", "top"):
            self.counted(name, n_layers)
        self.counted("set_energy", len(SCORES), n_layers)
        self.counted("other", len(SCORES), n_layers)
        self.counted("needed", n_layers, setting.reader.d_ff)

    def add(self, group: int, number: int, rows: Sequence[Row], ids: list[list[int]]) -> None:
        """Add up a block's tokens."""
        sums, beta = self.sums, self.config.beta
        sets: list[dict[int, np.ndarray]] = [{} for _ in range(self.reader.n_layers)]

        def take(place: int, z: torch.Tensor, batch: Batch) -> None:
            starts = batch.starts
            statistics = activation_statistics(z, starts, self.config.alpha)
            masks = core_masks(statistics, beta)
            top = top_of_tokens(z.abs(), beta)
            square = z.float().square()
            energy = square / square.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            both = (top[1:] & top[:-1]).sum(-1)
            inner = torch.ones(len(z) - 1, dtype=torch.bool, device=z.device)
            inner[torch.as_tensor(starts[1:-1] - 1, device=z.device)] = False  # a text's last and the next one's first
            sums["positive"][group, place] += int((z > 0).sum())
            sums["top"][group, place] += int(top[1:][inner].sum())
            sums["adjacent"][group, place] += int(both[inner].sum())
            sums["top_energy"][group, place] += _units((energy * top).double().sum())
            sums["needed"][group, place] += top.sum(0).cpu().numpy()
            for score in range(len(SCORES)):
                sums["set_energy"][group, score, place] += _units((statistics.energy * masks[score]).sum(dtype=float))
            for row, text in enumerate(batch.places.tolist()):
                sets[place][text] = masks[:, row]

        self.reader.activations(ids, take)
        n = [len(each) for each in ids]
        sums["tokens"][group] += sum(n)
        sums["followed"][group] += sum(n) - len(n)
        sums["pairs"][group] += max(0, len(n) - 1)
        for place, found in enumerate(sets):
            for one, other in pairwise(found[text] for text in sorted(found)):
                sums["other"][group, :, place] += (one & other).sum(axis=-1)

    def measures(self, sums: Sums) -> list[Measure]:
        """Return each share by layer, and its mean over layers."""
        size = n_kept(self.config.beta, self.reader.d_ff)
        n = sums["tokens"]
        often = (sums["needed"] >= _OFTEN * n).mean(axis=1)
        of_layers = np.array(
            [
                [
                    ratio(sums["positive"][place], n * self.reader.d_ff),
                    ratio(sums["top_energy"][place] * _UNIT, n),
                    *(ratio(sums["set_energy"][score, place] * _UNIT, n) for score in range(len(SCORES))),
                    ratio(sums["adjacent"][place], sums["top"][place]),
                    *(ratio(sums["other"][score, place], sums["pairs"] * size) for score in range(len(SCORES))),
                    float(often[place]),
                ]
                for place in range(self.reader.n_layers)
            ]
        )
        found = [
            Measure({"measure": name, "layers": "all"}, float(value))
            for name, value in zip(_MEASURES, of_layers.mean(axis=0), strict=True)
        ]
        for layer, values in zip(self.reader.layers, of_layers, strict=True):
            found += [
                Measure({"measure": name, "layer": layer.number}, float(value))
                for name, value in zip(_MEASURES, values, strict=True)
            ]
        return found


def _units(energy: object) -> int:
    return round(float(energy) / _UNIT)  # type: ignore[arg-type]
