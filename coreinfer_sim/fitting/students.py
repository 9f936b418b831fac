"""Students: compensation that learns by Adam what the whole dense model predicts, of one set or of sets that share it.

A student lends the model compact MLPs whose output projections leave their weights' gradients behind. These it takes to what
learns. The weights are merged once a step, as rows of neurons, so that cutting a set out of all neurons and adding to
them goes through memory in order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from coreinfer_sim.base.errors import BuildError
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.compact import Projections, compact_inputs, linear_parameters
from coreinfer_sim.index.compensated import LayerCompensation
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import MLPLayer

LEARNING_RATE = 2.5e-3
SPECIALISING_RATE = 1e-3
"""More undoes about as much as it gains on a cluster's few steps."""
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
    by more than ten times. A set that has been trained already is specialised at SPECIALISING_RATE."""
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

    def __init__(self, layer: MLPLayer, rows: torch.Tensor, learnt: torch.Tensor, bias: torch.Tensor) -> None:
        """Merge what has been learnt into the kept neurons' output weights.

        Args:
            layer: whose.
            rows: output weights of the kept neurons, [n_kept, d_model].
            learnt: what is added to them, float32 [n_kept, d_model].
            bias: that learns, [d_model].
        """
        super().__init__()
        self.weight = (learnt.detach() + rows).to(rows)
        """[n_kept, d_model]."""
        self.gradient: torch.Tensor | None = None
        """Of the weight, after a backward pass."""
        self._bias, self._learnt_bias = linear_parameters(layer.output)[1], [bias]  # in a list: the model's it is not

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Map [..., n_kept] to [..., d_model]."""
        (bias,) = self._learnt_bias
        out: torch.Tensor = _Product.apply(z, bias if self._bias is None else self._bias + bias, self)  # type: ignore[no-untyped-call]
        return out


class Student(ABC):
    """Compensation that learns by Adam, at a rate that goes by the weights and rises and falls over the steps."""

    def __init__(self, language_model: LanguageModel, settings: Distillation, n_steps: int) -> None:
        self.layers, self.device = language_model.layers, language_model.model.device
        self._settings, self._n_steps, self._n_done = settings, n_steps, 0
        self._groups: list[dict[str, Any]] = []

    def _learn(self, parameters: Iterable[nn.Parameter], weights: torch.Tensor, change: float) -> None:
        """Let parameters learn that are added to ``weights``, which the fit has changed by ``change``, root mean square."""
        highest = self._settings.learning_rate * _rms(weights)
        if self._settings.rate_of_change is not None:
            highest = min(highest, self._settings.rate_of_change * change)
        self._groups.append({"params": [*parameters], "highest": highest})

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """All that learn."""
        return [parameter for group in self._groups for parameter in group["params"]]

    @cached_property
    def _optimizer(self) -> torch.optim.Adam:
        # fused: one pass through memory in place of six; on a CPU those take longer than a step's texts do
        return torch.optim.Adam(self._groups, betas=(0.9, 0.98), fused=self.device.type == "cpu")

    @abstractmethod
    def compact(self, place: int) -> dict[int, Projections]:
        """Return the compact MLPs that read the text at ``place``."""

    @abstractmethod
    def take(self, place: int) -> None:
        """Take the gradients that a backward pass has left with the compact MLPs that read the text at ``place``."""

    @abstractmethod
    def trained(self) -> list[NeuronSelection]:
        """Return the selections with their compensation as it is now, on the CPU."""

    def step(self) -> None:
        """Move along the gradients that have gathered.

        Raises:
            BuildError: they are no numbers.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if not bool(norm.isfinite()):  # it would be in all weights
            raise BuildError(
                f"the gradient of step {self._n_done + 1} of {self._n_steps} is {float(norm)}, expected a finite one; build "
                "with --dtype float32, as the model's own type may be too coarse for it."
            )
        share = _rate(self._n_done, self._n_steps, self._settings.warm_up)
        for group in self._optimizer.param_groups:
            group["lr"] = group["highest"] * share
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)  # fresh memory costs more than zeros
        self._n_done += 1

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
            averages = {name: tensors[f"{i}.{name}"].to(self.device) for name in _AVERAGES}
            self._optimizer.state[parameter] = {"step": torch.tensor(float(n_done)), **averages}


class Alone(Student):
    """A selection whose compensation learns."""

    def __init__(
        self, language_model: LanguageModel, selection: NeuronSelection, settings: Distillation, n_steps: int
    ) -> None:
        super().__init__(language_model, settings, n_steps)
        self._selection = selection
        self._change: dict[int, nn.Parameter] = {}
        """Of the kept neurons' output weights by layer, [n_kept, d_model]."""
        self._bias: dict[int, nn.Parameter] = {}
        self._inputs: dict[int, Projections] = {}
        self._rows: dict[int, torch.Tensor] = {}
        self._merged: dict[int, _Output] = {}
        """The projections that what has been learnt is merged into, by layer."""
        assert selection.compensation is not None
        for number, ids in selection.ids.items():
            layer, fitted = self.layers[number], selection.compensation[number].to(self.device)
            delta = _change_of(fitted, len(ids))
            self._change[number] = nn.Parameter(delta.T.clone(memory_format=torch.contiguous_format))
            self._change[number].grad = torch.zeros_like(self._change[number])
            self._bias[number] = nn.Parameter(fitted.bias.float().clone())
            self._rows[number] = _output_rows(layer).index_select(0, ids.to(self.device))
            self._learn((self._change[number], self._bias[number]), self._rows[number], _rms(delta))
            self._inputs[number] = compact_inputs(layer, ids)

    def compact(self, place: int) -> dict[int, Projections]:
        """Return the compact MLPs, which read all texts."""
        if not self._merged:
            for number, change in self._change.items():
                self._merged[number] = _Output(self.layers[number], self._rows[number], change, self._bias[number])
        return {
            number: {**self._inputs[number], self.layers[number].family.output: output}
            for number, output in self._merged.items()
        }

    def take(self, place: int) -> None:
        """Take the gradients to what learns."""
        for number, output in self._merged.items():  # added in place, as fresh memory is dear
            gradient = self._change[number].grad
            assert gradient is not None and output.gradient is not None
            gradient.add_(output.gradient)
            output.gradient = None

    def step(self) -> None:
        """Move along the gradients that have gathered."""
        super().step()
        self._merged.clear()

    def trained(self) -> list[NeuronSelection]:
        """Return the selection."""
        repairs = {number: LayerCompensation(self._bias[number], change.T) for number, change in self._change.items()}
        return [_changed(self._selection, repairs)]


