"""Settings of decoding: which neurons are held, what decodes with them, and how tokens are chosen. Plain data, no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, TypeVar

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import Fallback, Mode, Score, Weights, check_ratio

E = TypeVar("E", bound=Enum)
MIB, GIB = 1 << 20, 1 << 30
MAX_SEED = 2**64 - 1
"""Of torch's generators."""


class Prefill(str, Enum):
    """Which MLPs read the prompt."""

    DENSE = "dense"
    SPARSE = "sparse"
    """The held neurons alone, which must be known before."""


@dataclass(frozen=True)
class ModelConfig:
    """How a model and its sentence encoder are loaded."""

    dtype: str = "auto"
    """Of the weights: auto, stored, float32, bfloat16 or float16; see `load_model`."""
    device: str = "auto"
    """Of torch; auto: a GPU where there is one."""
    encoder: str | None = None
    """Sentence encoder, hub id or folder; None: the index's, in a build all-MiniLM-L6-v2."""


@dataclass(frozen=True)
class SelectionConfig:
    """Which neurons decode holds for a prompt."""

    mode: Mode | None = None
    """Where the neurons come from. None: similarity; without an index all where tokens choose, else dense."""
    keep_ratio: float | None = None
    """Share of d_ff that is held; of the MLP bytes in compensated sets. None: the index's."""
    read_ratio: float | None = None
    """Share of d_ff that a token reads in full, on average, where all neurons are held, and less where fewer are. A token chooses
    by an estimate from a few bits of the weights. Below 1, all are held where no keep ratio is given. None: 1, all that are
    held."""
    score: Score = Score.ENERGY
    """What ranks the neurons."""
    sparse_layers: str | None = None
    """Slice of the layers that become sparse, such as ``4:``. None: those of the index, or all."""
    fallback: Fallback | None = None
    """What similarity mode does for unfamiliar prompts. None: global where compensated sets decode or prefill is sparse, else
    hybrid."""
    compensated: bool = True
    """Take the index's compensated sets where it has them for the keep ratio, unless it was tuned to plain ones."""
    alpha: float | None = None
    """Share of the positive activations that makes a token's core neurons. None: the index's, or 0.4."""
    seed: int = 0
    """Of random mode."""

    def __post_init__(self) -> None:
        """Turn names into choices and check ranges."""
        for name, kind in (("mode", Mode), ("score", Score), ("fallback", Fallback)):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, choice(name, value, kind))
        for name in ("keep_ratio", "read_ratio", "alpha"):
            value = getattr(self, name)
            if value is not None:
                check_ratio(name.replace("_", " "), value)
        check_seed(self.seed)

    @property
    def by_token(self) -> bool:
        """Whether each token chooses among the held neurons what it reads."""
        return self.read_ratio is not None and self.read_ratio < 1

    @property
    def mode_or_ratio(self) -> str | None:
        """Name of a setting that says itself which neurons are read, so that no profile does; None: there is none."""
        if self.named_mode is not Mode.SIMILARITY:
            return f"mode {self.named_mode.value}"
        names = ("keep_ratio", "read_ratio", "alpha", "sparse_layers", "score", "compensated")
        defaults = SelectionConfig()
        return next((name for name in names if getattr(self, name) != getattr(defaults, name)), None)

    @property
    def named_mode(self) -> Mode:
        """The mode, similarity where none is named."""
        return Mode.SIMILARITY if self.mode is None else self.mode

    def resolved(self, has_index: bool) -> SelectionConfig:
        """Return the settings with a mode, which depends on whether there is something to look up where none is named."""
        mode = self.named_mode
        if self.mode is None and not has_index and self.keep_ratio is None:
            mode = Mode.ALL if self.by_token else Mode.DENSE
        return replace(self, mode=mode)


