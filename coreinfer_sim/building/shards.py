"""The one expensive pass: the language model over a shard, as exact integer sums per cluster.

Energies and activations are added up as fixed-point integers, so that sums do not depend on the order in which
shards, processes or machines finish.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from coreinfer_sim.base.errors import BuildError
from coreinfer_sim.base.files import write_atomic
from coreinfer_sim.base.memory import give_back_memory
from coreinfer_sim.choosing.statistics import activation_statistics
from coreinfer_sim.fitting.clustered_corpus import ClusteredCorpus
from coreinfer_sim.index.sums import ACTIVATION_UNIT, ENERGY_UNIT
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.taps import recorded_activations

_LENGTH_STEP = 16
_TOKENS_AT_ONCE = 256
"""In a batch on a CPU, where more make no pass faster."""
_TOKENS_ON_DEVICE = 2048
"""In a batch on a GPU."""


@dataclass
class PartialSums:
    """Sums over some sentences, for the clusters that occur among them; arrays are int64 [n_here, n_layers, d_ff]."""

    clusters: np.ndarray
    """Numbers of those clusters, ascending, [n_here]."""
    counts: np.ndarray
    """Sentences whose C_α^β holds the neuron."""
    energy: np.ndarray
    """In units of 2^-30."""
    activation: np.ndarray
    """In units of 2^-16."""

    @classmethod
    def zeros(cls, clusters: np.ndarray, n_layers: int, d_ff: int) -> PartialSums:
        """Return empty sums for the given clusters."""
        return cls(clusters, *(np.zeros((len(clusters), n_layers, d_ff), np.int64) for _ in range(3)))

    def add(self, other: PartialSums) -> None:
        """Add sums over other sentences; their clusters must be among these."""
        places = np.searchsorted(self.clusters, other.clusters)
        for name in ("counts", "energy", "activation"):
            getattr(self, name)[places] += getattr(other, name)

    def save(self, path: Path) -> None:
        """Write in one step: a shard is on disk whole or not at all."""
        write_atomic(path, lambda part: part.write_bytes(save(vars(self))))

    @classmethod
    def load(cls, path: Path) -> PartialSums:
        """Read what `save` wrote.

        Raises:
            BuildError: the file is damaged.
        """
        try:
            return cls(**load_file(path))
        except (SafetensorError, TypeError) as error:
            raise BuildError(
                f"{path} is damaged ({error}), expected the sums of a shard; delete it and run the same command again."
            ) from error


def cut_into_shards(assignment: np.ndarray, n_tokens: np.ndarray, shard_size: int) -> list[np.ndarray]:
    """Cut the corpus into shards of sentence numbers, fixed by the corpus alone.

    Sentences are ordered by cluster, then by length, so that a shard touches few clusters and pads little.

    Args:
        assignment: cluster of each sentence, [n_sentences].
        n_tokens: length of each sentence, [n_sentences].
        shard_size: sentences in a shard.
    """
    order = np.lexsort((np.arange(len(assignment)), -n_tokens, assignment))
    shards = [order[begin : begin + shard_size] for begin in range(0, len(order), shard_size)]
    return [shard[np.lexsort((shard, -n_tokens[shard]))] for shard in shards]


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids of some sentences; rows without one fill it up."""

    numbers: np.ndarray
    """Which sentences, [n_sentences]."""
    input_ids: torch.Tensor
    """[n_rows, n_positions]."""
    attention_mask: torch.Tensor
    """1 for tokens, 0 for padding, [n_rows, n_positions]; a row without a sentence has one token, as a softmax needs one."""

    @property
    def is_token(self) -> torch.Tensor:
        """The same, but 0 throughout the rows without a sentence."""
        found = self.attention_mask.clone()
        found[len(self.numbers) :] = 0
        return found

    @property
    def n_tokens(self) -> int:
        """Tokens of sentences."""
        return int(self.is_token.sum())


