"""Compare ways to group the texts of an index, by what the groups' compensated sets are worth.

python figures/figures_clusters.py compare --model MODEL --data DATA --out FOLDER

Each way gives every group a set of its own, in closed form and shrunk towards the whole corpus, from the same texts; rows at
70 to 84, which choices may see, are scored under the set of the group that they are sent to. A way that has been scored
stands in FOLDER and is not scored again.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from figures_quality import UNSEEN, cases_of, data_option, model_option, name_option

from figures import RESULTS, header, running_command

_LONGEST = 128
"""Tokens of a prompt's end and of a completion's beginning that are read."""


@dataclass(frozen=True)
class Shrinkage:
    """What holds a group's set near the whole corpus's."""

    prior_tokens: float = 5_000.0
    """That the whole corpus's moments count as."""
    plain: bool = False
    """Whether these are moments whose targets take no error back."""


class Corpus:
    """The texts that sets are fitted to, and the rows that they are scored on."""

    def __init__(self, model: str, data: Path, rows: int, scored_rows: int, keep_ratio: float, tokens: int) -> None:
        """Read both; score the dense model; share the neurons out among the layers; fit the whole corpus's set."""
        from coreinfer_sim import load_model
        from coreinfer_sim.evaluation.rows import joined, read_rows
        from coreinfer_sim.fitting.budgets import layer_costs, neurons_of
        from coreinfer_sim.fitting.calibration import CalibrationText, Fit, fit_layers
        from coreinfer_sim.fitting.least_squares import Moments

        self.tokens = tokens
        self._fitted: dict[Any, Any] = {}
        self.language_model = load_model(model)
        layers, tokenizer = self.language_model.layers, self.language_model.tokenizer
        paths = sorted(data.glob("*.jsonl"))
        read = [row for path in paths if path.stem not in UNSEEN for row in read_rows(path, range(70), rows)]
        self.rows = [read[i] for i in np.random.default_rng(0).permutation(len(read))]
        self.texts: list[CalibrationText] = []
        for row in self.rows:
            prompt, completion = (
                tokenizer(part, add_special_tokens=False)["input_ids"] for part in joined(row.prompt, row.completion)
            )
            kept = prompt[-_LONGEST:]
            self.texts.append(CalibrationText([*kept, *completion[:_LONGEST]], len(kept)))
        self.cases = [case for path in paths for case in cases_of(self.language_model, path, scored_rows)]
        of_all = self._first(range(len(self.texts)), 3 * tokens)
        costs = layer_costs(self.language_model, of_all[::4], of_all[1::16], Fit())
        self.n_kept = neurons_of(layers, range(len(layers)), keep_ratio, costs)
        self.moments: dict[int, Moments] = {}
        self.set_of_all = fit_layers(self.language_model, of_all, self.n_kept, Fit(), keep=self.moments.__setitem__)

    def _first(self, places: Sequence[int], n_tokens: int) -> list[Any]:
        """Return the first texts at some places that hold ``n_tokens`` tokens together, if there are as many."""
        found: list[Any] = []
        for place in places:
            if sum(len(text.ids) for text in found) >= n_tokens:
                break
            found.append(self.texts[place])
        return found

    @cached_property
    def plain_moments(self) -> Any:
        """Moments of the whole corpus by layer whose targets take no earlier layer's error back."""
        from coreinfer_sim.fitting.calibration import Fit, fit_layers

        found: dict[int, Any] = {}
        of_all = self._first(range(len(self.texts)), 3 * self.tokens)
        fit_layers(self.language_model, of_all, self.n_kept, Fit(carry=0.0), keep=found.__setitem__)
        return found

    def fitted(self, places: Sequence[int], shrinkage: Shrinkage) -> Any:
        """Return the set of the texts at some places."""
        from coreinfer_sim.fitting.calibration import Fit, fit_layers

        key = (tuple(places), shrinkage)
        if key not in self._fitted:
            texts, fit = self._first(places, self.tokens), Fit(prior_tokens=shrinkage.prior_tokens)
            prior = self.plain_moments if shrinkage.plain else self.moments
            self._fitted[key] = fit_layers(self.language_model, texts, self.n_kept, fit, prior=prior.__getitem__)
        return self._fitted[key]

    def gaps(self, selection: Any, cases: Sequence[int]) -> dict[int, tuple[float, int]]:
        """Return by case what a set costs, in nats over the completion, and the completion's tokens."""
        from coreinfer_sim.engines.compact import installed

        with installed(self.language_model.layers, selection):
            scores = {i: self.cases[i].score() for i in cases}
        return {i: (score.loss - self.cases[i].reference_loss, score.n_tokens) for i, score in scores.items()}

    @cached_property
    def sentence_encoder(self) -> Any:
        """The default one."""
        from coreinfer_sim.index.encoder import SentenceEncoder

        return SentenceEncoder()

    def hidden(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the mean hidden state of prompts halfway through the language model, [n_prompts, d_model]."""
        import torch

        model, tokenizer = self.language_model.model, self.language_model.tokenizer
        found = []
        with torch.inference_mode():
            for prompt in prompts:
                ids = torch.tensor([tokenizer(prompt)["input_ids"][-256:]])
                states = model(
                    input_ids=ids, output_hidden_states=True, use_cache=False, logits_to_keep=1
                ).hidden_states
                found.append(states[len(states) // 2][0].float().mean(0).numpy())
        return np.stack(found)

    def energies(self) -> np.ndarray:
        """Return each text's share of every neuron in its completion's energy, square roots, [n_texts, n_layers · d_ff]."""
        import torch

        from coreinfer_sim.choosing.statistics import sentence_statistics
        from coreinfer_sim.models.taps import recorded_activations

        found: list[np.ndarray] = []
        for text in self.texts:
            by_layer: dict[int, np.ndarray] = {}
            ids = torch.tensor([text.ids])
            decoded = (torch.arange(len(text.ids)) >= text.n_prompt).long()[None]

            def add(layer: int, z: Any, by_layer: dict[int, np.ndarray] = by_layer) -> None:
                energy = sentence_statistics(z, np.array([0, len(z)]), 0.4).energy[0]
                by_layer[layer] = np.sqrt(energy / max(1, len(z)))

            with recorded_activations(self.language_model.layers, add) as tap, torch.inference_mode():
                tap.set_mask(decoded)
                self.language_model.model(input_ids=ids, use_cache=False, logits_to_keep=1)
            found.append(np.concatenate([by_layer[layer] for layer in sorted(by_layer)]))
        return np.stack(found)


@dataclass(frozen=True)
class Grouping:
    """Groups of the corpus's texts, and the group that each scored row is sent to."""

    texts: np.ndarray
    """[n_texts]."""
    cases: np.ndarray
    """[n_cases]."""
    shrinkage: Shrinkage = Shrinkage()


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return np.ascontiguousarray(vectors / norms, dtype=np.float32)


def _prompts(corpus: Corpus) -> tuple[list[str], list[str]]:
    return [row.prompt for row in corpus.rows], [case.row.prompt for case in corpus.cases]


def _k_means(texts: np.ndarray, cases: np.ndarray, k: int) -> Grouping:
    """Group by vectors of the prompts and send each row to the nearest centroid, as an index does."""
    from coreinfer_sim.index.clustering import cluster_embeddings

    found = cluster_embeddings(texts, k, 0)
    return Grouping(found.assignment, (cases @ found.centroids.T).argmax(1))


def _by_prompt_centroid(corpus: Corpus, groups: np.ndarray) -> Grouping:
    """Send each row to the group whose prompts' mean embedding is nearest, however the groups were made."""
    texts, cases = (corpus.sentence_encoder.encode(prompts) for prompts in _prompts(corpus))
    means = _unit(np.stack([texts[groups == group].mean(0) for group in range(groups.max() + 1)]))
    return Grouping(groups, (cases @ means.T).argmax(1))


def _encoded(corpus: Corpus, k: int) -> Grouping:
    texts, cases = (corpus.sentence_encoder.encode(prompts) for prompts in _prompts(corpus))
    return _k_means(texts, cases, k)


def _shrunk(prior_tokens: float, plain: bool = False) -> Callable[[Corpus], Grouping]:
    return lambda corpus: replace(_encoded(corpus, 16), shrinkage=Shrinkage(prior_tokens, plain))


def _last_words(corpus: Corpus) -> Grouping:
    ends = ([" ".join(prompt.split()[-12:]) for prompt in prompts] for prompts in _prompts(corpus))
    texts, cases = (corpus.sentence_encoder.encode(prompts) for prompts in ends)
    return _k_means(texts, cases, 16)


def _by_own_hidden_states(corpus: Corpus) -> Grouping:
    texts, cases = (corpus.hidden(prompts) for prompts in _prompts(corpus))
    middle = texts.mean(0)  # all hidden states share a large part, which would hide what tells them apart
    return _k_means(_unit(texts - middle), _unit(cases - middle), 16)


def _by_terms(corpus: Corpus) -> Grouping:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline

    prompts, asked = _prompts(corpus)
    encoder = make_pipeline(
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, min_df=2),
        TruncatedSVD(128, random_state=0),
    )
    return _k_means(_unit(encoder.fit_transform(prompts)), _unit(encoder.transform(asked)), 16)


