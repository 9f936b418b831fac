"""An index belongs to the model that it was built from, and to no other."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from index_folder import (
    STATISTICS,
    clusters,
    manifest,
)
from tiny_models import save_tiny_checkpoint

from coreinfer_sim.base.errors import IndexMismatchError
from coreinfer_sim.choosing.compatibility import check_model
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import (
    ModelInfo,
)
from coreinfer_sim.models.fingerprint import weight_sketch
from coreinfer_sim.models.loading import LanguageModel, load_model, tokenizer_hash


def index_of(language_model: LanguageModel) -> SemanticIndex:
    """Return an index that says that it was built from a model."""
    layer = language_model.layers[0]
    info = ModelInfo(
        name="the-model",
        revision=None,
        family=layer.family,
        dtype="float32",
        n_layers=len(language_model.layers),
        d_model=layer.d_model,
        d_ff=layer.d_ff,
        weight_sketch=weight_sketch(language_model.layers),
        tokenizer_sha256=tokenizer_hash(language_model.tokenizer),
        activation_site="input of down_proj",
    )
    made = manifest(model=info)
    return SemanticIndex(made, np.eye(4, dtype=np.float32)[:3], clusters(), STATISTICS, name="my-index")


@pytest.fixture(scope="module")
def language_model(tiny_checkpoint) -> LanguageModel:
    return load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def model_index(language_model) -> SemanticIndex:
    return index_of(language_model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_index_belongs_to_its_model_in_every_dtype(model_index, tiny_checkpoint, dtype):
    again = load_model(tiny_checkpoint, dtype)
    check_model(model_index, again.layers, tokenizer_hash(again.tokenizer))


def test_the_same_family_with_other_weights_is_refused(model_index, tmp_path):
    other = load_model(save_tiny_checkpoint(tmp_path / "other", seed=1))
    with pytest.raises(IndexMismatchError, match=r"\d+ of 96 sampled weights .* my-index .*coreinfer-sim build-index"):
        check_model(model_index, other.layers)


@pytest.mark.parametrize("layer", [0, 2])
def test_one_other_layer_is_refused(model_index, tiny_checkpoint, layer):
    tuned = load_model(tiny_checkpoint)
    with torch.no_grad():
        tuned.layers[layer].output.weight.mul_(1.1)
    with pytest.raises(IndexMismatchError, match="of 96 sampled weights"):
        check_model(model_index, tuned.layers)


@pytest.mark.parametrize(
    ("overrides", "shape"),
    [
        ({"num_hidden_layers": 2}, "llama with 2 layers, d_model 32, d_ff 48"),
        ({"intermediate_size": 64}, "llama with 3 layers, d_model 32, d_ff 64"),
    ],
)
def test_another_shape_is_refused_by_all_shapes(model_index, tmp_path, overrides, shape):
    other = load_model(save_tiny_checkpoint(tmp_path / "other", **overrides))
    with pytest.raises(
        IndexMismatchError, match=f"the model is {shape}, but .* llama with 3 layers, d_model 32, d_ff 48"
    ):
        check_model(model_index, other.layers)


def test_the_same_weights_are_known_whatever_their_type_is_called(model_index, language_model):
    renamed = replace(model_index.manifest.model, family="Llama")
    earlier = copy.copy(model_index)
    earlier.manifest = replace(model_index.manifest, model=renamed)
    check_model(earlier, language_model.layers)


def test_another_tokenizer_is_refused(model_index, language_model, tiny_checkpoint):
    tokenizer = load_model(tiny_checkpoint).tokenizer
    assert tokenizer_hash(tokenizer) == tokenizer_hash(language_model.tokenizer)
    tokenizer.add_tokens(["stars"])
    with pytest.raises(IndexMismatchError, match=r"the tokenizer's vocabulary .* use the tokenizer of the-model"):
        check_model(model_index, language_model.layers, tokenizer_hash(tokenizer))
