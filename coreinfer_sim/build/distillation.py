"""Distillation: a fitted set's compensation is trained on, so that the whole sparse model predicts what the dense one does.

The closed form repairs one layer at a time by squared error. From there a few hundred thousand tokens of gradient descent
on KL(dense ‖ sparse) weigh the layers' errors by what they do to the predictions. Only the compensation learns – the
change of the output weights, the output bias and the bypass's way out –, so that the index holds nothing new. The prompt
is read densely, as in `generate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from coreinfer_sim.architectures import MLPLayer
from coreinfer_sim.build.calibration import CalibrationText
from coreinfer_sim.build.reading import n_completion, read_densely
from coreinfer_sim.compensation import LayerCompensation, size_of_change
from coreinfer_sim.models import LanguageModel
from coreinfer_sim.selection import NeuronSelection
from coreinfer_sim.sparse_mlp import Projections, compact_projections, install, linear_parameters, merged_output

_LEARNT = ("bias", "left", "right", "bypass_out")
_LEAST_READ = 32
SPECIALISING_RATE = 1e-3
"""More undoes about as much as it gains on a cluster's few steps."""
_LEARNING_BYTES = 4 * 4
"""For a number that learns: itself, its gradient and Adam's two averages."""
_MERGED_BYTES = 4
"""For an output weight that a pass merges anew."""
_COMPACT_COPIES = 3
"""Of the kept weights, about: gate, up and output."""


@dataclass(frozen=True)
class Distillation:
    """How the compensation is trained."""

    learning_rate: float = 2.5e-3
    """Of Adam at its highest, as a share of the root mean square of a layer's output weights, which differs among models
    by more than ten times. A set that has been trained already is specialised at SPECIALISING_RATE."""
    tokens_per_step: int = 125
    """Decoded tokens whose gradients make one step."""
    warm_up: float = 0.1
    """Share of the steps over which the learning rate rises; from there it falls as a cosine to zero."""
    prompt_weight: float = 0.3
    """Weight of a prompt's token beside one of the completion, where a short completion makes the prompt's end decode."""
    length_power: float = 0.5
    """A text of n tokens counts n to this power: 1, every token the same; 0, every text."""


class _Learning(nn.Module):
    """The output projection of a compact MLP, merged anew in every pass."""

    def __init__(self, layer: MLPLayer, ids: torch.Tensor, compensation: LayerCompensation) -> None:
        """Begin with a fitted compensation of the neurons ``ids`` [n_kept]."""
        super().__init__()
        weight, self._bias = linear_parameters(layer.output)
        self._kept, self._gated = weight.index_select(1, ids), layer.family.gated
        self._fitted = compensation
        self.scale = float(self._kept.float().square().mean().sqrt())
        self.learnt = nn.ParameterDict(
            {name: value.float().clone() for name in _LEARNT if (value := getattr(compensation, name)) is not None}
        )

    @property
    def compensation(self) -> LayerCompensation:
        """The compensation as it is now."""
        return replace(self._fitted, **dict(self.learnt.items()))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Map [..., n_kept and bypass] to [..., d_model]."""
        compensation = self.compensation
        added = compensation.bias.to(z)
        bias = added if self._bias is None else self._bias + added
        return F.linear(z, merged_output(self._kept, compensation, self._gated), bias)


class _Student:
    """A selection whose compensation learns."""

    def __init__(
        self, language_model: LanguageModel, selection: NeuronSelection, settings: Distillation, n_steps: int
    ) -> None:
        assert selection.compensation is not None
        layers, device = language_model.layers, language_model.model.device
        self._selection = selection
        self._learning: dict[int, _Learning] = {}
        self.compact: dict[int, dict[str, Any]] = {}
        for number, ids in selection.ids.items():
            repair = selection.compensation[number].to(device)
            self.compact[number] = compact_projections(layers[number], ids, repair)
            self._learning[number] = _Learning(layers[number], ids.to(device), repair)
            self.compact[number][layers[number].family.output] = self._learning[number]
        modules = self._learning.values()
        self._parameters = [p for module in modules for p in module.parameters()]
        groups = [{"params": [*m.parameters()], "lr": settings.learning_rate * m.scale} for m in modules]
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: _rate(step, n_steps, settings.warm_up)
        )

    def step(self) -> None:
        """Move along the gradients that have gathered."""
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()

    def trained(self) -> NeuronSelection:
        """Return the selection with its compensation as it is now, on the CPU."""
        compensation = {
            number: LayerCompensation(
                **{name: value.detach().cpu() for name, value in vars(module.compensation).items() if value is not None}
            )
            for number, module in self._learning.items()
        }
        return replace(self._selection, compensation=compensation)


def distil(
    language_model: LanguageModel,
    selections: Sequence[NeuronSelection],
    texts: Sequence[CalibrationText],
    settings: Distillation,
    report: Callable[[int], None] | None = None,
) -> list[NeuronSelection]:
    """Train the compensation of fitted selections once over texts, each by itself.

    Together they cost less than one after the other: the dense model reads each text once for all.

    Args:
        language_model: the dense model.
        selections: with compensation.
        texts: in the order in which they are read.
        settings: how.
        report: takes each text's number of tokens when it has been read.

    Returns:
        The same ids with the trained compensation, on the CPU.
    """
    model, layers, device = language_model.model, language_model.layers, language_model.model.device
    steps = list(_steps(texts, settings.tokens_per_step))
    students = [_Student(language_model, selection, settings, len(steps)) for selection in selections]
    with _frozen(model):
        for step in steps:
            weights = [_weights(text, settings).to(device) for text in step]
            total = float(torch.cat(weights).sum())
            for text, weight in zip(step, weights, strict=True):
                reading = read_densely(model, text, len(weight))
                for student in students:
                    whole = install(layers, student.compact)
                    try:
                        sparse, dense = reading.again(model), reading.log_probabilities
                        divergence = F.kl_div(sparse, dense, reduction="none", log_target=True).sum(-1)
                        (weight @ divergence / total).backward()  # type: ignore[no-untyped-call]
                    finally:
                        install(layers, whole)
                if report is not None:
                    report(len(text.ids))
            for student in students:
                student.step()
    return [student.trained() for student in students]


def training_bytes(layers: Sequence[MLPLayer], keep_ratio: float, rank: int | None) -> int:
    """Return the memory that training one set takes beside the model and its texts, about."""
    of_weight = _MERGED_BYTES + _COMPACT_COPIES * layers[0].output.weight.dtype.itemsize
    total = 0
    for layer in layers:
        n_kept = int(keep_ratio * layer.d_ff)
        total += _LEARNING_BYTES * size_of_change(n_kept, layer.d_model, rank) + of_weight * n_kept * layer.d_model
    return total


def n_decoded(text: CalibrationText) -> int:
    """Return how many of a text's tokens are read sparsely: the completion, and of the prompt what makes up the least."""
    return min(max(len(text.ids) - text.n_prompt, _LEAST_READ), len(text.ids) - 1)


