"""The manifest of an index: what it was built from, and the checksum of every file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from coreinfer_sim.base.progress import counted
from coreinfer_sim.base.settings import Profile

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
CENTROIDS_FILE = "centroids.faiss"
NEURONS_FILE = "neurons.safetensors"
CLUSTERS_FILE = "clusters.jsonl"
HISTOGRAMS_FILE = "histograms.safetensors"
MAP_FILE = "map.safetensors"
REFIT_FILE = "refit.safetensors"
SUMS_FILE = "sums.safetensors"
INDEX_FILES = (CENTROIDS_FILE, NEURONS_FILE, CLUSTERS_FILE)
COMPENSATION_FOLDER = "compensation"
REBUILD = "build it anew with 'coreinfer-sim build-index'"


def compensation_file(keep_ratio: float, cluster: int | None) -> str:
    """Return a compensated set's file, relative to the index folder; None stands for the whole corpus."""
    name = "global" if cluster is None else f"{cluster:04d}"
    return f"{COMPENSATION_FOLDER}/{keep_ratio:g}/{name}.safetensors"


@dataclass(frozen=True)
class ModelInfo:
    """The language model that an index belongs to."""

    name: str
    revision: str | None
    family: str
    dtype: str
    n_layers: int
    d_model: int
    d_ff: int
    weight_sketch: list[list[float]]
    """A few down-projection weights of each layer, [n_layers][32]."""
    tokenizer_sha256: str
    activation_site: str
    path: str | None = None
    """Where the build found it; None: on the hub, or an earlier release built the index."""
    relative_path: str | None = None
    """The same, from the index folder on."""
    places: list[list[int]] | None = None
    """Of a mixture of experts, whose layers hold several MLPs: each MLP's layer and expert, -1 for one beside the experts."""

    @property
    def blocks(self) -> list[int]:
        """Number of the model's layer that each MLP lies in."""
        return list(range(self.n_layers)) if self.places is None else [layer for layer, _ in self.places]

    def title(self, number: int) -> str:
        """Return what an MLP is called."""
        layer, expert = (number, -1) if self.places is None else self.places[number]
        return f"layer {layer:3d}" + (f" expert {expert:3d}" if expert >= 0 else "")


@dataclass(frozen=True)
class EncoderInfo:
    """The sentence encoder that an index belongs to."""

    name: str
    dimension: int
    normalised: bool
    metric: str
    probe: list[float]
    """First values of a fixed sentence's embedding."""
    path: str | None = None
    """As for `ModelInfo`."""
    relative_path: str | None = None
    """As for `ModelInfo`."""


@dataclass(frozen=True)
class CorpusInfo:
    """The corpus that an index was built over."""

    source: str
    sha256: str
    n_sentences: int
    n_tokens: int


@dataclass(frozen=True)
class SettingsInfo:
    """The settings of the build that decide what the numbers mean."""

    n_clusters: int
    alpha: float
    beta: float
    gamma: float
    seed: int
    layers: list[int]
    """Recorded layers, ascending."""
    batch_size: int
    shard_size: int
    n_threads: int


@dataclass(frozen=True)
class CompensationInfo:
    """Compensated sets of one keep ratio: one for the whole corpus and one for each cluster."""

    keep_ratio: float
    """Share of the dense MLPs' bytes, on average over the layers."""
    ranking: str
    budget: str
    tokens: int
    """Tokens that each cluster's set was fitted on, if the cluster has as many."""
    distil_tokens: int
    """Tokens that it was trained on afterwards; 0: none."""
    n_kept: list[int]
    """Neurons of each layer of the model, [n_layers]."""
    plain: bool
    """Whether the sets are plain neurons after all, as compensation did harm on held-out texts."""


