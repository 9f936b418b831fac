"""Contenders: a way of choosing neurons, a keep ratio, and the precision of the weights."""

from __future__ import annotations

import copy
import itertools
import re
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import gguf
import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import Fallback, Score, check_ratio
from coreinfer_sim.choosing.index_sets import IndexSets
from coreinfer_sim.choosing.make import make_fallback
from coreinfer_sim.choosing.predictors import Predictor, random_selection
from coreinfer_sim.choosing.routing import HybridPredictor, SimilarityPredictor
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.choosing.statistics import PromptStatistics, SentenceStatistics
from coreinfer_sim.engines.compact import Projections, compact_model
from coreinfer_sim.engines.lean.decoder import quantized
from coreinfer_sim.evaluation.scoring import Case
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.ranking import n_kept, top_ids
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import MLPLayer, find_mlps, module_bytes, other_bytes

NAMES = ("dense", "random", "random-cluster", "global", "similarity", "hybrid", "stability", "griffin", "oracle")
"""stability: the prompt's positive counts, as in the paper; griffin: the prompt's energy; oracle: the completion's own."""
NEED_INDEX = ("random-cluster", "global", "similarity", "hybrid")
ROUTED = ("similarity", "hybrid")
READS_PROMPT = ("hybrid", "stability", "griffin", "oracle")
FITTED = ("random-cluster", "global", "similarity")
COMPENSATED = "compensated"
"""Stands where a score does for sets that were fitted with their compensation."""
WEIGHTS = ("16bit", "int8", "q8_0", "q4_0")
"""Precision of the weights: int8 as the lean engine holds it, one scale a row; q8_0 and q4_0 are llama.cpp's formats."""
_OF_HEAD = {"q4_0": "q8_0"}
"""Precision of the output head where it is another: llama.cpp keeps it at 6 or, where its width does not go into blocks of 256,
8 bits in a file of 4, as much of the quality is there."""
BITS = {"16bit": 16.0, "int8": 8.05, "q8_0": 8.5, "q4_0": 4.5}
"""Bits a weight, scales included: of int8 for rows of 640 weights, more than which the longer rows of larger models share."""
_FORMATS = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}
_WAY = re.compile(
    rf"(?P<name>[a-z-]+)(?:/(?P<score>{'|'.join([*Score, COMPENSATED])}))?"
    rf"(?: else (?P<fallback>{'|'.join(Fallback)}))?"
)
_BLOCK = 32
_MOST_HELD = 2 << 30


@dataclass(frozen=True)
class Contender:
    """One row of the table."""

    name: str
    keep_ratio: float = 1.0
    score: Score = Score.ENERGY
    weights: str = "16bit"
    fallback: Fallback = Fallback.NONE
    """What similarity does for unfamiliar prompts."""
    compensated: bool = False
    """Whether a cluster's, or the corpus's, compensated set is taken."""

    def __post_init__(self) -> None:
        """Check the names."""
        if self.name not in NAMES:
            raise ConfigError(f"there is no contender {self.name!r}, expected one of {', '.join(NAMES)}.")
        if self.compensated and self.name not in FITTED:
            raise ConfigError(f"{self.name} has no compensated sets, expected one of {', '.join(FITTED)}.")
        if self.weights not in WEIGHTS:
            raise ConfigError(f"there are no weights {self.weights!r}, expected one of {', '.join(WEIGHTS)}.")

    def __str__(self) -> str:
        """Return a name that tells contenders apart, such as ``similarity/energy 0.4 q8_0``."""
        if self.name == "dense":
            return f"dense {self.weights}"
        return f"{self.way} {self.keep_ratio:g}" + ("" if self.weights == "16bit" else f" {self.weights}")

    @property
    def family(self) -> str:
        """What it shares with contenders of other keep ratios, such as ``similarity/energy q8_0``; dense is one."""
        return "dense" if self.name == "dense" else f"{self.way} {self.weights}"

    @property
    def way(self) -> str:
        """How it chooses neurons, such as ``similarity/energy else hybrid``."""
        ranked_by = COMPENSATED if self.compensated else self.score.value
        parts = [f"{self.name}/{ranked_by}" if self.name in NEED_INDEX else self.name]
        if self.fallback is not Fallback.NONE:
            parts.append(f"else {self.fallback.value}")
        return " ".join(parts)


