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
from coreinfer_sim.base.progress import Progress, shown
from coreinfer_sim.base.rows import check_no_labels, describe_corpus
from coreinfer_sim.base.settings import BuildConfig, CorpusConfig
from coreinfer_sim.building.folder import begin_or_continue, build_folder, check_output, work_folder
from coreinfer_sim.building.histograms import layout_bytes, measure_histograms
from coreinfer_sim.building.plan import BuildPlan
from coreinfer_sim.building.promise import measure_promise
from coreinfer_sim.building.refit import fit_refit, read_refit
from coreinfer_sim.building.shards import PartialSums
from coreinfer_sim.building.stages import add_up, cluster, draw, draw_map, embed, record
from coreinfer_sim.building.writing import BuiltParts, write_index
from coreinfer_sim.fitting.clustered_corpus import ClusteredCorpus, recorded_layers
from coreinfer_sim.fitting.comparing import Statistics
from coreinfer_sim.fitting.pipeline import make_sets
from coreinfer_sim.fitting.workers import CorpusSource, Workers
from coreinfer_sim.index.encoder import DEFAULT_ENCODER, SentenceEncoder
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.fingerprint import weights_checksum
from coreinfer_sim.models.loading import LanguageModel, load_model
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
    force: bool = False,
    progress: Progress | None = None,
) -> SemanticIndex:
    """Run a corpus through a model and store each semantic cluster's core neurons.

    A killed build is continued by the same call, ``force`` included: what is finished is found in ``OUT.build``.

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
        force: replace an index that exists, and start anew where a build without it or of other settings was broken off; if
            only those of compensation are others, statistics are kept.
        progress: takes messages and progress; None: see `shown`.

    Raises:
        CoreInferSimError: any of its kinds; what was finished is kept.
    """
    corpus = CorpusConfig(corpus) if isinstance(corpus, str) else corpus
    config, progress = config or BuildConfig(), shown(progress)
    out = Path(os.path.realpath(out))  # a link stays, and what it names is made
    # 1) what can be refused before anything is loaded
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, expected 1 or more.")
    check_no_labels(corpus)
    check_output(out, force)
    progress.say(f"Reading {describe_corpus(corpus)}.")
    out.parent.mkdir(parents=True, exist_ok=True)  # before anything slow, so that a bad path is known at once
    # 2) the models
    language_model = load_model(model, dtype, device) if isinstance(model, str) else model
    for note in language_model.notes:
        progress.say(note)
    if not isinstance(model, str) and workers != 1:
        raise ConfigError("a loaded model cannot be shared among processes; give its name, or workers=1.")
    kind = str(language_model.model.device)
    sentence_encoder = SentenceEncoder(encoder, kind) if isinstance(encoder, str) else encoder
    # 3) the stages, from where an earlier run was broken off
    folder = work_folder(out)
    source = CorpusSource(
        language_model.name,
        language_model.dtype_name,
        kind,
        folder,
        config,
        corpus.max_tokens,
        threads or default_threads(kind),
    )
    with build_folder(folder):
        begin_or_continue(folder, _settings(source, corpus, language_model, sentence_encoder), force, progress)
        lay_out = isinstance(model, str) and dtype in ("auto", "stored") and kind == "cpu"
        _run_stages(out, source, corpus, language_model, sentence_encoder, workers, lay_out, progress)
    shutil.rmtree(folder)
    return SemanticIndex.load(out, sentence_encoder)


def _settings(
    source: CorpusSource, corpus: CorpusConfig, language_model: LanguageModel, encoder: SentenceEncoder
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
    path = Path(corpus.source)
    return {
        "corpus": asdict(corpus),
        "corpus_file": sha256_of(path) if path.is_file() else None,
        "config": source.config.as_dict(),
        "model": language_model.name,
        "dtype": source.dtype,
        "device": language_model.model.device.type,
        "n_threads": source.n_threads,
        "weights": weights_checksum(language_model.layers),
        "encoder": encoder.probe(),
    }


def _run_stages(
    out: Path,
    source: CorpusSource,
    corpus: CorpusConfig,
    language_model: LanguageModel,
    encoder: SentenceEncoder,
    n_workers: int | None,
    lay_out: bool,
    progress: Progress,
) -> None:
    """Run all stages of a build that are not finished, in its folder."""
    folder, config = source.folder, source.config
    # 1) sentences, and what the build will take
    drawn = draw(folder, corpus, language_model.tokenizer, progress)
    layers = recorded_layers(language_model, config)
    model_bytes = language_model.model.get_memory_footprint()
    measures = drawn.report.n_held_out > 0  # what tokens need and what that promises
    plan = BuildPlan(layers, config, drawn.report, model_bytes, layout_bytes(language_model) if measures else 0)
    progress.say(plan.describe())
    if config.clusters != "auto":
        plan.check_disk(plan.n_clusters, folder, out)
    # 2) clusters
    with torch_threads(n_cores()):
        embeddings = embed(folder, drawn.sentences, encoder, progress)
        clustering = cluster(folder, embeddings, config, progress)
        prompt_map = draw_map(embeddings, clustering, drawn.sentences, config, progress)
        del embeddings  # what follows needs the memory
    clustered = ClusteredCorpus(language_model, drawn.sentences, clustering, config, corpus.max_tokens, folder)
    plan.check_disk(clustered.n_clusters, folder, out)
    # 3) statistics
    workers = Workers(clustered, source, progress, n_workers)
    with torch_threads(source.n_threads):
        record(workers)
    sums = cache(lambda: add_up(clustered))  # asked for once the memory of fits is free
    # 4) compensated sets
    settings = config.compensation
    sets = None if settings is None else make_sets(workers, settings, _statistics(sums))
    # 5) what tokens need, and what it promises
    with torch_threads(n_cores()):
        histograms = measure_histograms(clustered, progress) if measures else {}
        refit = fit_refit(clustered, histograms, progress)
        unwritten = None if refit is None else read_refit(folder, refit, language_model)
        profiles = measure_promise(folder, language_model, histograms, unwritten, config.seed, lay_out, progress)
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
