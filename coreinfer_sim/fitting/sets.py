"""What makes compensated sets: fits in closed form, and training on from there if the build asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from coreinfer_sim.base.files import write_atomic
from coreinfer_sim.base.memory import free_memory, give_back_memory
from coreinfer_sim.base.settings import Budget, CompensationConfig, Start
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.fitting.budgets import layer_costs, neurons_of
from coreinfer_sim.fitting.calibration import Fit, fit_layers
from coreinfer_sim.fitting.least_squares import Moments
from coreinfer_sim.fitting.students import LEARNING_RATE, SPECIALISING_RATE, taught, training_bytes
from coreinfer_sim.fitting.texts import CalibrationCorpus, save_selection
from coreinfer_sim.fitting.training import distil, distil_jointly, training_on
from coreinfer_sim.index.manifest import compensation_file
from coreinfer_sim.models.mlps import MLPLayer

_GLOBAL_SHARE = 3
_MEASURED_TOKENS = 10_000


def fit_of(config: CompensationConfig) -> Fit:
    """Return how the settings of a build ask for compact MLPs to be fitted."""
    return Fit(config.ranking)


def sets_to_fit(config: CompensationConfig, n_clusters: int) -> list[tuple[float, int | None]]:
    """Return keep ratio and cluster of every set: first those of the whole corpus (None), which the others lean on."""
    return [(ratio, cluster) for cluster in fitted_clusters(n_clusters) for ratio in config.keep_ratios]


def fitted_clusters(n_clusters: int) -> list[int | None]:
    """Return the clusters that have sets of their own, after None, the whole corpus, which a single cluster equals."""
    return [None, *(range(n_clusters) if n_clusters > 1 else ())]


@dataclass(frozen=True)
class Training:
    """Sets that are trained in one go."""

    clusters: tuple[int | None, ...]
    """Whose; None: the whole corpus."""
    from_corpus: bool = False
    """Whether a cluster's set begins as the whole corpus's trained one, which it specialises."""

    @property
    def together(self) -> bool:
        """Whether several clusters share what they learn."""
        return len(self.clusters) > 1

    def starts(self, corpus: CalibrationCorpus, ratio: float) -> list[NeuronSelection]:
        """Return the sets as they are before, from the folder of the build."""
        trained, fitted = corpus.folder / compensation_file(ratio, None), corpus.folder / "fitted"
        if self.from_corpus:
            return [corpus.load(trained)]
        own = [corpus.load(fitted / compensation_file(ratio, each)) for each in self.clusters]
        if not self.together:
            return own
        before, after = corpus.load(fitted / compensation_file(ratio, None)), corpus.load(trained)
        return [taught(each, before, after) for each in own]


def trainings(config: CompensationConfig, n_clusters: int) -> list[Training]:
    """Return the trainings of a build, first the whole corpus's."""
    first, *others = fitted_clusters(n_clusters)
    if config.distil_from is Start.JOINT:
        return [Training((first,)), *([Training(tuple(others))] if others else [])]
    from_corpus = config.distil_from is Start.CORPUS
    return [Training((first,)), *(Training((each,), from_corpus) for each in others)]


def make_fitter(
    corpus: CalibrationCorpus, n_kept: dict[str, list[int]], report: Callable[[int], None] | None
) -> Callable[[int], int]:
    """Return the function that fits one set by its number in `sets_to_fit` and leaves it on disk.

    That function returns the layers that it has not reported.

    Args:
        corpus: what to fit to.
        n_kept: by keep ratio, the neurons of each layer that stay.
        report: takes 1 after each layer; None: in another process, which cannot show progress.
    """
    settings, folder = corpus.settings, corpus.folder
    sets = sets_to_fit(settings, corpus.n_clusters)

    def run(number: int) -> int:
        ratio, cluster = sets[number]
        _, texts = corpus.texts(cluster, set_tokens(settings.tokens, cluster))
        moments = folder / "moments" / f"{ratio:g}"
        leant_on = cluster is None and settings.own_fits and corpus.n_clusters > 1
        selection = fit_layers(
            corpus.language_model,
            texts,
            n_kept[f"{ratio:g}"],
            fit_of(settings),
            prior=None if cluster is None else lambda layer: _load_moments(moments / f"{layer}.safetensors"),
            keep=(lambda layer, m: _save_moments(moments / f"{layer}.safetensors", m)) if leant_on else None,
            report=report,
        )
        save_selection(fitted_path(folder, settings, ratio, cluster), selection)
        return len(corpus.language_model.layers) if report is None else 0

    return run


