"""Thresholds of an index's own: how much neurons are estimated to count where texts of its corpus are decoded."""

from __future__ import annotations

import numpy as np
import torch
from safetensors.numpy import load_file, save

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.base.files import write_atomic
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.settings import Weights
from coreinfer_sim.engines.registry import check_engine, choose_engines
from coreinfer_sim.fitting.clustered_corpus import ClusteredCorpus
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import dense_bytes

_KINDS = (Weights.STORED, Weights.BF16, Weights.INT8, Weights.INT4)
_SHARE = 20  # of the corpus's tokens one in so many is read for each layout
_FEWEST, _MOST = 2_000, 16_000  # tokens, if there are as many
_LARGEST = 1.2  # of 16-bit rows, beside which gate and up have an estimate of 4.5 bits
_FILE = "histograms.safetensors"


def n_tokens_measured(n_tokens: int) -> int:
    """Return how many tokens are read for each layout of a corpus of ``n_tokens``, about."""
    return min(n_tokens, max(_FEWEST, min(_MOST, n_tokens // _SHARE)))


def layout_bytes(language_model: LanguageModel) -> int:
    """Return the memory that the largest layout takes beside the model, about; 0 if no tokens choose among its neurons."""
    model, layers, config = language_model.model, language_model.layers, DecodeConfig()
    engine = check_engine(model, config)[0][0]
    chooses = engine.reads_by_token and not engine.is_sparse_by_itself(model, layers, config)
    return int(_LARGEST * dense_bytes(layers)) if chooses else 0


def measure_histograms(corpus: ClusteredCorpus, progress: Progress) -> dict[str, np.ndarray]:
    """Return the histograms of all layouts by which the model may decode; see `Engine.histograms`.

    Counted are the completions, or second halves, of some texts that no set is compared on.

    Args:
        corpus: of the build; what is measured is kept in its folder.
        progress: of the texts.
    """
    path = corpus.folder / _FILE
    if path.exists():
        found: dict[str, np.ndarray] = load_file(path)
        found.pop("", None)
        return found
    found = _measure(corpus, progress)
    content = save(found or {"": np.zeros(0, np.int64)})  # a file of no tensors cannot be read
    write_atomic(path, lambda part: part.write_bytes(content))
    return found


def _measure(corpus: ClusteredCorpus, progress: Progress) -> dict[str, np.ndarray]:
    language_model = corpus.language_model
    model, layers = language_model.model, language_model.layers
    if not layout_bytes(language_model):
        return {}
    _, texts = corpus.texts(None, n_tokens_measured(corpus.n_fitting_tokens()))
    pairs = [(torch.tensor(text.ids), text.n_prompt) for text in texts if len(text.ids) > text.n_prompt]
    # 1) the layouts, each once
    configs: dict[str, DecodeConfig] = {}
    for weights in _KINDS:
        config = DecodeConfig(weights=weights)
        configs.setdefault(check_engine(model, config)[0][0].layout_by_token(model, layers, config), config)
    # 2) one after the other, as each takes memory beside the model
    found: dict[str, np.ndarray] = {}
    progress.start("Measuring what tokens need", len(pairs) * len(configs), "texts")
    try:
        for config in configs.values() if pairs else ():
            engine = choose_engines(model, layers, config)[0][0]
            found |= engine.histograms(pairs, progress.advance)
    finally:
        progress.finish()
    return found
