"""Calibration: which neurons a set of texts needs, and the compensation for the others, one layer after the other.

Two streams of hidden states go through the model side by side. In the dense one every layer is whole. In the sparse one
every layer that is done already is compact, at the positions that decode would reach; a prompt's positions are dense in
both, as in `generate`. A layer is fitted on what it really will read – the sparse stream – towards what the dense model
has at that place, so it also takes back part of the error of the layers before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from coreinfer_sim.base.settings import Ranking
from coreinfer_sim.choosing.selection import NeuronSelection, n_within
from coreinfer_sim.engines.compact import Projections, compact_projections, install, linear_parameters
from coreinfer_sim.fitting.least_squares import (
    FEW_TEXTS_RIDGE,
    Moments,
    best_ridge,
    compensate,
    left_over,
    surgeon_score,
)
from coreinfer_sim.index.compensated import LayerCompensation
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import MLPLayer

_TOKENS_AT_ONCE = 4096
_LENGTH_STEP = 32


@dataclass(frozen=True)
class CalibrationText:
    """One text as token ids, and how many of them are the prompt."""

    ids: Sequence[int]
    n_prompt: int


@dataclass(frozen=True)
class Fit:
    """How compact MLPs are fitted to texts."""

    ranking: Ranking = Ranking.SURGEON
    prompt_weight: float = 0.3
    """Weight of a prompt's token beside one of the completion."""
    carry: float = 1.0
    """Share of the earlier layers' error that a layer tries to take back."""
    ridge: float | None = None
    """λ of the regression; None: each layer takes that of `best_ridge`, on texts held out of it."""
    prior_tokens: float = 200.0
    """Tokens that the prior counts as: few, as its moments are of another set's sparse stream."""


class _Batch:
    """Some texts of similar length: both streams, and what each layer is called with beside them."""

    def __init__(self, dense: torch.Tensor, decoded: torch.Tensor, weights: torch.Tensor, calls: list[_Call]) -> None:
        self.dense = self.sparse = dense
        self.dense_out: torch.Tensor | None = None
        """The dense stream after the layer at work, once it is known."""
        self.decoded = decoded
        self.weights = weights.reshape(-1)
        self.counted = self.weights.nonzero().squeeze(1)
        self.calls = calls


