"""Thresholds of an index's own: how much neurons are estimated to count where texts of its corpus are decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.base.files import write_atomic
from coreinfer_sim.base.processes import Report
from coreinfer_sim.base.settings import Weights
from coreinfer_sim.engines.face import Engine
from coreinfer_sim.engines.registry import check_engine, choose_engines
from coreinfer_sim.fitting.clustered_corpus import ClusteredCorpus
from coreinfer_sim.fitting.workers import Workers
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import dense_bytes

_KINDS = (Weights.STORED, Weights.BF16, Weights.INT8, Weights.INT4)
_SHARE = 20  # of the corpus's tokens one in so many is read for each layout
_FEWEST, _MOST = 2_000, 16_000  # tokens, if there are as many
_LARGEST = 1.2  # of 16-bit rows, beside which gate and up have an estimate of 4.5 bits
_FILE, _PARTS_FOLDER = "histograms.safetensors", "histograms"
_TEXTS_AT_ONCE = 32  # in a part, the unit of restart and of sharing


def n_tokens_measured(n_tokens: int) -> int:
    """Return how many tokens are read for each layout of a corpus of ``n_tokens``, about."""
    return min(n_tokens, max(_FEWEST, min(_MOST, n_tokens // _SHARE)))


def layout_bytes(language_model: LanguageModel) -> int:
    """Return the memory that the largest layout takes beside the model, about; 0 if no tokens choose among its neurons."""
    model, layers, config = language_model.model, language_model.layers, DecodeConfig()
    engine = check_engine(model, config)[0][0]
    chooses = engine.reads_by_token and not engine.is_sparse_by_itself(model, layers, config)
    return int(_LARGEST * dense_bytes(layers)) if chooses else 0


@dataclass
class MeasureHistograms:
    """The job that counts, on some texts, what tokens need of one layout; it reports texts. Counts are sums."""

    parts: Sequence[tuple[Weights, Sequence[int]]]
    """Of each part the kind of weights, and the places of its texts."""
    _engine: tuple[Weights, Engine] | None = None
    """Of the part before, as its layout takes longer than a text."""

    def result(self, corpus: ClusteredCorpus, number: int) -> Path:
        """Return where a part's counts will be."""
        return corpus.folder / _PARTS_FOLDER / f"{number:06d}.safetensors"

    def run(self, corpus: ClusteredCorpus, number: int, report: Report) -> None:
        """Leave the counts of one part on disk."""
        weights, places = self.parts[number]
        if self._engine is None or self._engine[0] is not weights:
            self._engine = None  # before the next one takes memory
            model, layers = corpus.language_model.model, corpus.language_model.layers
            self._engine = weights, choose_engines(model, layers, DecodeConfig(weights=weights))[0][0]
        texts = [corpus.text(place) for place in places]
        pairs = [(torch.tensor(text.ids), text.n_prompt) for text in texts]
        _save(self.result(corpus, number), self._engine[1].histograms(pairs, report))


def measure_histograms(workers: Workers) -> dict[str, np.ndarray]:
    """Return the histograms of all layouts by which the model may decode; see `Engine.histograms`.

    Counted are the completions, or second halves, of some texts that no set is compared on.

    Args:
        workers: of the build; what is measured is kept in its folder.
    """
    path = workers.corpus.folder / _FILE
    if not path.exists():
        _save(path, _measure(workers))
    return _load(path)


def _save(path: Path, found: Mapping[str, np.ndarray]) -> None:
    content = save(dict(found) or {"": np.zeros(0, np.int64)})  # a file of no tensors cannot be read
    write_atomic(path, lambda part: part.write_bytes(content))


def _load(path: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = load_file(path)
    found.pop("", None)
    return found


def kept_histograms(folder: Path) -> dict[str, np.ndarray]:
    """Return what `measure_histograms` has left in the folder of a build."""
    return _load(folder / _FILE)


def _measure(workers: Workers) -> dict[str, np.ndarray]:
    corpus = workers.corpus
    language_model = corpus.language_model
    model, layers = language_model.model, language_model.layers
    n_bytes = layout_bytes(language_model)
    if not n_bytes:
        return {}
    places, texts = corpus.texts(None, n_tokens_measured(corpus.n_fitting_tokens()))
    counting = [place for place, text in zip(places, texts, strict=True) if len(text.ids) > text.n_prompt]
    if not counting:
        return {}
    # 1) the layouts, each once
    kinds: dict[str, Weights] = {}
    for weights in _KINDS:
        config = DecodeConfig(weights=weights)
        kinds.setdefault(check_engine(model, config)[0][0].layout_by_token(model, layers, config), weights)
    # 2) some texts at a time, a worker one layout after the other, as each takes memory beside the model
    blocks = [counting[begin : begin + _TEXTS_AT_ONCE] for begin in range(0, len(counting), _TEXTS_AT_ONCE)]
    job = MeasureHistograms([(weights, block) for weights in kinds.values() for block in blocks])
    (corpus.folder / _PARTS_FOLDER).mkdir(exist_ok=True)
    sizes = {number: len(block) for number, (_, block) in enumerate(job.parts)}
    workers.run(job, "Measuring what tokens need", "texts", sizes, sizes, n_bytes, n_bytes)
    # 3) their sum
    found: dict[str, np.ndarray] = {}
    for number in sizes:
        for name, counts in _load(job.result(corpus, number)).items():
            found[name] = found[name] + counts if name in found else counts
    return found
