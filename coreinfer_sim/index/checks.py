"""Reading and checking an index: its manifest, and the sizes and checksums of its files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from coreinfer_sim.base.errors import IndexFormatError
from coreinfer_sim.base.settings import Profile, Weights
from coreinfer_sim.index.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    OPTIONAL,
    REBUILD,
    CompensationInfo,
    CorpusInfo,
    EncoderInfo,
    FileInfo,
    Manifest,
    MapInfo,
    ModelInfo,
    ProfileInfo,
    RefitInfo,
    SettingsInfo,
    SumsInfo,
    manifest_checksum,
)
from coreinfer_sim.index.verified import VerifiedFile

SKETCH_SIZE = 32
PROBE_LENGTH = 8
_SECTIONS = {"model": ModelInfo, "encoder": EncoderInfo, "corpus": CorpusInfo, "settings": SettingsInfo}


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        IndexFormatError: no index, another format version, or fields that are missing, unknown or of a wrong type.
    """
    path = folder / MANIFEST_FILE
    if folder.is_file():
        raise IndexFormatError(f"{folder} is a file, expected the folder of an index; name that.")
    if not folder.is_dir():
        begun = folder.with_name(f"{folder.name}.build")
        remedy = (
            f"finish the build in {begun} by the same command" if begun.is_dir() else f"check the path, or {REBUILD}"
        )
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
    found = ["profiles" if name == "profile" else name for name in raw]  # earlier releases wrote one
    if len(found) > len({*found}) or {*OPTIONAL, *found} != expected:
        raise IndexFormatError(f"{path} lacks or misspells a field ({sorted(set(raw) ^ expected)}); {REBUILD}.")
    if raw["sha256"] != manifest_checksum(raw):
        raise IndexFormatError(
            f"{path} has another checksum than it states, expected {raw.get('sha256')!r}; it is damaged or was edited – copy "
            f"it again or {REBUILD}."
        )
    try:
        sections = {name: _typed(kind, raw[name], name) for name, kind in _SECTIONS.items()}
        files = {str(name): _typed(FileInfo, entry, name) for name, entry in raw["files"].items()}
        compensation = [_compensation(entry) for entry in raw["compensation"]]
        profiles = _profiles(raw, compensation)
        versions = {str(name): str(value) for name, value in raw["versions"].items()}
        histograms = [str(name) for name in raw.get("histograms", [])]
        of_map = _typed(MapInfo, raw["map"], "map") if "map" in raw else None
        refit = _typed(RefitInfo, raw["refit"], "refit") if "refit" in raw else None
        sums = _sums(raw["sums"]) if "sums" in raw else None
    except (KeyError, TypeError, AttributeError) as error:
        raise IndexFormatError(f"{path} lacks or misspells a field ({error}); {REBUILD}.") from error
    manifest = Manifest(
        format_version=version,
        versions=versions,
        files=files,
        compensation=compensation,
        profiles=profiles,
        histograms=histograms,
        map=of_map,
        refit=refit,
        sums=sums,
        **sections,
    )
    _check_contents(manifest, path)
    expected = set(manifest.file_names())
    if set(files) != expected:
        raise IndexFormatError(f"{path} lists the files {sorted(files)}, expected {sorted(expected)}; {REBUILD}.")
    return manifest


def _compensation(raw: dict[str, Any]) -> CompensationInfo:
    """Make what is said of compensated sets from JSON; what earlier releases said beside that is left out.

    That sets were stored in factors, which are not read any more, their files tell.
    """
    fields = {name: value for name, value in raw.items() if name not in ("rank", "bypass_rank", "distil_from")}
    found: CompensationInfo = _typed(CompensationInfo, {"plain": False, **fields}, "compensation")
    return found


def _sums(raw: dict[str, Any]) -> SumsInfo:
    corpora: list[Any] = _typed(SumsInfo, raw, "sums").corpora
    return SumsInfo([_typed(CorpusInfo, corpus, "sums.corpora") for corpus in corpora])


