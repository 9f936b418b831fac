"""Compact experts: every batch, beams, experts that are modules of their own, and engines that do not know them."""

from __future__ import annotations

import pytest
import torch
from calls import (
    RowPredictor,
    assert_rows_equal,
    by_hand,
    generate,
    left_padded,
    logits,
    random_predictor,
    selection,
    stability,
    token_ids,
    unlike_selections,
)
from mixtures import mixtral_of_own_experts
from tiny_models import N_LAYERS, tiny_mixtral

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.choosing.predictors import FixedPredictor
from coreinfer_sim.engines.modules import installed
from coreinfer_sim.engines.registry import check_engine
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.models.mlps import dense_bytes, find_mlps

BUILD = {"in one parameter": tiny_mixtral, "modules": mixtral_of_own_experts}
both = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)


@both
def test_decode_is_that_of_compact_experts(build):
    model, ids = build(), token_ids(1, 9)
    chosen = selection(model, 0.5)
    expected, steps = by_hand(model, chosen, ids)
    with SparseModel(model, FixedPredictor(chosen)) as sparse:
        found = generate(sparse, ids)
    assert torch.equal(found.sequences, expected)
    assert (logits(found) - steps).abs().max() < 1e-4
    assert not torch.equal(found.sequences, generate(model, ids).sequences)


@both
def test_both_ways_to_hold_experts_give_the_same(build):
    ids, expected = token_ids(1, 9), tiny_mixtral()
    model = build()
    with torch.no_grad(), installed(find_mlps(model), selection(model)):
        found = model(ids).logits
    with torch.no_grad(), installed(find_mlps(expected), selection(expected)):
        torch.testing.assert_close(found, expected(ids).logits, atol=1e-5, rtol=1e-5)


@both
def test_rows_of_unlike_selections_share_a_batch(build):
    model = build()
    rows = [token_ids(1, n, seed=n) for n in (5, 9, 5, 7)]
    chosen = unlike_selections(model)
    ids, mask = left_padded(*rows)
    for options in ({}, {"num_beams": 2}):
        singles = []
        for row, one in zip(rows, chosen, strict=True):
            with SparseModel(model, FixedPredictor(one)) as sparse:
                singles.append(generate(sparse, row, **options))
        with SparseModel(model, RowPredictor(*chosen)) as sparse:
            batch = generate(sparse, ids, attention_mask=mask, **options)
        if options:
            for row, single in enumerate(singles):
                assert torch.equal(batch.sequences[row, -7:], single.sequences[0, -7:])
        else:
            assert_rows_equal(batch, singles)


def test_an_expert_that_the_prompt_has_not_reached_stays_dense():
    model, ids = tiny_mixtral(), token_ids(1, 1)
    with SparseModel(model, stability(model)) as sparse:
        generate(sparse, ids)
        (chosen,) = sparse.latest.selections
    assert len(chosen.ids) == 2 * N_LAYERS  # a token takes two of four
    assert all(len(kept) == 19 for kept in chosen.ids.values())


def test_layers_are_named_as_the_models_own():
    model = tiny_mixtral()
    assert sorted(selection(model, sparse_layers="1:").ids) == list(range(4, 4 * N_LAYERS))
    assert sorted(selection(model, sparse_layers="-1").ids) == list(range(4 * (N_LAYERS - 1), 4 * N_LAYERS))
    with pytest.raises(ConfigError, match="names none of the model's 3 layers"):
        selection(model, sparse_layers="3:")


def test_bytes_are_counted_of_the_experts_that_a_token_takes():
    model, ids = tiny_mixtral(), token_ids(1, 5)
    layers = find_mlps(model)
    for keep_ratio in (0.5, 1.0):
        with SparseModel(model, random_predictor(model, keep_ratio)) as sparse:
            generate(sparse, ids)
            assert sparse.latest.read.mlp_per_step == keep_ratio * dense_bytes(layers)
            assert sparse.engines[0].whole_bytes() == dense_bytes(layers)


def test_the_loops_leave_mixtures_to_transformers_and_say_so():
    model = tiny_mixtral()
    find_mlps(model)
    able, refused = check_engine(model, DecodeConfig())
    assert [engine.name for engine in able] == ["transformers"]
    assert refused is not None and refused.startswith("lean: ") and "mixtral" in refused
    with pytest.raises(ConfigError, match="compiled: it compiles no mixture of experts"):
        check_engine(model, DecodeConfig(engine="compiled"))
