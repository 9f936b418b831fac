"""Indexes for tiny models: one made at once, whose routing is real and whose statistics are random, and one that is built."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from coreinfer_sim.base.settings import BuildConfig
from coreinfer_sim.building.build import build_index
from coreinfer_sim.index.clusters import Cluster
from coreinfer_sim.index.encoder import SentenceEncoder
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import CorpusInfo, EncoderInfo, Manifest, ModelInfo, SettingsInfo
from coreinfer_sim.models.fingerprint import weight_sketch
from coreinfer_sim.models.mlps import MLPLayer

PROMPTS = ["How do stars form?", "Why does bread rise?", "What do judges decide in court?"]
WIDE_RATIO = 64 / 192
"""Keep ratio of the built index."""
QUANTILES = {"0": 0.2, "0.01": 0.21, "0.05": 0.25, "0.25": 0.4, "0.5": 0.5, "0.75": 0.6, "1": 0.9}


def tiny_index(
    layers: Sequence[MLPLayer], encoder: SentenceEncoder, recorded: Sequence[int] | None = None
) -> SemanticIndex:
    """Return an index of three clusters whose centroids are PROMPTS; None: of all layers."""
    d_ff = layers[0].d_ff
    recorded = range(len(layers)) if recorded is None else recorded
    random = np.random.default_rng(0)
    shape = (3, len(recorded), d_ff)
    statistics = {
        "counts": random.integers(0, 9, shape).astype(np.int32),
        "energy": random.random(shape, np.float32) ** 4,
        "activation": random.random(shape, np.float32),
    }
    manifest = Manifest(
        format_version=2,
        versions={},
        model=ModelInfo(
            name="tiny",
            revision=None,
            family=layers[0].family,
            dtype="float32",
            n_layers=len(layers),
            d_model=layers[0].d_model,
            d_ff=d_ff,
            weight_sketch=weight_sketch(layers),
            tokenizer_sha256="0" * 64,
            activation_site="input of down_proj",
        ),
        encoder=EncoderInfo(encoder.name, encoder.dimension, True, "cosine", encoder.probe()),
        corpus=CorpusInfo("prompts.jsonl", "1" * 64, 2997, 45_000),
        settings=SettingsInfo(3, 0.4, 0.4, 0.5, 0, list(recorded), 16, 64, 1),
        compensation=[],
        profiles={},
        files={},
    )
    clusters = [Cluster(c, 1000 - c, 10_000 + 5000 * c, f"label {c}", [], [], QUANTILES) for c in range(3)]
    return SemanticIndex(manifest, encoder.encode(PROMPTS), clusters, statistics, encoder=encoder)


def build_tiny_index(checkpoint: str, folder: Path, config: BuildConfig, encoder: SentenceEncoder) -> Path:
    """Build an index of three prompts a cluster in a folder; return the index's."""
    rows = [{"prompt": f"{question} {number}"} for question in PROMPTS for number in range(3)]
    return build_rows(checkpoint, folder, config, encoder, rows)


def build_rows(
    checkpoint: str, folder: Path, config: BuildConfig, encoder: SentenceEncoder, rows: Sequence[dict[str, str]]
) -> Path:
    """Build an index of some rows in a folder; return the index's."""
    corpus = folder / "prompts.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_index(checkpoint, str(corpus), folder / "index", config, encoder=encoder, threads=1)
    return folder / "index"
