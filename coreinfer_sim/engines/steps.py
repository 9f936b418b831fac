"""What a decode step gets, and what belongs to the call that makes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from coreinfer_sim.engines.prepared import Prepared
from coreinfer_sim.engines.sizes import BytesRead

Group = tuple[Sequence[int], Prepared]
"""Rows of a batch, and the neurons that they decode with."""


@dataclass(frozen=True)
class StepInputs:
    """What a decode step gets."""

    ids: torch.Tensor
    """The newest token of every row, [n_rows, 1]."""
    cache: Any
    """Of transformers; it grows by one position in all rows."""
    given: Mapping[str, Any]
    """All that transformers' ``generate`` gives to a forward pass."""
    starts: np.ndarray
    """First position of each row that is no padding, int64 [n_rows]."""
    finished: np.ndarray
    """Rows whose text has ended, boolean [n_rows]; nobody looks at their logits."""
    n_copies: int
    """Rows of each prompt: beams, or several texts of one prompt; groups name prompts."""
    forward: Callable[..., Any]
    """The model's own forward pass."""

    @property
    def positions(self) -> torch.Tensor:
        """Of the newest tokens, [n_rows]."""
        found = self.given.get("position_ids")
        if found is None:
            found = torch.full((1, 1), int(self.cache.get_seq_length()))
        return found.reshape(-1).expand(len(self.ids))


@dataclass
class CallState:
    """What belongs to one call of ``generate``; of an engine without a loop of its own, what it has read."""

    read: BytesRead = BytesRead()
    latest: Sequence[Group] = ()
    """Of the latest step."""
    watched: bool = False
    """Whether somebody wants to know which neurons tokens choose."""
    chosen: dict[int, Mapping[int, np.ndarray]] = field(default_factory=dict)
    """What rows of the latest step chose among the neurons that they hold, if the call is watched: by prepared selection (its
    ``id``) and layer, boolean [n_rows, n_held]. Of layers that are not named, all were read."""


@dataclass(frozen=True)
class Step:
    """A decode step that one of several calls waits for."""

    inputs: StepInputs
    groups: Sequence[Group]
    call: CallState


class SharesSteps(Protocol):
    """An engine that decodes for several calls at a time."""

    def steps(self, each: Sequence[Step]) -> list[Any]:
        """Do what `Engine.step` does for several calls, each with its own cache; return what it returns for each."""