@dataclass(frozen=True)
class ProfileInfo:
    """What a named profile decodes by, and the measurement that it rests on."""

    keep_ratio: float
    compensated: bool
    """Whether that is the compensated sets of this keep ratio; else plain ones, ranked by energy."""
    max_increase: float
    """Largest increase of perplexity that was allowed, as a share of the dense model's."""
    ratio: float
    """Measured perplexity over dense, geometric mean over sets."""
    low: float
    high: float
    """Its 95 % bootstrap interval."""
    mlp_bytes: int
    """MLP bytes that a decoded token reads."""
    n_rows: int
    read_ratio: float = 1.0
    """Share of d_ff that a token reads, on average, where all neurons are held; 1: whatever is held."""
    weights: str = "stored"
    """Type of the weights that it was measured with."""
    layout: str = ""
    """What the rows are that tokens choose among, as the engine names them; empty where all are read."""
    total_bytes: int | None = None
    """Bytes of all weights that a decoded token reads; None: an earlier release measured it."""
    dense_total_bytes: int | None = None
    """The same of a dense token."""

    @property
    def of_sets(self) -> bool:
        """Whether it speaks of sets that are held, rather than of what tokens read."""
        return self.read_ratio == 1

    @property
    def is_dense(self) -> bool:
        """Whether nothing was found that reads fewer bytes at a loss that was allowed."""
        return self.keep_ratio == 1 and self.of_sets and self.weights == "stored"

    @property
    def gain(self) -> float | None:
        """Share of a dense token's bytes that a token does not read; None: an earlier release measured it."""
        if self.total_bytes is None or self.dense_total_bytes is None:
            return None
        return 1 - self.total_bytes / self.dense_total_bytes

    def in_words(self) -> str:
        """Say in one line how it decodes, what that loses and what it gains."""
        if self.is_dense:
            return f"no gain: nothing that reads fewer bytes keeps perplexity within {self.max_increase:+.1%}, so dense decode"
        kind = "compensated sets" if self.compensated else "plain sets" if self.keep_ratio < 1 else "dense decode"
        how = (
            f"{kind}, keep ratio {self.keep_ratio:g}"
            if self.of_sets
            else f"tokens choose, read ratio {self.read_ratio:g}"
        )
        of_weights = "" if self.weights == "stored" else f", {self.weights} weights"
        gain = "" if self.gain is None else f", {self.gain:.0%} fewer bytes a token"
        return (
            f"{how}{of_weights}: perplexity {self.ratio - 1:+.1%} ({self.low - 1:+.1%} to {self.high - 1:+.1%}) on "
            f"{counted(self.n_rows, 'row')}, at most {self.max_increase:+.1%} allowed{gain}"
        )


@dataclass(frozen=True)
class MapInfo:
    """The map of the corpus's prompts."""

    n_prompts: int
    """Prompts on it: all, or as many as were drawn at random."""
    method: str
    """How they were laid out, "t-SNE" or "PCA"."""
    texts: bool
    """Whether it holds their beginnings."""


@dataclass(frozen=True)
class RefitInfo:
    """Output rows that were refitted for the neurons that tokens leave out."""

    read_ratio: float
    """Share of d_ff that a token reads, for which alone they are meant."""
    layout: str
    """Of the weights, as the engine names it."""
    tokens: int
    """That they were fitted to, about."""


