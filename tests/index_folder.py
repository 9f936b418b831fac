"""A small index on disk whose ranks are worked out by hand, and ways to damage it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from coreinfer_sim.base.files import sha256_of
from coreinfer_sim.index.clusters import Cluster
from coreinfer_sim.index.manifest import (
    MANIFEST_FILE,
    CorpusInfo,
    EncoderInfo,
    Manifest,
    ModelInfo,
    SettingsInfo,
    manifest_checksum,
)
from coreinfer_sim.index.prompt_map import PromptMap
from coreinfer_sim.index.storage import save_index

PROMPTS = ["How do stars form?", "Why does bread rise?", "What do judges decide in court?"]

# Three clusters, two recorded layers, six neurons; only the first layer's ranks are worked out by hand below.
ENERGY = np.zeros((3, 2, 6), np.float32)
ENERGY[0] = [[5, 1, 3, 3, 3, 0], [1, 2, 3, 4, 5, 6]]
ENERGY[1] = [[0, 4, 0, 0, 0, 9], [6, 5, 4, 3, 2, 1]]
COUNTS = np.zeros((3, 2, 6), np.uint8)
COUNTS[0] = [[200, 2, 0, 1, 2, 1], [0, 0, 0, 0, 0, 0]]
COUNTS[1] = [[100, 0, 0, 250, 0, 0], [0, 0, 0, 0, 0, 0]]
ACTIVATION = np.zeros((3, 2, 6), np.float32)
ACTIVATION[0] = [[0, 9, 1, 2, 1, 7], [1, 1, 1, 2, 1, 1]]
ACTIVATION[1] = [[3, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]]
STATISTICS = {"counts": COUNTS, "energy": ENERGY, "activation": ACTIVATION}


def clusters(n: int = 3) -> list[Cluster]:
    return [
        Cluster(c, 10 - c, 100, f"label {c}", [f"prompt „{c}“", "b"], [f"id-{c}", "y"], {"0": 0.25, "1": 0.75})
        for c in range(n)
    ]


def manifest(**sections: Any) -> Manifest:
    """Return a manifest that fits the parts above; sections replace its own."""
    return Manifest(
        **{
            "format_version": 2,
            "versions": {"coreinfer-sim": "0.1.0"},
            "model": ModelInfo(
                name="some-model",
                revision=None,
                family="Llama",
                dtype="float32",
                n_layers=3,
                d_model=8,
                d_ff=6,
                weight_sketch=[[0.5] * 32] * 3,
                tokenizer_sha256="0" * 64,
                activation_site="input of down_proj",
            ),
            "encoder": EncoderInfo("sentence-transformers/all-MiniLM-L6-v2", 4, True, "cosine", [0.0] * 8),
            "corpus": CorpusInfo("prompts.jsonl", "1" * 64, 27, 300),
            "settings": SettingsInfo(3, 0.4, 0.4, 0.5, 0, [1, 2], 16, 64, 1),
            "compensation": [],
            "profiles": {},
            "files": {},
            **sections,
        }
    )


def save(
    folder: Path,
    *,
    centroids: np.ndarray | None = None,
    of_clusters: list[Cluster] | None = None,
    statistics: dict[str, np.ndarray] | None = None,
    prompt_map: PromptMap | None = None,
    **sections: Any,
) -> Path:
    """Save an index; every part may be another."""
    folder.mkdir(parents=True)
    save_index(
        folder,
        np.eye(4, dtype=np.float32)[:3] if centroids is None else centroids,
        clusters() if of_clusters is None else of_clusters,
        STATISTICS if statistics is None else statistics,
        manifest(**sections),
        prompt_map=prompt_map,
    )
    return folder


def rewrite(folder: Path, raw: Any) -> None:
    """Put another manifest in place."""
    if isinstance(raw, dict) and isinstance(raw.get("sha256"), str):
        raw = {**raw, "sha256": manifest_checksum(raw)}
    (folder / MANIFEST_FILE).write_text(json.dumps(raw), encoding="utf-8")


def raw_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Put another file in place, its size and checksum in the manifest right."""
    (folder / name).write_bytes(content)
    raw = raw_manifest(folder)
    raw["files"][name] = {"size": len(content), "sha256": sha256_of(folder / name)}
    rewrite(folder, raw)


def changed_at(raw: dict[str, Any], field: tuple[str, ...]) -> dict[str, Any]:
    """Return the part of a manifest that holds a field."""
    for name in field[:-1]:
        raw = raw[name]
    return raw
