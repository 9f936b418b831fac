"""Output rows that make up for the neurons that tokens leave out: what they are fitted to, and where decode reads them."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import torch

from coreinfer_sim.engines.lean.blocks import LeanModel
from coreinfer_sim.engines.lean.compact import of_gates
from coreinfer_sim.engines.lean.forced import forced_states
from coreinfer_sim.engines.lean.matrix import Array
from coreinfer_sim.engines.lean.measuring import Text, layout_of
from coreinfer_sim.engines.lean.planes import TokenMLP
from coreinfer_sim.index.compensated import Refit

Take = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Takes the number of a layer, the values of its neurons that are read, and what all of them give."""


def refitted_mlps(weights: LeanModel, n_layers: int, refit: Refit) -> dict[int, TokenMLP]:
    """Return the MLPs of all layers with refitted output rows; none if these are of another layout of the weights."""
    if refit.layout != layout_of(weights, n_layers):
        return {}
    return {number: weights.token_mlp(number).refit(refit.changes[number]) for number in range(n_layers)}


def read_by_token(
    weights: LeanModel,
    dtype: torch.dtype,
    texts: Sequence[Text],
    thresholds: Array,
    numbers: Container[int],
    take: Take,
) -> None:
    """Read texts densely, and give what tokens would have read of some layers; arguments as for `Engine.values_by_token`."""
    for ids, n_first in texts:

        def mlp(number: int, x: torch.Tensor, n_first: int = n_first) -> torch.Tensor:
            own = weights.token_mlp(number)
            if number not in numbers:
                return own.whole_outputs(x, weights.kind)
            gate, up, down = own.parts
            values = of_gates(gate.times(x), weights.kind).mul_(up.times(x))
            outputs = down.times(values)
            chosen = own.contributions(x[n_first:], weights.kind) >= float(thresholds[number])
            take(number, values[n_first:] * chosen, outputs[n_first:])
            return outputs

        with torch.inference_mode():
            forced_states(weights, dtype, ids, None, mlp)