def _by_whole_text(corpus: Corpus) -> Grouping:
    from coreinfer_sim.index.clustering import cluster_embeddings

    texts = corpus.sentence_encoder.encode([f"{row.prompt}\n{row.completion}" for row in corpus.rows])
    return _by_prompt_centroid(corpus, cluster_embeddings(texts, 16, 0).assignment)


def _by_energy(corpus: Corpus) -> Grouping:
    from sklearn.decomposition import TruncatedSVD

    from coreinfer_sim.index.clustering import cluster_embeddings

    energies = corpus.energies()
    vectors = _unit(TruncatedSVD(128, random_state=0).fit_transform(energies - energies.mean(0)))
    return _by_prompt_centroid(corpus, cluster_embeddings(vectors, 16, 0).assignment)


def _data_sets(corpus: Corpus) -> tuple[list[str], np.ndarray]:
    names = sorted({row.set_name for row in corpus.rows})
    return names, np.array([names.index(row.set_name) for row in corpus.rows])


def _sets_by_prompt(corpus: Corpus) -> Grouping:
    return _by_prompt_centroid(corpus, _data_sets(corpus)[1])


def _sets_told(corpus: Corpus) -> Grouping:
    names, groups = _data_sets(corpus)
    nearest = _by_prompt_centroid(corpus, groups).cases
    told = [names.index(case.row.set_name) if case.row.set_name in names else -1 for case in corpus.cases]
    return Grouping(groups, np.where(np.array(told) < 0, nearest, told))


