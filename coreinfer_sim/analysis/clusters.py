"""Whether the texts of a semantic cluster have more core neurons in common than texts of different clusters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from coreinfer_sim.analysis.experiment import SCORES, Experiment, Picture, Setting
from coreinfer_sim.analysis.groups import centroids_name, clusters_of, fit_clusters
from coreinfer_sim.analysis.intervals import Measure, Sums, ratio
from coreinfer_sim.analysis.pairs import common_of_pairs, pairs_of
from coreinfer_sim.base.analysis_settings import AnalysisConfig
from coreinfer_sim.base.rows import Row
from coreinfer_sim.index.ranking import n_kept

_WITHIN, _BETWEEN, _MORE, _PURITY = "overlap within", "overlap between", "overlap within over between", "purity"
_SEMANTIC, _RANDOM, _LABELS = "semantic", "random", "labels"


class Clusters(Experiment):
    """Pairs within blocks of random texts are parted by whether both texts are of one cluster.

    Random clusters are of the same sizes: within a block the texts exchange their clusters. Where labels are known, the same is
    asked of texts of one label; purity is the share of the texts whose label is the most frequent one of their cluster.
    """

    @classmethod
    def picture(cls, _config: AnalysisConfig) -> Picture:
        """Say how the numbers are drawn."""
        return Picture(
            "Core neurons that two texts have in common",
            x="k",
            x_title="number of clusters",
            y_title="share in common",
            series=("measure", "clusters"),
            where={"measure": (_WITHIN, _BETWEEN), "score": ("counts",), "layers": ("all",), "encoder": (0,)},
        )

    needs_encoder = True

    def __init__(self, setting: Setting) -> None:
        """Begin with no text."""
        super().__init__(setting)
        self.ways: list[dict[str, Any]] = [
            {"clusters": clusters, "encoder": place, "k": k}
            for place in range(len(self.encoders))
            for k in self.config.clusters
            for clusters in (_SEMANTIC, _RANDOM)
        ]
        n_clustered = len(self.ways)
        if self.texts.labels:
            self.ways.append({"clusters": _LABELS})
            self.counted("labels", n_clustered, max(self.config.clusters), len(self.texts.labels))
        self.counted("pairs", len(self.ways), 2)
        self.counted("common", len(self.ways), 2, len(SCORES), setting.reader.n_layers)

    def prepare(self) -> None:
        """Fit the clusters."""
        self.memory |= fit_clusters(self.texts, self.encoders, self.config.clusters, self.config.seed, self.progress)

    def add(self, group: int, number: int, rows: Sequence[Row], ids: list[list[int]]) -> None:
        """Part the pairs of a block by each way of grouping texts."""
        common = common_of_pairs(self.reader, ids, self.config.alpha, self.config.beta)
        first, second = pairs_of(len(rows))
        label_of = {label: place for place, label in enumerate(self.texts.labels)}
        labels = np.array([label_of[row.label] for row in rows]) if label_of else None
        for way, groups in enumerate(self._groups(number, rows, labels)):
            same = groups[first] == groups[second]
            for place, pairs in enumerate((same, ~same)):
                self.sums["pairs"][group, way, place] += pairs.sum()
                self.sums["common"][group, way, place] += common[..., pairs].sum(axis=-1)
            if labels is not None and self.ways[way]["clusters"] != _LABELS:
                np.add.at(self.sums["labels"][group, way], (groups, labels), 1)

    def _groups(self, number: int, rows: Sequence[Row], labels: np.ndarray | None) -> list[np.ndarray]:
        """Return the group of each text, for each way."""
        others = np.random.default_rng([self.config.seed, number]).permutation(len(rows))
        found = []
        for place, encoder in enumerate(self.encoders):
            centroids = [self.memory[centroids_name(place, k)] for k in self.config.clusters]
            for semantic in clusters_of(rows, encoder, centroids):
                found += [semantic, semantic[others]]
        return found if labels is None else [*found, labels]

    def measures(self, sums: Sums) -> list[Measure]:
        """Return overlaps as shares of a set, as a mean over layers and by layer, and purities."""
        size = n_kept(self.config.beta, self.reader.d_ff)
        found = []
        for way, labels in enumerate(self.ways):
            pairs = sums["pairs"][way]
            for score, name in enumerate(SCORES):
                for layer in ("all", *range(self.reader.n_layers)):
                    of = slice(None) if layer == "all" else slice(layer, layer + 1)
                    where = {"layers": "all"} if layer == "all" else {"layer": self.reader.layers[layer].number}
                    counts = sums["common"][way, :, score, of].mean(axis=-1)
                    within, between = (ratio(counts[place], pairs[place] * size) for place in (0, 1))
                    values = {_WITHIN: within, _BETWEEN: between, _MORE: within - between}
                    more = {"score": name, **labels, **where}
                    found += [Measure({"measure": measure, **more}, value) for measure, value in values.items()]
            if "labels" in sums and labels["clusters"] != _LABELS:
                table = sums["labels"][way]
                found.append(Measure({"measure": _PURITY, **labels}, ratio(table.max(axis=1).sum(), table.sum())))
        return found

    def remarks(self) -> list[str]:
        """Name the encoders by their places."""
        return [f"encoder {place} is {encoder.name}" for place, encoder in enumerate(self.encoders)]
