"""A build: its stages in their order, from the checks of what was asked for to the finished index."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.files import sha256_of
from coreinfer_sim.base.processes import default_threads, n_cores, torch_threads
from coreinfer_sim.base.progress import Progress, counted, shown
from coreinfer_sim.base.ray_tasks import check_ray
from coreinfer_sim.base.rows import check_no_labels, describe_corpus
from coreinfer_sim.base.scale_settings import Executor, ScaleConfig
from coreinfer_sim.base.settings import BuildConfig, CorpusConfig
from coreinfer_sim.base.stores import RemoteFile, is_address
from coreinfer_sim.building.folder import begin_or_continue, build_folder, check_output, work_folder
from coreinfer_sim.building.histograms import layout_bytes, measure_histograms
from coreinfer_sim.building.log import LoggedProgress
from coreinfer_sim.building.merging import check_new
from coreinfer_sim.building.plan import BuildPlan
from coreinfer_sim.building.promise import measure_promise
from coreinfer_sim.building.refit import fit_refit
from coreinfer_sim.building.shards import PartialSums
from coreinfer_sim.building.stages import add_up, cluster, draw, draw_map, embed, record
from coreinfer_sim.building.writing import BuiltParts, write_index
from coreinfer_sim.choosing.compatibility import check_model
from coreinfer_sim.fitting.clustered_corpus import ClusteredCorpus, recorded_layers
from coreinfer_sim.fitting.comparing import Statistics
from coreinfer_sim.fitting.pipeline import make_sets
from coreinfer_sim.fitting.workers import CorpusSource, Workers
from coreinfer_sim.index.encoder import DEFAULT_ENCODER, SentenceEncoder
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import CENTROIDS_FILE
from coreinfer_sim.models.fingerprint import weights_checksum
from coreinfer_sim.models.loading import LanguageModel, load_model, tokenizer_hash
from coreinfer_sim.models.mlps import check_dense


def build_index(
    model: str | LanguageModel,
    corpus: CorpusConfig | str,
    out: str | Path,
    config: BuildConfig | None = None,
    *,
    encoder: str | SentenceEncoder = DEFAULT_ENCODER,
    dtype: str = "auto",
    device: str = "auto",
    workers: int | None = 1,
    threads: int | None = None,
    scale: ScaleConfig | None = None,
    force: bool = False,
    part_of: SemanticIndex | None = None,
    progress: Progress | None = None,
) -> SemanticIndex:
    """Run a corpus through a model and store each semantic cluster's core neurons.

    A killed build is continued by the same call: what is finished is found in ``OUT.build``.

    Args:
        model: hub id, checkpoint folder, GGUF file, or a loaded model (then ``workers`` must be 1).
        corpus: where the prompts are.
        out: the index folder to make; may be there if it is empty, and may be a link.
        config: what decides what is in the index.
        encoder: sentence encoder, by name or loaded.
        dtype: of the language model; see `load_model`.
        device: of the language model; "auto" a GPU where there is one.
        workers: processes that share the shards; None fills the cores. More than one needs the caller's
            ``if __name__ == "__main__"``, as always with Python's multiprocessing.
        threads: torch threads of each process; None a quarter of the cores. Part of the build, unlike ``workers``.
        scale: who shares the shards: processes here, on GPUs that are named, or tasks of a Ray cluster.
        force: replace an index that exists, and start anew where a build of other settings was broken off; if only those of
            compensation are others, statistics are kept.
        part_of: index that this one will be added to: the model must be its model, the corpus one that it does not hold, and
            what would be promised is not measured.
        progress: takes messages and progress; None: see `shown`.

    Raises:
        CoreInferSimError: any of its kinds; what was finished is kept.
    """
    corpus = CorpusConfig(corpus) if isinstance(corpus, str) else corpus
    config, scale, progress = config or BuildConfig(), scale or ScaleConfig(), shown(progress)
    out = Path(os.path.realpath(out))  # a link stays, and what it names is made
    # 1) what can be refused before anything is loaded
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, expected 1 or more.")
    device = _check_scale(scale, device, workers)
    check_no_labels(corpus)
    check_output(out, force)
    centroids = None if config.centroids is None else SemanticIndex.load(config.centroids)
    progress.say(f"Reading {describe_corpus(corpus)}.")
    out.parent.mkdir(parents=True, exist_ok=True)  # before anything slow, so that a bad path is known at once
    folder = work_folder(out)
    with build_folder(folder):
        check_output(out, force)  # once more, as something may have come there before the lock
        # 2) the models
        language_model = load_model(model, dtype, device) if isinstance(model, str) else model
        for note in language_model.notes:
            progress.say(note)
        if not isinstance(model, str) and (workers != 1 or scale.executor is Executor.RAY):
            raise ConfigError("a loaded model cannot be shared among processes; give its name, or workers=1.")
        kind = str(language_model.model.device)
        sentence_encoder = SentenceEncoder(encoder, kind) if isinstance(encoder, str) else encoder
        if centroids is not None:
            centroids.check_encoder(sentence_encoder)
        if part_of is not None:
            check_model(part_of, language_model.layers, tokenizer_hash(language_model.tokenizer))
        # 3) the stages, from where an earlier run was broken off
        source = CorpusSource(
            language_model.name,
            language_model.dtype_name,
            kind,
            folder,
            config,
            corpus.max_tokens,
            threads or default_threads(kind),
        )
        settings = _settings(source, corpus, language_model, sentence_encoder, centroids)
        begin_or_continue(folder, settings, force, progress)
        progress = LoggedProgress(folder, progress)
        lay_out = isinstance(model, str) and dtype in ("auto", "stored") and kind == "cpu"
        parts = (source, corpus, language_model, sentence_encoder, centroids)
        _run_stages(out, *parts, workers, scale, lay_out, part_of, progress)
    shutil.rmtree(folder)
    return SemanticIndex.load(out, sentence_encoder)


def _check_scale(scale: ScaleConfig, device: str, workers: int | None) -> str:
    """Return the device of this process, if what shares the work is there and goes together.

    Raises:
        ConfigError: it does not, or Ray is not installed.
        BuildError: no Ray cluster answers.
    """
    if scale.executor is Executor.RAY:
        check_ray(scale.ray_address)
    if scale.devices is None:
        return device
    n = len(scale.devices)
    if device != "auto":
        raise ConfigError(f"device is {device!r}, but {counted(n, 'device')} are named for workers; leave device out.")
    if workers not in (None, n):
        raise ConfigError(f"workers is {workers}, but {counted(n, 'device')} are named, one for each; expected {n}.")
    return scale.devices[0]


def _settings(
    source: CorpusSource,
    corpus: CorpusConfig,
    language_model: LanguageModel,
    encoder: SentenceEncoder,
    centroids: SemanticIndex | None,
) -> dict[str, Any]:
    """Return all that the index depends on, as plain JSON types.

    Raises:
        ConfigError: the model cannot be built with these settings.
        UnsupportedModelError: compensation was asked for, of a mixture of experts.
    """
    recorded_layers(language_model, source.config)
    if source.config.compensation is not None:
        check_dense(language_model.layers, "compensation")
    if source.config.refit is not None and not layout_bytes(language_model):
        raise ConfigError(
            f"build.refit was asked for, but decode reads all neurons of {language_model.name}, or those that are not zero, so "
            "that nothing is to be made up for; leave it out."
        )
    limit = language_model.context_length
    if limit is not None and corpus.max_tokens > limit:
        raise ConfigError(
            f"max_tokens is {corpus.max_tokens}, but the model's context is {limit}; give a smaller max_tokens."
        )
    return {
        "corpus": asdict(corpus),
        "corpus_file": _version_of(corpus.source),
        "config": source.config.as_dict(),
        "model": language_model.name,
        "dtype": source.dtype,
        "device": language_model.model.device.type,
        "n_threads": source.n_threads,
        "weights": weights_checksum(language_model.layers),
        "encoder": encoder.probe(),
        "centroids": None if centroids is None else centroids.manifest.files[CENTROIDS_FILE].sha256,
    }


def _version_of(corpus: str) -> str | None:
    """Return what changes when the file of a corpus does; None for a folder or a data set."""
    if is_address(corpus):
        return RemoteFile(corpus).version() if RemoteFile(corpus).is_file() else None
    return sha256_of(Path(corpus)) if Path(corpus).is_file() else None


def _run_stages(
    out: Path,
    source: CorpusSource,
    corpus: CorpusConfig,
    language_model: LanguageModel,
    encoder: SentenceEncoder,
    centroids: SemanticIndex | None,
    n_workers: int | None,
    scale: ScaleConfig,
    lay_out: bool,
    part_of: SemanticIndex | None,
    progress: Progress,
) -> None:
    """Run all stages of a build that are not finished, in its folder."""
    folder, config = source.folder, source.config
    # 1) sentences, and what the build will take
    drawn = draw(folder, corpus, language_model.tokenizer, progress)
    if part_of is not None:
        check_new(part_of, corpus.source, drawn.report.sha256)
    layers = recorded_layers(language_model, config)
    model_bytes = language_model.model.get_memory_footprint()
    measures = drawn.report.n_held_out > 0  # what tokens need and what that promises
    is_shared = source.shares_weights and (n_workers != 1 or scale.executor is Executor.RAY)
    plan = BuildPlan(
        layers,
        config,
        drawn.report,
        model_bytes,
        layout_bytes(language_model) if measures else 0,
        model_bytes if is_shared else 0,
        encoder.dimension,
        None if centroids is None else len(centroids),
    )
    progress.say(plan.describe())
    if config.clusters != "auto":
        plan.check_disk(plan.n_clusters, folder, out)
    # 2) clusters
    with torch_threads(n_cores()):
        embeddings = embed(folder, drawn.sentences, encoder, progress)
        clustering = cluster(folder, embeddings, config, progress, None if centroids is None else centroids.centroids)
        prompt_map = draw_map(embeddings, clustering, drawn.sentences, config, progress)
        del embeddings  # what follows needs the memory
    clustered = ClusteredCorpus(language_model, drawn.sentences, clustering, config, corpus.max_tokens, folder)
    plan.check_disk(clustered.n_clusters, folder, out)
    # 3) statistics
    sums = cache(lambda: add_up(clustered))  # asked for once the memory of fits is free
    with Workers(clustered, source, progress, n_workers, scale).open() as workers:
        with torch_threads(source.n_threads):
            record(workers)
        # 4) compensated sets
        settings = config.compensation
        sets = None if settings is None else make_sets(workers, settings, _statistics(sums))
        # 5) what tokens need, and what it promises
        with torch_threads(source.n_threads):
            histograms = measure_histograms(workers) if measures else {}
        with torch_threads(n_cores()):
            refit = fit_refit(clustered, histograms, progress)
        with torch_threads(source.n_threads):
            profiles = measure_promise(workers, refit, lay_out) if part_of is None else {}
    # 6) the index
    parts = BuiltParts(
        *(clustered, corpus.source, drawn.report, encoder, source.n_threads, sums(), sets, histograms, refit, profiles),
        prompt_map,
    )
    write_index(out, parts)


def _statistics(sums: Callable[[], PartialSums]) -> Statistics:
    """Return what gives energy and activation of a cluster's neurons, or under None of the whole corpus's."""

    def of(number: int | None) -> tuple[np.ndarray, np.ndarray]:
        energy, activation = sums().energy, sums().activation
        return (energy.sum(0), activation.sum(0)) if number is None else (energy[number], activation[number])

    return of