WAYS: dict[str, Callable[[Corpus], Grouping]] = {
    "one set": lambda corpus: Grouping(np.zeros(len(corpus.texts), int), np.zeros(len(corpus.cases), int)),
    "16 clusters": lambda corpus: _encoded(corpus, 16),
    "the data sets, told": _sets_told,
    "the data sets, by the prompt": _sets_by_prompt,
    "16 clusters of whole texts, by the prompt": _by_whole_text,
    "16 clusters of neurons' energy, by the prompt": _by_energy,
    "32 clusters": lambda corpus: _encoded(corpus, 32),
    "8 clusters": lambda corpus: _encoded(corpus, 8),
    "16 clusters, the prompt's last 12 words": _last_words,
    "16 clusters, the model's own hidden states": _by_own_hidden_states,
    "16 clusters, letters and terms": _by_terms,
    "16 clusters, shrunk a fifth as much (1,000 tokens)": _shrunk(1_000),
    "16 clusters, shrunk four times as much (20,000 tokens)": _shrunk(20_000),
    "16 clusters, shrunk a twenty-fifth as much (200 tokens)": _shrunk(200),
    "16 clusters, 5,000 tokens without errors taken back": _shrunk(5_000, plain=True),
    "16 clusters, 1,000 tokens without errors taken back": _shrunk(1_000, plain=True),
}
"""Of grouping texts and sending prompts to groups."""


