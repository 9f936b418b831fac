"""A selection is data: which neurons decode keeps, and where the choice came from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from coreinfer_sim.base.errors import IndexMismatchError
from coreinfer_sim.base.settings import UNFAMILIAR
from coreinfer_sim.index.compensated import LayerCompensation, Refit
from coreinfer_sim.models.mlps import MLPLayer


@dataclass(frozen=True, eq=False)
class NeuronSelection:
    """The neurons that a decode step reads; two selections are the same only if they are one object."""

    mode: str
    """Which predictor made it."""
    ids: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """Kept neurons of a layer, ascending, [n_kept]; a layer that is not named stays dense."""
    cluster: int | None = None
    """Semantic cluster that the prompt was routed to, if any."""
    similarity: float | None = None
    """Cosine similarity of the prompt to that cluster's centroid."""
    label: str | None = None
    """That cluster's readable label."""
    compensation: Mapping[int, LayerCompensation] | None = None
    """What is merged into the compact MLP of a layer; it belongs to just these ids."""
    confidence: float | None = None
    """Of the routing; see `Match`."""
    read_ratio: float = 1.0
    """Share of d_ff that a token reads in full, on average; 1: all that is kept."""
    refit: Refit | None = None
    """What makes up for the others, where all neurons are kept."""

    @property
    def confident(self) -> bool | None:
        """Whether the prompt is familiar to its cluster; None if it was not routed."""
        return None if self.confidence is None else self.confidence >= UNFAMILIAR

    def check(self, layers: Sequence[MLPLayer]) -> None:
        """Raise IndexMismatchError if the ids do not fit the model's layers."""
        for number, ids in self.ids.items():
            if not 0 <= number < len(layers):
                raise IndexMismatchError(f"the selection names layer {number}, but the model has {len(layers)} layers.")
            d_ff = layers[number].d_ff
            if ids.dtype != torch.int64 or ids.dim() != 1 or len(ids) == 0:
                raise IndexMismatchError(
                    f"the selection of layer {number} is {ids.dtype} of shape {tuple(ids.shape)}, expected int64 ids [n_kept]."
                )
            if int(ids[0]) < 0 or int(ids[-1]) >= d_ff or bool((ids.diff() <= 0).any()):
                raise IndexMismatchError(
                    f"the selection of layer {number} does not ascend within 0 to {d_ff - 1}, expected each id once, in order."
                )

    def keep_ratio(self, layers: Sequence[MLPLayer]) -> float:
        """Return kept neurons over all neurons of the model."""
        kept = sum(len(self.ids[layer.number]) if layer.number in self.ids else layer.d_ff for layer in layers)
        return kept / sum(layer.d_ff for layer in layers)


def refitted(selection: NeuronSelection, refit: Refit) -> NeuronSelection:
    """Return a selection with refitted output rows, if tokens read such a share of all neurons."""
    meant = not selection.ids and math.isclose(selection.read_ratio, refit.read_ratio)
    return replace(selection, refit=refit) if meant else selection
