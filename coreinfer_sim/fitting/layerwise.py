"""Layer-wise fits: which neurons a set of texts needs, and the compensation for the others, one layer after the other.

A layer is fitted on what it really will read – the sparse stream – towards what the dense model has at that place, so it
also takes back part of the error of the layers before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from coreinfer_sim.base.settings import Ranking
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.cutting import Projections, compact_projections
from coreinfer_sim.engines.modules import install
from coreinfer_sim.fitting.clustered_corpus import CalibrationText
from coreinfer_sim.fitting.least_squares import (
    FEW_TEXTS_RIDGE,
    Moments,
    best_ridge,
    compensate,
    left_over,
    surgeon_score,
)
from coreinfer_sim.fitting.streams import Batch, advance, decoder_blocks, make_batches, recorded
from coreinfer_sim.index.compensated import LayerCompensation
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import MLPLayer, linear_parameters, n_within


@dataclass(frozen=True)
class Fit:
    """How compact MLPs are fitted to texts."""

    ranking: Ranking = Ranking.SURGEON
    prompt_weight: float = 0.3
    """Weight of a prompt's token beside one of the completion."""
    carry: float = 1.0
    """Share of the earlier layers' error that a layer tries to take back."""
    ridge: float | None = None
    """λ of the regression; None: each layer's `best_ridge`, on texts held out of it."""
    prior_tokens: float = 200.0
    """Tokens that the prior counts as: few, as its moments are of another set's sparse stream."""


def fit_layers(
    language_model: LanguageModel,
    texts: Sequence[CalibrationText],
    n_kept: Sequence[int],
    fit: Fit,
    prior: Callable[[int], Moments] | None = None,
    keep: Callable[[int, Moments], None] | None = None,
    report: Callable[[int], None] | None = None,
) -> NeuronSelection:
    """Choose and compensate neurons for texts.

    Args:
        language_model: the dense model.
        texts: what to fit on.
        n_kept: neurons of each layer that stay, [n_layers]; d_ff leaves the layer dense.
        fit: how.
        prior: gives moments of a layer towards which these texts' are shrunk.
        keep: takes a layer's moments, before shrinkage.
        report: takes 1 after each layer.

    Returns:
        A selection with its compensation, on the CPU.
    """
    layers = language_model.layers
    blocks = decoder_blocks(language_model)
    ids: dict[int, torch.Tensor] = {}
    compensation: dict[int, LayerCompensation] = {}
    with torch.inference_mode():
        batches, held = (
            list(make_batches(language_model, blocks, part, fit.prompt_weight)) for part in _divided(texts)
        )
        for layer, block, n in zip(layers, blocks, n_kept, strict=True):
            dense: dict[int, Projections] = {}
            if n < layer.d_ff:
                chosen, sums = _choose(layer, block, batches, n, fit, prior, keep)
                repair = _compensated(layer, block, chosen, sums, held, fit)
                dense = install(layers, {layer.number: compact_projections(layer, chosen, repair)})
                ids[layer.number], compensation[layer.number] = chosen.cpu(), repair.to("cpu")
            try:
                advance(layer, block, [*batches, *held])
            finally:
                install(layers, dense)
            if report is not None:
                report(1)
    return NeuronSelection("compensated", ids, compensation=compensation)


def _choose(
    layer: MLPLayer,
    block: nn.Module,
    batches: Sequence[Batch],
    n: int,
    fit: Fit,
    prior: Callable[[int], Moments] | None,
    keep: Callable[[int, Moments], None] | None,
) -> tuple[torch.Tensor, Moments]:
    """Choose ``n`` neurons of a layer; return them, ascending, and their moments."""
    if fit.ranking is Ranking.ENERGY and prior is None and keep is None:
        # Products of all neurons would be the dearest part of it, and nobody asks for them.
        chosen = highest(_energy(layer, block, batches), n)
        return chosen, moments(layer, block, batches, fit, chosen)[0]
    sums, energy = moments(layer, block, batches, fit)
    if keep is not None:
        keep(layer.number, sums)
    if prior is not None:
        sums.add_moments(prior(layer.number), fit.prior_tokens)
    score = energy
    if fit.ranking is Ranking.SURGEON:
        score = surgeon_score(sums.centred().gram, linear_parameters(layer.output)[0])
    chosen = highest(score, n)
    return chosen, sums.of(chosen)


