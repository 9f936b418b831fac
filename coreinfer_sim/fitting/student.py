"""The student of a distillation: compensation that learns by Adam what the whole dense model predicts.

It lends the model compact MLPs whose output projections leave their weights' gradients behind, and adds these to what
learns. The weights are merged once a step, as rows of neurons, so that cutting a set out of all neurons and adding to them
goes through memory in order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from coreinfer_sim.base.errors import BuildError
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.cutting import Projections, compact_inputs
from coreinfer_sim.index.compensated import LayerCompensation
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import MLPLayer, linear_parameters

LEARNING_RATE = 2.5e-3
_AVERAGES = ("exp_avg", "exp_avg_sq")
_LEARNING_BYTES = 4 * 4
"""For a number that learns: itself, its gradient and Adam's two averages."""
_FITTED_BYTES = 2 + 2
"""For a number of a set as it was fitted, and at the end as it will be stored, bfloat16."""
_COMPACT_COPIES = 5
"""Of the kept weights, about: gate, up, output before and after merging, and its gradient."""


@dataclass(frozen=True)
class Distillation:
    """How the compensation is trained."""

    learning_rate: float = LEARNING_RATE
    """Of Adam at the most, as a share of the root mean square of a layer's output weights, which differs among models
    by more than ten times."""
    rate_of_change: float | None = 0.01
    """And as a share of the root mean square of what the fit changed in the layer, which is the less where few neurons are
    dropped: there a higher rate undoes what the fit has won. None: no such bound."""
    tokens_per_step: int = 125
    """Decoded tokens whose gradients make one step."""
    warm_up: float = 0.1
    """Share of the steps over which the learning rate rises; from there it falls as a cosine to zero."""
    prompt_weight: float = 0.3
    """Weight of a prompt's token beside one of the completion, where a short completion makes the prompt's end decode."""
    length_power: float = 0.5
    """A text of n tokens counts n to this power: 1, every token the same; 0, every text."""


