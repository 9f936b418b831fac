"""The sets of neurons that an index gives: each cluster's and the whole corpus's, compensated where there are such."""

from __future__ import annotations

from dataclasses import replace

from coreinfer_sim.base.settings import Mode, Score
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.index.clusters import Match
from coreinfer_sim.index.index import SemanticIndex

_ROUTED_OR_GLOBAL = (Mode.SIMILARITY, Mode.GLOBAL)


def wanted_sets(index: SemanticIndex, keep_ratio: float | None = None, compensated: bool = True) -> tuple[float, bool]:
    """Return the keep ratio that decodes, and whether compensated sets do.

    Args:
        index: that the sets come from.
        keep_ratio: None uses the profile's if it is of sets; without such a one, that of the first compensated sets, else the
            build's γ.
        compensated: False: plain sets; None uses `Manifest.plain_keep_ratio` then.
    """
    manifest = index.manifest
    if keep_ratio is not None:
        return keep_ratio, compensated and manifest.holds_sets(keep_ratio)
    if compensated and manifest.profile is not None and manifest.profile.of_sets:
        return manifest.profile.keep_ratio, manifest.profile.compensated
    if compensated and manifest.compensation:
        return manifest.compensation[0].keep_ratio, True
    return manifest.plain_keep_ratio, False


def default_sets(
    index: SemanticIndex, mode: Mode, score: Score = Score.ENERGY, compensated: bool = True
) -> tuple[float, bool]:
    """Return what `wanted_sets` does in a mode where no keep ratio is named; only some modes can decode compensated sets."""
    fitted = mode in _ROUTED_OR_GLOBAL and score is Score.ENERGY
    return wanted_sets(index, compensated=compensated and fitted)


class IndexSets:
    """The sets of an index at one keep ratio, each made once."""

    def __init__(
        self,
        index: SemanticIndex,
        keep_ratio: float | None = None,
        score: Score | str = Score.ENERGY,
        layers: str | None = None,
        compensated: bool = True,
    ) -> None:
        """Choose which sets are meant.

        Args:
            index: that the sets come from.
            keep_ratio: share of d_ff that is kept; None uses that of `wanted_sets`.
            score: energy, or the paper's count of sentences, whose sets are never compensated.
            layers: slice of the model's layers, such as ``4:``; None: those that the index recorded.
            compensated: take the compensated sets if the index holds some of this keep ratio and its profile, where no keep
                ratio is named, is not of plain sets; ``score`` does not matter to them.
        """
        self.index, self.score = index, Score(score)
        self.layers = index.recorded if layers is None else layers
        self.keep_ratio, self.compensated = wanted_sets(index, keep_ratio, compensated and self.score is Score.ENERGY)
        """What `wanted_sets` says."""
        self._known: dict[int | None, NeuronSelection] = {}

    def of_match(self, match: Match) -> NeuronSelection:
        """Return the set of a prompt's cluster."""
        return replace(self.of_cluster(match.cluster), similarity=match.similarity, confidence=match.confidence)

    def of_cluster(self, cluster: int) -> NeuronSelection:
        """Return a cluster's set.

        Raises:
            ConfigError: there is no such cluster, or a setting is out of range.
            IndexFormatError: the file of a compensated set is damaged.
        """
        if cluster not in self._known:
            self.index.check_cluster(cluster)
            label = self.index.clusters[cluster].label
            self._known[cluster] = replace(
                self._make(cluster), mode=Mode.SIMILARITY.value, cluster=cluster, label=label
            )
        return self._known[cluster]

    def of_corpus(self) -> NeuronSelection:
        """Return the one set that is meant for all prompts; errors as for `of_cluster`."""
        if None not in self._known:
            self._known[None] = replace(self._make(None), mode=Mode.GLOBAL.value)
        return self._known[None]

    def _make(self, cluster: int | None) -> NeuronSelection:
        if not self.compensated and self.keep_ratio == 1.0:
            return NeuronSelection("statistics")  # all layers stay as they are
        if not self.compensated:
            return NeuronSelection(
                "statistics", self.index.core_neurons(cluster, self.keep_ratio, self.score, self.layers)
            )
        wanted = self.index.rows_of_layers(self.layers)
        ids, compensation = self.index.compensated_set(self.keep_ratio, cluster)
        return NeuronSelection(
            "compensated",
            {layer: ids[layer] for layer in ids if layer in wanted},
            compensation=compensation.only(wanted),
        )
