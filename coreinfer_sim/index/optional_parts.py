"""What an index may hold beside its clusters and their statistics, each in a file of its own that is read when it is needed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coreinfer_sim.base.errors import IndexFormatError, MissingMapError, MissingSumsError
from coreinfer_sim.base.extra import require
from coreinfer_sim.index.clusters import Cluster
from coreinfer_sim.index.manifest import (
    HISTOGRAMS_FILE,
    MAP_FILE,
    NEURONS_FILE,
    REBUILD,
    REFIT_FILE,
    SUMS_FILE,
    Manifest,
)
from coreinfer_sim.index.plot import map_chart
from coreinfer_sim.index.prompt_map import Place, PromptMap, read_map
from coreinfer_sim.index.storage import read_histograms, read_statistics
from coreinfer_sim.index.sums import Sums, read_sums
from coreinfer_sim.index.verified import VerifiedFile

if TYPE_CHECKING:  # an index is looked up and described without torch
    from coreinfer_sim.index.compensated import Refit


class OptionalParts(ABC):
    """The optional parts of one index."""

    manifest: Manifest
    clusters: list[Cluster]
    name: str
    _folder: Path | None

    @cached_property
    def histograms(self) -> dict[str, np.ndarray]:
        """What neurons are estimated to count where the corpus's texts are decoded, as counts by layout, [n_layers, n_bins].

        The build has them from the engine; they are empty where it has measured none.

        Raises:
            IndexFormatError: the file is damaged.
        """
        manifest = self.manifest
        if self._folder is None or not manifest.histograms:
            return {}
        file = VerifiedFile(self._folder / HISTOGRAMS_FILE, manifest.files[HISTOGRAMS_FILE])
        return read_histograms(file, manifest.histograms, manifest.model.n_layers)

    @cached_property
    def map(self) -> PromptMap:
        """Prompts of the corpus as dots of the plane; whether there is a map, ``manifest.map`` tells.

        Raises:
            MissingMapError: there is none.
            IndexFormatError: the file is damaged.
        """
        manifest = self.manifest
        if self._folder is None or manifest.map is None:
            raise MissingMapError(
                f"{self.name} has no map of its prompts, expected one of this release's indexes; {REBUILD}."
            )
        file = VerifiedFile(self._folder / MAP_FILE, manifest.files[MAP_FILE])
        return read_map(file, manifest.map, manifest.encoder.dimension, manifest.settings.n_clusters)

    def place(self, text: str) -> Place:
        """Return where a prompt stands on the map: at the weighted mean of the dots nearest in meaning.

        Raises:
            MissingMapError: the index has no map.
        """
        return self.map.place(self._embed([text])[0])

    @abstractmethod
    def _embed(self, texts: list[str]) -> np.ndarray:
        """Return embeddings, [n_texts, dimension]."""

    def plot(self, prompt: str | None = None) -> Any:
        """Return the map as an Altair chart, and on it a prompt; a notebook shows it.

        Raises:
            MissingMapError: the index has no map.
            ConfigError: the extra ``plots`` is not installed.
        """
        require("a plot", "plots", "altair")
        place = None if prompt is None else self.place(prompt)
        return map_chart(self.map, self.clusters, prompt, place)

    def sums(self) -> Sums:
        """Read the exact sums, all at once.

        Raises:
            MissingSumsError: there are none.
            IndexFormatError: the file is damaged.
        """
        manifest = self.manifest
        if self._folder is None or manifest.sums is None:
            raise MissingSumsError(
                f"{self.name} holds no exact sums, which extending, merging and reclustering add up, as an earlier release built "
                f"it; {REBUILD} to get them."
            )
        shape = (manifest.settings.n_clusters, len(manifest.settings.layers), manifest.model.d_ff)
        files = {name: VerifiedFile(self._folder / name, manifest.files[name]) for name in (NEURONS_FILE, SUMS_FILE)}
        statistics = {name: array.whole() for name, array in read_statistics(files[NEURONS_FILE], shape).items()}
        return read_sums(files[SUMS_FILE], statistics, manifest.corpus.n_sentences)

    def refit(self, read_ratio: float) -> Refit | None:
        """Return what was fitted for tokens that read such a share of all neurons, or None if nothing was.

        Raises:
            IndexFormatError: the file is damaged.
        """
        from coreinfer_sim.index.compensated import Refit, load_compensated

        info, model = self.manifest.refit, self.manifest.model
        if self._folder is None or info is None or not math.isclose(info.read_ratio, read_ratio):
            return None
        ids, changes = load_compensated(
            self._folder / REFIT_FILE, model.d_model, model.n_layers, self.manifest.files[REFIT_FILE]
        )
        if [len(ids.get(number, ())) for number in range(model.n_layers)] != [model.d_ff] * model.n_layers:
            raise IndexFormatError(f"{self._folder / REFIT_FILE} lacks layers or neurons; {REBUILD}.")
        return Refit(info.read_ratio, info.layout, changes)