def mean_divergences(
    language_model: LanguageModel,
    texts: Sequence[CalibrationText],
    contenders: Sequence[dict[int, Projections]],
    report: Callable[[int], None],
) -> list[float]:
    """Return each contender's KL(dense ‖ sparse) a completion token in nats, each text counting the same.

    Args:
        language_model: the dense model.
        texts: of two tokens or more, whose prompts are read densely.
        contenders: compact MLPs by layer.
        report: takes 1 after each text.
    """
    model, layers = language_model.model, language_model.layers
    sums = [0.0] * len(contenders)
    for text in texts:
        with torch.inference_mode():
            reading = read_densely(model, text, n_completion(text))
            for place, compact in enumerate(contenders):
                whole = install(layers, compact)
                try:
                    sums[place] += reading.divergence(model) / reading.n_last
                finally:
                    install(layers, whole)
        report(1)
    return [total / len(texts) for total in sums]


def _steps(texts: Sequence[CalibrationText], n_tokens: int) -> Iterator[list[CalibrationText]]:
    """Divide texts into steps of at least ``n_tokens`` decoded tokens; the last takes what is left."""
    step: list[CalibrationText] = []
    for text in texts:
        if n_decoded(text) > 0:
            step.append(text)
        if sum(map(n_decoded, step)) >= n_tokens:
            yield step
            step = []
    if step:
        yield step


def _weights(text: CalibrationText, settings: Distillation) -> torch.Tensor:
    """Return the weight of each decoded token."""
    n = n_decoded(text)
    weights = torch.ones(n)
    weights[: max(0, text.n_prompt - (len(text.ids) - n))] = settings.prompt_weight
    return weights * float(weights.sum()) ** (settings.length_power - 1)


def _rate(step: int, n_steps: int, warm_up: float) -> float:
    """Return the learning rate of a step over the highest."""
    n_rising = max(1, round(warm_up * n_steps))
    if step < n_rising:
        return (step + 1) / (n_rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - n_rising) / max(1, n_steps - n_rising)))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Keep gradients off the model's own parameters."""
    learnable = [p for p in model.parameters() if p.requires_grad]
    for parameter in learnable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learnable:
            parameter.requires_grad_(True)