@dataclass(frozen=True)
class _Call:
    """Arguments of one decoder layer, the hidden states left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        if "hidden_states" in self.kwargs:
            out = block(*self.args, **{**self.kwargs, "hidden_states": hidden})
        else:
            out = block(hidden, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


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
        texts, held_texts = _divided(texts)
        fitted, held = (list(_batches(language_model, blocks, part, fit)) for part in (texts, held_texts))
        for layer, block, n in zip(layers, blocks, n_kept, strict=True):
            dense: dict[int, Projections] = {}
            if n < layer.d_ff:
                chosen, moments = _choose(layer, block, fitted, n, fit, prior, keep)
                repair = _compensated(layer, block, chosen, moments, held, fit)
                dense = install(layers, {layer.number: compact_projections(layer, chosen, repair)})
                ids[layer.number], compensation[layer.number] = chosen.cpu(), repair.to("cpu")
            try:
                _advance(layer, block, [*fitted, *held])
            finally:
                install(layers, dense)
            if report is not None:
                report(1)
    return NeuronSelection("compensated", ids, compensation=compensation)


def _choose(
    layer: MLPLayer,
    block: nn.Module,
    batches: Sequence[_Batch],
    n: int,
    fit: Fit,
    prior: Callable[[int], Moments] | None,
    keep: Callable[[int, Moments], None] | None,
) -> tuple[torch.Tensor, Moments]:
    """Choose ``n`` neurons of a layer; return them, ascending, and their moments."""
    if fit.ranking is Ranking.ENERGY and prior is None and keep is None:
        # Products of all neurons would be the dearest part of it, and nobody asks for them.
        chosen = highest(_energy(layer, block, batches), n)
        return chosen, _moments(layer, block, batches, fit, chosen)[0]
    moments, energy = _moments(layer, block, batches, fit)
    if keep is not None:
        keep(layer.number, moments)
    if prior is not None:
        moments.add_moments(prior(layer.number), fit.prior_tokens)
    score = energy
    if fit.ranking is Ranking.SURGEON:
        score = surgeon_score(moments.centred().gram, linear_parameters(layer.output)[0])
    chosen = highest(score, n)
    return chosen, moments.of(chosen)


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
        batches, held = (list(_batches(language_model, blocks, part, fit)) for part in _divided(texts))
        for layer, block in zip(language_model.layers, blocks, strict=True):
            weight, _ = linear_parameters(layer.output)
            n = n_within(layer, keep_ratio)
            if fit.ranking is Ranking.ENERGY:
                energy = _energy(layer, block, batches)
                chosen = highest(energy, n)
                moments = _moments(layer, block, batches, fit, chosen)[0]
                losses = (energy * weight.float().square().sum(0)).sort(descending=True).values
                left = (losses.sum() - losses.cumsum(0)).clamp_min(0)
            else:
                moments = _moments(layer, block, batches, fit)[0]
                gram = moments.centred().gram
                score = surgeon_score(gram, weight)
                chosen = highest(score, n)
                moments = moments.of(chosen)
                left = left_over(gram, weight, score)
            yield layer, chosen, _compensated(layer, block, chosen, moments, held, fit), left
            _advance(layer, block, [*batches, *held])


def _divided(texts: Sequence[CalibrationText]) -> tuple[list[CalibrationText], list[CalibrationText]]:
    """Return texts to fit on, and every eighth, on which the strength of regularisation is chosen."""
    return [text for i, text in enumerate(texts) if i % 8 != 7], list(texts[7::8])


def _compensated(
    layer: MLPLayer, block: nn.Module, chosen: torch.Tensor, moments: Moments, held: Sequence[_Batch], fit: Fit
) -> LayerCompensation:
    """Return what makes up for all but the chosen neurons, from the moments of these.

    The held texts choose the ridge, and then count as all others do.
    """
    weight, bias = linear_parameters(layer.output)
    kept = weight.index_select(1, chosen)
    ridge = FEW_TEXTS_RIDGE if fit.ridge is None else fit.ridge
    if held:
        further = _moments(layer, block, held, fit, chosen)[0]
        if fit.ridge is None and further.n_tokens > 0:  # prompts may weigh nothing
            ridge = best_ridge(moments.centred(), further.centred(), kept)
        moments.add_moments(further)
    places = torch.arange(len(chosen), device=chosen.device)
    return compensate(moments.centred(), places, kept, bias, ridge=ridge)


def decoder_blocks(language_model: LanguageModel) -> list[nn.Module]:
    """Return the model's decoder layers in order: the list of modules that holds one MLP in each of its members."""
    owners = [layer.owner for layer in language_model.layers]
    return next(
        list(modules)
        for modules in language_model.model.modules()
        if isinstance(modules, nn.ModuleList)
        and len(modules) == len(owners)
        and all(any(part is owner for part in block.modules()) for block, owner in zip(modules, owners, strict=True))
    )


def _moments(
    layer: MLPLayer, block: nn.Module, batches: Sequence[_Batch], fit: Fit, kept: torch.Tensor | None = None
) -> tuple[Moments, torch.Tensor]:
    """Return moments of a layer's neurons on the sparse stream towards the dense one, and their energy [n_kept].

    ``kept`` names the neurons, [n_kept]; None: all d_ff.
    """
    n = layer.d_ff if kept is None else len(kept)
    device = layer.output.weight.device
    moments = Moments(n, layer.d_model, device)
    energy = torch.zeros(n, device=device)
    here, narrow = {layer.number: layer}, {} if kept is None else compact_projections(layer, kept)
    for batch in batches:
        call, tokens = batch.calls[layer.number], batch.counted
        with _taped(layer) as tape:
            batch.dense_out = call(block, batch.dense)
            target = tape.y[tokens]
        whole = install(here, {layer.number: narrow})
        try:
            with _taped(layer) as tape:
                after_sparse = call(block, batch.sparse)
        finally:
            install(here, whole)
        z = tape.z[tokens]
        if not layer.post_norm:  # the residual stream takes the MLP's output as it is
            gap = (batch.dense_out - after_sparse).reshape(-1, layer.d_model)[tokens]
            target = target + fit.carry * (gap - (target - tape.y[tokens]))
        weights = batch.weights[tokens]
        moments.add(z, target, weights)
        energy += _energy_of(z, weights)
    return moments, energy


def _energy(layer: MLPLayer, block: nn.Module, batches: Sequence[_Batch]) -> torch.Tensor:
    """Return the energy of all neurons of a layer on the sparse stream, [d_ff]."""
    energy = torch.zeros(layer.d_ff, device=layer.output.weight.device)
    for batch in batches:
        with _taped(layer) as tape:
            batch.calls[layer.number](block, batch.sparse)
        energy += _energy_of(tape.z[batch.counted], batch.weights[batch.counted])
    return energy


