"""Compensation is the least-squares answer."""

from __future__ import annotations

import pytest
import torch
from compensation_cases import drawn, moments_of

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.fitting import least_squares
from coreinfer_sim.fitting.least_squares import RIDGES, Moments, best_ridge, compensate, left_over, surgeon_score


@pytest.fixture
def correlated(monkeypatch):
    """Neurons that say much of each other, with next to no ridge: z [500, 12], W [6, 12], bias [6]."""
    monkeypatch.setattr(least_squares, "RIDGE", 1e-7)
    z = drawn(500, 5, seed=1) @ drawn(5, 12, seed=2) + 0.3 * drawn(500, 12, seed=3) + 1.0
    return z, drawn(6, 12, seed=4), drawn(6, seed=5)


def test_full_rank_is_least_squares(correlated):
    z, weight, bias = correlated
    ids = torch.tensor([0, 3, 4, 8])
    found = compensate(moments_of(z, z @ weight.T + bias).centred(), ids, weight, bias, ridge=1e-7)
    with_one = torch.cat([z[:, ids], torch.ones(500, 1)], 1).double()
    wanted = torch.linalg.lstsq(with_one, (z @ weight.T + bias).double()).solution
    assert torch.allclose((weight[:, ids] + found.delta).double(), wanted[:-1].T, atol=2e-3)
    assert torch.allclose((bias + found.bias).double(), wanted[-1], atol=5e-3)


def test_weights_count_tokens(correlated):
    z, weight, _ = correlated
    twice = moments_of(torch.cat([z, z[:50]]), torch.cat([z, z[:50]]) @ weight.T).centred()
    weights = torch.ones(500)
    weights[:50] = 2
    once = moments_of(z, z @ weight.T, weights).centred()
    for name, value in vars(once).items():
        assert torch.allclose(value, getattr(twice, name), atol=1e-4), name


def test_moments_of_bfloat16_are_those_of_float32_and_leave_the_precision_of_other_products():
    z, targets = drawn(400, 300, seed=1).bfloat16(), drawn(400, 60, seed=2).bfloat16()
    weights = torch.where(torch.arange(400) % 3 == 0, 0.3, 1.0)
    before = torch.get_float32_matmul_precision()
    found = moments_of(z, targets, weights)
    assert torch.get_float32_matmul_precision() == before
    wanted = moments_of(z.float(), targets.float(), weights)
    for name in ("gram", "cross"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert one.dtype is torch.float32 and float((one - other).abs().max()) < 1e-5 * float(other.abs().max())


def test_moments_of_few_weighted_bfloat16_tokens_are_those_of_a_covariance():
    # far more neurons than tokens, and a mean that towers above what varies
    z = (30 + drawn(40, 300, seed=1)).bfloat16()
    gram = moments_of(z, z[:, :6], torch.where(torch.arange(40) % 3 == 0, 1.0, 0.3)).centred().gram
    assert torch.allclose(gram, gram.T, atol=1e-3)
    assert torch.linalg.eigvalsh(gram.double())[0] > -0.1  # float32 itself has -0.02


def test_surgeon_score_is_the_error_that_stays(correlated):
    z, weight, _ = correlated
    centred = moments_of(z, z @ weight.T).centred()
    score = surgeon_score(centred.gram, weight)
    for neuron in range(12):
        ids = torch.tensor([n for n in range(12) if n != neuron])
        repair = compensate(centred, ids, weight, None, ridge=1e-7)
        rest = z @ weight.T - z[:, ids] @ (weight[:, ids] + repair.delta).T - repair.bias
        assert rest.square().sum(1).mean().item() == pytest.approx(score[neuron].item(), rel=0.02)


def test_left_over_is_the_error_of_nested_sets(correlated):
    z, weight, _ = correlated
    centred = moments_of(z, z @ weight.T).centred()
    left = left_over(centred.gram, weight, surgeon_score(centred.gram, weight))
    assert (left.diff() <= 1e-4).all() and left[-1] < 1e-2
    ids = surgeon_score(centred.gram, weight).topk(5).indices.sort().values
    repair = compensate(centred, ids, weight, None, ridge=1e-7)
    rest = z @ weight.T - z[:, ids] @ (weight[:, ids] + repair.delta).T - repair.bias
    assert rest.square().sum(1).mean().item() == pytest.approx(left[4].item(), rel=0.02)


@pytest.mark.parametrize("n_tokens", [40, 4000])
def test_the_best_ridge_loses_least_on_other_tokens(n_tokens):
    weight, bias, ids = drawn(6, 30, seed=4), drawn(6, seed=5), torch.arange(25)
    noisy = weight.clone()
    noisy[:, 25:] *= 5

    def tokens(n, seed):
        z = drawn(n, 30, seed=seed) @ (torch.eye(30) + 0.1 * drawn(30, 30, seed=2))
        return z, z @ noisy.T + bias

    (z, target), (other_z, other_target) = tokens(n_tokens, 1), tokens(200, 6)
    fitted = moments_of(z, target).centred()
    of_kept = (moments_of(some[:, ids], given).centred() for some, given in ((z, target), (other_z, other_target)))
    chosen = best_ridge(*of_kept, weight[:, ids])
    errors = {}
    for ridge in RIDGES:
        repair = compensate(fitted, ids, weight, bias, ridge=ridge)
        given = other_z[:, ids] @ (weight[:, ids] + repair.delta).T + bias + repair.bias
        errors[ridge] = (other_target - given).square().sum().item()
    assert chosen == min(errors, key=errors.get)
    assert (chosen == RIDGES[0]) == (n_tokens == 4000)


def test_a_prior_is_further_tokens(correlated):
    z, weight, _ = correlated
    own, other = moments_of(z[:200], z[:200] @ weight.T), moments_of(z[200:], z[200:] @ weight.T)
    own.add_moments(other, other.n_tokens)
    together = moments_of(z, z @ weight.T)
    assert own.n_tokens == together.n_tokens
    assert torch.allclose(own.gram, together.gram, rtol=1e-4)


def test_no_tokens_are_refused():
    with pytest.raises(ConfigError, match="no tokens to compensate with"):
        Moments(3, 2).centred()
