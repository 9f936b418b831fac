"""How many bits neuron, cluster, prompt and previous token tell about which neurons a token needs.

The bits are those of a code: each text is coded with what the texts before it in a random order have taught, so that no number is
better than it could be on texts that nothing has seen (prequential code length; Dawid, Statistical theory: the prequential
approach, 1984).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from coreinfer_sim.analysis.alpha_beta import top_of_tokens
from coreinfer_sim.analysis.experiment import Experiment, Picture, Setting
from coreinfer_sim.analysis.groups import centroids_name, clusters_of, fit_clusters
from coreinfer_sim.analysis.intervals import Measure, Sums
from coreinfer_sim.analysis.texts import BLOCK, Batch
from coreinfer_sim.base.analysis_settings import AnalysisConfig
from coreinfer_sim.base.errors import CorpusError
from coreinfer_sim.base.rows import Row
from coreinfer_sim.models.mlps import linear_parameters

_WEIGHTS = (4.0, 16.0, 64.0, 256.0, 1024.0)
"""Tokens that the wider knowledge counts for beside the narrower one; the best is taken, of each kind for all neurons alike."""
_LEAST = 4
"""Tokens of a text that has two halves."""
_SHARE, _NEURON, _PROMPT = "share alone", "neuron", "neuron and prompt"
_PREVIOUS, _BOTH = "neuron and previous token", "neuron, prompt and previous token"
_CLUSTER, _RANDOM = "neuron and cluster", "neuron and random cluster"
_DRAWN = (_SHARE, _NEURON, _CLUSTER, _PROMPT, _PREVIOUS, _BOTH)


class Information(Experiment):
    """A token needs the top β of its neurons by |z| times the norm of the output row, of those that are not zero.

    The first half of each text is its prompt, the tokens of the second half are coded. The first half of the texts only teaches.
    Random clusters are of the same sizes: within a block the texts exchange their clusters.
    """

    unit = "coded"
    needs_encoder = True
    least_texts = BLOCK + 1

    @classmethod
    def picture(cls, config: AnalysisConfig) -> Picture:
        """Draw the largest number of clusters alone."""
        return Picture(
            "Bits that it takes to say whether a token needs a neuron",
            x="layer",
            x_title="layer",
            y_title="bits, knowing",
            series=("measure",),
            where={"k": (None, max(config.clusters)), "measure": _DRAWN},
        )

    def __init__(self, setting: Setting) -> None:
        """Begin with no text."""
        super().__init__(setting)
        reader, ks = setting.reader, self.config.clusters
        self.kinds: list[tuple[str, int | None]] = [
            (_SHARE, None),
            (_NEURON, None),
            (_PROMPT, None),
            (_PREVIOUS, None),
            (_BOTH, None),
        ]
        self.kinds += [(name, k) for k in ks for name in (_CLUSTER, _RANDOM)]
        shape = reader.n_layers, reader.d_ff
        self.counted("coded")
        self.counted("bits", len(self.kinds), len(_WEIGHTS), reader.n_layers, kind=np.float64)
        self.memory["needed"] = np.zeros(shape, np.int64)
        self.memory["tokens"] = np.zeros(1, np.int64)
        self.memory["after"] = np.zeros((2, *shape), np.int64)
        self.memory["after_tokens"] = np.zeros((2, *shape), np.int64)
        for k in ks:
            self.memory[f"clusters {k}"] = np.zeros((2, k, *shape), np.int32)
            self.memory[f"cluster tokens {k}"] = np.zeros((2, k), np.int64)
        self._norms = [linear_parameters(layer.output)[0].float().norm(dim=0) for layer in reader.layers]

    def prepare(self) -> None:
        """Fit the clusters."""
        self.memory |= fit_clusters(
            self.texts, self.encoders[:1], self.config.clusters, self.config.seed, self.progress
        )

    def add(self, group: int, number: int, rows: Sequence[Row], ids: list[list[int]]) -> None:
        """Code a block's texts by what the blocks before have taught, then learn from them."""
        long = [place for place, each in enumerate(ids) if len(each) >= _LEAST]
        rows, ids = [rows[place] for place in long], [ids[place] for place in long]
        if not ids:
            return
        counts = [_TextCounts(len(each), self.reader.n_layers, self.reader.d_ff) for each in ids]

        def take(place: int, z: torch.Tensor, batch: Batch) -> None:
            needed = top_of_tokens(z.float().abs() * self._norms[place].to(z.device), self.config.beta).cpu().numpy()
            for row, text in enumerate(batch.places.tolist()):
                counts[text].take(place, needed[batch.starts[row] : batch.starts[row + 1]])

        self.reader.activations(ids, take)
        clusters = self._clusters(number, rows)
        if number >= self.texts.n_blocks // 2 and self.memory["tokens"][0]:
            for text, found in enumerate(counts):
                self.sums["bits"][group] += self._bits(found, [each[:, text] for each in clusters])
                self.sums["coded"][group] += found.n_coded
        for text, found in enumerate(counts):
            self._learn(found, [each[:, text] for each in clusters])

    def _clusters(self, number: int, rows: Sequence[Row]) -> list[np.ndarray]:
        """Return, for each number of clusters, the semantic and the random cluster of each text, [2, n_texts]."""
        centroids = [self.memory[centroids_name(0, k)] for k in self.config.clusters]
        others = np.random.default_rng([self.config.seed, number]).permutation(len(rows))
        return [np.stack([each, each[others]]) for each in clusters_of(rows, self.encoders[0], centroids)]

    def _learn(self, found: _TextCounts, clusters: Sequence[np.ndarray]) -> None:
        """Add a text to what later ones are coded by."""
        needed = found.prompt + found.coded.sum(axis=0)
        self.memory["needed"] += needed
        self.memory["tokens"] += found.n_tokens
        self.memory["after"] += found.coded + found.prompt_after
        self.memory["after_tokens"] += found.coded_tokens + found.prompt_after_tokens
        for k, own in zip(self.config.clusters, clusters, strict=True):
            for way in range(2):
                self.memory[f"clusters {k}"][way, own[way]] += needed
                self.memory[f"cluster tokens {k}"][way, own[way]] += found.n_tokens

    def _bits(self, found: _TextCounts, clusters: Sequence[np.ndarray]) -> np.ndarray:
        """Return the bits of a text's second half, [n_kinds, n_weights, n_layers]."""
        memory, coded, n_coded = self.memory, found.coded.sum(axis=0), found.n_coded
        of_layer = memory["needed"].mean(axis=1, keepdims=True) / memory["tokens"][0]
        of_neuron = _mixed(memory["needed"], memory["tokens"][0], of_layer, 1.0)
        after = _mixed(memory["after"], memory["after_tokens"], of_neuron, 1.0)
        bits = [
            [_cost(coded, n_coded, np.broadcast_to(of_layer, coded.shape))],
            [_cost(coded, n_coded, of_neuron)],
            [_cost(coded, n_coded, _mixed(found.prompt, found.n_prompt, of_neuron, w)) for w in _WEIGHTS],
            [_cost(found.coded, found.coded_tokens, after).sum(axis=0)],
            [
                _cost(
                    found.coded, found.coded_tokens, _mixed(found.prompt_after, found.prompt_after_tokens, after, w)
                ).sum(axis=0)
                for w in _WEIGHTS
            ],
        ]
        for k, own in zip(self.config.clusters, clusters, strict=True):
            for way in range(2):
                needed = memory[f"clusters {k}"][way, own[way]]
                tokens = memory[f"cluster tokens {k}"][way, own[way]]
                bits.append([_cost(coded, n_coded, _mixed(needed, tokens, of_neuron, w)) for w in _WEIGHTS])
        return np.stack([np.broadcast_to(each, (len(_WEIGHTS), self.reader.n_layers)) for each in bits])

    def check(self) -> None:
        """Raise CorpusError if no text was coded."""
        if not self.sums["coded"].any():
            raise CorpusError(
                f"no text in the second half of the corpus has {_LEAST} tokens, of which information codes the second half; give "
                "longer texts."
            )

    def measures(self, sums: Sums) -> list[Measure]:
        """Return bits a neuron and token, and how many fewer they are than those of a neuron alone."""
        best = np.stack([each[each.sum(axis=1).argmin()] for each in sums["bits"]])  # [n_kinds, n_layers]
        bits = best / float(sums["coded"] * self.reader.d_ff)
        found = []
        for layer in ("all", *range(self.reader.n_layers)):
            of = slice(None) if layer == "all" else slice(layer, layer + 1)
            where = {"layers": "all"} if layer == "all" else {"layer": self.reader.layers[layer].number}
            means = bits[:, of].mean(axis=1)
            for (name, k), value in zip(self.kinds, means, strict=True):
                more = {**where, "k": k}
                found.append(Measure({"measure": name, **more}, float(value)))
                if layer == "all" and name not in (_SHARE, _NEURON):
                    told = f"fewer bits by {name.removeprefix('neuron and ').removeprefix('neuron, ')}"
                    found.append(Measure({"measure": told, **more}, float(means[1] - value)))
        return found