def fit_each_alone(
    language_model: LanguageModel, texts: Sequence[CalibrationText], keep_ratio: float, fit: Fit
) -> Iterator[tuple[MLPLayer, torch.Tensor, LayerCompensation, torch.Tensor]]:
    """Fit each layer among layers that are all dense.

    Yields:
        The layer, its chosen neurons, what makes up for the others, and how much error is left if 1, 2, … d_ff neurons
        stay, [d_ff], to some scale: squared, after compensation; or, ranked by energy, before it, as though neurons were
        independent and all tokens' activations of one length, which takes no products of all neurons.
    """
    blocks = decoder_blocks(language_model)
    with torch.inference_mode():
        batches, held = (
            list(make_batches(language_model, blocks, part, fit.prompt_weight)) for part in _divided(texts)
        )
        for layer, block in zip(language_model.layers, blocks, strict=True):
            weight, _ = linear_parameters(layer.output)
            n = n_within(layer, keep_ratio)
            if fit.ranking is Ranking.ENERGY:
                energy = _energy(layer, block, batches)
                chosen = highest(energy, n)
                sums = moments(layer, block, batches, fit, chosen)[0]
                losses = (energy * weight.float().square().sum(0)).sort(descending=True).values
                left = (losses.sum() - losses.cumsum(0)).clamp_min(0)
            else:
                sums = moments(layer, block, batches, fit)[0]
                gram = sums.centred().gram
                score = surgeon_score(gram, weight)
                chosen = highest(score, n)
                sums = sums.of(chosen)
                left = left_over(gram, weight, score)
            yield layer, chosen, _compensated(layer, block, chosen, sums, held, fit), left
            advance(layer, block, [*batches, *held])


def _divided(texts: Sequence[CalibrationText]) -> tuple[list[CalibrationText], list[CalibrationText]]:
    """Return texts to fit on, and every eighth, on which the strength of regularisation is chosen."""
    return [text for i, text in enumerate(texts) if i % 8 != 7], list(texts[7::8])


def _compensated(
    layer: MLPLayer, block: nn.Module, chosen: torch.Tensor, sums: Moments, held: Sequence[Batch], fit: Fit
) -> LayerCompensation:
    """Return what makes up for all but the chosen neurons, from the moments of these.

    The held texts choose the ridge, and then count as all others do.
    """
    weight, bias = linear_parameters(layer.output)
    kept = weight.index_select(1, chosen)
    ridge = FEW_TEXTS_RIDGE if fit.ridge is None else fit.ridge
    if held:
        further = moments(layer, block, held, fit, chosen)[0]
        if fit.ridge is None and further.n_tokens > 0:  # prompts may weigh nothing
            ridge = best_ridge(sums.centred(), further.centred(), kept)
        sums.add_moments(further)
    places = torch.arange(len(chosen), device=chosen.device)
    return compensate(sums.centred(), places, kept, bias, ridge=ridge)


def moments(
    layer: MLPLayer, block: nn.Module, batches: Sequence[Batch], fit: Fit, kept: torch.Tensor | None = None
) -> tuple[Moments, torch.Tensor]:
    """Return moments of a layer's neurons on the sparse stream towards the dense one, and their energy [n_kept].

    Args:
        layer: the MLP, whole.
        block: the decoder layer that it lies in.
        batches: both streams before that layer.
        fit: how.
        kept: the neurons, [n_kept]; None: all d_ff.
    """
    n = layer.d_ff if kept is None else len(kept)
    device = layer.output.weight.device
    sums, energy = Moments(n, layer.d_model, device), torch.zeros(n, device=device)
    here, narrow = {layer.number: layer}, {} if kept is None else compact_projections(layer, kept)
    for batch in batches:
        call, tokens = batch.calls[layer.number], batch.counted
        # 1) the dense stream: what the layer should give
        with recorded(layer) as recording:
            batch.dense_out = call(block, batch.dense)
            target = recording.y[tokens]
        # 2) the sparse stream: what it reads in decode
        whole = install(here, {layer.number: narrow})
        try:
            with recorded(layer) as recording:
                after_sparse = call(block, batch.sparse)
        finally:
            install(here, whole)
        z = recording.z[tokens]
        # 3) the error that earlier layers have left is added to the target
        if not layer.post_norm:  # the residual stream takes the MLP's output as it is
            gap = (batch.dense_out - after_sparse).reshape(-1, layer.d_model)[tokens]
            target = target + fit.carry * (gap - (target - recording.y[tokens]))
        weights = batch.weights[tokens]
        sums.add(z, target, weights)
        energy += _energy_of(z, weights)
    return sums, energy


def _energy(layer: MLPLayer, block: nn.Module, batches: Sequence[Batch]) -> torch.Tensor:
    """Return the energy of all neurons of a layer on the sparse stream, [d_ff]."""
    energy = torch.zeros(layer.d_ff, device=layer.output.weight.device)
    for batch in batches:
        with recorded(layer) as recording:
            batch.calls[layer.number](block, batch.sparse)
        energy += _energy_of(recording.z[batch.counted], batch.weights[batch.counted])
    return energy


def _energy_of(z: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the sum of the tokens' shares of energy, [n_neurons], of activations [n_tokens, n_neurons]."""
    square = z.float().square()
    return weights @ (square / square.sum(-1, keepdim=True).clamp_min(1e-30))


def highest(score: torch.Tensor, n: int) -> torch.Tensor:
    """Return the ``n`` neurons of highest score [d_ff], ascending."""
    return score.topk(n).indices.sort().values
