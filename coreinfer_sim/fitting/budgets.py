"""Layer budgets: where dropping neurons costs most, measured, and how many each layer keeps under a given mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from coreinfer_sim.engines.cutting import compact_projections
from coreinfer_sim.engines.modules import install
from coreinfer_sim.fitting.clustered_corpus import CalibrationText
from coreinfer_sim.fitting.layerwise import Fit, fit_each_alone
from coreinfer_sim.fitting.reading import n_completion, packs, read_densely
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import MLPLayer, n_within

PROBE = 0.375
"""Keep ratio at which the cost of a layer is measured."""
_LEAST = 0.7
"""Share of the mean that every layer keeps: what a layer costs alone understates what it costs among sparse ones."""
_STEP = 1 / 64
"""Share of a layer that is handed out at a time."""


def layer_costs(
    language_model: LanguageModel,
    fitted_on: Sequence[CalibrationText],
    measured_on: Sequence[CalibrationText],
    fit: Fit,
    report: Callable[[int], None] = lambda _n: None,
) -> np.ndarray:
    """Measure what each layer's sparsity costs, were all other layers dense.

    Each layer is made sparse alone, at one keep ratio and compensated, and the mean KL divergence to the dense model over
    the completions of ``measured_on`` is taken, after prompts that are read densely, as in `generate`. To other keep ratios
    it is carried over in proportion to the squared error that is left in the layer's output, see `fit_each_alone`.

    Args:
        language_model: the dense model.
        fitted_on: texts for the moments.
        measured_on: other texts, for the divergence.
        fit: how sets are fitted.
        report: takes 1 after each layer.

    Returns:
        KL in nats by layer and number of kept neurons 1, 2, … d_ff: [n_layers, d_ff].
    """
    layers = language_model.layers
    model = language_model.model
    measured_on = [text for text in measured_on if n_completion(text) > 0]
    groups = [[measured_on[place] for place in pack] for pack in packs(model, measured_on)]
    readings = [read_densely(model, group, [n_completion(text) for text in group]) for group in groups]
    n_tokens = max(1, sum(reading.n_last for reading in readings))
    costs = np.zeros((len(layers), layers[0].d_ff), np.float32)
    for layer, ids, repair, left in fit_each_alone(language_model, fitted_on, PROBE, fit):
        n = n_within(layer, PROBE)
        whole = install(layers, {layer.number: compact_projections(layer, ids, repair)})
        try:
            divergence = sum(float(reading.divergences(model).sum()) for reading in readings) / n_tokens
        finally:
            install(layers, whole)
        costs[layer.number] = max(divergence, 0.0) * (left / left[n - 1].clamp_min(1e-30)).cpu().numpy()
        report(1)
    return costs


def share_out(costs: np.ndarray, keep_ratio: float, least: float) -> np.ndarray:
    """Return each layer's keep ratio [n_layers] with mean ``keep_ratio`` and the least sum of costs.

    Steps go one by one to the layer that gains most, which is best as costs fall ever more slowly.

    Args:
        costs: of `layer_costs`, [n_layers, d_ff].
        keep_ratio: mean over the layers.
        least: what every layer keeps, if the mean allows it.
    """
    n_layers, d_ff = costs.shape
    kept = (np.arange(d_ff) + 1) / d_ff

    def cost(layer: int, share: float) -> float:
        return float(np.interp(share, kept, costs[layer]))

    given = np.full(n_layers, min(least, keep_ratio))
    left = keep_ratio * n_layers - given.sum()
    while left > 1e-9:
        step = min(_STEP, left)
        gains = [
            cost(layer, share) - cost(layer, share + step) if share + step <= 1 + 1e-9 else -np.inf
            for layer, share in enumerate(given)
        ]
        given[int(np.argmax(gains))] += step
        left -= step
    return given


def neurons_of(
    layers: Sequence[MLPLayer], recorded: Sequence[int], keep_ratio: float, costs: np.ndarray | None
) -> list[int]:
    """Return the neurons of each layer whose bytes are ``keep_ratio`` of the dense ones on average.

    Args:
        layers: the model's MLPs.
        recorded: numbers of the layers that become sparse; the others keep all.
        keep_ratio: mean over those.
        costs: of `layer_costs`; None: the same for all.
    """
    if costs is None:
        shares = np.full(len(recorded), keep_ratio)
    else:
        shares = share_out(costs[list(recorded)], keep_ratio, max(_LEAST * keep_ratio, 1 / 16))
    kept = [layer.d_ff for layer in layers]
    for number, share in zip(recorded, shares, strict=True):
        kept[number] = n_within(layers[number], float(share))
    return kept
