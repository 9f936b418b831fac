"""The last stage of a build: the index folder, put in place in one step."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from coreinfer_sim.base.files import replacing
from coreinfer_sim.base.plain import excerpt
from coreinfer_sim.base.rows import CorpusReport
from coreinfer_sim.building.shards import PartialSums
from coreinfer_sim.fitting.clustered_corpus import ClusteredCorpus
from coreinfer_sim.fitting.pipeline import CompensatedSets
from coreinfer_sim.index.clustering import quantiles_of
from coreinfer_sim.index.clusters import Cluster
from coreinfer_sim.index.encoder import SentenceEncoder
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.labels import topic_labels
from coreinfer_sim.index.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    REFIT_FILE,
    CompensationInfo,
    CorpusInfo,
    EncoderInfo,
    Manifest,
    ModelInfo,
    ProfileInfo,
    RefitInfo,
    SettingsInfo,
    SumsInfo,
)
from coreinfer_sim.index.places import places_of
from coreinfer_sim.index.prompt_map import PromptMap
from coreinfer_sim.index.storage import save_index
from coreinfer_sim.index.sums import Sums
from coreinfer_sim.models.fingerprint import weight_sketch
from coreinfer_sim.models.loading import tokenizer_hash
from coreinfer_sim.models.mlps import MLPLayer

N_EXEMPLARS = 3
_LIBRARIES = ("coreinfer-sim", "torch", "transformers", "sentence-transformers", "faiss-cpu", "numpy")


@dataclass(frozen=True)
class BuiltParts:
    """All that an index is written from."""

    corpus: ClusteredCorpus
    source: str
    """Name of the corpus: of its file or on the hub."""
    report: CorpusReport
    encoder: SentenceEncoder
    n_threads: int
    sums: PartialSums
    """Of all clusters."""
    sets: CompensatedSets | None
    histograms: Mapping[str, np.ndarray]
    """Of what tokens need, by layout."""
    refit: RefitInfo | None
    """Of the rows that lie in the build's folder."""
    profiles: dict[str, ProfileInfo]
    prompt_map: PromptMap


def write_index(out: Path, parts: BuiltParts) -> None:
    """Write an index beside its place, check that it loads, and move it there, in place of an older one."""
    clustering, found = parts.corpus.clustering, parts.sums
    similarity = clustering.similarity[np.concatenate(clustering.members())]
    sums = Sums(found.counts, found.energy, found.activation, similarity)
    with replacing(out, MANIFEST_FILE) as temporary:
        temporary.mkdir(parents=True)
        if parts.sets is not None:
            parts.sets.put_into(temporary)
        if parts.refit is not None:
            shutil.copyfile(parts.corpus.folder / REFIT_FILE, temporary / REFIT_FILE)
        manifest = _manifest(out, parts, [] if parts.sets is None else parts.sets.described())
        clusters = _clusters(parts.corpus, parts.encoder)
        save_index(temporary, clustering.centroids, clusters, sums, manifest, parts.histograms, parts.prompt_map)
        SemanticIndex.load(temporary, parts.encoder)  # what cannot be read replaces nothing


def _places(layers: Sequence[MLPLayer]) -> list[list[int]] | None:
    """Return layer and expert of each MLP of a mixture, as the manifest holds them."""
    if all(layer.expert is None for layer in layers):
        return None
    return [[layer.block, -1 if layer.expert is None else layer.expert] for layer in layers]


def _clusters(corpus: ClusteredCorpus, encoder: SentenceEncoder) -> list[Cluster]:
    """Describe the clusters: size, label and the prompts nearest to the centroid."""
    clustering, sentences = corpus.clustering, corpus.sentences
    prompts = [sentence.prompt for sentence in sentences]
    labels = topic_labels(prompts, clustering.assignment, clustering.centroids, encoder.encode)
    clusters = []
    for number, (label, members) in enumerate(zip(labels, clustering.members(), strict=True)):
        nearest = members[:N_EXEMPLARS].tolist()
        clusters.append(
            Cluster(
                id=number,
                size=len(members),
                n_tokens=sum(sentences[i].n_tokens for i in members.tolist()),
                label=label,
                exemplars=[excerpt(sentences[i].prompt) for i in nearest] if corpus.config.texts else [],
                exemplar_ids=[sentences[i].id for i in nearest],
                similarity_quantiles=quantiles_of(clustering.similarity[members]),
            )
        )
    return clusters


def _manifest(out: Path, parts: BuiltParts, compensation: list[CompensationInfo]) -> Manifest:
    """Say what the index was built from, and how."""
    corpus, encoder, report = parts.corpus, parts.encoder, parts.report
    language_model, config, layers = corpus.language_model, corpus.config, corpus.layers
    of_corpus = CorpusInfo(Path(parts.source).name, report.sha256, report.n_kept, report.n_tokens)
    return Manifest(
        format_version=FORMAT_VERSION,
        versions={name: version(name) for name in _LIBRARIES},
        model=ModelInfo(
            name=language_model.name,
            revision=getattr(language_model.model.config, "_commit_hash", None),
            family=layers[0].family,
            dtype=language_model.dtype_name,
            n_layers=len(language_model.layers),
            d_model=layers[0].d_model,
            d_ff=layers[0].d_ff,
            weight_sketch=weight_sketch(language_model.layers),
            tokenizer_sha256=tokenizer_hash(language_model.tokenizer),
            activation_site=f"input of {layers[0].output_name}",
            places=_places(language_model.layers),
            **places_of(language_model.name, out),
        ),
        encoder=EncoderInfo(
            encoder.name, encoder.dimension, True, "cosine", encoder.probe(), **places_of(encoder.name, out)
        ),
        corpus=of_corpus,
        settings=SettingsInfo(
            n_clusters=corpus.n_clusters,
            alpha=config.alpha,
            beta=config.beta,
            gamma=config.gamma,
            seed=config.seed,
            layers=[layer.number for layer in layers],
            batch_size=config.batch_size,
            shard_size=config.shard_size,
            n_threads=parts.n_threads,
        ),
        compensation=compensation,
        profiles=parts.profiles,
        refit=parts.refit,
        sums=SumsInfo([of_corpus]),
        files={},
    )
