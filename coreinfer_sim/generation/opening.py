"""The one place that opens an index, a model and an engine: every command, the server, lm-eval and bench go through it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from coreinfer_sim.base.decode_settings import DecodeConfig, ModelConfig, Prefill, SelectionConfig, with_settings
from coreinfer_sim.base.errors import ConfigError, MissingModelError, ModelError
from coreinfer_sim.base.memory import keep_heap_small
from coreinfer_sim.base.progress import Progress, shown
from coreinfer_sim.base.settings import Fallback, Mode, Profile
from coreinfer_sim.choosing.compatibility import check_model
from coreinfer_sim.choosing.promised import promised
from coreinfer_sim.engines.registry import AUTO, EXPORTED, check_engine, engine_class
from coreinfer_sim.generation.budget import Longest, load_by_token_within_budget, load_within_budget
from coreinfer_sim.generation.exported import ExportedGenerator
from coreinfer_sim.generation.in_process import TextGenerator
from coreinfer_sim.generation.text import Generator
from coreinfer_sim.index.encoder import SentenceEncoder
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.loading import LanguageModel, load_model, tokenizer_hash, usable_device

_OF_LLAMACPP = ("exported", "memory_limit", "context")
"""Settings that no other engine looks at."""


def load(
    index: str | Path | SemanticIndex | None = None,
    model: str | LanguageModel | None = None,
    *,
    profile: Profile | str | None = None,
    selection: SelectionConfig | None = None,
    decode: DecodeConfig | None = None,
    loading: ModelConfig | None = None,
    longest: Longest | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Generator:
    """Open what generates, streams and looks up.

    Example:
        >>> import coreinfer_sim
        >>> with coreinfer_sim.load("my-index", "./my-model") as generator:
        ...     print(generator.generate("How do stars form?", max_new_tokens=64).text)

    Args:
        index: name or folder of an index, or a loaded one; None: only modes that need none.
        model: hub id, checkpoint folder, GGUF file or a loaded model; None: the index's.
        profile: exact, balanced or fast, as they were measured for the index; None: balanced where it has a gain, else exact,
            unless a mode or a ratio is given.
        selection: which neurons decode holds.
        decode: what decodes.
        loading: type and device of the model, and the sentence encoder.
        longest: for a memory budget, which is planned before anything is loaded.
        progress: receives messages and progress; None: see `shown`.
        **settings: further fields of these, such as ``mode="global"``, ``engine="lean"`` or ``device="cpu"``.

    Raises:
        CoreInferSimError: what is missing, damaged or does not belong together.
    """
    # 1) settings
    progress = shown(progress)
    selection, decode, loading = with_settings(
        settings, (selection or SelectionConfig(), decode or DecodeConfig(), loading or ModelConfig())
    )
    if decode.prefill is Prefill.SPARSE and selection.fallback is None:
        selection = replace(selection, fallback=Fallback.GLOBAL)
    if decode.memory_budget is not None:
        keep_heap_small()  # before the index' encoder leaves holes in the heap
    # 2) the index
    opened = open_index(index, loading.encoder)
    if decode.engine == EXPORTED:
        if opened is None:
            raise ConfigError("llama.cpp needs an index that routes and the models exported from it; give both.")
        if profile is not None:
            raise ConfigError(
                "a profile does not apply to the engine llamacpp, whose models were fixed by export; leave it out."
            )
        return ExportedGenerator(opened, selection, decode)
    given = [name for name in _OF_LLAMACPP if getattr(decode, name) != getattr(DecodeConfig(), name)]
    if given:
        raise ConfigError(f"{given[0]} is of the engine llamacpp, but {decode.engine} was asked for; leave it out.")
    was_asked, was_named = selection.by_token, selection.mode is not None or profile is not None
    found = promised(selection, decode, opened, engine_class(_first(decode)).is_faster_by_token, profile)
    decode, used, why_dense = found.decode, found.profile, found.why_dense
    selection = found.selection.resolved(opened is not None)
    # 3) the model
    if isinstance(model, LanguageModel):
        loaded = model
    elif decode.memory_budget is not None:
        load_it = load_by_token_within_budget if selection.by_token else load_within_budget
        loaded = load_it(model_name(opened, model), opened, selection, decode, loading, longest or Longest(), progress)
        _say_notes(loaded, progress)
    else:
        name = model_name(opened, model)
        laid_out = laid_out_model(name, loading, decode, selection.by_token, progress)
        loaded = laid_out or open_model(opened, model, loading, decode, progress)
    if opened is not None:
        check_model(opened, loaded.layers, tokenizer_hash(loaded.tokenizer))
    if not was_named and selection.mode is Mode.DENSE:
        why_dense = (
            "Decode is dense, as there is no index; 'coreinfer-sim build-index' makes one, or give a read ratio."
        )
    if selection.by_token and not was_asked:
        engine = check_engine(loaded.model, decode)[0][0]
        if not engine.reads_by_token:
            selection, used = replace(selection, read_ratio=None), Profile.EXACT
            why_dense = f"Decode is dense, as the engine {engine.name} reads all neurons."
    if why_dense is not None:
        progress.say(why_dense)
    generator = TextGenerator(loaded, opened, selection, decode, progress=progress)
    generator.profile = used
    if not isinstance(model, LanguageModel):  # nobody else knows it
        generator.take_over()
    return generator


def open_index(index: str | Path | SemanticIndex | None, encoder: str | None = None) -> SemanticIndex | None:
    """Load an index, with an encoder of its own where one is named."""
    if index is None or isinstance(index, SemanticIndex):
        return index
    return SemanticIndex.load(index, SentenceEncoder(encoder) if encoder else None)


def model_name(index: SemanticIndex | None, model: str | None) -> str:
    """Return the model that was named, or else where the index's lies.

    Raises:
        ConfigError: neither was given.
        MissingModelError: the index's is not to be found.
    """
    if model is not None:
        return model
    if index is None:
        raise ConfigError("neither a model nor an index was given, expected a model, or an index to take it from.")
    return index.model_place


def open_model(
    index: SemanticIndex | None,
    model: str | None,
    loading: ModelConfig | None = None,
    decode: DecodeConfig | None = None,
    progress: Progress | None = None,
) -> LanguageModel:
    """Load the model that decodes: weights stay as stored where the engine multiplies them in any type.

    What was passed over or mended in it is said to ``progress``.
    """
    loading = loading or ModelConfig()
    as_stored = (decode or DecodeConfig()).engine != "compiled"
    name = model_name(index, model)
    try:
        loaded = load_model(name, loading.dtype, loading.device, as_stored=as_stored)
    except ModelError as error:
        if index is None or model is not None or type(error) is not ModelError:
            raise
        raise MissingModelError(f"{index.name} names the model {name}, but {error}") from error
    _say_notes(loaded, progress)
    return loaded


def laid_out_model(
    name: str,
    loading: ModelConfig,
    decode: DecodeConfig,
    by_token: bool = False,
    progress: Progress | None = None,
) -> LanguageModel | None:
    """Load a model in the layout of the engine that decodes it; None: it reads weights as transformers loads them.

    The layout is made when it is needed first, and kept in the user's cache folder.
    """
    if loading.dtype not in ("auto", "stored") or usable_device(loading.device) != "cpu":
        return None
    loaded = engine_class(_first(decode)).load(name, decode, by_token, progress)
    if loaded is not None:
        _say_notes(loaded, progress)
    return loaded


def _first(decode: DecodeConfig) -> str:
    """Return the name of the engine that decodes if it can run the model."""
    return AUTO[0] if decode.engine == "auto" else decode.engine


def _say_notes(loaded: LanguageModel, progress: Progress | None) -> None:
    for note in loaded.notes:
        (progress or Progress()).say(note)