class _TextCounts:
    """How many of a text's tokens need each neuron: of either half, and parted by whether the token before did, too."""

    def __init__(self, n_tokens: int, n_layers: int, d_ff: int) -> None:
        """Begin with nothing counted."""
        self.n_tokens, self.n_prompt = n_tokens, n_tokens // 2
        self.n_coded = n_tokens - self.n_prompt
        shape = n_layers, d_ff
        self.prompt = np.zeros(shape, np.int32)
        self.prompt_after, self.prompt_after_tokens, self.coded, self.coded_tokens = (
            np.zeros((2, *shape), np.int32) for _ in range(4)
        )

    def take(self, place: int, needed: np.ndarray) -> None:
        """Count one layer's needs, bool [n_tokens, d_ff]."""
        half = self.n_prompt
        self.prompt[place] = needed[:half].sum(axis=0)
        parts = ((self.prompt_after, self.prompt_after_tokens, 1, half), (self.coded, self.coded_tokens, half, None))
        for after, tokens, begin, end in parts:
            now, before = needed[begin:end], needed[begin - 1 : -1 if end is None else end - 1]
            after[1, place] = (now & before).sum(axis=0)
            after[0, place] = now.sum(axis=0) - after[1, place]
            tokens[1, place] = before.sum(axis=0)
            tokens[0, place] = len(now) - tokens[1, place]


def _mixed(needed: np.ndarray, tokens: np.ndarray | int, wider: np.ndarray, weight: float) -> np.ndarray:
    """Return how likely a token needs each neuron, where wider knowledge counts for ``weight`` tokens."""
    return np.clip((needed + weight * wider) / (tokens + weight), 1e-9, 1 - 1e-9)


def _cost(needed: np.ndarray, tokens: np.ndarray | int, likely: np.ndarray) -> np.ndarray:
    """Return the bits of saying which tokens need each neuron, summed over neurons, [..., n_layers]."""
    likely = np.clip(likely, 1e-9, 1 - 1e-9)
    cost: np.ndarray = -(needed * np.log2(likely) + (tokens - needed) * np.log2(1 - likely)).sum(axis=-1)
    return cost
