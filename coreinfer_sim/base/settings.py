"""Settings of a build: plain data, checked when made; no I/O and no torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from coreinfer_sim.base.errors import ConfigError


class Score(str, Enum):
    """What ranks the neurons of a cluster."""

    ENERGY = "energy"
    """Sum over tokens of (z_n / ‖z‖₂)²; sign-blind (the GRIFFIN statistic)."""
    PAPER = "paper"
    """Number of sentences whose sentence-wise core neurons hold the neuron (CoreInfer)."""


class Ranking(str, Enum):
    """What ranks the neurons of a set that is compensated."""

    SURGEON = "surgeon"
    """Squared error that compensation by all others cannot repair (optimal brain surgeon)."""
    ENERGY = "energy"
    """As in `Score`."""


class Budget(str, Enum):
    """How the neurons are shared out among the layers of a set that is compensated."""

    UNIFORM = "uniform"
    """The same share of every layer."""
    SENSITIVITY = "sensitivity"
    """More where dropping neurons was measured to cost more, under the same mean."""


class Mode(str, Enum):
    """Where a selection comes from."""

    SIMILARITY = "similarity"
    HYBRID = "hybrid"
    STABILITY = "stability"
    GLOBAL = "global"
    RANDOM = "random"
    ALL = "all"
    """Every neuron; each token reads those that it needs."""
    DENSE = "dense"


class Profile(str, Enum):
    """How much quality decode may give up for bytes; what that comes to was measured for the index."""

    EXACT = "exact"
    """None: tokens are dense."""
    BALANCED = "balanced"
    """At most 3 % of perplexity, unless the index was tuned for another share."""
    FAST = "fast"
    """At most 10 %."""


MAX_INCREASES = {Profile.BALANCED: 0.03, Profile.FAST: 0.1}
"""Of perplexity, as a share of the dense model's, that a profile may lose unless an index is tuned for another share."""


class Weights(str, Enum):
    """Type of the weights that decode reads."""

    STORED = "stored"
    """The checkpoint's own; of a GGUF file the codes and scales that it holds."""
    BF16 = "bf16"
    """bfloat16."""
    INT8 = "int8"
    """8 bits with a scale every 32 weights, as GGUF's Q8_0."""
    INT4 = "int4"
    """4 bits with a scale every 32 weights, as GGUF's Q4_0; 6 bits in the output head."""


class Fallback(str, Enum):
    """What similarity mode does for a prompt that is unfamiliar to its cluster."""

    HYBRID = "hybrid"
    DENSE = "dense"
    GLOBAL = "global"
    NONE = "none"


SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "\\t": "\t", "pipe": "|"}
"""Of values in a text file, by name."""
UNFAMILIAR = 0.05
"""A prompt is unfamiliar if fewer than this share of its cluster's own prompts lie as far from the centroid."""


def check_ratio(name: str, value: float) -> None:
    """Raise ConfigError unless ``value`` lies in (0, 1]."""
    if not 0.0 < value <= 1.0:
        raise ConfigError(f"{name} is {value}, expected a number above 0 and at most 1.")


def _check_at_least(name: str, value: int | None, smallest: int) -> None:
    if value is not None and value < smallest:
        raise ConfigError(f"{name} is {value}, expected {smallest} or more.")


def parse_size(text: str) -> int:
    """Turn ``"2GiB"``, ``"500 MB"`` or a number of bytes into bytes.

    Raises:
        ConfigError: the text is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b)?", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"{text!r} is no size, expected for example 2GiB, 500MB or a number of bytes.")
    power = " kmgt".index((found[2] or " ").lower())
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def template_parts(template: str) -> list[tuple[str, bool]]:
    """Return the parts of a template such as ``"Question: {The question}"``: texts, and with True the names of columns.

    A name is whatever stands between braces; doubled braces are braces of the text.

    Raises:
        ConfigError: it names no column, or has a single brace.
    """
    parts: list[tuple[str, bool]] = []
    for found in re.finditer(r"(\{\{|\}\})|\{([^{}]+)\}|([^{}]+)|([{}])", template):
        brace, name, text, single = found.groups()
        if single:
            raise ConfigError(f"the template {template!r} has a single brace; write {{column}}, or {{{{ for a brace.")
        parts.append((name, True) if name else (text or brace[0], False))
    if not any(is_field for _, is_field in parts):
        raise ConfigError(f"the template {template!r} names no column; write for example 'Question: {{question}}'.")
    return parts


@dataclass(frozen=True)
class CorpusConfig:
    """Where the prompts come from and how a row becomes text."""

    source: str
    """Hub id, or the path of a JSONL, JSON, CSV, TSV, text (each also .gz) or Parquet file, of a folder of files
    of one of these kinds, or of a ``save_to_disk`` folder."""
    name: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set, or of a folder with several."""
    prompt_column: str | None = None
    """Column that is embedded: what a user would type, or a list of messages, of which the user's last one is embedded. None:
    "messages" or "conversations", "prompt" with "completion", "prompt", "text", or the only text column; where there is none
    of these beside a template, what that renders."""
    completion_column: str | None = None
    """Column of answers, which evaluation scores; a build reads prompt and answer as a conversation. None: "completion"."""
    separator: str | None = None
    """Of a .csv or .tsv file: a character, or comma, semicolon, tab or pipe. None: recognised by the first rows."""
    label_column: str | None = None
    """Column that says what kind of text a row is, which an analysis holds clusters against; read by nothing else."""
    template: str | None = None
    """What the language model reads, with ``{column}`` fields. None: the prompt itself."""
    limit: int | None = None
    """Keep at most this many prompts."""
    max_tokens: int = 512
    """Longer texts are cut to this many tokens; the report says how many were."""
    deduplicate: bool = True
    """Drop a row whose text has been seen."""

    def __post_init__(self) -> None:
        """Check ranges and the template."""
        _check_at_least("limit", self.limit, 1)
        _check_at_least("max_tokens", self.max_tokens, 2)
        if self.template is not None:
            template_parts(self.template)
        if self.separator is not None and len(self.separator) != 1 and self.separator not in SEPARATORS:
            raise ConfigError(f"separator is {self.separator!r}, expected one character, or {', '.join(SEPARATORS)}.")


