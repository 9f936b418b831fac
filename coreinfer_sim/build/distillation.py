"""Distillation: a fitted set's compensation is trained on, so that the whole sparse model predicts what the dense one does.

The closed form repairs one layer at a time by squared error. From there a few hundred thousand tokens of gradient descent
on KL(dense ‖ sparse) weigh the layers' errors by what they do to the predictions. Only the compensation learns – the
change of the output weights, the output bias and the bypass's way out –, so that the index holds nothing new. The prompt
is read densely, as in `generate`.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from coreinfer_sim.architectures import MLPLayer
from coreinfer_sim.build.calibration import CalibrationText
from coreinfer_sim.build.reading import n_completion, read_densely, texts_at_once
from coreinfer_sim.compensation import LayerCompensation, size_of_change
from coreinfer_sim.errors import BuildError
from coreinfer_sim.files import write_atomic
from coreinfer_sim.models import LanguageModel
from coreinfer_sim.selection import NeuronSelection
from coreinfer_sim.sparse_mlp import Projections, compact_projections, install, linear_parameters, merged_output

_LEARNT = ("bias", "left", "right", "bypass_out")
_AVERAGES = ("exp_avg", "exp_avg_sq")
_N_DONE = "steps"
_KEPT_EVERY = 300.0
"""Seconds of training that a kill may cost."""
_LEAST_READ = 32
_LARGE_STEP = 1000
"""Decoded tokens of a step where texts are read side by side, unless that leaves fewer steps than _ENOUGH_STEPS."""
_ENOUGH_STEPS = 500
LEARNING_RATE = 2.5e-3
SPECIALISING_RATE = 1e-3
"""More undoes about as much as it gains on a cluster's few steps."""
_LEARNING_BYTES = 4 * 4
"""For a number that learns: itself, its gradient and Adam's two averages."""
_MERGED_BYTES = 4
"""For an output weight that a pass merges anew."""
_FITTED_BYTES = 2
"""For a number of a set as it was fitted, bfloat16."""
_COMPACT_COPIES = 3
"""Of the kept weights, about: gate, up and output."""


@dataclass(frozen=True)
class Distillation:
    """How the compensation is trained."""

    learning_rate: float = LEARNING_RATE
    """Of Adam at its highest, as a share of the root mean square of a layer's output weights, which differs among models
    by more than ten times. A set that has been trained already is specialised at SPECIALISING_RATE."""
    tokens_per_step: int = 125
    """Decoded tokens whose gradients make one step."""
    texts_at_once: int = 1
    """Texts that are read side by side."""
    warm_up: float = 0.1
    """Share of the steps over which the learning rate rises; from there it falls as a cosine to zero."""
    prompt_weight: float = 0.3
    """Weight of a prompt's token beside one of the completion, where a short completion makes the prompt's end decode."""
    length_power: float = 0.5
    """A text of n tokens counts n to this power: 1, every token the same; 0, every text."""


