"""The pass of the language model over a shard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_models import save_tiny_checkpoint

from coreinfer_sim.base.rows import Row
from coreinfer_sim.base.settings import BuildConfig
from coreinfer_sim.building.shards import PartialSums, batches, run_shard
from coreinfer_sim.fitting.clustered_corpus import ClusteredCorpus
from coreinfer_sim.index.clustering import Clustering
from coreinfer_sim.models.loading import load_model


@pytest.fixture(params=["bfloat16", "float32"])
def corpus(request, tmp_path) -> ClusteredCorpus:
    """Twenty-four sentences of two to thirty words, of two clusters."""
    folder = save_tiny_checkpoint(tmp_path / "model", hidden_size=256, intermediate_size=512)
    loaded = load_model(folder, request.param)
    texts = [" ".join(["How do stars form?"] * (1 + n % 7)) + f" Case {n}." for n in range(24)]
    lengths = [len(ids) for ids in loaded.tokenizer(texts)["input_ids"]]
    sentences = [
        Row(str(n), text, text, n_tokens) for n, (text, n_tokens) in enumerate(zip(texts, lengths, strict=True))
    ]
    clustering = Clustering(np.eye(2, 4, dtype=np.float32), np.arange(24) % 2, np.ones(24, np.float32))
    return ClusteredCorpus(loaded, sentences, clustering, BuildConfig(clusters=2), 512, Path())


def test_sums_do_not_depend_on_what_shares_a_batch(corpus):
    every = np.arange(24)
    n_layers, d_ff = len(corpus.layers), corpus.layers[0].d_ff
    for parts in (np.split(every, 24), np.split(every, [5, 6, 17])):
        sums = PartialSums.zeros(np.arange(2), n_layers, d_ff)
        for part in parts:
            sums.add(run_shard(corpus, part))
        whole = run_shard(corpus, every)
        for name in ("counts", "energy", "activation"):
            np.testing.assert_array_equal(getattr(sums, name), getattr(whole, name))


def test_a_sentence_has_a_shape_of_its_own(corpus):
    shapes: dict[int, set[tuple[int, ...]]] = {}
    for part in (np.arange(24), np.arange(3), np.arange(2, 20)):
        for batch in batches(corpus, part):
            assert batch.n_tokens == sum(corpus.sentences[i].n_tokens for i in batch.numbers)
            for number in batch.numbers:
                shapes.setdefault(number, set()).add(tuple(batch.input_ids.shape))
    assert len(shapes) == 24 and all(len(each) == 1 for each in shapes.values())
    assert len(set.union(*shapes.values())) > 1
