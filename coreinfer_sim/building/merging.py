"""Indexes added up: over the same model and centroids, what each holds is a sum, and so is what they hold together."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from coreinfer_sim.base.errors import ConfigError, IndexFormatError, IndexMismatchError, ModelError
from coreinfer_sim.base.files import replacing
from coreinfer_sim.base.progress import Progress, shown
from coreinfer_sim.building.folder import holding
from coreinfer_sim.building.writing import N_EXEMPLARS
from coreinfer_sim.index.clustering import quantiles_of
from coreinfer_sim.index.clusters import Cluster
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import (
    MANIFEST_FILE,
    REBUILD,
    REFIT_FILE,
    CorpusInfo,
    EncoderInfo,
    Manifest,
    ModelInfo,
    ProfileInfo,
    SumsInfo,
)
from coreinfer_sim.index.places import find, places_of
from coreinfer_sim.index.prompt_map import MOST_PROMPTS, PromptMap, lay_out
from coreinfer_sim.index.storage import save_index
from coreinfer_sim.index.sums import Sums

Info = TypeVar("Info", ModelInfo, EncoderInfo)
_NAMED = 3  # corpora, in the name of their sum


@dataclass(frozen=True)
class Members:
    """A cluster, and its members' similarities to the centroid, the highest first."""

    cluster: Cluster
    similarity: np.ndarray


def merge(
    indexes: Sequence[SemanticIndex], out: str | Path, force: bool = False, progress: Progress | None = None
) -> SemanticIndex:
    """Add indexes up: counts, energies and activations come out as one build over all their texts would sum them.

    Labels are those of the index with the most texts in a cluster. The map is drawn anew. What was fitted to, or measured on,
    the texts of one index alone is left out, and said.

    Args:
        indexes: two or more, over the same model, encoder and centroids; the first one's settings stay.
        out: the index folder to make.
        force: replace an index that exists, which may be one of these.
        progress: takes messages; None: see `shown`.

    Raises:
        IndexMismatchError: they do not belong together.
        MissingSumsError: one was built by an earlier release.
        ConfigError: there are fewer than two, or two hold the same corpus.
        BuildError: something stands where the index shall go.
    """
    out = Path(out).resolve()
    with holding(out, force):
        return add_up(indexes, out, shown(progress))


def add_up(indexes: Sequence[SemanticIndex], out: Path, progress: Progress) -> SemanticIndex:
    """As `merge`, at a place that this process holds."""
    check_mergeable(indexes)
    first = indexes[0].manifest
    # 1) the sums
    each = [index.sums() for index in indexes]
    members = [members_of(index, sums) for index, sums in zip(indexes, each, strict=True)]
    together = [_together(of_one) for of_one in zip(*members, strict=True)]
    sums = Sums(
        _added([part.counts for part in each]),
        _added([part.energy for part in each]),
        _added([part.activation for part in each]),
        np.concatenate([part.similarity for part in together]),
    )
    # 2) what goes with them
    prompt_map = _together_on_map(indexes, progress)
    histograms, source = _thresholds(indexes, progress)
    profiles = {} if source is None else profiles_by_token(source.manifest)
    refit = None if source is None else source.manifest.refit
    note_left_out([index.manifest for index in indexes], profiles, refit is not None, progress)
    # 3) the index
    corpora = [corpus for index in indexes for corpus in corpora_of(index)]
    manifest = replace(
        first,
        corpus=_whole_corpus(corpora),
        compensation=[],
        profiles=profiles,
        refit=refit,
        sums=SumsInfo(corpora),
    )
    return write_changed(
        indexes[0],
        out,
        manifest,
        indexes[0].centroids,
        [part.cluster for part in together],
        sums,
        histograms,
        prompt_map,
        source,
    )


def check_mergeable(indexes: Sequence[SemanticIndex]) -> None:
    """Raise the error of indexes that cannot be added up, before anything is read."""
    if len(indexes) < 2:
        raise ConfigError(
            f"one index ({indexes[0].name}) was named, expected two or more to be added up; name another one."
        )
    first, known = indexes[0], dict[str, str]()
    for index in indexes:
        for corpus in corpora_of(index):
            if corpus.sha256 in known:
                raise ConfigError(
                    f"{index.name} holds the corpus {corpus.source}, which {known[corpus.sha256]} holds too, so that its texts "
                    "would count twice, expected indexes over different texts; leave one out."
                )
            known[corpus.sha256] = index.name
        check_same(first, index)
        if not np.array_equal(first.centroids, index.centroids):
            raise IndexMismatchError(
                f"{index.name} has other centroids than {first.name}, expected the same; build it with "
                f"build.centroids={first.name}."
            )