class Chooser:
    """Makes the selections of contenders for a case, each cluster's only once.

    All make the layers sparse that the index recorded, so that they are compared at equal bytes; without an index, all layers.
    """

    def __init__(self, language_model: LanguageModel, index: SemanticIndex | None, seed: int) -> None:
        """Choose among the neurons of ``language_model``; ``index`` is needed by those that route by meaning."""
        self._language_model, self._index = language_model, index
        self._numbers = list(range(len(language_model.layers))) if index is None else index.manifest.settings.layers
        self._seed = seed
        self._sets: dict[tuple[float, Score, bool], IndexSets] = {}
        self._drawn: dict[float, NeuronSelection] = {}
        self._predictors: dict[Contender, Predictor] = {}

    def choose(self, contender: Contender, case: Case) -> NeuronSelection:
        """Return a contender's selection for a case."""
        if contender.name == "dense":
            return NeuronSelection("dense")
        if contender.compensated and self._index and not self._index.manifest.holds_sets(contender.keep_ratio):
            raise ConfigError(
                f"{self._index.name} holds no sets compensated at keep ratio {contender.keep_ratio:g}, but {contender} "
                "needs them; name another keep ratio, or build the index with --compensate."
            )
        if contender.name in ("stability", "griffin", "oracle"):
            return self._from_statistics(contender, case)
        if contender.name in ROUTED:
            return self._routed(contender, case)
        if contender.name == "random":
            return self._random(contender.keep_ratio)
        if self._index is None:
            raise ConfigError(f"the contender {contender.name} needs an index; give --index.")
        sets = self._sets_of(self._index, contender)
        if contender.name == "global":
            return sets.of_corpus()
        return replace(sets.of_cluster(self._drawn_cluster(self._index, case)), mode=contender.name)

    def _from_statistics(self, contender: Contender, case: Case) -> NeuronSelection:
        statistics: PromptStatistics = case.statistics
        if contender.name == "oracle":
            statistics = case.oracle_statistics(self._language_model)
        counted = contender.name == "stability"

        def ids(s: SentenceStatistics) -> torch.Tensor:
            score = s.counts if counted else s.energy
            return torch.from_numpy(top_ids(score[0], s.activation[0], n_kept(contender.keep_ratio, score.shape[1])))

        return NeuronSelection(contender.name, {number: ids(statistics[number]) for number in self._numbers})

    def _routed(self, contender: Contender, case: Case) -> NeuronSelection:
        if contender not in self._predictors:
            if self._index is None:
                raise ConfigError("this contender routes by meaning and needs an index; give --index.")
            self._predictors[contender] = _routing(self._sets_of(self._index, contender), contender)
        chosen = self._predictors[contender].select([case.row.prompt], case.statistics, n_rows=1)
        assert chosen is not None
        return chosen[0]

    def _sets_of(self, index: SemanticIndex, contender: Contender) -> IndexSets:
        key = contender.keep_ratio, contender.score, contender.compensated
        if key not in self._sets:
            self._sets[key] = IndexSets(index, contender.keep_ratio, contender.score, None, contender.compensated)
        return self._sets[key]

    def _drawn_cluster(self, index: SemanticIndex, case: Case) -> int:
        row = zlib.crc32(f"{case.row.set_name}/{case.row.id}".encode())  # the same draw when a log is continued
        return int(np.random.default_rng([self._seed, row]).integers(len(index)))

    def _random(self, keep_ratio: float) -> NeuronSelection:
        if keep_ratio not in self._drawn:
            self._drawn[keep_ratio] = random_selection(
                self._language_model.layers, self._numbers, keep_ratio, self._seed
            )
        return self._drawn[keep_ratio]


def _routing(sets: IndexSets, contender: Contender) -> Predictor:
    alpha = sets.index.manifest.settings.alpha
    if contender.name == "hybrid":
        return HybridPredictor(sets, alpha)
    return SimilarityPredictor(sets, make_fallback(contender.fallback, sets, alpha))


def check_known_before(contenders: Sequence[Contender]) -> None:
    """Raise ConfigError if a contender chooses by what a dense prefill reads, so that prefill cannot be sparse."""
    for contender in contenders:
        if contender.name in READS_PROMPT or contender.fallback is Fallback.HYBRID:
            raise ConfigError(
                f"{contender} chooses by the prompt's own activations, but sparse prefill needs the set before; leave it "
                "out, or let prefill be dense."
            )


def rounded(weight: torch.Tensor, weights: str) -> torch.Tensor:
    """Return a weight matrix [out, in] as it comes back from a quantised format, in its own dtype."""
    if weights == "16bit":
        return weight
    if weights == "int8":
        whole, scale = quantized(weight)
        return (whole.float() * scale[:, None]).to(weight)
    kind = _FORMATS[weights]
    n_in = weight.shape[1]
    padded = torch.nn.functional.pad(weight.float(), (0, -n_in % _BLOCK)).cpu().numpy()
    restored = gguf.quants.dequantize(gguf.quants.quantize(padded, kind), kind)[:, :n_in]
    return torch.from_numpy(np.ascontiguousarray(restored)).to(weight)