def _profiles(raw: dict[str, Any], compensation: Sequence[CompensationInfo]) -> dict[str, ProfileInfo]:
    """Make the profiles from a manifest's JSON; the one of an earlier release, by which decode went, is balanced."""
    if "profile" in raw:
        return {} if raw["profile"] is None else {Profile.BALANCED.value: _profile(raw["profile"], compensation)}
    unknown = sorted(set(raw["profiles"]) - {Profile.BALANCED.value, Profile.FAST.value})
    if unknown:
        raise TypeError(f"profiles: {unknown}")
    return {name: _profile(each, compensation) for name, each in raw["profiles"].items()}


def _profile(raw: dict[str, Any], compensation: Sequence[CompensationInfo]) -> ProfileInfo:
    """Make a profile from JSON; where it does not say so, it is of compensated sets if there are some of its keep ratio."""
    there = any(math.isclose(info.keep_ratio, raw["keep_ratio"]) for info in compensation)
    profile: ProfileInfo = _typed(
        ProfileInfo, {"compensated": there, "read_ratio": 1.0, "weights": "stored", "layout": "", **raw}, "profile"
    )
    if profile.compensated and not there:
        raise TypeError(f"profile.keep_ratio is {profile.keep_ratio}, of which there are no compensated sets")
    return profile


def _is_sound_profile(profile: ProfileInfo) -> bool:
    return (
        0 < profile.keep_ratio <= 1
        and 0 < profile.read_ratio <= 1
        and profile.weights in {weights.value for weights in Weights}
        and (profile.dense_total_bytes is None or profile.dense_total_bytes > 0)
    )


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
        "model.places": model.places is None
        or len(model.places) == model.n_layers
        and all(isinstance(each, list) and [type(n) for n in each] == [int, int] for each in model.places),
        "encoder.probe": _are_numbers(probe, PROBE_LENGTH),
        **{f"settings.{name}": 0 < getattr(settings, name) <= 1 for name in ("alpha", "beta", "gamma")},
        **{f"model.{name}": getattr(model, name) > 0 for name in ("n_layers", "d_model", "d_ff")},
        "settings.n_clusters": settings.n_clusters > 0,
        "profiles": all(map(_is_sound_profile, manifest.profiles.values())),
        "refit": manifest.refit is None or 0 < manifest.refit.read_ratio < 1,
        "compensation": all(_is_sound(info, model) for info in manifest.compensation)
        and len({f"{info.keep_ratio:g}" for info in manifest.compensation}) == len(manifest.compensation),
        "encoder.dimension": manifest.encoder.dimension > 0,
        "map.n_prompts": manifest.map is None or manifest.map.n_prompts > 0,
        "sums.corpora": manifest.sums is None
        or sum(corpus.n_sentences for corpus in manifest.sums.corpora) == manifest.corpus.n_sentences,
    }
    for name, holds in sound.items():
        if not holds:
            raise IndexFormatError(f"{path}: {name} has an impossible value; {REBUILD}.")


def _is_sound(info: CompensationInfo, model: ModelInfo) -> bool:
    return (
        0 < info.keep_ratio < 1
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
    """Make a section from JSON, with every field there that has no default, none unknown, and scalars of the right type."""
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    optional = {field.name for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING}
    if (set(raw) ^ set(fields)) - (optional - set(raw)):
        raise TypeError(f"{where}: {sorted((set(raw) ^ set(fields)) - optional)}")
    scalars: dict[str, Any] = {
        "int": int,
        "str": str,
        "bool": bool,
        "float": (int, float),
        "str | None": (str, type(None)),
        "int | None": (int, type(None)),
    }
    for name, annotation in fields.items():
        if name not in raw:
            continue
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


def verified_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> dict[str, VerifiedFile]:
    """Return files of the manifest's checksums by name, once all files have its sizes.

    Raises:
        IndexFormatError: one has not.
    """
    check_file_sizes(folder, manifest)
    return {name: VerifiedFile(folder / name, manifest.files[name], stays_open=True) for name in names}
