"""What every process of a build runs: shards of the corpus, then compensated sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from coreinfer_sim.base.corpus import Sentence
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.processes import RunShard
from coreinfer_sim.base.settings import BuildConfig, parse_layers
from coreinfer_sim.building.folder import read_kept_neurons, read_sentences
from coreinfer_sim.building.shards import cut_into_shards, run_shard
from coreinfer_sim.fitting.sets import make_distiller, make_fitter
from coreinfer_sim.fitting.texts import CalibrationCorpus
from coreinfer_sim.index.clustering import Clustering
from coreinfer_sim.models.loading import LanguageModel, load_model
from coreinfer_sim.models.mlps import MLPLayer

_ROOM_ALONE = 0.8
"""Share of the free memory that training takes by itself at most: reading texts and the rest of the machine need some."""


@dataclass(frozen=True)
class Job:
    """What every process of a build needs; it pickles."""

    model: str
    dtype: str
    device: str
    folder: Path
    config: BuildConfig
    max_tokens: int
    n_threads: int


def recorded_layers(language_model: LanguageModel, config: BuildConfig) -> list[MLPLayer]:
    """Return the layers whose statistics are taken."""
    numbers = sorted(parse_layers(config.layers, len(language_model.layers)))
    if not numbers:
        raise ConfigError(f"layers is {config.layers!r}, which names none of {len(language_model.layers)} layers.")
    return [language_model.layers[number] for number in numbers]


def shards_of(sentences: list[Sentence], clustering: Clustering, config: BuildConfig) -> list[np.ndarray]:
    """Return the numbers of each shard's sentences."""
    n_tokens = np.array([sentence.n_tokens for sentence in sentences])
    return cut_into_shards(clustering.assignment, n_tokens, config.shard_size)


def shard_path(folder: Path, number: int) -> Path:
    """Return where a shard's sums are."""
    return folder / "shards" / f"{number:06d}.safetensors"


def runner(job: Job, language_model: LanguageModel, sentences: list[Sentence], clustering: Clustering) -> RunShard:
    """Return the function that runs one shard by number."""
    layers = recorded_layers(language_model, job.config)
    shards = shards_of(sentences, clustering, job.config)

    def run(number: int) -> int:
        sums = run_shard(
            language_model, layers, sentences, clustering.assignment, shards[number], job.config, job.max_tokens
        )
        sums.save(shard_path(job.folder, number))
        return sum(sentences[i].n_tokens for i in shards[number])

    return run


def runner_of(job: Job) -> RunShard:
    """Load in a further process what the shards need."""
    return runner(job, *load_again(job))


def load_again(job: Job) -> tuple[LanguageModel, list[Sentence], Clustering]:
    """Load in a further process what the first one has."""
    torch.set_num_threads(job.n_threads)
    with np.load(job.folder / "clustering.npz") as arrays:
        clustering = Clustering(**arrays)
    language_model = load_model(job.model, job.dtype, job.device)
    return language_model, read_sentences(job.folder / "corpus.jsonl"), clustering


def calibration_corpus(
    job: Job, language_model: LanguageModel, sentences: list[Sentence], clustering: Clustering
) -> CalibrationCorpus:
    """Return what compensated sets are fitted to."""
    return CalibrationCorpus(language_model, sentences, clustering, job.config, job.max_tokens, job.folder)


def fitter(corpus: CalibrationCorpus, report: Callable[[int], None] | None = None) -> RunShard:
    """Return the function that fits one compensated set by number."""
    return make_fitter(corpus, read_kept_neurons(corpus.folder), report)


def fitter_of(job: Job) -> RunShard:
    """Load in a further process what the compensated sets need."""
    return fitter(calibration_corpus(job, *load_again(job)))


def distiller(corpus: CalibrationCorpus, report: Callable[[int], None] | None = None, alone: bool = False) -> RunShard:
    """Return the function that does one of the build's trainings, by its number in `trainings`.

    ``alone`` says that no other process trains meanwhile; else another may be about to take half of the free memory.
    """
    return make_distiller(corpus, report, _ROOM_ALONE if alone else 0.5)


def distiller_of(job: Job) -> RunShard:
    """Load in a further process what training needs."""
    return distiller(calibration_corpus(job, *load_again(job)))
