"""An index of a mixture of experts: each expert's own statistics and sets, by layer and expert, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from builds import CONFIG
from commands import call as command
from commands import generated, parsed, refused, setting, succeeded
from mixtures import saved
from safetensors.numpy import load_file
from tiny_models import tiny_mixtral
from tiny_types import tiny_of_type

from coreinfer_sim.base.errors import UnsupportedModelError
from coreinfer_sim.base.settings import BuildConfig, CompensationConfig, CorpusConfig
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.choosing.statistics import activation_statistics
from coreinfer_sim.export.export import export
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.loading import load_model
from coreinfer_sim.models.taps import recorded_activations

NEVER = 2
"""The expert to which the router of `gpt_oss` sends nothing."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("mixture") / "mixtral", tiny_mixtral())


@pytest.fixture(scope="module")
def texts(corpus):
    return CorpusConfig(corpus, max_tokens=64)


@pytest.fixture(scope="module")
def index(build, checkpoint, texts, tmp_path_factory):
    config = BuildConfig(clusters=3, gamma=0.5)
    return build(tmp_path_factory.mktemp("mixture-index") / "index", config, checkpoint, texts)


@torch.no_grad()
def test_statistics_are_sums_of_what_each_expert_has_read(index, checkpoint, corpus):
    loaded = load_model(checkpoint)
    sums = {layer.number: np.zeros(layer.d_ff) for layer in loaded.layers}

    def add(number, z):
        sums[number] += activation_statistics(z, np.array([0, len(z)]), 0.4).energy[0]

    with recorded_activations(loaded.layers, add) as tap:
        for row in map(json.loads, Path(corpus).read_text(encoding="utf-8").splitlines()):
            ids = loaded.tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
            tap.set_mask(torch.ones_like(ids))
            loaded.model(input_ids=ids, use_cache=False)
    energy, _ = index.statistics(None)
    assert energy.shape == (12, 48)
    for number, expected in sums.items():
        np.testing.assert_allclose(energy[number], expected, rtol=1e-3)


def test_the_index_does_not_depend_on_shards_and_batches(index, build, checkpoint, texts, tmp_path):
    other = build(tmp_path / "index", BuildConfig(clusters=3, gamma=0.5, shard_size=7, batch_size=3), checkpoint, texts)
    for cluster in range(3):
        for one, two in zip(index.statistics(cluster), other.statistics(cluster), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-3)


def test_commands_name_layer_and_expert(index, checkpoint):
    folder = index.folder
    text = succeeded("info", folder).stdout
    assert "(mixtral, 3 layers of 4 experts, d_model 32, d_ff 48, float32)" in text and "layers 0-2" in text
    text = succeeded("lookup", folder, "Where do comets come from?", "--layers", "1:", "--ids").stdout
    assert re.search(r"core neurons of cluster \d: 24 of 48 in each of 8 experts", text)
    assert "  layer   1 expert   0: " in text and "  layer   2 expert   3: " in text and "layer   0" not in text
    ids = parsed("lookup", folder, "comets")["core_neurons"]
    assert list(ids) == [f"{layer}.{expert}" for layer in range(3) for expert in range(4)]
    assert len(ids["2.3"]) == 24
    assert "sampled model weights" in succeeded("check", folder, "--model", checkpoint).stdout
    found = generated(folder, "--keep-ratio", 0.5)
    assert found["engine"] == "transformers" and found["keep_ratio"] == 0.5
    assert found["mlp_bytes_per_token"] == found["dense_mlp_bytes_per_token"] / 2 == 4 * 3 * 3 * 32 * 48
    assert generated(folder, "--keep-ratio", 0.5, *setting("select.sparse_layers", "1:"))["keep_ratio"] == 0.6667


def test_all_ways_of_choosing_decode(index, checkpoint):
    loaded = load_model(checkpoint)
    ids = loaded.tokenizer("How do stars form?", return_tensors="pt")["input_ids"]
    for mode in ("similarity", "hybrid", "stability", "global", "random"):
        predictor = make_predictor(mode, loaded.layers, index, keep_ratio=0.5)
        with SparseModel(loaded.model, predictor, loaded.tokenizer) as sparse:
            assert sparse.generate(ids, max_new_tokens=2).shape[1] == ids.shape[1] + 2
            assert all(len(kept) == 24 for kept in sparse.latest.selections[0].ids.values())


def test_an_expert_that_a_cluster_has_not_reached_has_the_corpuss_set(index):
    statistics = load_file(index.folder / "neurons.safetensors")
    for values in statistics.values():
        values[1, 5] = 0
        values[:, 7] = 0
    thinned = SemanticIndex(index.manifest, index.centroids, index.clusters, statistics)
    whole, own, corpus = index.core_neurons(1), thinned.core_neurons(1), thinned.core_neurons(None)
    assert torch.equal(own[5], corpus[5]) and torch.equal(own[4], whole[4])
    assert 7 not in own and 7 not in corpus and len(own) == 11


def test_an_expert_that_no_text_has_reached_stays_dense(build, texts, tmp_path):
    model = tiny_of_type("gpt_oss")
    for block in model.model.layers:
        block.mlp.router.bias.data[NEVER] = -1e4
    checkpoint = saved(tmp_path / "model", model)
    index = build(tmp_path / "index", CONFIG, checkpoint, texts)
    never = [number for number, (_, expert) in enumerate(index.manifest.model.places) if expert == NEVER]
    for cluster in (None, 0, 1, 2):
        assert set(range(8)) - set(index.core_neurons(cluster)) == set(never)
        assert all(not values[number].any() for values in index.statistics(cluster, "paper") for number in never)
    loaded = load_model(checkpoint)
    ids = loaded.tokenizer("How do stars form?", return_tensors="pt")["input_ids"]
    for mode in ("similarity", "hybrid"):
        predictor = make_predictor(mode, loaded.layers, index, keep_ratio=0.5)
        with SparseModel(loaded.model, predictor, loaded.tokenizer) as sparse:
            sparse.generate(ids, max_new_tokens=2)
            assert set(range(8)) - set(sparse.latest.selections[0].ids) == set(never)


def test_what_mixtures_cannot_do_is_refused(index, build, checkpoint, texts, tmp_path):
    config = BuildConfig(clusters=3, compensation=CompensationConfig())
    with pytest.raises(UnsupportedModelError, match="compensation was asked for, but mixtral is a mixture of experts"):
        build(tmp_path / "index", config, checkpoint, texts)
    with pytest.raises(UnsupportedModelError, match="an export was asked for, but mixtral is a mixture of experts"):
        export(load_model(checkpoint), index, ["global"], tmp_path / "exported")
    for more, says in (
        (["--read-ratio", 0.5], "the engine transformers reads all held neurons"),
        (["--engine", "lean"], "lean: .*mixtral"),
        (["--memory-budget", "2GiB", "--keep-ratio", 0.5], "a memory budget was asked for"),
    ):
        refused(command("generate", "Hello.", "--index", index.folder, "--max-new-tokens", 2, *more), says)