@dataclass(frozen=True)
class DecodeConfig:
    """What decodes, and in how much memory."""

    engine: str = "auto"
    """Name of a registered engine, or auto: the first that can run the model."""
    weights: Weights | None = None
    """Type of the weights that decode reads; all but stored need the lean engine. None: the one that the index was tuned to, or
    stored."""
    prefill: Prefill = Prefill.DENSE
    """Which MLPs read the prompt."""
    cache_bytes: int = 2 * GIB
    """Prepared weights of recent selections that stay in memory for later prompts."""
    prefix_bytes: int = 512 * MIB
    """Keys and values of recent texts that stay in memory for prompts which begin as they do; 0, or a memory budget: none."""
    memory_budget: int | None = None
    """Bytes that the process (on a GPU: its memory) may hold; dense MLP weights then stay on disk (in host memory)."""
    exported: str | None = None
    """For llamacpp: folder of exported files and their router."""
    memory_limit: int | None = None
    """For llamacpp: bytes of files that may be open at a time."""
    context: int = 4096
    """For llamacpp: positions of the cache."""

    def __post_init__(self) -> None:
        """Turn names into choices and check ranges."""
        if self.weights is not None:
            object.__setattr__(self, "weights", choice("weights", self.weights, Weights))
        object.__setattr__(self, "prefill", choice("prefill", self.prefill, Prefill))
        least_of = {"cache_bytes": 0, "prefix_bytes": 0, "memory_budget": 1, "memory_limit": 1, "context": 8}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}, expected {least} or more.")

    @property
    def weights_type(self) -> Weights:
        """Type of the weights, stored where none is named."""
        return self.weights or Weights.STORED


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen and where a text ends; greedy unless a sampling setting is given."""

    max_new_tokens: int = 128
    """Most new tokens."""
    min_new_tokens: int | None = None
    """No end token before so many."""
    temperature: float | None = None
    """Sample at this temperature; 0: greedy."""
    top_k: int | None = None
    """Sample among the k likeliest tokens."""
    top_p: float | None = None
    """Nucleus sampling."""
    min_p: float | None = None
    """Drop tokens below this share of the likeliest."""
    typical_p: float | None = None
    """Locally typical sampling."""
    repetition_penalty: float | None = None
    """Above 1: tokens that were there become less likely."""
    no_repeat_ngram_size: int | None = None
    """No sequence of so many tokens comes twice."""
    num_beams: int = 1
    """Beam search; does not stream."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer."""
    seed: int | None = None
    """Of sampling. None: goes on with torch's generator."""
    ignore_eos: bool = False
    """Go on past end tokens, as benchmarks do."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, least in (
            *(
                ("max_new_tokens", 1),
                ("min_new_tokens", 0),
                ("top_k", 0),
                ("no_repeat_ngram_size", 1),
                ("num_beams", 1),
            ),
            *(("temperature", 0.0), ("min_p", 0.0)),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}, expected {least} or more.")
        check_seed(self.seed)
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            if value is not None:
                check_ratio(name, value)
        if self.min_p is not None and self.min_p > 1:
            raise ConfigError(f"min_p is {self.min_p}, expected 0 to 1.")
        if self.repetition_penalty is not None and self.repetition_penalty <= 0:
            raise ConfigError(f"repetition_penalty is {self.repetition_penalty}, expected a number above 0.")
        if (self.min_new_tokens or 0) > self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens is {self.min_new_tokens}, expected at most max_new_tokens, {self.max_new_tokens}."
            )
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if "" in self.stop:
            raise ConfigError("a stop text is empty, which every text contains; leave it out.")

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn by chance."""
        if self.temperature == 0:
            return False
        names = ("temperature", "top_k", "top_p", "min_p", "typical_p")
        return any(getattr(self, name) is not None for name in names)


def with_settings(settings: Mapping[str, Any], configs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Put settings by name into whichever of ``configs``, dataclasses, has them.

    Raises:
        ConfigError: none has one of that name.
    """
    known = [{field.name for field in fields(config)} for config in configs]
    unknown = sorted(set(settings).difference(*known))
    if unknown:
        names = sorted(set().union(*known))
        near = difflib.get_close_matches(unknown[0], names, 3, 0.5)
        listed = f"nearest: {', '.join(near)}" if near else f"expected some of {', '.join(names)}"
        raise ConfigError(f"there is no setting {', '.join(unknown)} here; {listed}.")
    return tuple(
        replace(config, **{name: value for name, value in settings.items() if name in own})
        for config, own in zip(configs, known, strict=True)
    )


def check_seed(seed: int | None) -> None:
    """Raise ConfigError unless torch's generators take a seed."""
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed is {seed}, expected 0 to {MAX_SEED}.")


def choice(name: str, value: object, kind: type[E]) -> E:
    """Return the member of ``kind`` that ``value`` names, or raise ConfigError with all names and the nearest."""
    try:
        return kind(value)
    except ValueError as error:
        known = [str(each.value) for each in kind]
        near = difflib.get_close_matches(str(value), known, 1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(known)}{hint}.") from error
