"""What every contender is: a program that is started once, run on prompts, stopped. No torch here: llama.cpp needs none."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from coreinfer_sim.bench.shapes import Shape, random_model
from coreinfer_sim.bench.specs import Spec


@dataclass(frozen=True)
class Subject:
    """The model that all programs run."""

    model: str | None
    """Hub id, checkpoint folder or GGUF file."""
    shape: Shape | None
    """A shape with random weights, in place of a model."""
    index: str | None = None
    """Index folder."""
    encoder: str | None = None
    """Sentence encoder, if it is not the packaged one."""

    @property
    def title(self) -> str:
        """What results call it."""
        return self.shape.title if self.shape is not None else str(self.model)

    def load(self, dtype: str, device: str, **options: Any) -> Any:
        """Return the `LanguageModel`; ``options`` are further ones of `load_model`."""
        if self.shape is not None:
            return random_model(self.shape, dtype, device)
        from coreinfer_sim.models.loading import load_model

        assert self.model is not None
        return load_model(self.model, dtype, device, **options)


@dataclass(frozen=True)
class Prompt:
    """The same tokens for every program."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class BenchJob:
    """What a worker process needs to make its program."""

    spec: Spec
    subject: Subject
    n_threads: int
    device: str
    context: int
    """Positions that the cache needs."""
    seed: int
    file: Path | None = None
    """GGUF file or checkpoint that was written for the program."""
    folder: Path | None = None
    """For what the program itself writes."""
    bytes_per_token: int | None = None
    """Where the process itself cannot tell."""
    llama_bench: Path | None = None
    """llama.cpp's own program, built for this processor; None: the ready-made package."""


@dataclass(frozen=True)
class Timing:
    """What one prompt cost; seconds."""

    lookup_seconds: float
    """Embedding the prompt and finding its cluster."""
    swap_seconds: float
    """Making or loading compact weights; 0 where they were there."""
    prefill_seconds: float
    """Reading the prompt, up to the first new token."""
    first_token_seconds: float
    """From the call to the first new token, whatever happened in between."""
    decode_seconds: float
    """From the first new token to the last."""
    n_new: int
    tokens_per_second: float
    """Decode speed, over the new tokens after the first."""
    bytes_per_token: int
    """Bytes of weights that one decoded token reads; the cache is not counted."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Further ones, such as the cluster."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


class Program(Protocol):
    """Something that generates text, in a process of its own."""

    def start(self) -> dict[str, Any]:
        """Load everything; return facts such as the dtype."""
        ...

    def run(self, prompt: Prompt, n_new: int) -> Timing:
        """Generate exactly ``n_new`` tokens, greedily."""
        ...

    def stop(self) -> None:
        """Let go of what `start` made."""
        ...

    # A program whose work is done by further processes also has `peak_bytes`: the most memory that one of them has held.
