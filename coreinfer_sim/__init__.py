"""Sparse decode from semantically clustered core neurons.

The names below are the public API, which ``docs/python.md`` describes. They load on first use, so that importing the package
does not import torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if "OMP_WAIT_POLICY" not in os.environ:
    # OpenMP's threads wait for each other some hundred times a token. By default they spin for milliseconds: while other programs
    # need the same cores, that takes most of decode's speed. OpenMP reads this when torch or numba is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:  # what type checkers and editors see; the same names as in _WHERE
    from coreinfer_sim.base.decode_settings import DecodeConfig as DecodeConfig
    from coreinfer_sim.base.decode_settings import ModelConfig as ModelConfig
    from coreinfer_sim.base.decode_settings import SamplingConfig as SamplingConfig
    from coreinfer_sim.base.decode_settings import SelectionConfig as SelectionConfig
    from coreinfer_sim.base.errors import CoreInferSimError as CoreInferSimError
    from coreinfer_sim.base.progress import Progress as Progress
    from coreinfer_sim.base.scale_settings import ScaleConfig as ScaleConfig
    from coreinfer_sim.base.settings import BuildConfig as BuildConfig
    from coreinfer_sim.base.settings import CorpusConfig as CorpusConfig
    from coreinfer_sim.base.settings import Fallback as Fallback
    from coreinfer_sim.base.settings import Mode as Mode
    from coreinfer_sim.base.settings import Profile as Profile
    from coreinfer_sim.base.settings import Score as Score
    from coreinfer_sim.building.build import build_index as build_index
    from coreinfer_sim.choosing.make import make_predictor as make_predictor
    from coreinfer_sim.choosing.selection import NeuronSelection as NeuronSelection
    from coreinfer_sim.evaluation.compare import Evaluation as Evaluation
    from coreinfer_sim.evaluation.compare import evaluate as evaluate
    from coreinfer_sim.generation.in_process import TextGenerator as TextGenerator
    from coreinfer_sim.generation.opening import load as load
    from coreinfer_sim.generation.sparse_model import SparseModel as SparseModel
    from coreinfer_sim.generation.text import Generation as Generation
    from coreinfer_sim.generation.text import Generator as Generator
    from coreinfer_sim.index.clusters import Match as Match
    from coreinfer_sim.index.encoder import SentenceEncoder as SentenceEncoder
    from coreinfer_sim.index.index import SemanticIndex as SemanticIndex
    from coreinfer_sim.index.prompt_map import Place as Place
    from coreinfer_sim.index.prompt_map import PromptMap as PromptMap
    from coreinfer_sim.models.loading import LanguageModel as LanguageModel
    from coreinfer_sim.models.loading import load_model as load_model
    from coreinfer_sim.models.mlps import find_mlps as find_mlps

_WHERE = {
    "base.decode_settings": ("DecodeConfig", "ModelConfig", "SamplingConfig", "SelectionConfig"),
    "base.errors": ("CoreInferSimError",),
    "base.progress": ("Progress",),
    "base.scale_settings": ("ScaleConfig",),
    "base.settings": ("BuildConfig", "CorpusConfig", "Fallback", "Mode", "Profile", "Score"),
    "building.build": ("build_index",),
    "choosing.make": ("make_predictor",),
    "choosing.selection": ("NeuronSelection",),
    "evaluation.compare": ("Evaluation", "evaluate"),
    "generation.in_process": ("TextGenerator",),
    "generation.opening": ("load",),
    "generation.sparse_model": ("SparseModel",),
    "generation.text": ("Generation", "Generator"),
    "index.clusters": ("Match",),
    "index.encoder": ("SentenceEncoder",),
    "index.index": ("SemanticIndex",),
    "index.prompt_map": ("Place", "PromptMap"),
    "models.loading": ("LanguageModel", "load_model"),
    "models.mlps": ("find_mlps",),
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
