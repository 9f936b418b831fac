"""The compensation stages of a build: sets fitted in closed form, and trained on from there if the build asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save

from coreinfer_sim.architectures import MLPLayer
from coreinfer_sim.build.calibration import CalibrationText, Fit, fit_layers
from coreinfer_sim.build.distillation import distil, distil_jointly, training_on
from coreinfer_sim.build.sensitivity import layer_costs, neurons_of
from coreinfer_sim.build.students import LEARNING_RATE, SPECIALISING_RATE, training_bytes
from coreinfer_sim.clustering import Clustering
from coreinfer_sim.compensated import load_compensated, save_compensated
from coreinfer_sim.compensation import Moments
from coreinfer_sim.config import Budget, BuildConfig, CompensationConfig, Start
from coreinfer_sim.corpus import Sentence
from coreinfer_sim.files import write_atomic
from coreinfer_sim.manifest import compensation_file
from coreinfer_sim.memory import free_memory, give_back_memory
from coreinfer_sim.models import LanguageModel
from coreinfer_sim.selection import NeuronSelection

_GLOBAL_SHARE = 3
_MEASURED_TOKENS = 10_000
_MOST_HELD = 48


def fit_of(config: CompensationConfig) -> Fit:
    """Return how the settings of a build ask for compact MLPs to be fitted."""
    return Fit(config.ranking, config.rank, config.bypass_rank, ranking_tokens=config.ranking_tokens)


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

    def start(self, folder: Path, ratio: float, cluster: int | None) -> Path:
        """Return where a set is before, in the folder of the build."""
        if self.from_corpus:
            return folder / compensation_file(ratio, None)
        return folder / "fitted" / compensation_file(ratio, cluster)


def trainings(config: CompensationConfig, n_clusters: int) -> list[Training]:
    """Return the trainings of a build, first the whole corpus's."""
    first, *others = fitted_clusters(n_clusters)
    if config.distil_from is Start.JOINT:
        return [Training((first,)), *([Training(tuple(others))] if others else [])]
    from_corpus = config.distil_from is Start.CORPUS
    return [Training((first,)), *(Training((each,), from_corpus) for each in others)]


def make_fitter(
    language_model: LanguageModel,
    sentences: Sequence[Sentence],
    clustering: Clustering,
    config: BuildConfig,
    max_tokens: int,
    folder: Path,
    n_kept: dict[str, list[int]],
    report: Callable[[int], None] | None,
) -> Callable[[int], int]:
    """Return the function that fits one set by its number in `sets_to_fit` and leaves it on disk.

    That function returns the layers that it has not reported.

    Args:
        language_model: the model.
        sentences: the corpus.
        clustering: the clusters of its sentences.
        config: what to fit, and on how many tokens.
        max_tokens: longer texts are cut.
        folder: the build folder.
        n_kept: by keep ratio, the neurons of each layer that stay, a bypass included.
        report: takes 1 after each layer; None: in another process, which cannot show progress.
    """
    assert config.compensation is not None
    settings = config.compensation
    sets = sets_to_fit(settings, len(clustering.centroids))

    def run(number: int) -> int:
        ratio, cluster = sets[number]
        n_tokens = set_tokens(settings.tokens, cluster)
        _, texts = calibration_texts(language_model, sentences, clustering, cluster, n_tokens, config.seed, max_tokens)
        moments = folder / "moments" / f"{ratio:g}"
        leant_on = cluster is None and settings.own_fits and len(clustering.centroids) > 1
        selection = fit_layers(
            language_model,
            texts,
            n_kept[f"{ratio:g}"],
            fit_of(settings),
            prior=None if cluster is None else lambda layer: _load_moments(moments / f"{layer}.safetensors"),
            keep=(lambda layer, m: _save_moments(moments / f"{layer}.safetensors", m)) if leant_on else None,
            report=report,
        )
        save_compensated(fitted_path(folder, settings, ratio, cluster), selection)
        return len(language_model.layers) if report is None else 0

    return run


