"""Settings of an analysis: plain data, checked when made; no I/O and no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import check_ratio, parse_layers

LEAST_LENGTH = 16


class Experiment(str, Enum):
    """What is measured of core neurons."""

    ALPHA_BETA = "alpha-beta"
    """Perplexity where a token has its core neurons alone, or those of its text, over their share."""
    STABILITY = "stability"
    """How soon a text's core neurons are those that it ends with."""
    SIMILARITY = "similarity"
    """Whether texts of like meaning have like core neurons."""
    CLUSTERS = "clusters"
    """Whether the texts of a semantic cluster have more core neurons in common than others."""
    LAYERS = "layers"
    """How activations differ by layer."""
    INFORMATION = "information"
    """How much of what a token needs is known before it comes."""


@dataclass(frozen=True)
class AnalysisConfig:
    """What an analysis looks at; what stands beside these settings in its result depends on nothing else."""

    alpha: float = 0.4
    """Share of the positive activations that makes a token's core neurons."""
    beta: float = 0.4
    """Share of d_ff that makes a text's core neurons, and that a token needs."""
    layers: str = ":"
    """Slice of the layers that are looked at, such as ``4:``."""
    clusters: tuple[int, ...] = (4, 8, 16, 32)
    """Numbers of semantic clusters."""
    further_encoders: tuple[str, ...] = ()
    """Sentence encoders whose clusters are compared with those of model.encoder."""
    length: int = 256
    """Tokens of a text that stability looks at; shorter texts are left out."""
    seed: int = 0
    """Of the texts' order, of k-means, and of what is shuffled."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("alpha", "beta"):
            check_ratio(name, getattr(self, name))
        if min(self.clusters, default=0) < 2 or len(set(self.clusters)) < len(self.clusters):
            raise ConfigError(
                f"clusters is {','.join(map(str, self.clusters)) or 'empty'}, expected different numbers of 2 or more."
            )
        if self.length < LEAST_LENGTH:
            raise ConfigError(f"length is {self.length}, expected {LEAST_LENGTH} tokens or more.")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, expected 0 or more.")
        parse_layers(self.layers, 1)
