"""Distillation: a fitted set's compensation is trained on, so that the whole sparse model predicts what the dense one does.

The closed form repairs one layer at a time by squared error. From there a few hundred thousand tokens of gradient descent
on KL(dense ‖ sparse) weigh the layers' errors by what they do to the predictions. Only the compensation learns – the
change of the output weights and the output bias –, so that the index holds nothing new. The prompt is read densely, as in
`generate`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from coreinfer_sim.base.errors import BuildError
from coreinfer_sim.base.files import write_atomic
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.cutting import Projections
from coreinfer_sim.engines.modules import install
from coreinfer_sim.fitting.clustered_corpus import CalibrationText
from coreinfer_sim.fitting.reading import n_completion, packs, read_densely
from coreinfer_sim.fitting.student import Distillation, Student
from coreinfer_sim.models.loading import LanguageModel

_N_DONE = "steps"
KEPT_EVERY = 300.0
"""Seconds of training that a kill may cost."""
_LEAST_READ = 32
_LARGE_STEP = 1000
"""Decoded tokens of a step on a GPU, unless that leaves fewer steps than ENOUGH_STEPS."""
ENOUGH_STEPS = 500


def training_on(device: str, texts: Sequence[CalibrationText]) -> Distillation:
    """Return how texts are trained on with a type of device: on a GPU a small step takes as long as a large one."""
    if device != "cuda":
        return Distillation()
    n_tokens = sum(max(0, n_decoded(text)) for text in texts)
    tokens_per_step = min(_LARGE_STEP, max(Distillation.tokens_per_step, n_tokens // ENOUGH_STEPS))
    return Distillation(tokens_per_step=tokens_per_step)


def distil(
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
    Families cost less together than one after the other: the dense model reads each text once for all.

    Args:
        language_model: the dense model.
        families: selections with compensation, [n_families][n_selections].
        texts: in the order in which they are read.
        readers: number of the selection that reads each text, [n_texts].
        settings: how.
        report: takes each text's number of tokens when it has been read.
        checkpoint: where a training that is broken off is found by the next call, which ends as it would have; None: nowhere.

    Returns:
        The same ids with the trained compensation, on the CPU.
    """
    steps = list(_steps(texts, readers, settings.tokens_per_step))
    students = [Student(language_model, selections, readers, settings, len(steps)) for selections in families]
    _train(language_model, students, texts, steps, settings, report, checkpoint)
    return [student.trained() for student in students]


def _train(
    language_model: LanguageModel,
    students: Sequence[Student],
    texts: Sequence[CalibrationText],
    steps: Sequence[list[int]],
    settings: Distillation,
    report: Callable[[int], None] | None,
    checkpoint: Path | None,
) -> None:
    """Let students learn from texts, which the dense model reads once for all of them, step by step of `_steps`."""
    model, layers, device = language_model.model, language_model.layers, language_model.model.device
    # 1) take up a training that was broken off
    n_done = 0 if checkpoint is None or not checkpoint.exists() else _restore(students, checkpoint)
    saved = time.monotonic()
    # 2) the dense model reads the texts of a step, the students learn from them
    with _frozen(model), sound_gradients(device.type):
        for number, step in enumerate(steps, 1):
            if number <= n_done:
                if report is not None:
                    report(sum(len(texts[place].ids) for place in step))
                continue
            weights = {place: _weights(texts[place], settings).to(device) for place in step}
            total = sum(float(weight.sum()) for weight in weights.values())
            for pack in packs(model, [texts[place] for place in step]):
                places = [step[i] for i in pack]
                read = [texts[place] for place in places]
                reading = read_densely(model, read, [n_decoded(text) for text in read])
                weight = torch.cat([weights[place] for place in places]) / total
                for student in students:
                    whole = install(layers, student.compact(places[0]))
                    try:
                        (weight @ reading.divergences(model)).backward()
                    finally:
                        install(layers, whole)
                    student.gather()
                if report is not None:
                    report(sum(len(text.ids) for text in read))
            for student in students:
                student.step()
            # 3) now and then keep what a kill would cost
            if checkpoint is not None and time.monotonic() - saved >= KEPT_EVERY:
                _save(students, number, checkpoint)
                saved = time.monotonic()


def sound_gradients(device: str) -> AbstractContextManager[Any]:
    """Keep cuDNN's attention out of the block: in PyTorch 2.11 and later its gradients can be no numbers under a mask.

    Models with massive activations, such as Qwen2.5, come upon it (github.com/pytorch/pytorch/issues/196678).
    """
    if device != "cuda":
        return nullcontext()
    sound: AbstractContextManager[Any] = sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
    return sound


def _save(students: Sequence[Student], n_done: int, path: Path) -> None:
    """Keep what `_restore` needs to go on after ``n_done`` steps."""
    tensors = {f"{i}.{name}": value for i, student in enumerate(students) for name, value in student.state().items()}
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, lambda part: save_file({**tensors, _N_DONE: torch.tensor(n_done)}, part))


def _restore(students: Sequence[Student], path: Path) -> int:
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


def n_decoded(text: CalibrationText) -> int:
    """Return how many of a text's tokens are read sparsely: the completion, and of the prompt what makes up the least."""
    return min(max(len(text.ids) - text.n_prompt, _LEAST_READ), len(text.ids) - 1)


def divergences_of(
    language_model: LanguageModel,
    texts: Sequence[CalibrationText],
    contenders: Sequence[dict[int, Projections]],
    report: Callable[[int], None],
) -> list[list[float]]:
    """Return each contender's KL(dense ‖ sparse) a completion token in nats, for each text, [n_contenders][n_texts].

    Args:
        language_model: the dense model.
        texts: of two tokens or more, whose prompts are read densely.
        contenders: compact MLPs by layer.
        report: takes 1 after each text.
    """
    model, layers = language_model.model, language_model.layers
    found: list[list[float]] = [[] for _ in contenders]
    for pack in packs(model, texts):
        group = [texts[place] for place in pack]
        n_last = [n_completion(text) for text in group]
        with torch.inference_mode():
            reading = read_densely(model, group, n_last)
            for place, compact in enumerate(contenders):
                whole = install(layers, compact)
                try:
                    found[place] += [float(part.mean()) for part in reading.divergences(model).split(n_last)]
                finally:
                    install(layers, whole)
        report(len(group))
    return found


def _steps(texts: Sequence[CalibrationText], readers: Sequence[int], n_tokens: int) -> Iterator[list[int]]:
    """Divide the places of texts into steps of one reader and at least ``n_tokens`` decoded tokens; the last ones are smaller."""
    waiting: dict[int, list[int]] = {}
    for place, text in enumerate(texts):
        if n_decoded(text) <= 0:
            continue
        step = waiting.setdefault(readers[place], [])
        step.append(place)
        if sum(n_decoded(texts[each]) for each in step) >= n_tokens:
            yield waiting.pop(readers[place])
    yield from waiting.values()


def _weights(text: CalibrationText, settings: Distillation) -> torch.Tensor:
    """Return the weight of each decoded token."""
    n = n_decoded(text)
    weights = torch.ones(n)
    weights[: max(0, text.n_prompt - (len(text.ids) - n))] = settings.prompt_weight
    scale: float = float(weights.sum()) ** (settings.length_power - 1)
    return weights * scale


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