def _measured(corpus: Corpus, grouping: Grouping) -> dict[str, Any]:
    """Fit the groups' sets and score the rows; return what a result file says of it."""
    n_groups = int(grouping.texts.max()) + 1
    gaps: dict[int, tuple[float, int]] = {}
    for group in range(n_groups):
        cases = np.flatnonzero(grouping.cases == group).tolist()
        if cases:
            places = np.flatnonzero(grouping.texts == group).tolist()
            selection = corpus.set_of_all if n_groups == 1 else corpus.fitted(places, grouping.shrinkage)
            gaps |= corpus.gaps(selection, cases)
    sums: dict[str, tuple[float, int]] = {}
    for i, case in enumerate(corpus.cases):
        (gap, n), (further, tokens) = sums.get(case.row.set_name, (0.0, 0)), gaps[i]
        sums[case.row.set_name] = gap + further, n + tokens
    members = [[corpus.rows[i].set_name for i in np.flatnonzero(grouping.texts == group)] for group in range(n_groups)]
    leading = sum(Counter(names).most_common(1)[0][1] for names in members)
    logs = {name: gap / n for name, (gap, n) in sums.items()}
    return {
        "groups": n_groups,
        "of_leading_set": round(leading / len(corpus.rows), 3),
        "log_gap": float(np.mean([logs[name] for name in logs if name not in UNSEEN])),
        "log_gap_unseen": float(np.mean([logs[name] for name in logs if name in UNSEEN])),
        "sets": {name: round(math.exp(log), 3) for name, log in logs.items()},
    }


@click.group()
def main() -> None:
    """Compare ways to group the texts of an index."""


@main.command()
@model_option
@data_option
@name_option
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder that keeps what has been scored.")
@click.option("--keep-ratio", default=0.4, show_default=True)
@click.option("--rows", default=100, show_default=True, help="Of each indexed set, to fit on.")
@click.option(
    "--tokens", default=4_000, show_default=True, help="Of each group at most; three times as many for the corpus."
)
@click.option("--scored-rows", default=8, show_default=True, help="Of each set.")
@click.option("--only", multiple=True, type=click.Choice(list(WAYS)), help="May be repeated.  [default: all]")
def compare(
    model: str, data: Path, name: str, out: Path, keep_ratio: float, rows: int, tokens: int, scored_rows: int,
    only: tuple[str, ...],
) -> None:  # fmt: skip
    """Score ways to group texts and to send prompts to groups on rows at 70 to 84, which choices may see."""
    out.mkdir(parents=True, exist_ok=True)
    paths = {way: out / f"{number}.json" for number, way in enumerate(WAYS)}
    left = [way for way in only or WAYS if not paths[way].exists()]
    corpus = Corpus(model, data, rows, scored_rows, keep_ratio, tokens) if left else None
    for way in left:
        assert corpus is not None
        found = _measured(corpus, WAYS[way](corpus))
        paths[way].write_text(json.dumps(found), encoding="utf-8")
        print(f"{way:48s} {math.exp(found['log_gap']):.3f}", flush=True)
    scored = {way: json.loads(path.read_text(encoding="utf-8")) for way, path in paths.items() if path.exists()}
    content = {
        **header(),
        "command": running_command(only=() if len(scored) == len(WAYS) else tuple(scored)),
        "keep_ratio": keep_ratio,
        "tokens": tokens,
        "rows_per_set": scored_rows,
        "groupings": scored,
    }
    path = RESULTS / f"clusters-{name.lower()}-{keep_ratio:g}-{tokens}.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
