"""Output rows that make up for the neurons that tokens leave out: least squares on what those that they read come to.

The regression is that of `least_squares`, over all neurons, whose values are 0 wherever a token does not read them. It is fitted
to texts that the dense model reads, so that layers do not depend on one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from coreinfer_sim.engines.face import Engine
from coreinfer_sim.fitting.clustered_corpus import CalibrationText
from coreinfer_sim.fitting.least_squares import Moments, compensate
from coreinfer_sim.index.compensated import LayerCompensation
from coreinfer_sim.models.mlps import MLPLayer, linear_parameters

N_TOKENS = 32_000
"""To which rows are fitted, about."""
_RIDGE = 1.0
"""λ, relative to the mean of the neurons' second moments: rows of neurons that are seldom read stay near what they are."""
_FIRST = 8
_MOMENTS_BYTES = 2 << 30
"""Memory for the moments of the layers that are fitted in one pass over the texts: one layer at least."""


def moments_bytes(layer: MLPLayer) -> int:
    """Return the memory of one layer's moments."""
    return 4 * layer.d_ff * (layer.d_ff + layer.d_model)


def layers_at_once(layers: Sequence[MLPLayer]) -> int:
    """Return how many layers are fitted in one pass over the texts."""
    return max(1, min(len(layers), _MOMENTS_BYTES // moments_bytes(layers[0])))


def refit_rows(
    engine: Engine,
    layers: Sequence[MLPLayer],
    texts: Sequence[CalibrationText],
    read_ratio: float,
    report: Callable[[int], None],
) -> dict[int, LayerCompensation]:
    """Fit the change of all layers' output weights, [d_model, d_ff]; output biases stay.

    Args:
        engine: reads by token, and was calibrated.
        layers: of the model.
        texts: of which all but the first tokens count, whose values are like no others'.
        read_ratio: share of d_ff that a token reads.
        report: takes how many more texts were read; each is read once for every `layers_at_once` of the layers.
    """
    found = {}
    n_at_once = layers_at_once(layers)
    for begin in range(0, len(layers), n_at_once):
        group = {layer.number: layer for layer in layers[begin : begin + n_at_once]}
        moments = {number: Moments(layer.d_ff, layer.d_model) for number, layer in group.items()}

        def take(
            number: int, values: torch.Tensor, outputs: torch.Tensor, moments: dict[int, Moments] = moments
        ) -> None:
            bias = linear_parameters(layers[number].output)[1]
            wanted = outputs if bias is None else outputs - bias.float()
            moments[number].add(values, wanted, torch.ones(len(values)))

        for text in texts:
            if len(text.ids) > _FIRST:
                engine.values_by_token([(torch.tensor(text.ids), _FIRST)], read_ratio, group, take)
            report(1)
        for number, layer in group.items():
            weight, _ = linear_parameters(layer.output)
            ids, about_zero = torch.arange(layer.d_ff), moments.pop(number).about_zero()
            found[number] = compensate(about_zero, ids, weight, None, ridge=_RIDGE, of_mean=True)
    return found