def check_new(index: SemanticIndex, source: str, sha256: str) -> None:
    """Raise ConfigError if an index holds a corpus already, which is known by the checksum of its texts."""
    for corpus in corpora_of(index):
        if corpus.sha256 == sha256:
            raise ConfigError(
                f"{index.name} holds the texts of {source} already, as {corpus.source}, and they would count twice, expected "
                "other texts; leave this corpus out."
            )


def check_same(first: SemanticIndex, index: SemanticIndex) -> None:
    """Raise IndexMismatchError unless two indexes are of one model and encoder, with sums that mean the same."""
    (a, b), (s, t) = (first.manifest, index.manifest), (first.manifest.settings, index.manifest.settings)
    of_models = [(each.model.dtype, each.model.weight_sketch, each.model.tokenizer_sha256) for each in (a, b)]
    of_settings = [(each.alpha, each.beta, each.layers) for each in (s, t)]
    same_encoder = a.encoder.dimension == b.encoder.dimension and np.allclose(
        a.encoder.probe, b.encoder.probe, atol=1e-3
    )
    for same, what, found, expected in (
        (
            of_models[0] == of_models[1],
            "was built from another model",
            f"{b.model.name} in {b.model.dtype}",
            f"{a.model.name} in {a.model.dtype}",
        ),
        (same_encoder, "was built with another encoder", b.encoder.name, a.encoder.name),
        (
            of_settings[0] == of_settings[1],
            "was built with other settings",
            f"α {t.alpha}, β {t.beta}, {len(t.layers)} layers",
            f"α {s.alpha}, β {s.beta}, {len(s.layers)} layers",
        ),
    ):
        if not same:
            raise IndexMismatchError(
                f"{index.name} {what} ({found}) than {first.name}, expected {expected}; build it with the same."
            )


def members_of(index: SemanticIndex, sums: Sums) -> list[Members]:
    """Return each cluster with its members' similarities."""
    sizes = [cluster.size for cluster in index.clusters]
    if sum(sizes) != len(sums.similarity):
        raise IndexFormatError(
            f"{index.name} has clusters of {sum(sizes)} prompts and sums of {len(sums.similarity)}, expected as many; {REBUILD}."
        )
    parts = np.split(sums.similarity, np.cumsum(sizes)[:-1])
    return [Members(cluster, part) for cluster, part in zip(index.clusters, parts, strict=True)]


def _together(parts: Sequence[Members]) -> Members:
    largest = max(parts, key=lambda part: part.cluster.size).cluster
    return joined(largest.id, largest.label, parts)


def joined(number: int, label: str, parts: Sequence[Members]) -> Members:
    """Return the members of several clusters as those of one."""
    similarity = np.concatenate([part.similarity for part in parts])
    similarity = similarity[np.argsort(-similarity, kind="stable")]
    has_texts = all(len(part.cluster.exemplars) == len(part.cluster.exemplar_ids) for part in parts)
    nearest = sorted(
        (
            (float(value), row_id, part.cluster.exemplars[place] if has_texts else "")
            for part in parts
            for place, (row_id, value) in enumerate(zip(part.cluster.exemplar_ids, part.similarity, strict=False))
        ),
        key=lambda found: -found[0],
    )[:N_EXEMPLARS]
    cluster = Cluster(
        id=number,
        size=len(similarity),
        n_tokens=sum(part.cluster.n_tokens for part in parts),
        label=label,
        exemplars=[text for _, _, text in nearest] if has_texts else [],
        exemplar_ids=[row_id for _, row_id, _ in nearest],
        similarity_quantiles=quantiles_of(similarity),
    )
    return Members(cluster, similarity)


def _together_on_map(indexes: Sequence[SemanticIndex], progress: Progress) -> PromptMap | None:
    """Draw a map of prompts of all indexes, each with its share."""
    without = [index.name for index in indexes if index.manifest.map is None]
    if without:
        progress.say(f"There is no map, as {', '.join(without)} has none.")
        return None
    random = np.random.default_rng(indexes[0].manifest.settings.seed)
    sizes = np.array([index.manifest.corpus.n_sentences for index in indexes])
    n_shown = np.floor(sizes * min(1, MOST_PROMPTS / sizes.sum())).astype(int)
    maps = [index.map for index in indexes]
    shown_of = [
        np.sort(random.choice(len(each), min(len(each), max(1, n)), replace=False))
        for each, n in zip(maps, n_shown.tolist(), strict=True)
    ]
    texts = all(each.excerpts is not None for each in maps)
    return lay_out(
        np.concatenate([each.embeddings[rows].astype(np.float32) for each, rows in zip(maps, shown_of, strict=True)]),
        np.concatenate([each.clusters[rows] for each, rows in zip(maps, shown_of, strict=True)]),
        [
            (each.excerpts or [""] * len(each))[row]
            for each, rows in zip(maps, shown_of, strict=True)
            for row in rows.tolist()
        ],
        indexes[0].manifest.settings.seed,
        texts,
    )


