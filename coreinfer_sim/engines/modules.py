"""Compact MLPs inside a model: put in place, for a batch grouped by rows, and taken out again.

The owner's own forward code runs unchanged on the narrower projections, so activation, dropout and residual stay
those of the model family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.cutting import Projections, compact_model
from coreinfer_sim.models.experts import Routing
from coreinfer_sim.models.mlps import MLPLayer
from coreinfer_sim.models.structure import weight_shape


class GroupedLinear(nn.Module):
    """One projection for a batch whose rows hold different selections.

    Rows of one group go through that group's weights; narrower groups are padded with zeros, which add nothing to
    the output projection. An expert sees some of the tokens, of which its routing says where they belong.
    """

    def __init__(
        self,
        linears: Sequence[Any],
        rows: Sequence[Sequence[int]],
        pad_halves: bool,
        routing: Routing | None = None,
        reads: bool = False,
    ) -> None:
        """Use ``linears[g]`` for the batch rows ``rows[g]``.

        Args:
            linears: one a group.
            rows: of each group.
            pad_halves: pad gate and up of a fused projection.
            routing: of an expert.
            reads: whether the projection is the first that the expert calls.
        """
        super().__init__()
        self.routing, self.reads = routing, reads
        self.linears = nn.ModuleList(linears)
        self.rows = [torch.tensor(group) for group in rows]
        self.n_rows = sum(len(group) for group in rows)
        self.n_parts = 2 if pad_halves else 1
        self.shapes = [weight_shape(linear) for linear in linears]
        self.n_out: int = max(n_out for n_out, _ in self.shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [n_rows · n_beams (· n_positions) (, n_positions), n_in] to [..., n_out]; of an expert some of these."""
        places, n_places = torch.arange(len(x), device=x.device), len(x)
        if self.routing is not None:
            if self.reads:
                self.routing.read(x)
            places, n_places = self.routing.tokens, self.routing.n_tokens
        row_of = places * self.n_rows // n_places  # generate lays a prompt's beams one after the other
        out = x.new_zeros(*x.shape[:-1], self.n_parts, self.n_out // self.n_parts)
        for linear, rows, (n_out, n_in) in zip(self.linears, self.rows, self.shapes, strict=True):
            width = n_out // self.n_parts
            own = torch.isin(row_of, rows.to(row_of.device)).nonzero().squeeze(1)
            if len(own):
                out[own, ..., :width] = linear(x[own][..., :n_in]).unflatten(-1, (self.n_parts, width))
        return out.reshape(*x.shape[:-1], self.n_out)


def grouped_model(
    layers: Sequence[MLPLayer], compact: Sequence[dict[int, Projections]], rows: Sequence[Sequence[int]]
) -> dict[int, Projections]:
    """Join the compact MLPs of several selections into one, for a batch.

    Args:
        layers: the model's MLPs.
        compact: `compact_model` of each selection.
        rows: the batch rows of each selection.
    """
    if len(compact) == 1:
        return compact[0]
    grouped: dict[int, Projections] = {}
    for number in sorted(set().union(*compact)):
        layer = layers[number]
        dense = {name: layer.projection(name) for name in layer.projections}
        parts = [group.get(number, dense) for group in compact]
        grouped[number] = {
            name: GroupedLinear(
                [part[name] for part in parts],
                rows,
                layer.fused and name in layer.inputs,
                layer.routing,
                reads=name == layer.inputs[0],
            )
            for name in layer.projections
        }
    return grouped


def install(
    layers: Sequence[MLPLayer] | Mapping[int, MLPLayer], projections: dict[int, Projections]
) -> dict[int, Projections]:
    """Put projections into the model and return what they replace, which `install` puts back."""
    replaced: dict[int, Projections] = {}
    for number, modules in projections.items():
        layer = layers[number]
        replaced[number] = {name: layer.projection(name) for name in modules}
        for name, module in modules.items():
            layer.put(name, module)
    return replaced


@contextmanager
def installed_projections(layers: Sequence[MLPLayer], projections: dict[int, Projections]) -> Iterator[None]:
    """Run the block with projections in the model."""
    dense = install(layers, projections)
    try:
        yield
    finally:
        install(layers, dense)


@contextmanager
def installed(layers: Sequence[MLPLayer], selection: NeuronSelection) -> Iterator[None]:
    """Run the block with the selection's compact MLPs in the model; every token in it decodes sparsely."""
    selection.check(layers)
    with installed_projections(layers, compact_model(layers, selection)):
        yield