def training_on(model: Any, texts: Sequence[CalibrationText], learning_rate: float) -> Distillation:
    """Return how texts are trained on with the model's device: on a GPU a small step takes as long as a large one."""
    n_at_once = texts_at_once(model, texts)
    if n_at_once == 1:
        return Distillation(learning_rate)
    n_tokens = sum(max(0, n_decoded(text)) for text in texts)
    per_step = min(_LARGE_STEP, max(Distillation.tokens_per_step, n_tokens // _ENOUGH_STEPS))
    return Distillation(learning_rate, per_step, n_at_once)


class _Output(nn.Module):
    """The output projection of a compact MLP whose compensation learns: merged anew in every pass."""

    def __init__(self, layer: MLPLayer, ids: torch.Tensor, compensation: LayerCompensation) -> None:
        """Hold the output weights of the neurons ``ids`` [n_kept] and their compensation, of tensors that learn."""
        super().__init__()
        weight, self._bias = linear_parameters(layer.output)
        self.kept, self._gated = weight.index_select(1, ids), layer.family.gated
        self._compensation = compensation

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Map [..., n_kept and bypass] to [..., d_model]."""
        added = self._compensation.bias.to(z)
        bias = added if self._bias is None else self._bias + added
        return F.linear(z, merged_output(self.kept, self._compensation, self._gated), bias)


class _Student(ABC):
    """Compensation that learns by Adam, at a rate that goes by the weights and rises and falls over the steps."""

    def __init__(self, language_model: LanguageModel, settings: Distillation, n_steps: int) -> None:
        self.layers, self.device = language_model.layers, language_model.model.device
        self._settings, self._n_steps, self._n_done = settings, n_steps, 0
        self._groups: list[dict[str, Any]] = []

    def _learn(self, parameters: Iterable[nn.Parameter], weights: torch.Tensor) -> None:
        """Let parameters learn that are added to ``weights``."""
        highest = self._settings.learning_rate * float(weights.float().square().mean().sqrt())
        self._groups.append({"params": [*parameters], "highest": highest})

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """All that learn."""
        return [parameter for group in self._groups for parameter in group["params"]]

    @cached_property
    def _optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self._groups, betas=(0.9, 0.98))

    @abstractmethod
    def compact(self, place: int) -> dict[int, Projections]:
        """Return the compact MLPs that read the text at ``place``."""

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
        self._optimizer.zero_grad()
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


class _Alone(_Student):
    """A selection whose compensation learns, the bypass's way out included."""

    def __init__(
        self, language_model: LanguageModel, selection: NeuronSelection, settings: Distillation, n_steps: int
    ) -> None:
        super().__init__(language_model, settings, n_steps)
        self._selection = selection
        self._repairs: dict[int, LayerCompensation] = {}
        self._compact: dict[int, dict[str, Any]] = {}
        assert selection.compensation is not None
        for number, ids in selection.ids.items():
            layer, fitted = self.layers[number], selection.compensation[number].to(self.device, copy=True)
            values = ((name, getattr(fitted, name)) for name in _LEARNT)
            learnt = {name: nn.Parameter(value.float()) for name, value in values if value is not None}
            self._repairs[number] = replace(fitted, **learnt)
            output = _Output(layer, ids.to(self.device), self._repairs[number])
            self._learn(learnt.values(), output.kept)
            self._compact[number] = compact_projections(layer, ids, fitted)
            self._compact[number][layer.family.output] = output

    def compact(self, place: int) -> dict[int, Projections]:
        """Return the compact MLPs, which read all texts."""
        return self._compact

    def trained(self) -> list[NeuronSelection]:
        """Return the selection."""
        return [_changed(self._selection, self._repairs)]


class _Joint(_Student):
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
        self._ids = [
            {number: ids.to(self.device, copy=True) for number, ids in selection.ids.items()}  # autograd will save them
            for selection in selections
        ]
        self._fitted = [
            {number: repair.to(self.device, copy=True) for number, repair in (selection.compensation or {}).items()}
            for selection in selections
        ]
        self._change: dict[int, nn.Parameter] = {}
        """[d_ff, d_model] by layer."""
        self._bias: dict[int, nn.Parameter] = {}
        for number in sorted(set().union(*(selection.ids for selection in selections))):
            layer = self.layers[number]
            self._change[number] = nn.Parameter(torch.zeros(layer.d_ff, layer.d_model, device=self.device))
            self._bias[number] = nn.Parameter(torch.zeros(layer.d_model, device=self.device))
            self._learn((self._change[number], self._bias[number]), linear_parameters(layer.output)[0])

    def compact(self, place: int) -> dict[int, Projections]:
        """Cut the compact MLPs of the selection that reads this text: holding all of them could take too much memory."""
        reader = self._readers[place]
        compact: dict[int, dict[str, Any]] = {}
        for number, ids in self._ids[reader].items():
            layer = self.layers[number]
            compact[number] = compact_projections(layer, ids, self._fitted[reader][number])
            compact[number][layer.family.output] = _Output(layer, ids, self._repair(reader, number))
        return compact

    def trained(self) -> list[NeuronSelection]:
        """Return all selections."""
        return [
            _changed(selection, {number: self._repair(reader, number) for number in selection.ids})
            for reader, selection in enumerate(self._selections)
        ]

    def _repair(self, reader: int, number: int) -> LayerCompensation:
        fitted = self._fitted[reader][number]
        left = fitted.delta + self._change[number][self._ids[reader][number]].T
        return replace(fitted, bias=fitted.bias + self._bias[number], left=left, right=None)


def _changed(selection: NeuronSelection, repairs: dict[int, LayerCompensation]) -> NeuronSelection:
    """Return a selection with other compensation, detached and on the CPU."""
    detached = {
        number: LayerCompensation(**{k: v.detach().cpu() for k, v in vars(repair).items() if v is not None})
        for number, repair in repairs.items()
    }
    return replace(selection, compensation=detached)


def distil(
    language_model: LanguageModel,
    selections: Sequence[NeuronSelection],
    texts: Sequence[CalibrationText],
    settings: Distillation,
    report: Callable[[int], None] | None = None,
    checkpoint: Path | None = None,
) -> list[NeuronSelection]:
    """Train the compensation of fitted selections once over texts, each by itself.

    Together they cost less than one after the other: the dense model reads each text once for all.

    Args:
        language_model: the dense model.
        selections: with compensation.
        texts: in the order in which they are read.
        settings: how.
        report: takes each text's number of tokens when it has been read.
        checkpoint: where a training that is broken off is found by the next call, which ends as it would have; None: nowhere.

    Returns:
        The same ids with the trained compensation, on the CPU.
    """
    steps = list(_steps(texts, [0] * len(texts), settings.texts_at_once, settings.tokens_per_step))
    students = [_Alone(language_model, selection, settings, len(steps)) for selection in selections]
    _train(language_model, students, texts, steps, settings, report, checkpoint)
    return [selection for student in students for selection in student.trained()]


def distil_jointly(
    language_model: LanguageModel,
    families: Sequence[Sequence[NeuronSelection]],
    texts: Sequence[CalibrationText],
    readers: Sequence[int],
    settings: Distillation,
    report: Callable[[int], None] | None = None,
    checkpoint: Path | None = None,
) -> list[list[NeuronSelection]]:
    """Train families of selections over texts, each of which one selection reads; in a family they share what they learn.

    A neuron that several selections keep learns from the texts of all of them. What a fit gave each selection alone stays.

    Args:
        language_model: the dense model.
        families: selections with compensation at full rank, [n_families][n_selections].
        texts: in the order in which they are read.
        readers: number of the selection that reads each text, [n_texts].
        settings: how.
        report: takes each text's number of tokens when it has been read.
        checkpoint: where a training that is broken off is found by the next call, which ends as it would have; None: nowhere.

    Returns:
        The same ids with the trained compensation, on the CPU.
    """
    steps = list(_steps(texts, readers, settings.texts_at_once, settings.tokens_per_step))
    students = [_Joint(language_model, selections, readers, settings, len(steps)) for selections in families]
    _train(language_model, students, texts, steps, settings, report, checkpoint)
    return [student.trained() for student in students]


def _train(
    language_model: LanguageModel,
    students: Sequence[_Student],
    texts: Sequence[CalibrationText],
    steps: Sequence[list[list[int]]],
    settings: Distillation,
    report: Callable[[int], None] | None,
    checkpoint: Path | None,
) -> None:
    """Let students learn from texts, which the dense model reads once for all of them, step by step of `_steps`."""
    model, layers, device = language_model.model, language_model.layers, language_model.model.device
    n_done = 0 if checkpoint is None or not checkpoint.exists() else _restore(students, checkpoint)
    saved = time.monotonic()
    with _frozen(model), _sound_gradients(device.type):
        for number, step in enumerate(steps, 1):
            if number <= n_done:
                if report is not None:
                    report(sum(len(texts[place].ids) for batch in step for place in batch))
                continue
            weights = [torch.cat([_weights(texts[place], settings) for place in batch]) for batch in step]
            total = float(torch.cat(weights).sum())
            for batch, weight in zip(step, weights, strict=True):
                read = [texts[place] for place in batch]
                reading = read_densely(model, read, [n_decoded(text) for text in read])
                for student in students:
                    whole = install(layers, student.compact(batch[0]))
                    try:
                        (weight.to(device) @ reading.divergences(model) / total).backward()  # type: ignore[no-untyped-call]
                    finally:
                        install(layers, whole)
                if report is not None:
                    report(sum(len(text.ids) for text in read))
            for student in students:
                student.step()
            if checkpoint is not None and time.monotonic() - saved >= _KEPT_EVERY:
                _save(students, number, checkpoint)
                saved = time.monotonic()


def _sound_gradients(device: str) -> AbstractContextManager[Any]:
    """Keep cuDNN's attention out of the block: in PyTorch 2.11 and later its gradients can be no numbers under a mask.

    Models with massive activations, such as Qwen2.5, come upon it (github.com/pytorch/pytorch/issues/196678).
    """
    if device != "cuda":
        return nullcontext()
    sound: AbstractContextManager[Any] = sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
    return sound


def _save(students: Sequence[_Student], n_done: int, path: Path) -> None:
    """Keep what `_restore` needs to go on after ``n_done`` steps."""
    tensors = {f"{i}.{name}": value for i, student in enumerate(students) for name, value in student.state().items()}
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, lambda part: save_file({**tensors, _N_DONE: torch.tensor(n_done)}, part))


def _restore(students: Sequence[_Student], path: Path) -> int:
    """Take up what `_save` kept; return the steps that were done.

    Raises:
        BuildError: it cannot be read.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BuildError(
            f"{path} cannot be read ({error}); delete it, and its sets are trained from the start."
        ) from error
    n_done = int(tensors.pop(_N_DONE))
    for i, student in enumerate(students):
        start = f"{i}."
        student.go_on(n_done, {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
    return n_done


def checkpoint_bytes(layers: Sequence[MLPLayer], keep_ratio: float, rank: int | None, n_sharing: int = 1) -> int:
    """Return the disk that a training which is broken off leaves behind, of one set or of ``n_sharing`` that share."""
    return 4 * (1 + len(_AVERAGES)) * sum(_n_learning(layer, keep_ratio, rank, n_sharing) for layer in layers)


def training_bytes(layers: Sequence[MLPLayer], keep_ratio: float, rank: int | None, n_sharing: int = 1) -> int:
    """Return the memory that such a training takes beside the model and its texts, about."""
    of_weight = _MERGED_BYTES + _COMPACT_COPIES * layers[0].output.weight.dtype.itemsize
    of_fitted = _FITTED_BYTES * n_sharing if n_sharing > 1 else 0  # one alone learns in place
    total = 0
    for layer in layers:
        n_weights = int(keep_ratio * layer.d_ff) * layer.d_model
        total += _LEARNING_BYTES * _n_learning(layer, keep_ratio, rank, n_sharing) + (of_weight + of_fitted) * n_weights
    return total


def _n_learning(layer: MLPLayer, keep_ratio: float, rank: int | None, n_sharing: int) -> int:
    """Return how many numbers of a layer learn, biases aside."""
    n_neurons = layer.d_ff if n_sharing > 1 else int(keep_ratio * layer.d_ff)
    return size_of_change(n_neurons, layer.d_model, rank)


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
    n_at_once = texts_at_once(model, texts)
    for begin in range(0, len(texts), n_at_once):
        group = texts[begin : begin + n_at_once]
        n_last = [n_completion(text) for text in group]
        with torch.inference_mode():
            reading = read_densely(model, group, n_last)
            for place, compact in enumerate(contenders):
                whole = install(layers, compact)
                try:
                    sums[place] += sum(float(part.mean()) for part in reading.divergences(model).split(n_last))
                finally:
                    install(layers, whole)
        report(len(group))
    return [total / len(texts) for total in sums]


def _steps(
    texts: Sequence[CalibrationText], readers: Sequence[int], n_at_once: int, n_tokens: int
) -> Iterator[list[list[int]]]:
    """Divide the places of texts into steps of at least ``n_tokens`` decoded tokens; the last takes what is left.

    A step is batches of texts that are read side by side, each by one reader.
    """
    step: list[list[int]] = []
    n_found = 0
    for batch in _batches(texts, readers, n_at_once, n_tokens):
        step.append(batch)
        n_found += sum(n_decoded(texts[place]) for place in batch)
        if n_found >= n_tokens:
            yield step
            step, n_found = [], 0
    if step:
        yield step


def _batches(
    texts: Sequence[CalibrationText], readers: Sequence[int], n_at_once: int, n_tokens: int
) -> Iterator[list[int]]:
    """Gather the places of texts of one reader, up to ``n_at_once`` or ``n_tokens`` decoded tokens, in their order."""
    waiting: dict[int, list[int]] = {}
    for place, text in enumerate(texts):
        if n_decoded(text) <= 0:
            continue
        batch = waiting.setdefault(readers[place], [])
        batch.append(place)
        if len(batch) >= n_at_once or sum(n_decoded(texts[each]) for each in batch) >= n_tokens:
            yield waiting.pop(readers[place])
    yield from waiting.values()


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