def batches(corpus: ClusteredCorpus, shard: np.ndarray) -> Iterator[Batch]:
    """Tokenise a shard in batches whose shape depends on the length of their sentences alone.

    Libraries take another kernel for another shape, whose sums are rounded otherwise: so each sentence passes in a shape of its
    own, whichever others come with it, and an index that is extended or merged has the sums of one build. The longest batch
    decides how much memory a build takes, so it is bounded whatever the corpus holds.
    """
    tokenizer, max_tokens = corpus.language_model.tokenizer, corpus.max_tokens
    device = corpus.language_model.model.device
    at_once = _TOKENS_AT_ONCE if device.type == "cpu" else _TOKENS_ON_DEVICE
    by_length: dict[int, list[tuple[int, list[int]]]] = {}
    texts = [corpus.sentences[i].text for i in shard]
    for number, ids in zip(shard, tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"], strict=True):
        # Every new shape costs memory and time in the libraries below, so lengths are rounded up to a few.
        n_positions = min(-(-max(1, len(ids)) // _LENGTH_STEP) * _LENGTH_STEP, max_tokens)
        by_length.setdefault(n_positions, []).append((number, ids))
    for n_positions, rows in by_length.items():
        n_rows = max(1, min(corpus.config.batch_size, at_once // n_positions))
        for begin in range(0, len(rows), n_rows):
            here = rows[begin : begin + n_rows]
            input_ids = torch.full((n_rows, n_positions), tokenizer.pad_token_id or 0)
            mask = torch.zeros_like(input_ids)
            mask[:, 0] = 1
            for row, (_, ids) in enumerate(here):
                input_ids[row, : len(ids)] = torch.tensor(ids)
                mask[row, : len(ids)] = 1
            yield Batch(np.array([number for number, _ in here]), input_ids.to(device), mask.to(device))


def forward(language_model: LanguageModel, batch: Batch) -> None:
    """Run the layers over a batch, without cache and without the output head, which no statistic needs."""
    with torch.inference_mode():
        language_model.model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


def run_shard(corpus: ClusteredCorpus, shard: np.ndarray) -> PartialSums:
    """Run the language model over one shard and sum up what its neurons did.

    Args:
        corpus: of the build.
        shard: numbers of the shard's sentences.
    """
    layers, config, assignment = corpus.layers, corpus.config, corpus.clustering.assignment
    sums = PartialSums.zeros(np.unique(assignment[shard]), len(layers), layers[0].d_ff)
    row_of = {layer.number: row for row, layer in enumerate(layers)}
    starts = places = np.zeros(0, np.int64)

    def add(number: int, z: torch.Tensor) -> None:
        statistics = activation_statistics(z, starts, config.alpha)
        if not np.isfinite(statistics.energy).all():
            raise BuildError(
                f"{corpus.language_model.layers[number].title} of {corpus.language_model.name} gives what is no number, expected "
                "finite activations; its weights are damaged or too narrow – fetch the model again, or load it in float32."
            )
        parts = (
            ("counts", statistics.core_mask(config.beta).astype(np.int64)),
            ("energy", np.rint(statistics.energy / np.float32(ENERGY_UNIT)).astype(np.int64)),
            ("activation", np.rint(statistics.activation / np.float32(ACTIVATION_UNIT)).astype(np.int64)),
        )
        for place in np.unique(places):
            for name, values in parts:
                getattr(sums, name)[place, row_of[number]] += values[places == place].sum(axis=0)

    with recorded_activations(layers, add) as tap:
        for batch in batches(corpus, shard):
            is_token = batch.is_token
            starts = np.concatenate([[0], np.cumsum(is_token[: len(batch.numbers)].sum(1).cpu().numpy())])
            places = np.searchsorted(sums.clusters, assignment[batch.numbers])
            tap.set_mask(is_token)
            forward(corpus.language_model, batch)
            give_back_memory()  # batches of many shapes would leave holes, more with every one
    return sums
