"""Contenders: a way of choosing neurons, a keep ratio, and the precision of the weights."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import Fallback, Score, check_ratio

NAMES = ("dense", "all", "random", "random-cluster", "global", "similarity", "hybrid", "stability", "griffin", "oracle")
"""all: every neuron is held, for tokens to choose among; stability: the prompt's positive counts, as in the paper; griffin:
the prompt's energy; oracle: the completion's own."""
NEED_INDEX = ("random-cluster", "global", "similarity", "hybrid")
READS_PROMPT = ("hybrid", "stability", "griffin", "oracle")
FITTED = ("random-cluster", "global", "similarity")
COMPENSATED = "compensated"
"""Stands where a score does for sets that were fitted with their compensation."""
WEIGHTS = ("16bit", "stored", "int8", "int4", "q8_0", "q4_0")
"""Precision of the weights: 16bit as a checkpoint holds it, or as a GGUF file is widened to; stored is a GGUF file's own codes;
int8 and int4 as the lean engine rounds; q8_0 and q4_0 are llama.cpp's formats. A GGUF file of the same model may stand here
too."""
READ_WHOLE = ("q8_0", "q4_0")
"""Weights of which no token reads a share."""
_WAY = re.compile(
    rf"(?P<name>[a-z-]+)(?:/(?P<score>{'|'.join([*Score, COMPENSATED])}))?"
    rf"(?: else (?P<fallback>{'|'.join(Fallback)}))?"
)

_TITLE = re.compile(r"(?P<way>.+?) (?P<keep>[\d.e-]+)(?: read (?P<read>[\d.e-]+))?(?: (?P<weights>\S+))?")


@dataclass(frozen=True)
class Contender:
    """One row of the table."""

    name: str
    keep_ratio: float = 1.0
    score: Score = Score.ENERGY
    weights: str = "16bit"
    fallback: Fallback = Fallback.NONE
    """What similarity does for unfamiliar prompts."""
    compensated: bool = False
    """Whether a cluster's, or the corpus's, compensated set is taken."""
    read_ratio: float = 1.0
    """Share of d_ff that a token reads; 1: all that is held."""

    def __post_init__(self) -> None:
        """Check the names."""
        if self.name not in NAMES:
            raise ConfigError(f"there is no contender {self.name!r}, expected one of {', '.join(NAMES)}.")
        if self.compensated and self.name not in FITTED:
            raise ConfigError(f"{self.name} has no compensated sets, expected one of {', '.join(FITTED)}.")
        if self.of_file:
            if self.name != "dense":
                raise ConfigError(f"{self.weights} is another file, which is read densely; compare it as dense.")
            return
        if self.read_ratio < 1 and self.weights in READ_WHOLE:
            raise ConfigError(
                f"{self.weights} weights are read as a whole; give a read ratio to 16bit, int8 or int4 ones."
            )
        if self.weights not in WEIGHTS:
            raise ConfigError(
                f"there are no weights {self.weights!r}, expected one of {', '.join(WEIGHTS)}, or a GGUF file of the same model."
            )

    def __str__(self) -> str:
        """Return a name that tells contenders apart, such as ``similarity/energy 0.4 q8_0``."""
        if self.name == "dense":
            return f"dense {Path(self.weights).name if self.of_file else self.weights}"
        reads = f" read {self.read_ratio:g}" if self.read_ratio < 1 else ""
        return f"{self.way} {self.keep_ratio:g}{reads}" + ("" if self.weights == "16bit" else f" {self.weights}")

    @classmethod
    def named(cls, title: str) -> Contender:
        """Return the contender that a name such as ``similarity/energy 0.4 q8_0`` stands for; the inverse of ``str``.

        Raises:
            ConfigError: there is none.
        """
        if title.startswith("dense "):
            return cls("dense", weights=title.removeprefix("dense "))
        found = _TITLE.fullmatch(title)
        if found is None:
            raise ConfigError(f"there is no contender {title!r}, expected one as evaluation names it.")
        name, score, fallback = _parts(found["way"])
        compensated = score == COMPENSATED
        return cls(
            name,
            float(found["keep"]),
            Score.ENERGY if compensated else Score(score),
            found["weights"] or "16bit",
            Fallback(fallback),
            compensated,
            float(found["read"] or 1),
        )

    @property
    def of_file(self) -> bool:
        """Whether the weights are those of another file."""
        return is_file_name(self.weights)

    @property
    def reads_prompt(self) -> bool:
        """Whether it chooses by the prompt's own activations."""
        return self.name in READS_PROMPT or self.fallback is Fallback.HYBRID

    @property
    def family(self) -> str:
        """What it shares with contenders of other keep ratios, such as ``similarity/energy q8_0``; dense is one."""
        if self.name == "dense":
            return self.name
        return f"{self.way} {'by token ' if self.read_ratio < 1 else ''}{self.weights}"

    @property
    def way(self) -> str:
        """How it chooses neurons, such as ``similarity/energy else hybrid``."""
        ranked_by = COMPENSATED if self.compensated else self.score.value
        parts = [f"{self.name}/{ranked_by}" if self.name in NEED_INDEX else self.name]
        if self.fallback is not Fallback.NONE:
            parts.append(f"else {self.fallback.value}")
        return " ".join(parts)


