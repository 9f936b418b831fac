"""The manifest of an index: what it was built from, and the checksum of every file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreinfer_sim.base.errors import IndexFormatError
from coreinfer_sim.base.files import sha256_of

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
CENTROIDS_FILE = "centroids.faiss"
NEURONS_FILE = "neurons.safetensors"
CLUSTERS_FILE = "clusters.jsonl"
INDEX_FILES = (CENTROIDS_FILE, NEURONS_FILE, CLUSTERS_FILE)
SKETCH_SIZE = 32
PROBE_LENGTH = 8
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


@dataclass(frozen=True)
class EncoderInfo:
    """The sentence encoder that an index belongs to."""

    name: str
    dimension: int
    normalised: bool
    metric: str
    probe: list[float]
    """First values of a fixed sentence's embedding."""


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
    rank: int | None
    """Of the change of the output weights; None: full."""
    bypass_rank: int
    ranking: str
    budget: str
    tokens: int
    """Tokens that each cluster's set was fitted on, if the cluster has as many."""
    distil_tokens: int
    """Tokens that it was trained on afterwards; 0: none."""
    distil_from: str | None
    """What training began with; None: there was none."""
    n_kept: list[int]
    """Neurons of each layer of the model, bypass included, [n_layers]."""
    plain: bool
    """Whether the sets are plain neurons after all, as compensation did harm on held-out texts."""


