"""Which engine decodes: the one place that decides, by one rule.

A named engine decodes or refuses in one sentence. ``auto`` decodes by the first of `AUTO` that can run the model, and within a
call by the next one where the first cannot serve that call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.base.errors import ConfigError, UnknownEngineError
from coreinfer_sim.engines.compiled import CompiledEngine
from coreinfer_sim.engines.face import Engine
from coreinfer_sim.engines.in_transformers import TransformersEngine
from coreinfer_sim.engines.lean.engine import LeanEngine
from coreinfer_sim.models.mlps import MLPLayer

AUTO = ("lean", "transformers")
EXPORTED = "llamacpp"
"""Decodes exported files, outside this process's models; see `generation.exported`."""
_ENGINES: dict[str, type[Engine]] = {}


def register(engine: type[Engine]) -> type[Engine]:
    """Make an engine known under its name."""
    _ENGINES[engine.name] = engine
    return engine


def unregister(engine: type[Engine]) -> None:
    """Forget an engine, as one does after a test; nothing happens if it is not known."""
    _ENGINES.pop(engine.name, None)


for _engine in (LeanEngine, TransformersEngine, CompiledEngine):
    register(_engine)


def engine_class(name: str) -> type[Engine]:
    """Return the engine of a name, or raise ConfigError with all names."""
    if name not in _ENGINES:
        raise UnknownEngineError(
            f"there is no engine {name!r}, expected auto or one of {', '.join([*_ENGINES, EXPORTED])}."
        )
    return _ENGINES[name]


def check_engine(model: Any, config: DecodeConfig) -> tuple[list[type[Engine]], str | None]:
    """Return the engines that can run a model, best first, and why an earlier one of ``auto`` cannot.

    Raises:
        ConfigError: the engine that was named, or each of ``auto``, refuses.
    """
    config = replace(config, weights=config.weights_type)
    names = AUTO if config.engine == "auto" else (config.engine,)
    refusals = {name: engine_class(name).refuses(model, config) for name in names}
    able = [engine_class(name) for name in names if refusals[name] is None]
    if not able:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
        raise ConfigError(
            f"engine {config.engine} with {config.weights_type.value} weights was asked for, but {reasons}; leave the engine at "
            "auto and the weights as stored."
        )
    first = next(iter(refusals.items()))  # what comes after the engine that decodes was not needed
    refused = None if first[1] is None else f"{first[0]}: {first[1]}"
    return able, refused


def choose_engines(model: Any, layers: Sequence[MLPLayer], config: DecodeConfig) -> tuple[list[Engine], str | None]:
    """Return the engines that may decode a model, and what `check_engine` says; errors as for that."""
    config = replace(config, weights=config.weights_type)
    able, refused = check_engine(model, config)
    return [engine(model, layers, config) for engine in able], refused