def is_file_name(weights: str) -> bool:
    """Return whether weights are named by a GGUF file rather than by a type."""
    return weights.lower().endswith(".gguf")


def check_known_before(contenders: Sequence[Contender]) -> None:
    """Raise ConfigError if a contender chooses by what a dense prefill reads, so that prefill cannot be sparse."""
    for contender in contenders:
        if contender.reads_prompt:
            raise ConfigError(
                f"{contender} chooses by the prompt's own activations, but sparse prefill needs the set before; leave it "
                "out, or let prefill be dense."
            )


def parse_contenders(
    names: Sequence[str],
    keep_ratios: Sequence[float],
    scores: Sequence[str],
    weights: Sequence[str],
    fallbacks: Sequence[str] = ("none",),
    read_ratios: Sequence[float] = (),
) -> list[Contender]:
    """Cross names with keep ratios, read ratios, scores, weights and fallbacks, each sensible combination once.

    A name may also be a whole `Contender.way`, such as ``similarity/compensated else global``, which is crossed with keep
    ratios and weights alone.

    Raises:
        ConfigError: there is no such contender, a keep ratio is no share, or two files have one name.
    """
    for ratio in keep_ratios:
        check_ratio("keep ratio", ratio)
    for ratio in read_ratios:
        check_ratio("read ratio", ratio)
    found: dict[str, Contender] = {}
    for kind in weights:
        if is_file_name(kind) and not Path(kind).is_file():
            raise ConfigError(f"there is no file {kind}, expected a GGUF file of the same model.")
    for kind, given in itertools.product(weights, names):
        name, score, fallback = _parts(given)
        if name != "dense" and (is_file_name(kind) or (name == "all" and kind in READ_WHOLE)):
            continue
        whole = name != given
        crossed = itertools.product(
            keep_ratios if name not in ("dense", "all") else [1.0],
            [score] if whole else scores if name in NEED_INDEX else ["energy"],
            [fallback] if whole else fallbacks if name == "similarity" else ["none"],
            (read_ratios if name != "dense" and kind not in READ_WHOLE else []) or [1.0],
        )
        for ratio, score, fallback, reads in crossed:
            compensated = score == COMPENSATED
            if compensated and not whole and name not in FITTED:
                continue
            rank_by = Score.ENERGY if compensated else Score(score)
            contender = Contender(name, ratio, rank_by, kind, Fallback(fallback), compensated, reads)
            first = found.setdefault(str(contender), contender)
            if first.weights != kind:
                raise ConfigError(f"{first.weights} and {kind} have one name in the table; rename one of them.")
    return list(found.values())


def _parts(way: str) -> tuple[str, str, str]:
    """Return name, score and fallback of a contender's name or whole way."""
    found = _WAY.fullmatch(way)
    if found is None or not (
        found["name"] in NAMES
        and (found["score"] is None or found["name"] in NEED_INDEX)
        and (found["fallback"] is None or found["name"] == "similarity")
    ):
        raise ConfigError(
            f"there is no contender {way!r}, expected one of {', '.join(NAMES)}, or a way as the table names it "
            "without its keep ratio, such as 'similarity/compensated else global'."
        )
    return found["name"], found["score"] or "energy", found["fallback"] or "none"
