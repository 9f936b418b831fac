"""An analysis: texts are drawn, each passes through the model once, and what they add up to is kept on the way."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from coreinfer_sim.analysis.alpha_beta import AlphaBeta
from coreinfer_sim.analysis.clusters import Clusters
from coreinfer_sim.analysis.experiment import Experiment, Picture, Setting
from coreinfer_sim.analysis.information import Information
from coreinfer_sim.analysis.intervals import N_GROUPS, with_intervals
from coreinfer_sim.analysis.layers import Layers
from coreinfer_sim.analysis.reading import Reader
from coreinfer_sim.analysis.similarity import Similarity
from coreinfer_sim.analysis.stability import Stability
from coreinfer_sim.analysis.texts import BLOCK, Texts, draw
from coreinfer_sim.base import analysis_settings as settings
from coreinfer_sim.base.errors import ConfigError, CorpusError
from coreinfer_sim.base.files import cache_folder, locked, write_atomic
from coreinfer_sim.base.progress import Progress, counted, shown
from coreinfer_sim.base.rows import describe_corpus
from coreinfer_sim.base.settings import CorpusConfig
from coreinfer_sim.index.encoder import DEFAULT_ENCODER, SentenceEncoder
from coreinfer_sim.models.fingerprint import weights_checksum
from coreinfer_sim.models.loading import LanguageModel, load_model, tokenizer_hash

EXPERIMENTS: dict[settings.Experiment, type[Experiment]] = {
    settings.Experiment.ALPHA_BETA: AlphaBeta,
    settings.Experiment.STABILITY: Stability,
    settings.Experiment.SIMILARITY: Similarity,
    settings.Experiment.CLUSTERS: Clusters,
    settings.Experiment.LAYERS: Layers,
    settings.Experiment.INFORMATION: Information,
}
SAVE_EVERY = 20.0
"""Seconds between two times that what was found is kept."""
_MEMORY = "memory "
_VERSION = 1
"""Of what experiments count: sums of another one are not gone on with."""


@dataclass(frozen=True)
class Analysis:
    """What an experiment has found."""

    experiment: settings.Experiment
    model: str
    corpus: dict[str, Any]
    """Of `CorpusReport`, and the source."""
    config: settings.AnalysisConfig
    encoders: tuple[str, ...]
    """Empty where none was needed."""
    rows: list[dict[str, Any]]
    """A number each: what it is of, "value", and "low" and "high", the ends of its 95 % interval; None: too few texts."""
    remarks: list[str]
    n_texts: int
    """That were measured, which may be fewer than the corpus holds."""

    @property
    def picture(self) -> Picture:
        """How it is drawn."""
        return EXPERIMENTS[self.experiment].picture(self.config)

    @property
    def has_intervals(self) -> bool:
        """Whether there were texts enough for intervals."""
        return any(row["low"] is not None for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        found = {**asdict(self), "experiment": self.experiment.value}
        return {**found, "config": {**found["config"], "clusters": list(self.config.clusters)}}


def analyze(
    experiment: settings.Experiment | str,
    model: str | LanguageModel,
    corpus: CorpusConfig | str,
    config: settings.AnalysisConfig | None = None,
    *,
    encoder: str | SentenceEncoder = DEFAULT_ENCODER,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> Analysis:
    """Ask one question about core neurons of a model on a corpus.

    What was found is kept in the user's cache folder: the same call goes on where an earlier one was broken off, and gives the
    same numbers. Memory does not grow with the texts but by some 100 bytes for each.

    Args:
        experiment: what is asked.
        model: hub id, checkpoint folder, GGUF file, or a loaded model.
        corpus: where the texts are.
        config: what is looked at.
        encoder: of sentences, by name or loaded, for experiments that compare meanings.
        dtype: of the language model; see `load_model`.
        device: of the language model and the encoder.
        progress: takes messages and progress; None: see `shown`.

    Raises:
        CoreInferSimError: any of its kinds; what was finished is kept.
    """
    experiment, progress = settings.Experiment(experiment), shown(progress)
    corpus = CorpusConfig(corpus) if isinstance(corpus, str) else corpus
    config = config or settings.AnalysisConfig()
    kind = EXPERIMENTS[experiment]
    if config.further_encoders and experiment is not settings.Experiment.CLUSTERS:
        raise ConfigError(f"further_encoders are of clusters, and do nothing for {experiment.value}; leave them out.")
    # 1) the models
    progress.say(f"Reading {describe_corpus(corpus)}.")
    language_model = load_model(model, dtype, device) if isinstance(model, str) else model
    for note in language_model.notes:
        progress.say(note)
    reader = Reader.of(language_model, config.layers, corpus.max_tokens)
    encoders = (
        _encoders(encoder, config.further_encoders, str(language_model.model.device)) if kind.needs_encoder else []
    )
    with TemporaryDirectory() as folder:
        # 2) the texts
        texts = draw(Path(folder, "texts.jsonl"), corpus, language_model.tokenizer, config.seed, progress)
        if len(texts) < kind.least_texts:
            raise CorpusError(
                f"the corpus {corpus.source} holds {counted(len(texts), 'text')}, expected {kind.least_texts} or more, which "
                f"{experiment.value} compares; give a larger one."
            )
        # 3) what they add up to, from where an earlier run was broken off
        used = {
            "version": _VERSION,
            "experiment": experiment.value,
            "texts": texts.report.sha256,
            "max_tokens": corpus.max_tokens,
            "config": asdict(config),
            "weights": weights_checksum(language_model.layers),
            "tokenizer": tokenizer_hash(language_model.tokenizer),
            "dtype": language_model.dtype_name,
            "encoders": [each.probe() for each in encoders],
        }
        digest = hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()[:16]
        work = kind(Setting(reader, config, encoders, texts, progress))
        kept = cache_folder("analyses") / digest
        with locked(kept, progress):
            _run(work, kept / "sums.safetensors", texts, progress)
    # 4) the numbers
    work.check()
    rows = with_intervals(work.sums, work.measures, work.unit)
    found = Analysis(
        experiment,
        language_model.name,
        {"source": corpus.source, **texts.report.as_dict()},
        config,
        tuple(each.name for each in encoders),
        rows,
        work.remarks(),
        int(work.sums[work.measured].sum()),
    )
    if not found.has_intervals:
        found.remarks.append(
            f"intervals compare blocks of {BLOCK} texts, and {counted(found.n_texts, 'text')} gave too few of them"
        )
    return found


def _encoders(encoder: str | SentenceEncoder, further: Sequence[str], device: str) -> list[SentenceEncoder]:
    first = SentenceEncoder(encoder, device) if isinstance(encoder, str) else encoder
    return [first, *(SentenceEncoder(name, device) for name in further)]


def _run(work: Experiment, state: Path, texts: Texts, progress: Progress) -> None:
    """Pass all blocks through the model that an earlier run has not finished; keep what was found from time to time."""
    done = _load(work, state)
    if done:
        progress.say(f"Going on after {done * 100 // texts.n_blocks} % of the texts.")
    else:
        work.prepare()
    n_before = int(work.sums["texts"].sum())
    progress.start("Language model", len(texts), "texts", n_before)
    saved = time.monotonic()
    try:
        for number in range(done, texts.n_blocks):
            rows, group = texts.block(number), number % N_GROUPS
            work.add(group, number, rows, work.reader.ids(rows))
            work.sums["texts"][group] += len(rows)
            if number + 1 == texts.n_blocks or time.monotonic() - saved >= SAVE_EVERY:
                _save(work, state, number + 1)
                saved = time.monotonic()
            progress.advance(len(rows))
    finally:
        progress.finish()


def _save(work: Experiment, path: Path, done: int) -> None:
    """Write sums and memory in one step."""
    arrays = {**work.sums, **{_MEMORY + name: values for name, values in work.memory.items()}}
    arrays = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    content = save(arrays, {"done": str(done)})
    write_atomic(path, lambda part: part.write_bytes(content))


def _load(work: Experiment, path: Path) -> int:
    """Take what an earlier run has kept; return the blocks that it has finished."""
    if not path.exists():
        return 0
    try:
        with safe_open(path, "numpy") as file:
            done = int(file.metadata()["done"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
    except SafetensorError:
        work.progress.say(f"{path} is damaged; counting anew.")
        return 0
    for name, values in arrays.items():
        if name.startswith(_MEMORY):
            work.memory[name.removeprefix(_MEMORY)] = values
        else:
            work.sums[name] = values
    return done
