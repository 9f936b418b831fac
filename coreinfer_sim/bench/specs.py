"""Contenders as text, such as ``sparse:0.4:int8``; no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import Mode, Profile, check_ratio

DENSE, OURS_DENSE, OFFLOAD, LLAMACPP = "dense", "ours-dense", "offload", "llamacpp"
_MODES = {"sparse": Mode.SIMILARITY, **{mode.value: mode for mode in Mode if mode is not Mode.DENSE}}
KINDS = (DENSE, OURS_DENSE, *_MODES, OFFLOAD, LLAMACPP)
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16", "bf16": "bfloat16", "f32": "float32"}
GGUF_TYPES = ("bf16", "f16", "f32", "q8_0", "q4_0")
OWN_FILE = "file"
"""The GGUF file that the model is, as it stands."""
_OPTIONS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("engine", "weights", "prefill", "score", "fallback", "sparse_layers"), str),
    "seed": int,
    "read_ratio": float,
    "profile": Profile,
}
"""Further settings of our own runtime, as `load` names them, by what reads their text."""
DEFAULT_KEEP_RATIO = 0.4
_POSSIBLE = (
    "dense[:DTYPE], ours-dense[:DTYPE], MODE[:KEEP_RATIO][:DTYPE][:int8|int4][:OPTION=VALUE…], offload[:SHARE][:DTYPE] or "
    f"llamacpp[:TYPE]; MODE is {', '.join(_MODES)}, DTYPE float32, bfloat16 or float16, "
    f"TYPE {', '.join((*GGUF_TYPES, OWN_FILE))}, OPTION {', '.join(_OPTIONS)}"
)


@dataclass(frozen=True)
class Spec:
    """One contender as it was requested."""

    text: str
    """What was requested; the contender's name."""
    kind: str
    """DENSE, OURS_DENSE, OFFLOAD, LLAMACPP, or the value of a `Mode`."""
    dtype: str = "auto"
    """As `load_model` reads it; in llama.cpp the type of the GGUF file."""
    ratio: float | None = None
    """Keep ratio; in offload the share of the weights that stays in memory."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of our own runtime."""

    @property
    def mode(self) -> Mode:
        """How our own runtime chooses neurons."""
        return Mode.DENSE if self.kind == OURS_DENSE else Mode(self.kind)

    @property
    def by_token(self) -> bool:
        """Whether each token chooses what it reads, or may by its profile."""
        by_profile = self.options.get("profile", Profile.EXACT) is not Profile.EXACT
        return by_profile or float(self.options.get("read_ratio", 1.0)) < 1

    @property
    def needs_index(self) -> bool:
        """Whether neurons come from an index."""
        return self.kind in (Mode.SIMILARITY.value, Mode.HYBRID.value, Mode.GLOBAL.value)


def parse_spec(text: str) -> Spec:
    """Read a contender such as ``dense:float32``, ``sparse:0.4:int8`` or ``llamacpp:q8_0``.

    Raises:
        ConfigError: it cannot be read; the message lists what is possible.
    """
    kind, *parts = text.strip().split(":")
    if kind not in KINDS:
        raise _wrong(text, f"there is no {kind!r}")
    if kind == LLAMACPP:
        if len(parts) > 1 or (parts and parts[0] not in (*GGUF_TYPES, OWN_FILE)):
            raise _wrong(text, f"llamacpp has no {':'.join(parts)!r}")
        return Spec(text, kind, parts[0] if parts else "bf16")
    ours = kind not in (DENSE, OFFLOAD)
    found: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for part in parts:
        name, value = _read_part(text, part, has_ratio=kind not in (DENSE, OURS_DENSE), has_options=ours)
        target = found if name in ("dtype", "ratio") else options
        if name in target:
            raise _wrong(text, f"{part!r} gives {name} a second time")
        target[name] = value
    if kind in _MODES:
        holds_all = kind == Mode.ALL.value or not {"read_ratio", "profile"}.isdisjoint(options)
        kind, ratio = _MODES[kind].value, found.get("ratio", None if holds_all else DEFAULT_KEEP_RATIO)
    else:
        ratio = found.get("ratio", 0.5 if kind == OFFLOAD else None)
    return Spec(text, kind, found.get("dtype", "auto"), ratio, options)


def _read_part(text: str, part: str, has_ratio: bool, has_options: bool) -> tuple[str, Any]:
    """Return what a part of a spec sets, and to what."""
    if part in DTYPES:
        return "dtype", DTYPES[part]
    name, equals, value = part.partition("=")
    if has_options and part in ("int8", "int4"):
        return "weights", part
    if has_options and equals and name in _OPTIONS:
        try:
            return name, _OPTIONS[name](value)
        except ValueError as error:
            raise _wrong(text, f"{value!r} is no {name}") from error
    try:
        ratio = float(part)
    except ValueError as error:
        raise _wrong(text, f"{part!r} is unknown") from error
    if not has_ratio:
        raise _wrong(text, f"dense contenders have no ratio, but {part!r} was given")
    check_ratio(f"the ratio of the contender {text!r}", ratio)
    return "ratio", ratio


def _wrong(text: str, reason: str) -> ConfigError:
    return ConfigError(f"the contender {text!r} cannot be read, as {reason}; expected {_POSSIBLE}.")


def parse_specs(texts: Sequence[str]) -> list[Spec]:
    """Read contenders, each once.

    Raises:
        ConfigError: one cannot be read.
    """
    return [parse_spec(text) for text in dict.fromkeys(text.strip() for text in texts)]