def make_distiller(
    corpus: CalibrationCorpus, report: Callable[[int], None] | None, room_share: float
) -> Callable[[int], int]:
    """Return the function that does one of the build's `trainings`, by its number, at all keep ratios.

    That function leaves the sets on disk and returns the tokens that it has not reported. Arguments as for `make_fitter`,
    and the share of the free memory in which sets may be trained side by side.
    """
    settings, folder, language_model = corpus.settings, corpus.folder, corpus.language_model
    all_trainings = trainings(settings, corpus.n_clusters)

    def run(number: int) -> int:
        training = all_trainings[number]
        clusters = training.clusters
        cluster = None if training.together else clusters[0]
        n_tokens = set_tokens(settings.distil_tokens, cluster)
        # from the end, so that the fit's own texts, which no longer show what is wrong with it, come last or not at all
        places, texts = corpus.texts(cluster, n_tokens, from_end=True)
        how = training_on(
            language_model.model.device.type, texts, SPECIALISING_RATE if training.from_corpus else LEARNING_RATE
        )
        room = int(room_share * free_memory(language_model.model.device))
        files = {
            ratio: [folder / compensation_file(ratio, each) for each in clusters] for ratio in settings.keep_ratios
        }
        ratios = [ratio for ratio, paths in files.items() if not all(path.exists() for path in paths)]
        checkpoints = folder / "training"
        parts = _begun(checkpoints, number, ratios)
        left = [ratio for ratio in ratios if not any(ratio in part for part in parts)]
        parts += trained_together(language_model.layers, left, room, len(clusters))

        def advance(n_tokens: int) -> None:
            if report is not None:
                report(n_tokens // len(parts))

        for part in parts:
            checkpoint = checkpoints / f"{number}-{'-'.join(f'{ratio:g}' for ratio in part)}.safetensors"
            starts = [training.starts(corpus, ratio) for ratio in part]
            if training.together:
                readers = corpus.clustering.assignment[places].tolist()
                found = distil_jointly(language_model, starts, texts, readers, how, advance, checkpoint)
            else:
                alone = distil(language_model, [start for (start,) in starts], texts, how, advance, checkpoint)
                found = [[selection] for selection in alone]
            for ratio, selections in zip(part, found, strict=True):
                for path, selection in zip(files[ratio], selections, strict=True):
                    save_selection(path, selection)
            checkpoint.unlink(missing_ok=True)
            give_back_memory()  # the next ones' tensors have other shapes
        n_reported = 0 if report is None else len(parts) * sum(len(text.ids) // len(parts) for text in texts)
        return sum(len(text.ids) for text in texts) - n_reported

    return run


def _begun(checkpoints: Path, number: int, ratios: Sequence[float]) -> list[list[float]]:
    """Return the groups of keep ratios whose training was broken off, whatever memory was free when they were made."""
    groups: list[list[float]] = []
    for path in sorted(checkpoints.glob(f"{number}-*.safetensors")):
        names = path.stem.split("-")[1:]
        group = [ratio for ratio in ratios if f"{ratio:g}" in names]
        if len(group) == len(names) and not any(ratio in other for other in groups for ratio in group):
            groups.append(group)
    return groups


def trained_together(
    layers: Sequence[MLPLayer], keep_ratios: Sequence[float], room: int, n_sharing: int = 1
) -> list[list[float]]:
    """Group keep ratios whose sets can be trained side by side within ``room`` bytes; a set that cannot is a group."""
    groups: list[list[float]] = []
    taken = room
    for ratio in keep_ratios:
        n_bytes = training_bytes(layers, ratio, n_sharing)
        if taken + n_bytes > room:
            groups.append([])
            taken = 0
        groups[-1].append(ratio)
        taken += n_bytes
    return groups


def set_tokens(tokens: int, cluster: int | None) -> int:
    """Return the tokens that a set is fitted or trained on; the set of the whole corpus takes more than a cluster's."""
    return tokens * (_GLOBAL_SHARE if cluster is None else 1)


def fitted_path(folder: Path, settings: CompensationConfig, ratio: float, cluster: int | None) -> Path:
    """Return where a set that is fitted in closed form is: in its final place, unless it is trained on from there."""
    return folder / ("fitted" if settings.distil_tokens else ".") / compensation_file(ratio, cluster)


def neurons_by_ratio(
    corpus: CalibrationCorpus, recorded: Sequence[int], report: Callable[[int], None]
) -> dict[str, list[int]]:
    """Return how many neurons each layer keeps at each keep ratio, measured if the budget asks for it.

    Args:
        corpus: what to measure on.
        recorded: numbers of the layers that become sparse.
        report: takes 1 after each layer that was measured.
    """
    settings, language_model = corpus.settings, corpus.language_model
    costs = None
    if settings.budget is Budget.SENSITIVITY:
        _, texts = corpus.texts(None, min(_MEASURED_TOKENS, settings.tokens))
        n_held = max(1, len(texts) // 8)
        held, fitted = texts[:n_held], texts[n_held:] or texts
        measured = layer_costs(language_model, fitted, held, fit_of(settings), report)
        costs = measured if measured.any() else None  # texts of one token say nothing
    return {f"{ratio:g}": neurons_of(language_model.layers, recorded, ratio, costs) for ratio in settings.keep_ratios}


def _save_moments(path: Path, moments: Moments) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    n_tokens = torch.tensor(moments.n_tokens, dtype=torch.float64)
    content = save({**vars(moments), "n_tokens": n_tokens})
    write_atomic(path, lambda part: part.write_bytes(content))


def _load_moments(path: Path) -> Moments:
    tensors = load_file(path)
    moments = Moments(*tensors["cross"].shape)
    vars(moments).update({**tensors, "n_tokens": float(tensors["n_tokens"])})
    return moments
