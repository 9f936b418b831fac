"""Calls that sparse decode cannot honour are refused with their reason, and leave the model as it was."""

from __future__ import annotations

import threading

import pytest
import torch
from calls import (
    N_NEW,
    CallAt,
    Snapshot,
    assert_same_output,
    everything,
    generate,
    left_padded,
    random_predictor,
    stability,
    token_ids,
)
from tiny_models import VOCABULARY, tiny_mamba, tiny_model
from transformers import GenerationConfig, StoppingCriteriaList

from coreinfer_sim.base.errors import GenerationError, IndexMismatchError, UnsupportedModelError
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.choosing.predictors import FixedPredictor
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.models.mlps import find_mlps


def test_guidance_is_refused(models):
    model = models["llama"]
    with pytest.raises(GenerationError, match="guidance_scale"):
        generate(SparseModel(model, stability(model)), token_ids(1, 9), guidance_scale=1.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cache": False}, "use_cache is False.*needs the cache"),
        ({"generation_config": GenerationConfig(use_cache=False)}, "use_cache is False"),
        ({"assistant_model": object()}, "assistant_model does not go with sparse decode"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens does not go"),
        ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)}, "prompt_lookup_num_tokens does not go"),
        ({"custom_generate": "somewhere"}, "custom_generate does not go"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}, "ends in padding.*padding_side='left'"),
        ({"attention_mask": torch.ones(2, 3)}, r"shape \(2, 3\), expected that of the ids, \(2, 4\)"),
        ({"attention_mask": torch.ones(1, 4)}, r"shape \(1, 4\)"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, r"shape \(2, 1, 4, 4\)"),
    ],
    ids=[
        "use_cache",
        "use_cache-config",
        "assistant",
        "lookup",
        "lookup-config",
        "custom",
        "right-padding",
        "short-mask",
        "mask-of-one-row",
        "mask-4d",
    ],
)
def test_refused_options(models, options, message):
    model = models["llama"]
    before = Snapshot(model)
    sparse = SparseModel(model, random_predictor(model))
    with pytest.raises(GenerationError, match=message):
        sparse.generate(token_ids(2, 4), **{"max_new_tokens": 2, **options})
    before.check()
    assert sparse.generate(token_ids(2, 4), max_new_tokens=2).shape == (2, 6)


@pytest.mark.parametrize("config", [None, GenerationConfig(max_new_tokens=2)], ids=["no config", "a config"])
def test_what_training_has_left_in_use_cache_is_passed_over(config):
    model = tiny_model("llama")
    model.generation_config.use_cache = model.config.use_cache = False
    sparse = SparseModel(model, random_predictor(model))
    assert sparse.generate(token_ids(1, 4), generation_config=config, max_new_tokens=2).shape == (1, 6)
    with pytest.raises(GenerationError, match="use_cache is False"):
        sparse.generate(token_ids(1, 4), max_new_tokens=2, use_cache=False)


@pytest.mark.parametrize(
    "ids",
    [None, torch.zeros(1, 0, dtype=torch.long), torch.tensor([5, 6]), [[5, 6]]],
    ids=["none", "empty", "flat", "list"],
)
def test_refused_ids(models, ids):
    model = models["llama"]
    sparse = SparseModel(model, random_predictor(model))
    for call in (lambda: sparse.generate(ids), lambda: sparse.generate(input_ids=ids)):
        with pytest.raises(GenerationError, match="no token ids, expected input_ids of"):
            call()


@pytest.mark.parametrize("mode", ["random", "stability"])
def test_drafts_by_early_exit_are_refused(mode):
    model = tiny_model("llama")
    sparse = SparseModel(model, make_predictor(mode, find_mlps(model), keep_ratio=0.5))
    with pytest.raises(GenerationError, match="assistant_early_exit"):
        sparse.generate(token_ids(1, 6), max_new_tokens=6, assistant_early_exit=1, do_sample=False)