def rounded_model(language_model: LanguageModel, weights: str) -> LanguageModel:
    """Return a model whose matrices are rounded to a format, the output head to that of `_OF_HEAD`; the same one for 16 bits."""
    if weights == "16bit":
        return language_model
    model = copy.deepcopy(language_model.model)
    head = model.get_output_embeddings()
    for module in model.modules():
        kind = _OF_HEAD.get(weights, weights) if module is head else weights
        if isinstance(module, torch.nn.Linear):
            made = rounded(module.weight.data, kind)
        elif isinstance(module, Conv1D):  # its weight lies the other way round
            made = rounded(module.weight.data.T, kind).T.contiguous()
        else:
            continue
        module.weight = torch.nn.Parameter(made, requires_grad=False)
    return replace(language_model, model=model, layers=find_mlps(model))


class Compactor:
    """Makes the compact MLPs of selections in a precision; those of the latest selections are kept, as many as fit."""

    def __init__(self, layers: Sequence[MLPLayer]) -> None:
        """Cut from ``layers``, which hold the weights in full precision."""
        self._layers = layers
        self._latest: OrderedDict[tuple[int, str], tuple[NeuronSelection, dict[int, Projections]]] = OrderedDict()

    def compact(self, selection: NeuronSelection, weights: str) -> dict[int, Projections]:
        """Return a selection's compact MLPs; compensation is merged first and rounded with them."""
        if not selection.ids:
            return {}
        key = id(selection.ids), weights
        if key not in self._latest:
            selection.check(self._layers)
            projections = compact_model(self._layers, selection)
            for number, modules in projections.items() if weights != "16bit" else ():
                output = self._layers[number].family.output
                for name, module in modules.items():
                    weight = module.weight.data
                    by_neuron = (
                        weights == "int8" and name == output
                    )  # the lean engine keeps a neuron's weights together
                    made = rounded(weight.T, weights).T if by_neuron else rounded(weight, weights)
                    module.weight = torch.nn.Parameter(made.contiguous(), requires_grad=False)
            self._latest[key] = selection, projections
        self._latest.move_to_end(key)
        while len(self._latest) > 1 and sum(map(_held_bytes, self._latest.values())) > _MOST_HELD:
            self._latest.popitem(last=False)
        return self._latest[key][1]


def _held_bytes(made: tuple[NeuronSelection, dict[int, Projections]]) -> int:
    return sum(module_bytes(module) for modules in made[1].values() for module in modules.values())


def bytes_per_token(language_model: LanguageModel, selection: NeuronSelection, weights: str) -> tuple[int, int]:
    """Return the MLP bytes and all weight bytes that one decoded token reads.

    Weights count as stored in their precision, whatever type computes; see `other_bytes`.
    """
    model, layers = language_model.model, language_model.layers
    bits = 8 * model.dtype.itemsize
    share, of_head = BITS[weights] / bits, BITS[_OF_HEAD.get(weights, weights)] / bits
    head = model.get_output_embeddings()
    head_bytes = 0 if head is None else module_bytes(head)
    mlp = selection.mlp_bytes(layers) * share
    return round(mlp), round(mlp + (other_bytes(model, layers) - head_bytes) * share + head_bytes * of_head)


def parse_contenders(
    names: Sequence[str],
    keep_ratios: Sequence[float],
    scores: Sequence[str],
    weights: Sequence[str],
    fallbacks: Sequence[str] = ("none",),
) -> list[Contender]:
    """Cross names with keep ratios, scores, weights and fallbacks, each sensible combination once.

    A name may also be a whole `Contender.way`, such as ``similarity/compensated else global``, which is crossed with keep
    ratios and weights alone.

    Raises:
        ConfigError: there is no such contender, or a keep ratio is no share.
    """
    for ratio in keep_ratios:
        check_ratio("keep ratio", ratio)
    found: dict[str, Contender] = {}
    for kind, given in itertools.product(weights, names):
        name, score, fallback = _parts(given)
        whole = name != given
        crossed = itertools.product(
            keep_ratios if name != "dense" else [1.0],
            [score] if whole else scores if name in NEED_INDEX else ["energy"],
            [fallback] if whole else fallbacks if name == "similarity" else ["none"],
        )
        for ratio, score, fallback in crossed:
            compensated = score == COMPENSATED
            if compensated and not whole and name not in FITTED:
                continue
            rank_by = Score.ENERGY if compensated else Score(score)
            contender = Contender(name, ratio, rank_by, kind, Fallback(fallback), compensated)
            found.setdefault(str(contender), contender)
    return list(found.values())


def _parts(way: str) -> tuple[str, str, str]:
    """Return name, score and fallback of a contender's name or whole way."""
    found = _WAY.fullmatch(way)
    if found is None or not (
        found["name"] in NAMES
        and (found["score"] is None or found["name"] in NEED_INDEX)
        and (found["fallback"] is None or found["name"] == "similarity")
    ):
        raise ConfigError(
            f"there is no contender {way!r}, expected one of {', '.join(NAMES)}, or a way as the table names it "
            "without its keep ratio, such as 'similarity/compensated else global'."
        )
    return found["name"], found["score"] or "energy", found["fallback"] or "none"
