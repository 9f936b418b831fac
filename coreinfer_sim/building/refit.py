"""Output rows of an index's own, for tokens that leave neurons out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.settings import BuildConfig
from coreinfer_sim.engines.calibration import calibrate
from coreinfer_sim.engines.registry import choose_engines
from coreinfer_sim.fitting.clustered_corpus import ClusteredCorpus
from coreinfer_sim.fitting.refit import N_TOKENS, layers_at_once, moments_bytes, refit_rows
from coreinfer_sim.index.compensated import Refit, load_compensated, save_compensated
from coreinfer_sim.index.manifest import REFIT_FILE, RefitInfo
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import MLPLayer


def refit_disk(layers: Sequence[MLPLayer], config: BuildConfig) -> int:
    """Return the bytes of the file."""
    return 0 if config.refit is None else sum(layer.d_ff * (2 * layer.d_model + 4) for layer in layers)


def refit_memory(layers: Sequence[MLPLayer], config: BuildConfig) -> int:
    """Return the memory that fitting takes beside the model: moments, and the rows that were fitted."""
    if config.refit is None:
        return 0
    return (layers_at_once(layers) + 2) * moments_bytes(layers[0]) + 2 * refit_disk(layers, config)


def read_refit(folder: Path, info: RefitInfo, language_model: LanguageModel) -> Refit:
    """Read from the build's folder what `fit_refit` has left there."""
    layers = language_model.layers
    _, changes = load_compensated(folder / REFIT_FILE, layers[0].d_model, len(layers))
    return Refit(info.read_ratio, info.layout, changes)


def fit_refit(corpus: ClusteredCorpus, histograms: Mapping[str, np.ndarray], progress: Progress) -> RefitInfo | None:
    """Refit output rows in the build's folder, unless that was done before, and say of what they are; None: not asked for.

    Args:
        corpus: of the build.
        histograms: that the index will hold.
        progress: of the texts.

    Raises:
        ConfigError: the engine that decodes the model reads no share of neurons.
    """
    read_ratio, language_model = corpus.config.refit, corpus.language_model
    if read_ratio is None:
        return None
    model, layers, config = language_model.model, language_model.layers, DecodeConfig()
    path = corpus.folder / REFIT_FILE
    engine = choose_engines(model, layers, config)[0][0]
    _, texts = corpus.texts(None, N_TOKENS)
    n_tokens = sum(len(text.ids) for text in texts)
    info = RefitInfo(read_ratio, engine.layout_by_token(model, layers, config), n_tokens)
    if path.exists():
        return info
    calibrate(engine, language_model.tokenizer, progress, histograms)
    n_passes = -(-len(layers) // layers_at_once(layers))
    progress.start("Refitting output rows", len(texts) * n_passes, "texts")
    try:
        changes = refit_rows(engine, layers, texts, read_ratio, progress.advance)
    finally:
        progress.finish()
    save_compensated(path, {number: torch.arange(layers[number].d_ff) for number in changes}, changes)
    return info