@dataclass(frozen=True)
class SumsInfo:
    """What exact sums an index holds, by which it may be extended and merged."""

    corpora: list[CorpusInfo]
    """The corpora that it was built over, in the order in which they were added."""


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and sha256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything in ``manifest.json``."""

    format_version: int
    versions: dict[str, str]
    model: ModelInfo
    encoder: EncoderInfo
    corpus: CorpusInfo
    settings: SettingsInfo
    compensation: list[CompensationInfo]
    profiles: dict[str, ProfileInfo]
    """What was measured, by the names of `Profile`; exact needs no measurement."""
    files: dict[str, FileInfo]
    histograms: list[str] = dataclasses.field(default_factory=list)
    """Layouts of which there are histograms of what tokens need, as the engine names them."""
    map: MapInfo | None = None
    """Of the map of its prompts; None: there is none."""
    refit: RefitInfo | None = None
    """Of output rows; None: there are none."""
    sums: SumsInfo | None = None
    """Of the exact sums; None: an earlier release built the index."""

    def file_names(self) -> list[str]:
        """Return the files of the index beside the manifest, relative to its folder."""
        clusters = [None, *range(self.settings.n_clusters)]
        return [
            *INDEX_FILES,
            *(file for field, file in OPTIONAL.items() if getattr(self, field)),
            *(compensation_file(info.keep_ratio, cluster) for info in self.compensation for cluster in clusters),
        ]

    def served_by_corpus(self, keep_ratio: float) -> list[int]:
        """Return the clusters whose compensated set is the whole corpus's: the same file under two names."""
        of_corpus = self.files[compensation_file(keep_ratio, None)].sha256
        return [
            cluster
            for cluster in range(self.settings.n_clusters)
            if self.files[compensation_file(keep_ratio, cluster)].sha256 == of_corpus
        ]

    def holds_sets(self, keep_ratio: float) -> bool:
        """Return whether there are compensated sets of a keep ratio."""
        return self.fitted_neurons(keep_ratio) is not None

    def fitted_neurons(self, keep_ratio: float) -> list[int] | None:
        """Return how many neurons of each layer the compensated sets of a keep ratio hold; None if there are none."""
        found = (info for info in self.compensation if math.isclose(info.keep_ratio, keep_ratio))
        return next((info.n_kept for info in found), None)

    @property
    def profile(self) -> ProfileInfo | None:
        """That of balanced, by which decode goes where nothing is named; None: none was measured."""
        return self.profiles.get(Profile.BALANCED.value)

    @property
    def default_profile(self) -> Profile:
        """The profile where none is named: balanced where it has a gain, else exact."""
        return Profile.EXACT if self.profile is None or self.profile.is_dense else Profile.BALANCED

    @property
    def plain_keep_ratio(self) -> float:
        """The keep ratio of plain sets where none is named: the profile's if it is of such, else the build's γ."""
        profile = self.profile
        plain = profile is not None and profile.of_sets and not profile.compensated
        return profile.keep_ratio if profile is not None and plain else self.settings.gamma

    def as_dict(self) -> dict[str, Any]:
        """Return the manifest as plain JSON types, with its own checksum."""
        return {**self._fields(), "sha256": self.checksum()}

    def identity(self) -> str:
        """Return a checksum by which the index is known wherever it lies and whatever it decodes by default."""
        places: dict[str, Any] = {"path": None, "relative_path": None}
        return dataclasses.replace(
            self,
            profiles={},
            model=dataclasses.replace(self.model, **places),
            encoder=dataclasses.replace(self.encoder, **places),
        ).checksum()

    def checksum(self) -> str:
        """Return the sha256 over all fields."""
        return manifest_checksum(self._fields())

    def _fields(self) -> dict[str, Any]:
        """Return all fields; what is not there is left out of those that earlier releases did not have."""
        fields = dataclasses.asdict(self)
        for name in OPTIONAL:
            if not fields[name]:
                del fields[name]
        if not self.profiles:
            del fields["profiles"]
            fields["profile"] = None  # as earlier releases write it
        for section in (fields["model"], fields["encoder"]):
            for name in ("path", "relative_path", "places"):
                if section.get(name, ()) is None:
                    del section[name]
        return fields


OPTIONAL = {"histograms": HISTOGRAMS_FILE, "map": MAP_FILE, "refit": REFIT_FILE, "sums": SUMS_FILE}
"""Fields of a manifest that earlier releases did not have, each with the file that it describes."""


def manifest_checksum(fields: dict[str, Any]) -> str:
    """Return the sha256 over a manifest's fields, its own checksum left out."""
    rest = {name: value for name, value in fields.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