class _Product(torch.autograd.Function):
    """``x @ weight + bias`` of a projection, with which the gradient of its weight stays."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor, projection: _Output) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.projection = projection
        return x @ projection.weight + bias.to(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        rows = gradient.flatten(0, -2)
        ctx.projection.gradient = x.flatten(0, -2).T @ rows
        of_x = gradient @ ctx.projection.weight.T if ctx.needs_input_grad[0] else None
        return of_x, rows.float().sum(0), None


class _Output(nn.Module):
    """The output projection of a compact MLP whose compensation learns."""

    def __init__(self, layer: MLPLayer, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Take the weights that compensation is merged into.

        Args:
            layer: whose.
            weight: output weights of the kept neurons, [n_kept, d_model].
            bias: that learns, [d_model].
        """
        super().__init__()
        self.weight = weight
        self.gradient = weight.new_zeros(0)
        """Of the weight, after a backward pass, [n_kept, d_model]."""
        self._bias, self._learnt_bias = linear_parameters(layer.output)[1], [bias]  # in a list: the model's it is not

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Map [..., n_kept] to [..., d_model]."""
        (bias,) = self._learnt_bias
        out: torch.Tensor = _Product.apply(z, bias if self._bias is None else self._bias + bias, self)  # type: ignore[no-untyped-call]
        return out


class _Layer:
    """What the sets of one layer share and learn, and what each of them holds alone."""

    def __init__(
        self, layer: MLPLayer, ids: Mapping[int, torch.Tensor], fitted: Mapping[int, LayerCompensation]
    ) -> None:
        """Begin with no change.

        Args:
            layer: the MLP.
            ids: kept neurons of each set that makes the layer sparse, by the set's number, [n_kept].
            fitted: their compensation.
        """
        device = layer.output.weight.device
        self.layer = layer
        self.ids = {reader: each.to(device) for reader, each in ids.items()}
        self.fitted = {reader: _by_neuron(each, len(ids[reader]), device) for reader, each in fitted.items()}
        """Change of the output weights neuron by neuron, [n_kept, d_model], and of the bias."""
        union = torch.cat([*self.ids.values()]).unique()
        self._places = {  # None: all neurons of the union, which spares copies
            reader: None if len(each) == len(union) else torch.searchsorted(union, each)
            for reader, each in self.ids.items()
        }
        self._rows = linear_parameters(layer.output)[0].T.contiguous().index_select(0, union)
        self.change = nn.Parameter(torch.zeros(self._rows.shape, device=device))
        """Of the output weights of all neurons that some set keeps, float32 [n_union, d_model]."""
        self.change.grad = torch.zeros_like(self.change)
        self.bias = nn.Parameter(torch.zeros(layer.d_model, device=device))

    def rate(self, settings: Distillation) -> float:
        """Return the highest learning rate."""
        highest = settings.learning_rate * _rms(self._rows)
        if settings.rate_of_change is not None:
            changes = [_rms(delta) for delta, _ in self.fitted.values()]
            highest = min(highest, settings.rate_of_change * sum(changes) / len(changes))
        return highest

    def output(self, reader: int) -> _Output:
        """Merge a set's compensation into its output projection."""
        delta, bias = self.compensation(reader)
        return _Output(self.layer, (delta + self._of(self._rows, reader)).to(self._rows), bias)

    def compensation(self, reader: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a set's change of the output weights, float32 [n_kept, d_model], and its bias, which learns [d_model]."""
        delta, bias = self.fitted[reader]
        return delta + self._of(self.change.detach(), reader), bias + self.bias

    def add_gradient(self, reader: int, gradient: torch.Tensor) -> None:
        """Add the gradient of a set's output weights, [n_kept, d_model], in place, as fresh memory is dear."""
        places = self._places[reader]
        total: Any = self.change.grad
        if places is None:
            total.add_(gradient)
        else:
            total.index_add_(0, places, gradient.float())

    def _of(self, rows: torch.Tensor, reader: int) -> torch.Tensor:
        """Return a set's rows of those of the union."""
        places = self._places[reader]
        return rows if places is None else rows.index_select(0, places)


class Student:
    """Sets that share what they learn: a change of all their neurons' output weights, and of the output bias.

    Each set adds to its fitted compensation what its own neurons have learnt. Adam's rate goes by the weights and rises and
    falls over the steps.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        selections: Sequence[NeuronSelection],
        readers: Sequence[int],
        settings: Distillation,
        n_steps: int,
    ) -> None:
        """Begin with the sets as they were fitted.

        Args:
            language_model: the dense model.
            selections: the sets, with compensation.
            readers: number of the set that reads each text, [n_texts].
            settings: how they learn.
            n_steps: in all.
        """
        self._selections, self._readers = selections, readers
        self._settings, self._n_steps, self._n_done = settings, n_steps, 0
        self._layers: dict[int, _Layer] = {}
        for number in sorted(set().union(*(selection.ids for selection in selections))):
            ids = {reader: each.ids[number] for reader, each in enumerate(selections) if number in each.ids}
            fitted = {reader: (selections[reader].compensation or {})[number] for reader in ids}
            self._layers[number] = _Layer(language_model.layers[number], ids, fitted)
        # Of one reader alone: holding all readers' could take too much memory.
        self._reader = -1
        self._inputs: dict[int, Projections] = {}
        self._outputs: dict[int, _Output] = {}

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """All that learn."""
        return [parameter for layer in self._layers.values() for parameter in (layer.change, layer.bias)]

    @cached_property
    def _optimizer(self) -> torch.optim.Adam:
        groups = [
            {"params": [layer.change, layer.bias], "highest": layer.rate(self._settings)}
            for layer in self._layers.values()
        ]
        # fused: one pass through memory in place of six; on a CPU those take longer than a step's texts do
        return torch.optim.Adam(groups, betas=(0.9, 0.98), fused=self.parameters[0].device.type == "cpu")

    def compact(self, place: int) -> dict[int, Projections]:
        """Return the compact MLPs of the set that reads the text at ``place``."""
        reader = self._readers[place]
        if reader != self._reader:
            self._inputs, self._outputs, self._reader = {}, {}, reader  # before the next ones take memory
            sparse = {number: layer for number, layer in self._layers.items() if reader in layer.ids}
            self._inputs = {n: compact_inputs(each.layer, each.ids[reader]) for n, each in sparse.items()}
        if not self._outputs:
            self._outputs = {number: self._layers[number].output(reader) for number in self._inputs}
        return {
            number: {**self._inputs[number], self._layers[number].layer.output_name: output}
            for number, output in self._outputs.items()
        }

    def gather(self) -> None:
        """Add the gradients that a backward pass has left with the compact MLPs to those of what learns."""
        for number, output in self._outputs.items():
            self._layers[number].add_gradient(self._reader, output.gradient)
            output.gradient = output.gradient.new_zeros(0)

    def step(self) -> None:
        """Move along the gradients that have gathered.

        Raises:
            BuildError: they are no numbers.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if not bool(norm.isfinite()):  # it would be in all weights
            raise BuildError(
                f"the gradient of step {self._n_done + 1} of {self._n_steps} is {float(norm)}, expected a finite one; load "
                "the model with the dtype float32, as its own may be too coarse."
            )
        share = _rate(self._n_done, self._n_steps, self._settings.warm_up)
        for group in self._optimizer.param_groups:
            group["lr"] = group["highest"] * share
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)  # fresh memory costs more than zeros
        self._n_done += 1
        self._outputs = {}

    def state(self) -> dict[str, torch.Tensor]:
        """Return all that `go_on` needs: the parameters and Adam's two averages, by name."""
        tensors = {}
        for i, parameter in enumerate(self.parameters):
            tensors[f"{i}"] = parameter.detach()
            tensors |= {f"{i}.{name}": self._optimizer.state[parameter][name] for name in _AVERAGES}
        return tensors

    def go_on(self, n_done: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Be as a student was that had done ``n_done`` steps."""
        self._n_done = n_done
        for i, parameter in enumerate(self.parameters):
            parameter.data.copy_(tensors[f"{i}"])
            averages = {name: tensors[f"{i}.{name}"].to(parameter.device) for name in _AVERAGES}
            self._optimizer.state[parameter] = {"step": torch.tensor(float(n_done)), **averages}

    def trained(self) -> list[NeuronSelection]:
        """Return the sets with their compensation as it is now, on the CPU, as it is stored: in bfloat16."""
        return [
            replace(selection, compensation={number: self._stored(reader, number) for number in selection.ids})
            for reader, selection in enumerate(self._selections)
        ]

    def _stored(self, reader: int, number: int) -> LayerCompensation:
        delta, bias = self._layers[number].compensation(reader)
        return LayerCompensation(bias.detach().cpu(), delta.bfloat16().T.contiguous().cpu())


def add_trained_change(fitted: NeuronSelection, before: NeuronSelection, after: NeuronSelection) -> NeuronSelection:
    """Return a fitted set with what training has changed in another one: the bias, and the output weights of common neurons.

    Args:
        fitted: with compensation.
        before: the other one as it was fitted, of the same layers.
        after: the same, trained.
    """
    repairs = {}
    for number, ids in fitted.ids.items():
        own, old, new = (
            _by_neuron((each.compensation or {})[number], len(each.ids[number]), "cpu")
            for each in (fitted, before, after)
        )
        _, places, other_places = np.intersect1d(ids, before.ids[number], assume_unique=True, return_indices=True)
        delta = own[0].float()
        delta[places] += (new[0].float() - old[0].float())[other_places]
        repairs[number] = LayerCompensation(own[1] + new[1] - old[1], delta.to(own[0].dtype).T)
    return replace(fitted, compensation=repairs)


def _rms(values: torch.Tensor) -> float:
    return float(values.detach().float().square().mean().sqrt())


def _by_neuron(repair: LayerCompensation, n_kept: int, device: str | torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the change of the output weights neuron by neuron, [n_kept, d_model], and the bias in float32, as copies."""
    delta = torch.zeros(len(repair.bias), n_kept) if repair.delta is None else repair.delta
    rows = delta.to(device).T.clone(memory_format=torch.contiguous_format)
    return rows, repair.bias.to(device, torch.float32, copy=True)


def checkpoint_bytes(layers: Sequence[MLPLayer], keep_ratio: float, n_sharing: int = 1) -> int:
    """Return the disk that a training which is broken off leaves behind, of one set or of ``n_sharing`` that share."""
    return 4 * (1 + len(_AVERAGES)) * sum(_n_learning(layer, keep_ratio, n_sharing) for layer in layers)


def training_bytes(layers: Sequence[MLPLayer], keep_ratio: float, n_sharing: int = 1) -> int:
    """Return the memory that such a training takes beside the model and its texts, about."""
    of_weight = _COMPACT_COPIES * layers[0].output.weight.dtype.itemsize + _FITTED_BYTES * n_sharing
    total = 0
    for layer in layers:
        total += _LEARNING_BYTES * _n_learning(layer, keep_ratio, n_sharing)
        total += of_weight * int(keep_ratio * layer.d_ff) * layer.d_model
        if n_sharing > 1:  # all neurons' output weights once more, from which sets are cut
            total += layer.output.weight.nbytes
    return total


def _n_learning(layer: MLPLayer, keep_ratio: float, n_sharing: int) -> int:
    """Return how many numbers of a layer learn at most, biases aside."""
    n_neurons = layer.d_ff if n_sharing > 1 else int(keep_ratio * layer.d_ff)
    return n_neurons * layer.d_model


def _rate(step: int, n_steps: int, warm_up: float) -> float:
    """Return the learning rate of a step over the highest."""
    n_rising = max(1, round(warm_up * n_steps))
    if step < n_rising:
        return (step + 1) / (n_rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - n_rising) / max(1, n_steps - n_rising)))