@pytest.mark.parametrize("end", [None, 3, [3, 0]], ids=["no-end", "another-end", "the-end-too"])
def test_without_a_mask_padding_is_found_as_transformers_finds_it(models, end):
    model = models["llama"]
    ids, _ = left_padded(token_ids(1, 3), token_ids(1, 7))
    options = {"max_new_tokens": N_NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": end}
    found = SparseModel(model, everything(model)).generate(ids, **options)
    assert torch.equal(found, model.generate(ids, **options))


@pytest.mark.parametrize(("name", "value"), [("prompt_lookup_num_tokens", 3), ("assistant_early_exit", 1)])
def test_settings_of_the_model_hold_where_a_given_config_names_none(name, value):
    model = tiny_model("llama")
    setattr(model.generation_config, name, value)
    sparse = SparseModel(model, random_predictor(model))
    with pytest.raises(GenerationError, match=name):
        sparse.generate(token_ids(1, 6), generation_config=GenerationConfig(max_new_tokens=2))


def test_padding_is_found_where_a_given_config_names_none(models):
    model = models["llama"]
    assert model.generation_config.pad_token_id == 0
    ids, _ = left_padded(token_ids(1, 3), token_ids(1, 7))
    config = GenerationConfig(max_new_tokens=N_NEW, do_sample=False)
    found = SparseModel(model, everything(model)).generate(ids, generation_config=config)
    assert torch.equal(found, model.generate(ids, generation_config=config))


@pytest.mark.parametrize("strange", [-1, VOCABULARY, 10**6])
def test_ids_that_stand_for_no_row_are_refused_unless_they_pad(models, strange):
    model = models["llama"]
    ids, mask = left_padded(token_ids(1, 3), token_ids(1, 7))
    options = {"max_new_tokens": N_NEW, "do_sample": False}
    expected = SparseModel(model, everything(model)).generate(ids, attention_mask=mask, **options)
    ids = ids.masked_fill(mask == 0, strange)
    found = SparseModel(model, everything(model)).generate(ids, attention_mask=mask, **options)
    assert torch.equal(found[:, -N_NEW:], expected[:, -N_NEW:])
    found = SparseModel(model, everything(model)).generate(ids, pad_token_id=strange, **options)  # tells its mask
    assert torch.equal(found[:, -N_NEW:], expected[:, -N_NEW:])
    with pytest.raises(GenerationError, match=f"the ids hold {strange}, expected 0 to {VOCABULARY - 1}"):
        SparseModel(model, everything(model)).generate(ids, attention_mask=torch.ones_like(ids), **options)


@pytest.mark.parametrize("pad", [-1, VOCABULARY, 10**6])
def test_a_row_that_ended_is_padded_whatever_the_models_own_padding_is(pad):
    """An id without a row in the table cannot be fed to the model."""
    model = tiny_model("llama")
    model.generation_config.pad_token_id = pad
    ids = torch.cat([token_ids(1, 5, seed=1), token_ids(1, 5, seed=2)])
    first = SparseModel(model, everything(model)).generate(ids, max_new_tokens=1)[0, -1].item()
    found = SparseModel(model, everything(model)).generate(ids, max_new_tokens=N_NEW, eos_token_id=first)
    assert found.shape == (2, 5 + N_NEW) and found[0, 5:].tolist() == [first] * N_NEW


def test_embeddings_in_place_of_ids(models):
    model = models["llama"]
    embedded = model.get_input_embeddings()(token_ids(1, 6)).detach()
    with pytest.raises(GenerationError, match="inputs_embeds does not go with sparse decode"):
        generate(SparseModel(model, stability(model)), token_ids(1, 6), inputs_embeds=embedded)


def test_unsupported_models_are_refused():
    with pytest.raises(UnsupportedModelError, match="holds no MLP"):
        SparseModel(tiny_mamba(), FixedPredictor(NeuronSelection("dense")))


def test_a_selection_that_does_not_fit_is_refused(models):
    model = models["llama"]
    before = Snapshot(model)
    sparse = SparseModel(model, FixedPredictor(NeuronSelection("test", {0: torch.tensor([48])})))
    with pytest.raises(IndexMismatchError, match="layer 0 .*0 to 47"):
        generate(sparse, token_ids(1, 4))
    before.check()


def test_a_second_call_while_one_runs_is_refused(models):
    """From another thread, from within, and through another wrapper of the same model."""
    model = models["llama"]
    sparse, other = (SparseModel(model, random_predictor(model)) for _ in range(2))
    errors = []

    def call(wrapper):
        try:
            wrapper.generate(token_ids(1, 3), max_new_tokens=2)
        except GenerationError as error:
            errors.append(str(error))

    def try_all():
        for wrapper in (sparse, other):
            call(wrapper)
            thread = threading.Thread(target=call, args=(wrapper,))
            thread.start()
            thread.join()

    expected = generate(sparse, token_ids(1, 6))
    once = iter([True])
    criteria = StoppingCriteriaList([CallAt(8, lambda: next(once, None) and try_all())])
    assert_same_output(generate(sparse, token_ids(1, 6), stopping_criteria=criteria), expected, 0.0)
    assert len(errors) == 4
    assert all("is generating already" in error for error in errors)
    assert_same_output(generate(other, token_ids(1, 6)), expected, 0.0)  # and free again