class Joint(Student):
    """Selections that share what they learn: a change of the output weights of all neurons, and of the output bias.

    Each selection takes from it what its own neurons need, on top of its fitted compensation.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        selections: Sequence[NeuronSelection],
        readers: Sequence[int],
        settings: Distillation,
        n_steps: int,
    ) -> None:
        super().__init__(language_model, settings, n_steps)
        self._readers = readers
        self._selections = selections
        self._ids = [{number: ids.to(self.device) for number, ids in selection.ids.items()} for selection in selections]
        self._fitted = [
            {
                number: _in_rows(repair.to(self.device, copy=True))
                for number, repair in (selection.compensation or {}).items()
            }
            for selection in selections
        ]
        self._rows: dict[int, torch.Tensor] = {}
        """Output weights of all neurons by layer, [d_ff, d_model]."""
        self._change: dict[int, nn.Parameter] = {}
        """[d_ff, d_model] by layer."""
        self._bias: dict[int, nn.Parameter] = {}
        self._cut: tuple[int, dict[int, dict[str, Any]]] | None = None
        """The reader whose compact MLPs were cut last, and these: holding all readers' could take too much memory."""
        for number in sorted(set().union(*(selection.ids for selection in selections))):
            layer = self.layers[number]
            self._rows[number] = _output_rows(layer)
            self._change[number] = nn.Parameter(torch.zeros(layer.d_ff, layer.d_model, device=self.device))
            self._change[number].grad = torch.zeros_like(self._change[number])
            self._bias[number] = nn.Parameter(torch.zeros(layer.d_model, device=self.device))
            changes = [
                _rms(_change_of(fitted[number], len(ids[number])))
                for fitted, ids in zip(self._fitted, self._ids, strict=True)
                if number in fitted
            ]
            self._learn((self._change[number], self._bias[number]), self._rows[number], sum(changes) / len(changes))

    def compact(self, place: int) -> dict[int, Projections]:
        """Return the compact MLPs of the selection that reads this text."""
        reader = self._readers[place]
        if self._cut is None or self._cut[0] != reader:
            self._cut = None  # before the next ones take memory
            self._cut = reader, {number: self._compact(reader, number) for number in self._ids[reader]}
        return self._cut[1]

    def _compact(self, reader: int, number: int) -> dict[str, Any]:
        layer, ids, repair = self.layers[number], self._ids[reader][number], self._repair(reader, number)
        rows = self._rows[number].index_select(0, ids)
        output = _Output(layer, rows, _change_of(repair, len(ids)).T, repair.bias)
        return {**compact_inputs(layer, ids), layer.family.output: output}

    def take(self, place: int) -> None:
        """Add the gradients to those of the neurons that this text's selection keeps."""
        assert self._cut is not None and self._cut[0] == self._readers[place]
        for number, modules in self._cut[1].items():
            ids, output = self._ids[self._cut[0]][number], modules[self.layers[number].family.output]
            self._change[number].grad.index_add_(0, ids, output.gradient.float())  # type: ignore[union-attr]
            output.gradient = None

    def step(self) -> None:
        """Move along the gradients that have gathered."""
        super().step()
        self._cut = None

    def trained(self) -> list[NeuronSelection]:
        """Return all selections."""
        return [_changed(selection, self._stored(reader)) for reader, selection in enumerate(self._selections)]

    def _repair(self, reader: int, number: int) -> LayerCompensation:
        fitted = self._fitted[reader][number]
        ids = self._ids[reader][number]
        delta = _change_of(fitted, len(ids)) + self._change[number].detach().index_select(0, ids).T
        return LayerCompensation(fitted.bias + self._bias[number], delta)

    def _stored(self, reader: int) -> dict[int, LayerCompensation]:
        """Return a selection's compensation in bfloat16, as it is stored: of all at once, float32 may not fit into memory."""
        found = {}
        for number in self._selections[reader].ids:
            repair = self._repair(reader, number)
            found[number] = replace(repair, delta=_change_of(repair, len(self._ids[reader][number])).bfloat16())
        return found