def _thresholds(
    indexes: Sequence[SemanticIndex], progress: Progress
) -> tuple[dict[str, np.ndarray], SemanticIndex | None]:
    """Return the histograms of all, and the one index whose own they are, so that what rests on them stays; None: several."""
    measured = [index for index in indexes if index.manifest.histograms]
    if len(measured) <= 1:
        source = measured[0] if measured else indexes[0]
        if measured:
            progress.say(f"Thresholds stay those measured on the texts of {source.name}; the others have none.")
        return source.histograms, source
    of_each = [set(index.manifest.histograms) for index in measured]
    layouts = set.intersection(*of_each)
    if rest := sorted(set.union(*of_each) - layouts):
        progress.say(f"Thresholds of {', '.join(rest)} are left out, as not every index that has some has these.")
    histograms = {
        name: _added([index.histograms[name].astype(np.int64) for index in measured]) for name in sorted(layouts)
    }
    return histograms, None


def _added(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return reduce(np.add, arrays)


def profiles_by_token(manifest: Manifest) -> dict[str, ProfileInfo]:
    """Return the profiles that hold for other clusters too: tokens choose by thresholds, and not by a cluster's neurons."""
    return {name: each for name, each in manifest.profiles.items() if not each.of_sets or each.keep_ratio == 1}


def note_left_out(
    manifests: Sequence[Manifest], profiles: Mapping[str, ProfileInfo], keeps_refit: bool, progress: Progress
) -> None:
    """Say what those had which the new index has not, and how to get it."""
    lost = ["compensated sets (build the index anew with them)"] if any(each.compensation for each in manifests) else []
    if gone := sorted({name for each in manifests for name in each.profiles} - set(profiles)):
        lost.append(f"what was promised as {' and '.join(gone)} (measure it with 'coreinfer-sim tune')")
    if any(each.refit for each in manifests) and not keeps_refit:
        lost.append("refitted rows (build the index anew with build.refit)")
    if lost:
        progress.say(f"Left out, as they rest on other texts or clusters: {'; '.join(lost)}.")


def corpora_of(index: SemanticIndex) -> list[CorpusInfo]:
    """Return what an index was built over."""
    return [index.manifest.corpus] if index.manifest.sums is None else index.manifest.sums.corpora


def _whole_corpus(corpora: Sequence[CorpusInfo]) -> CorpusInfo:
    names = [corpus.source for corpus in corpora]
    more = [f"{len(names) - _NAMED + 1} more"] if len(names) > _NAMED else []
    return CorpusInfo(
        " + ".join([*names[: _NAMED - bool(more)], *more]),
        hashlib.sha256("".join(corpus.sha256 for corpus in corpora).encode()).hexdigest(),
        sum(corpus.n_sentences for corpus in corpora),
        sum(corpus.n_tokens for corpus in corpora),
    )


def write_changed(
    index: SemanticIndex,
    out: Path,
    manifest: Manifest,
    centroids: np.ndarray,
    clusters: Sequence[Cluster],
    sums: Sums,
    histograms: Mapping[str, np.ndarray],
    prompt_map: PromptMap | None,
    refit_of: SemanticIndex | None,
) -> SemanticIndex:
    """Write an index that was made of another one, in one step.

    Args:
        index: whose model and encoder it is of.
        out: the folder to make or to replace.
        manifest: of the new index.
        centroids: unit norm, [n_clusters, dim].
        clusters: one entry a cluster.
        sums: of all clusters.
        histograms: of what tokens need, by layout.
        prompt_map: of its corpora; None: it has none.
        refit_of: whose refitted rows it holds, where the manifest says so.
    """
    moved = replace(manifest, model=_moved(manifest.model, index, out), encoder=_moved(manifest.encoder, index, out))
    with replacing(out, MANIFEST_FILE) as temporary:
        temporary.mkdir(parents=True)
        if manifest.refit is not None and refit_of is not None:
            shutil.copyfile(refit_of.folder / REFIT_FILE, temporary / REFIT_FILE)
        save_index(temporary, centroids, clusters, sums, moved, histograms, prompt_map)
        SemanticIndex.load(temporary)
    return SemanticIndex.load(out)


def _moved(info: Info, index: SemanticIndex, out: Path) -> Info:
    """Say where a model or an encoder lies, from another index folder on."""
    try:
        place = find(info, index.folder, index.name)
    except ModelError:  # it may be given when it is needed
        return replace(info, relative_path=None)
    found: dict[str, Any] = {"path": None, "relative_path": None, **places_of(place, out)}
    return replace(info, **found)