@dataclass(frozen=True)
class ProfileInfo:
    """What decodes for who names no keep ratio, and the measurement that it rests on."""

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
    profile: ProfileInfo | None
    files: dict[str, FileInfo]

    def file_names(self) -> list[str]:
        """Return the files of the index beside the manifest, relative to its folder."""
        clusters = [None, *range(self.settings.n_clusters)]
        return [
            *INDEX_FILES,
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

    def as_dict(self) -> dict[str, Any]:
        """Return the manifest as plain JSON types, with its own checksum."""
        return {**self._fields(), "sha256": self.checksum()}

    def checksum(self) -> str:
        """Return the sha256 over all fields."""
        return manifest_checksum(self._fields())

    def _fields(self) -> dict[str, Any]:
        """Return the fields without those that say what earlier builds took for granted, so that their checksums stay."""
        fields = dataclasses.asdict(self)
        for entry in fields["compensation"]:
            if not entry["plain"]:
                del entry["plain"]
        profile = self.profile
        if profile is not None and profile.compensated == holds_sets(self.compensation, profile.keep_ratio):
            del fields["profile"]["compensated"]
        return fields


def manifest_checksum(fields: dict[str, Any]) -> str:
    """Return the sha256 over a manifest's fields, its own checksum left out."""
    rest = {name: value for name, value in fields.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


_SECTIONS = {"model": ModelInfo, "encoder": EncoderInfo, "corpus": CorpusInfo, "settings": SettingsInfo}


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        IndexFormatError: no index, another format version, or fields that are missing, unknown or of a wrong type.
    """
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        begun = folder.with_name(f"{folder.name}.build")
        remedy = f"finish the build in {begun} by the same command" if begun.is_dir() else REBUILD
        raise IndexFormatError(f"there is no folder {folder}, expected an index; {remedy}.")
    if not path.is_file():
        raise IndexFormatError(
            f"{folder} has no {MANIFEST_FILE}, expected a finished index; name another folder or {REBUILD}."
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        reason = "it states no format_version" if isinstance(error, KeyError) else error
        raise IndexFormatError(f"{path} is no readable manifest ({reason}); {REBUILD}.") from error
    if type(version) is not int or version != FORMAT_VERSION:
        raise IndexFormatError(
            f"{folder} has format version {version!r}, this release reads version {FORMAT_VERSION}; "
            f"install the release that wrote it or {REBUILD}."
        )
    expected = {*(field.name for field in dataclasses.fields(Manifest)), "sha256"}
    if set(raw) != expected:
        raise IndexFormatError(f"{path} lacks or misspells a field ({sorted(set(raw) ^ expected)}); {REBUILD}.")
    if raw["sha256"] != manifest_checksum(raw):
        raise IndexFormatError(
            f"{path} has another checksum than it states, expected {raw.get('sha256')!r}; it is damaged or was edited – copy "
            f"it again or {REBUILD}."
        )
    try:
        sections = {name: _typed(kind, raw[name], name) for name, kind in _SECTIONS.items()}
        files = {str(name): _typed(FileInfo, entry, name) for name, entry in raw["files"].items()}
        compensation = [
            _typed(CompensationInfo, {"plain": False, **entry}, "compensation") for entry in raw["compensation"]
        ]
        profile = None if raw["profile"] is None else _profile(raw["profile"], compensation)
        versions = {str(name): str(value) for name, value in raw["versions"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise IndexFormatError(f"{path} lacks or misspells a field ({error}); {REBUILD}.") from error
    manifest = Manifest(
        format_version=version, versions=versions, files=files, compensation=compensation, profile=profile, **sections
    )
    _check_contents(manifest, path)
    expected = set(manifest.file_names())
    if set(files) != expected:
        raise IndexFormatError(f"{path} lists the files {sorted(files)}, expected {sorted(expected)}; {REBUILD}.")
    return manifest


def holds_sets(compensation: Sequence[CompensationInfo], keep_ratio: float) -> bool:
    """Return whether there are compensated sets of a keep ratio."""
    return any(math.isclose(info.keep_ratio, keep_ratio) for info in compensation)


def _profile(raw: dict[str, Any], compensation: Sequence[CompensationInfo]) -> ProfileInfo:
    """Make the profile from JSON; earlier builds took compensated sets wherever there were some."""
    there = holds_sets(compensation, raw["keep_ratio"])
    profile: ProfileInfo = _typed(ProfileInfo, {"compensated": there, **raw}, "profile")
    if profile.compensated and not there:
        raise TypeError(f"profile.keep_ratio is {profile.keep_ratio}, of which there are no compensated sets")
    return profile


def _check_contents(manifest: Manifest, path: Path) -> None:
    """Raise IndexFormatError for values that no build writes."""
    model, settings, probe = manifest.model, manifest.settings, manifest.encoder.probe
    layers = settings.layers
    sound = {
        "settings.layers": all(type(layer) is int for layer in layers)
        and layers == sorted(set(layers))
        and bool(layers)
        and layers[0] >= 0
        and layers[-1] < model.n_layers,
        "model.weight_sketch": len(model.weight_sketch) == model.n_layers
        and all(_are_numbers(row, SKETCH_SIZE) for row in model.weight_sketch),
        "encoder.probe": _are_numbers(probe, PROBE_LENGTH),
        **{f"settings.{name}": 0 < getattr(settings, name) <= 1 for name in ("alpha", "beta", "gamma")},
        **{f"model.{name}": getattr(model, name) > 0 for name in ("n_layers", "d_model", "d_ff")},
        "settings.n_clusters": settings.n_clusters > 0,
        "profile": manifest.profile is None or 0 < manifest.profile.keep_ratio <= 1,
        "compensation": all(_is_sound(info, model) for info in manifest.compensation)
        and len({f"{info.keep_ratio:g}" for info in manifest.compensation}) == len(manifest.compensation),
        "encoder.dimension": manifest.encoder.dimension > 0,
    }
    for name, holds in sound.items():
        if not holds:
            raise IndexFormatError(f"{path}: {name} has an impossible value; {REBUILD}.")


def _is_sound(info: CompensationInfo, model: ModelInfo) -> bool:
    return (
        0 < info.keep_ratio < 1
        and (info.rank is None or info.rank > 0)
        and info.bypass_rank >= 0
        and len(info.n_kept) == model.n_layers
        and all(type(n) is int and 0 < n <= model.d_ff for n in info.n_kept)
    )


def _are_numbers(values: Any, n: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == n
        and all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    )


def _typed(kind: type, raw: dict[str, Any], where: str) -> Any:
    """Make a section from JSON, with every field there, none unknown, and scalars of the right type."""
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    if set(raw) != set(fields):
        raise TypeError(f"{where}: {sorted(set(raw) ^ set(fields))}")
    scalars: dict[str, Any] = {
        "int": int,
        "str": str,
        "bool": bool,
        "float": (int, float),
        "str | None": (str, type(None)),
        "int | None": (int, type(None)),
    }
    for name, annotation in fields.items():
        expected = scalars.get(str(annotation), list)
        if not isinstance(raw[name], expected) or (expected is not bool and isinstance(raw[name], bool)):
            raise TypeError(f"{where}.{name} is {raw[name]!r}")
    return kind(**raw)


def check_file_sizes(folder: Path, manifest: Manifest) -> None:
    """Raise IndexFormatError unless every file is there in its full size; cheap, so done before anything is read."""
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise IndexFormatError(f"{folder} lacks {name}, expected {entry.size} bytes; copy it again or {REBUILD}.")
        if path.stat().st_size != entry.size:
            raise IndexFormatError(
                f"{path} has {path.stat().st_size} bytes, expected {entry.size}; copy it again or {REBUILD}."
            )


def check_files(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Raise IndexFormatError unless all files have the manifest's sizes, and ``names`` (None: all) its checksums."""
    check_file_sizes(folder, manifest)
    for name in manifest.files if names is None else names:
        check_file(folder, manifest, name)


def check_file(folder: Path, manifest: Manifest, name: str) -> None:
    """Raise IndexFormatError unless a file has the checksum of the manifest."""
    expected, found = manifest.files[name].sha256, sha256_of(folder / name)
    if found != expected:
        raise IndexFormatError(
            f"{folder / name} has the checksum {found[:12]}…, expected {expected[:12]}…; the file is damaged – "
            f"copy it again or {REBUILD}."
        )