def taught(fitted: NeuronSelection, before: NeuronSelection, after: NeuronSelection) -> NeuronSelection:
    """Return a fitted set with what training has changed in another one: the bias, and the output weights of common neurons.

    Args:
        fitted: with compensation.
        before: the other one as it was fitted, of the same layers.
        after: the same, trained.
    """
    assert fitted.compensation is not None and before.compensation is not None and after.compensation is not None
    repairs = {}
    for number, ids in fitted.ids.items():
        own, old, new = (each.compensation[number] for each in (fitted, before, after))  # type: ignore[index]
        _, places, other_places = np.intersect1d(ids, before.ids[number], assume_unique=True, return_indices=True)
        delta, n_before = _change_of(own, len(ids)).clone(), len(before.ids[number])
        delta[:, places] += (_change_of(new, n_before) - _change_of(old, n_before))[:, other_places]
        bias = own.bias.float() + new.bias.float() - old.bias.float()
        repairs[number] = LayerCompensation(bias, delta.to(own.bias.dtype))
    return replace(fitted, compensation=repairs)


def _rms(values: torch.Tensor) -> float:
    return float(values.detach().float().square().mean().sqrt())


def _output_rows(layer: MLPLayer) -> torch.Tensor:
    """Return the output weights neuron by neuron, [d_ff, d_model]."""
    return linear_parameters(layer.output)[0].T.contiguous()


def _in_rows(repair: LayerCompensation) -> LayerCompensation:
    """Return compensation whose change of the output weights lies neuron by neuron."""
    return repair if repair.delta is None else replace(repair, delta=repair.delta.T.contiguous().T)


def _change_of(repair: LayerCompensation, n_kept: int) -> torch.Tensor:
    """Return the change of the kept neurons' output weights, float32 [d_model, n_kept]."""
    return repair.bias.new_zeros(len(repair.bias), n_kept).float() if repair.delta is None else repair.delta.float()


def _changed(selection: NeuronSelection, repairs: dict[int, LayerCompensation]) -> NeuronSelection:
    """Return a selection with other compensation, detached and on the CPU."""
    detached = {}
    for number, repair in repairs.items():
        bias, delta = (value.detach().cpu().contiguous() for value in (repair.bias, repair.delta) if value is not None)
        detached[number] = LayerCompensation(bias, delta)
    return replace(selection, compensation=detached)


def checkpoint_bytes(layers: Sequence[MLPLayer], keep_ratio: float, n_sharing: int = 1) -> int:
    """Return the disk that a training which is broken off leaves behind, of one set or of ``n_sharing`` that share."""
    return 4 * (1 + len(_AVERAGES)) * sum(_n_learning(layer, keep_ratio, n_sharing) for layer in layers)


def training_bytes(layers: Sequence[MLPLayer], keep_ratio: float, n_sharing: int = 1) -> int:
    """Return the memory that such a training takes beside the model and its texts, about."""
    of_weight = _COMPACT_COPIES * layers[0].output.weight.dtype.itemsize
    of_fitted = _FITTED_BYTES * n_sharing if n_sharing > 1 else 0  # one alone learns in place
    total = 0
    for layer in layers:
        n_weights = int(keep_ratio * layer.d_ff) * layer.d_model
        total += _LEARNING_BYTES * _n_learning(layer, keep_ratio, n_sharing) + (of_weight + of_fitted) * n_weights
        if n_sharing > 1:  # all neurons' output weights once more, from which sets are cut
            total += layer.output.weight.nbytes
    return total


def _n_learning(layer: MLPLayer, keep_ratio: float, n_sharing: int) -> int:
    """Return how many numbers of a layer learn, biases aside."""
    n_neurons = layer.d_ff if n_sharing > 1 else int(keep_ratio * layer.d_ff)
    return n_neurons * layer.d_model


def _rate(step: int, n_steps: int, warm_up: float) -> float:
    """Return the learning rate of a step over the highest."""
    n_rising = max(1, round(warm_up * n_steps))
    if step < n_rising:
        return (step + 1) / (n_rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - n_rising) / max(1, n_steps - n_rising)))