def _energy_of(z: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the sum of the tokens' shares of energy, [n_neurons], of activations [n_tokens, n_neurons]."""
    square = z.float().square()
    return weights @ (square / square.sum(-1, keepdim=True).clamp_min(1e-30))


def highest(score: torch.Tensor, n: int) -> torch.Tensor:
    """Return the ``n`` neurons of highest score [d_ff], ascending."""
    return score.topk(n).indices.sort().values


def _advance(layer: MLPLayer, block: nn.Module, batches: Sequence[_Batch]) -> None:
    """Move both streams past a layer, the sparse one as the layer is now."""
    for batch in batches:
        call = batch.calls[layer.number]
        out = call(block, batch.sparse)
        if batch.dense_out is None:  # nothing was fitted here, so the layer is still dense
            batch.dense_out = call(block, batch.dense)
        batch.sparse = torch.where(batch.decoded[..., None], out, batch.dense_out)
        batch.dense, batch.dense_out = batch.dense_out, None


class _Tape:
    """The latest activations and output of an MLP, each by token."""

    def __init__(self) -> None:
        self.z = self.y = torch.zeros(0)


@contextmanager
def _taped(layer: MLPLayer) -> Iterator[_Tape]:
    """Read a layer's MLP in every pass of the block."""
    tape = _Tape()

    def left(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        tape.z = inputs[0].reshape(-1, inputs[0].shape[-1])
        tape.y = output.reshape(-1, output.shape[-1]).clone()  # Falcon adds to it in place

    hook = getattr(layer.owner, layer.family.output).register_forward_hook(left)
    try:
        yield tape
    finally:
        hook.remove()


def _batches(
    language_model: LanguageModel, blocks: Sequence[nn.Module], texts: Sequence[CalibrationText], fit: Fit
) -> Iterator[_Batch]:
    """Pad texts of similar length to few shapes and embed them."""
    calls: dict[torch.Size, list[_Call]] = {}
    device = language_model.model.device
    ordered = sorted(texts, key=lambda text: -len(text.ids))
    begin = 0
    while begin < len(ordered):
        n_positions = -(-len(ordered[begin].ids) // _LENGTH_STEP) * _LENGTH_STEP
        group = ordered[begin : begin + max(1, _TOKENS_AT_ONCE // n_positions)]
        begin += len(group)
        # Padding lies to the right, where causal attention never looks, so that no mask is needed.
        input_ids = torch.zeros(len(group), n_positions, dtype=torch.int64)
        weights = torch.zeros(len(group), n_positions)
        for row, text in enumerate(group):
            input_ids[row, : len(text.ids)] = torch.tensor(text.ids)
            weights[row, : len(text.ids)] = 1.0
            weights[row, : text.n_prompt] = fit.prompt_weight
        n_prompt = torch.tensor([text.n_prompt for text in group])
        decoded = torch.arange(n_positions) >= n_prompt[:, None]
        shape = input_ids.shape
        hidden, found = _enter(language_model, blocks, input_ids.to(device), all_blocks=shape not in calls)
        if shape not in calls:
            calls[shape] = found
        yield _Batch(hidden, decoded.to(device), weights.to(device), calls[shape])


class _Entered(Exception):
    """The first decoder layer has been reached; no other is wanted."""


def _enter(
    language_model: LanguageModel, blocks: Sequence[nn.Module], input_ids: torch.Tensor, all_blocks: bool
) -> tuple[torch.Tensor, list[_Call]]:
    """Return what the first decoder layer reads, and what each layer is called with beside it.

    Arguments do not depend on the hidden states, so the layers after the first hand on what they are given, uncomputed.
    """
    hidden: list[torch.Tensor] = []
    calls: list[_Call] = []
    outputs: list[Any] = []

    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])
        calls.append(_Call(args[1:], kwargs))
        if not all_blocks:
            raise _Entered

    def hand_on(*_args: Any, **_kwargs: Any) -> Any:
        return (hidden[-1], *outputs[0][1:]) if isinstance(outputs[0], tuple) else hidden[-1]

    hooks = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    hooks.append(blocks[0].register_forward_hook(lambda _module, _inputs, output: outputs.append(output)))
    forwards = [vars(block).get("forward") for block in blocks]  # accelerate, for one, puts its own there
    for block in blocks[1:]:
        block.forward = hand_on
    try:
        language_model.model.base_model(input_ids=input_ids, use_cache=False)
    except _Entered:
        pass
    finally:
        for block, forward in zip(blocks[1:], forwards[1:], strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
        for hook in hooks:
            hook.remove()
    return hidden[0], calls
