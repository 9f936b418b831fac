"""Sparse decode from semantically clustered core neurons.

The names below load on first use, so that importing the package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "BuildConfig": "base.settings",
    "CorpusConfig": "base.settings",
    "Fallback": "base.settings",
    "Mode": "base.settings",
    "Score": "base.settings",
    "CoreInferSimError": "base.errors",
    "LanguageModel": "models.loading",
    "load_model": "models.loading",
    "SentenceEncoder": "index.encoder",
    "NeuronSelection": "choosing.selection",
    "SemanticIndex": "index.index",
    "Match": "index.clusters",
    "Place": "index.prompt_map",
    "PromptMap": "index.prompt_map",
    "build_index": "building.build",
    "find_mlps": "models.mlps",
    "make_predictor": "choosing.make",
    "SparseModel": "generation.sparse_model",
    "TextGenerator": "generation.in_process",
    "Generation": "generation.text",
    "load": "generation.opening",
    "DecodeConfig": "base.decode_settings",
    "ModelConfig": "base.decode_settings",
    "SamplingConfig": "base.decode_settings",
    "SelectionConfig": "base.decode_settings",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