@dataclass(frozen=True)
class CompensationConfig:
    """How sets of neurons are fitted so that the kept ones make up for the dropped ones."""

    keep_ratios: tuple[float, ...] = (0.4,)
    """Share of the dense MLPs' bytes, compensation included, on average over the layers; one fitted set for each."""
    ranking: Ranking = Ranking.SURGEON
    """What ranks the neurons."""
    budget: Budget = Budget.SENSITIVITY
    """How neurons are shared out among the layers."""
    tokens: int = 20_000
    """Tokens that each cluster's set is fitted on; the whole corpus's set takes three times as many."""
    distil_tokens: int = 0
    """Three times as many tokens of the texts train the whole corpus's set from there, and then again all clusters' sets
    jointly; 0: the closed form stays as it is."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not self.keep_ratios:
            raise ConfigError("compensation was given no keep ratio, expected one or more.")
        for ratio in self.keep_ratios:
            check_ratio("keep ratio", ratio)
            if ratio == 1.0:
                raise ConfigError("the keep ratio is 1, where nothing is dropped and nothing can be compensated.")
        names = [f"{ratio:g}" for ratio in self.keep_ratios]  # as an index tells them apart
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"the keep ratio {twice} was given twice, expected each once; leave one out.")
        _check_at_least("tokens", self.tokens, 1)
        _check_at_least("distil tokens", self.distil_tokens, 0)


@dataclass(frozen=True)
class BuildConfig:
    """Everything that decides what is in an index, apart from corpus and model."""

    clusters: int | str = "auto"
    """Number of semantic clusters, or "auto": the best silhouette on a sample."""
    centroids: str | None = None
    """Index whose clusters are taken in place of new ones, so that the index may be merged with it; some may be empty."""
    alpha: float = 0.4
    """Share of the positive activations that makes a token's core neurons."""
    beta: float = 0.4
    """Share of d_ff that makes a sentence's core neurons."""
    gamma: float = 0.8
    """Keep ratio used where the reader of the index names none."""
    seed: int = 0
    """Seed of k-means, of what is held out, and of the order of texts that sets are fitted to and trained on."""
    layers: str = ":"
    """Slice of the layers that are recorded, such as ``4:``."""
    batch_size: int = 16
    """Sentences in one forward pass."""
    shard_size: int = 64
    """Sentences in one shard, the unit of restart and of sharing among processes."""
    texts: bool = True
    """Keep the beginnings of prompts: of those nearest to each centroid, and of those on the map. Labels hold words anyhow."""
    refit: float | None = None
    """Share of the neurons that tokens read for which output rows are refitted, to make up for the others; None: they are not."""
    compensation: CompensationConfig | None = None
    """Fit compensated sets as well; None: store statistics alone."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("alpha", "beta", "gamma"):
            check_ratio(name, getattr(self, name))
        if isinstance(self.clusters, str):
            if self.clusters != "auto":
                raise ConfigError(f"clusters is {self.clusters!r}, expected a number or 'auto'.")
        else:
            _check_at_least("clusters", self.clusters, 1)
        if self.centroids is not None and self.clusters != "auto":
            raise ConfigError(
                f"clusters is {self.clusters} and centroids is {self.centroids!r}, whose clusters are taken; give one of them."
            )
        if self.refit is not None:
            check_ratio("refit", self.refit)
            if self.refit == 1.0:
                raise ConfigError("refit is 1, where tokens read all neurons and nothing is to be made up for.")
        _check_at_least("seed", self.seed, 0)
        _check_at_least("batch_size", self.batch_size, 1)
        _check_at_least("shard_size", self.shard_size, 1)
        parse_layers(self.layers, 1)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON types."""
        return dataclasses.asdict(self)


def layers_slice(numbers: Sequence[int]) -> str:
    """Return the slice that `parse_layers` turns into ``numbers``, rising and evenly spaced."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    return f"{numbers[0]}:{numbers[-1] + 1}:{step}"


def members_within(text: str, layers: Sequence[int]) -> list[int]:
    """Return which members lie in the layers that a slice names; several, such as a layer's experts, may lie in one.

    Args:
        text: as in `parse_layers`, which counts the layers that have members.
        layers: number of each member's layer.
    """
    numbers = sorted(set(layers))
    named = {numbers[place] for place in parse_layers(text, len(numbers))}
    return [member for member, layer in enumerate(layers) if layer in named]


def parse_layers(text: str, n_layers: int) -> list[int]:
    """Turn ``"4:"``, ``"2:10"``, ``"3"`` or ``":"`` into layer numbers, with Python's slice rules.

    Raises:
        ConfigError: the text is not a slice or number.
    """
    parts = text.strip().split(":")
    try:
        numbers = [int(part) if part.strip() else None for part in parts]
    except ValueError as error:
        raise ConfigError(f"layers is {text!r}, expected a slice such as '4:' or one layer's number.") from error
    if len(numbers) == 1 and numbers[0] is not None:
        layer = numbers[0]
        return [layer % n_layers] if -n_layers <= layer < n_layers else []
    if len(numbers) in (2, 3) and numbers[2:] != [0]:
        return list(range(n_layers))[slice(*numbers)]
    raise ConfigError(f"layers is {text!r}, expected a slice such as '4:' or one layer's number.")
