"""Sparse decode from semantically clustered core neurons.

The names below load on first use, so that importing the package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "BuildConfig": "config",
    "CorpusConfig": "config",
    "Fallback": "config",
    "Mode": "config",
    "Score": "config",
    "CoreInferSimError": "errors",
    "LanguageModel": "models",
    "load_model": "models",
    "SentenceEncoder": "embeddings",
    "NeuronSelection": "selection",
    "SemanticIndex": "index",
    "Match": "index",
    "build_index": "build",
    "find_mlps": "architectures",
    "make_predictor": "predictors",
    "SparseModel": "runtime",
    "TextGenerator": "generation",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