def make_distiller(
    language_model: LanguageModel,
    sentences: Sequence[Sentence],
    clustering: Clustering,
    config: BuildConfig,
    max_tokens: int,
    folder: Path,
    report: Callable[[int], None] | None,
    room_share: float,
) -> Callable[[int], int]:
    """Return the function that does one of the build's `trainings`, by its number, at all keep ratios.

    That function leaves the sets on disk and returns the tokens that it has not reported. Arguments as for `make_fitter`,
    and the share of the free memory in which sets may be trained side by side.
    """
    assert config.compensation is not None
    settings = config.compensation
    all_trainings = trainings(settings, len(clustering.centroids))
    d_model, n_layers = language_model.layers[0].d_model, len(language_model.layers)

    def started(path: Path) -> NeuronSelection:
        ids, repairs = load_compensated(path, d_model, n_layers)
        return NeuronSelection("compensated", ids, compensation=repairs)

    def run(number: int) -> int:
        training = all_trainings[number]
        clusters = training.clusters
        together = len(clusters) > 1
        cluster = None if together else clusters[0]
        n_tokens = set_tokens(settings.distil_tokens, cluster)
        # from the end, so that the fit's own texts, which no longer show what is wrong with it, come last or not at all
        places, texts = calibration_texts(
            language_model, sentences, clustering, cluster, n_tokens, config.seed, max_tokens, from_end=True
        )
        how = training_on(
            language_model.model.device.type, texts, SPECIALISING_RATE if training.from_corpus else LEARNING_RATE
        )
        room = int(room_share * free_memory(language_model.model.device))
        files = {
            ratio: [folder / compensation_file(ratio, each) for each in clusters] for ratio in settings.keep_ratios
        }
        ratios = [ratio for ratio, paths in files.items() if not all(path.exists() for path in paths)]
        parts = trained_together(language_model.layers, ratios, settings.rank, room, len(clusters))

        def advance(n_tokens: int) -> None:
            if report is not None:
                report(n_tokens // len(parts))

        for part in parts:
            checkpoint = folder / "training" / f"{number}-{'-'.join(f'{ratio:g}' for ratio in part)}.safetensors"
            starts = [[started(training.start(folder, ratio, each)) for each in clusters] for ratio in part]
            if together:
                readers = clustering.assignment[places].tolist()
                found = distil_jointly(language_model, starts, texts, readers, how, advance, checkpoint)
            else:
                alone = distil(language_model, [start for (start,) in starts], texts, how, advance, checkpoint)
                found = [[selection] for selection in alone]
            for ratio, selections in zip(part, found, strict=True):
                for path, selection in zip(files[ratio], selections, strict=True):
                    save_compensated(path, selection)
            checkpoint.unlink(missing_ok=True)
            give_back_memory()  # the next ones' tensors have other shapes
        n_reported = 0 if report is None else len(parts) * sum(len(text.ids) // len(parts) for text in texts)
        return sum(len(text.ids) for text in texts) - n_reported

    return run


def trained_together(
    layers: Sequence[MLPLayer], keep_ratios: Sequence[float], rank: int | None, room: int, n_sharing: int = 1
) -> list[list[float]]:
    """Group keep ratios whose sets can be trained side by side within ``room`` bytes; a set that cannot is a group."""
    groups: list[list[float]] = []
    taken = room
    for ratio in keep_ratios:
        n_bytes = training_bytes(layers, ratio, rank, n_sharing)
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
    language_model: LanguageModel,
    recorded: Sequence[int],
    sentences: Sequence[Sentence],
    clustering: Clustering,
    config: BuildConfig,
    max_tokens: int,
    report: Callable[[int], None],
) -> dict[str, list[int]]:
    """Return how many neurons each layer keeps at each keep ratio, measured if the budget asks for it.

    Args:
        language_model: the model.
        recorded: numbers of the layers that become sparse.
        sentences: the corpus.
        clustering: of its sentences.
        config: of the build.
        max_tokens: longer texts are cut.
        report: takes 1 after each layer that was measured.
    """
    assert config.compensation is not None
    settings = config.compensation
    costs = None
    if settings.budget is Budget.SENSITIVITY:
        n_tokens = min(_MEASURED_TOKENS, settings.tokens)
        _, texts = calibration_texts(language_model, sentences, clustering, None, n_tokens, config.seed, max_tokens)
        n_held = max(1, len(texts) // 8)
        held, fitted = texts[:n_held], texts[n_held:] or texts
        measured = layer_costs(language_model, fitted, held, fit_of(settings), report)
        costs = measured if measured.any() else None  # texts of one token say nothing
    return {
        f"{ratio:g}": neurons_of(language_model.layers, recorded, ratio, costs, settings.bypass_rank)
        for ratio in settings.keep_ratios
    }


def calibration_texts(
    language_model: LanguageModel,
    sentences: Sequence[Sentence],
    clustering: Clustering,
    cluster: int | None,
    n_tokens: int,
    seed: int,
    max_tokens: int,
    from_end: bool = False,
) -> tuple[list[int], list[CalibrationText]]:
    """Tokenise ``n_tokens`` tokens of a cluster's sentences, or of the whole corpus's, in random order.

    Args:
        language_model: the model.
        sentences: the corpus.
        clustering: of its sentences.
        cluster: whose sentences; None: all.
        n_tokens: if there are as many, those left out that `held_out` names.
        seed: of the order.
        max_tokens: longer texts are cut.
        from_end: the order's last sentences, the last first.

    Returns:
        The sentences' places in the corpus, and their texts.
    """
    order = np.random.default_rng(seed).permutation(len(sentences))
    order = order[~held_out(clustering, seed)[order]]
    if from_end:
        order = order[::-1]
    if cluster is not None:
        order = order[clustering.assignment[order] == cluster]
    texts: list[CalibrationText] = []
    n_found = 0
    for i in order:
        if n_found >= n_tokens:
            break
        texts.append(calibration_text(language_model, sentences[i], max_tokens))
        n_found += len(texts[-1].ids)
    return order[: len(texts)].tolist(), texts


def held_out(clustering: Clustering, seed: int) -> np.ndarray:
    """Return which sentences no set is fitted to, so that sets can be compared on them, bool [n_sentences].

    They are at most an eighth of each cluster.
    """
    held = np.zeros(len(clustering.assignment), bool)
    order = np.random.default_rng(seed).permutation(len(held))
    for cluster in range(len(clustering.centroids)):
        members = order[clustering.assignment[order] == cluster]
        held[members[len(members) - min(_MOST_HELD, len(members) // 8) :]] = True
    return held


def calibration_text(language_model: LanguageModel, sentence: Sentence, max_tokens: int) -> CalibrationText:
    """Tokenise a sentence and find where its prompt ends; where the text is the prompt alone, in its middle.

    A text that is too long loses the prompt's beginning, so that a completion is left.
    """
    tokenizer = language_model.tokenizer
    place = sentence.text.find(sentence.prompt)
    end = place + len(sentence.prompt)
    ids = tokenizer(sentence.text, verbose=False)["input_ids"]
    if place < 0 or not sentence.text[end:].strip():
        ids = ids[:max_tokens]
        return CalibrationText(ids, len(ids) // 2)
    n_prompt = min(len(tokenizer(sentence.text[:end], verbose=False)["input_ids"]), len(ids) - 1)
    ids = ids[: n_prompt + max_tokens // 2]
    n_cut = max(0, len(ids) - max_tokens)
    return CalibrationText([*ids[:1], *ids[n_cut + 1 :]], max(0, n_prompt - n_cut))


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
