"""Rows of a batch decode as each would alone, whatever their neurons and lengths."""

from __future__ import annotations

import pytest
import torch
from calls import (
    N_NEW,
    SOME,
    RowPredictor,
    assert_rows_equal,
    generate,
    left_padded,
    random_predictor,
    selection,
    token_ids,
    unlike_selections,
)

from coreinfer_sim.choosing.predictors import FixedPredictor
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.generation.sparse_model import SparseModel


def test_left_padded_rows_of_one_selection_equal_single_rows(model):
    rows = [token_ids(1, 3, seed=1), token_ids(1, 8, seed=2), token_ids(1, 5, seed=3)]
    ids, mask = left_padded(*rows)
    sparse = SparseModel(model, random_predictor(model))
    assert_rows_equal(generate(sparse, ids, attention_mask=mask), [generate(sparse, row) for row in rows])


def test_left_padded_rows_of_unlike_selections_equal_single_rows(model):
    rows = [token_ids(1, n, seed=n) for n in (3, 8, 5, 6)]
    ids, mask = left_padded(*rows)
    chosen = unlike_selections(model)
    sparse = SparseModel(model, RowPredictor(*chosen))
    batch = generate(sparse, ids, attention_mask=mask)
    assert_rows_equal(
        batch, [generate(SparseModel(model, FixedPredictor(c)), r) for c, r in zip(chosen, rows, strict=True)]
    )
    assert list(sparse.latest.selections) == chosen


def beams_alone(model, chosen, rows, **options):
    return [
        generate(SparseModel(model, FixedPredictor(c)), row, **options) for c, row in zip(chosen, rows, strict=True)
    ]


@pytest.mark.parametrize("key", SOME)
def test_unlike_selections_with_beams_equal_single_rows(models, key):
    model = models[key]
    rows = [token_ids(1, n, seed=n) for n in (3, 8, 5, 6)]
    ids, mask = left_padded(*rows)
    chosen = unlike_selections(model)
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    batch = generate(SparseModel(model, RowPredictor(*chosen)), ids, attention_mask=mask, **options)
    singles = beams_alone(model, chosen, rows, **options)
    new = torch.cat([single.sequences[:, -N_NEW:] for single in singles])
    assert torch.equal(batch.sequences[:, -N_NEW:], new)
    scores = torch.cat([single.sequences_scores for single in singles])
    torch.testing.assert_close(batch.sequences_scores, scores, atol=1e-4, rtol=1e-4)


def test_more_selections_in_a_batch_than_are_kept(models):
    model = models["llama"]
    rows = [token_ids(1, 5, seed=n) for n in range(7)]
    chosen = [selection(model, 0.2 + 0.1 * n, seed=n) for n in range(7)]
    sparse = SparseModel(model, RowPredictor(*chosen))
    singles = [generate(SparseModel(model, FixedPredictor(c)), r) for c, r in zip(chosen, rows, strict=True)]
    for _ in range(2):
        assert_rows_equal(generate(sparse, torch.cat(rows)), singles)


def test_shared_ids_beside_others(models):
    model = models["llama"]
    shared, other = selection(model, 0.3, seed=1), selection(model, 0.6, seed=2)
    rows = [token_ids(1, 5, seed=n) for n in range(4)]
    chosen = [NeuronSelection("test", each.ids, cluster=n) for n, each in enumerate((shared, other, shared, other))]
    singles = [generate(SparseModel(model, FixedPredictor(c)), r) for c, r in zip(chosen, rows, strict=True)]
    assert_rows_equal(generate(SparseModel(model, RowPredictor(*chosen)), torch.cat(rows)), singles)
