"""Core neurons and energy: worked examples, and the compiled loop against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coreinfer_sim.base.errors import CoreInferSimError
from coreinfer_sim.choosing.statistics import ActivationStatistics, activation_statistics, token_core_mask


def ids_of(mask):
    return [np.flatnonzero(row).tolist() for row in np.asarray(mask)]


# --- token-wise -----------------------------------------------------------------------------------------------------


def test_token_wise_core_neurons_by_hand():
    z = torch.tensor(
        [
            [5.0, -9.0, 1.0, 4.0, 3.0, 2.0],  # five positive: ceil(0.4 · 5) = 2
            [-1.0, 0.5, -2.0, 0.0, 0.7, 0.1],  # three positive: ceil(1.2) = 2
            [0.0, 0.0, -1.0, -2.0, -3.0, 8.0],  # one positive: ceil(0.4) = 1
            [-1.0, -2.0, -0.5, 0.0, -0.0, -7.0],  # none
        ]
    )
    assert ids_of(token_core_mask(z, 0.4)) == [[0, 3], [1, 4], [5], []]
    assert ids_of(token_core_mask(z, 1.0)) == [[0, 2, 3, 4, 5], [1, 4, 5], [5], []]
    assert ids_of(token_core_mask(z, 0.01)) == [[0], [4], [5], []]


def test_equal_activations_go_to_the_lower_id():
    z = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    assert ids_of(token_core_mask(z, 0.6)) == [[0, 1, 3], [0, 1, 2]]
    assert ids_of(token_core_mask(z, 0.2)) == [[1], [0]]


def test_a_whole_share_is_not_rounded_up():
    """0.1 · 30 and the like lie a little above the whole number in binary."""
    for alpha, n_positive in [(0.1, 30), (0.4, 5), (0.7, 10), (0.29, 100), (0.55, 100), (0.4, 15000), (0.3, 210)]:
        z = torch.ones(1, n_positive)
        found = activation_statistics(z, np.array([0, 1]), alpha).counts.sum()
        assert found == round(alpha * n_positive), (alpha, n_positive)


@pytest.mark.parametrize(("alpha", "n_positive"), [(0.3, 210), (0.15, 340), (0.36, 150)])
def test_a_whole_share_is_not_rounded_up_by_the_definition(alpha, n_positive):
    assert token_core_mask(torch.ones(1, n_positive), alpha).sum() == round(alpha * n_positive)


# --- sentence-wise --------------------------------------------------------------------------------------------------

SENTENCES = torch.tensor(
    [
        # the first sentence, three tokens
        [4.0, 3.0, 2.0, 1.0, -1.0],
        [1.0, 3.0, -2.0, 0.0, 2.0],
        [0.0, 1.0, 5.0, 2.0, -2.0],
        # the second, one token
        [-3.0, 4.0, 0.0, 0.0, 0.0],
        # the third, two tokens, one of them without any activation
        [0.0, 0.0, 0.0, 0.0, 0.0],
        [2.0, -1.0, 2.0, -4.0, 0.0],
    ]
)
STARTS = np.array([0, 3, 4, 6])


def test_sentence_statistics_by_hand():
    found = activation_statistics(SENTENCES, STARTS, 0.5)
    # C_α: {0, 1} of four positive, {1, 4} of three, {2, 3} of three; {1} of one; {}, {0} of two
    assert found.counts.tolist() == [[1, 2, 1, 1, 1], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert np.issubdtype(found.counts.dtype, np.integer)
    assert found.activation.tolist() == [[5, 7, 7, 3, 2], [0, 4, 0, 0, 0], [2, 0, 2, 0, 0]]
    energy = [  # the squares of the tokens sum up to 31, 18, 34; 25; 0, 25
        [
            16 / 31 + 1 / 18,
            9 / 31 + 9 / 18 + 1 / 34,
            4 / 31 + 4 / 18 + 25 / 34,
            1 / 31 + 4 / 34,
            1 / 31 + 4 / 18 + 4 / 34,
        ],
        [9 / 25, 16 / 25, 0, 0, 0],
        [4 / 25, 1 / 25, 4 / 25, 16 / 25, 0],
    ]
    np.testing.assert_allclose(found.energy, energy, rtol=1e-6)
    # every token with any activation has an energy of one in all
    np.testing.assert_allclose(found.energy.sum(axis=1), [3, 1, 1], rtol=1e-6)


def test_sentence_wise_core_neurons_by_hand():
    found = activation_statistics(SENTENCES, STARTS, 0.5)
    # β = 0.4 of five: two. First: 1 by its count, then 2 by its activation of 7 over 5, 3 and 2.
    # Second: 1, then the lowest of those without count and activation. Third: 0, then 2 by activation.
    assert ids_of(found.core_mask(0.4)) == [[1, 2], [0, 1], [0, 2]]
    assert ids_of(found.core_mask(0.6)) == [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert ids_of(found.core_mask(1.0)) == [[0, 1, 2, 3, 4]] * 3
    assert ids_of(found.core_mask(0.01)) == [[1], [1], [0]]


def test_statistics_of_parts_add_up():
    whole = activation_statistics(SENTENCES[:3], np.array([0, 3]), 0.5)
    parts = activation_statistics(SENTENCES[:1], np.array([0, 1]), 0.5) + activation_statistics(
        SENTENCES[1:3], np.array([0, 2]), 0.5
    )
    assert np.array_equal(parts.counts, whole.counts)
    np.testing.assert_allclose(parts.energy, whole.energy, rtol=1e-6)
    np.testing.assert_allclose(parts.activation, whole.activation, rtol=1e-6)


def test_a_sentence_without_tokens_has_no_statistics():
    found = activation_statistics(SENTENCES[:2], np.array([0, 0, 2, 2]), 0.5)
    for array in (found.counts, found.energy, found.activation):
        assert not array[[0, 2]].any()
        assert array[1].any()


# --- the compiled loop ----------------------------------------------------------------------------------------------


def reference(z, starts, alpha):
    """The definition, straight from `token_core_mask`, with the sums in float64."""
    mask, wide = token_core_mask(z, alpha).numpy(), z.double().numpy()
    square = wide**2
    share = square / np.maximum(square.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    spans = list(zip(starts[:-1], starts[1:], strict=True))
    return ActivationStatistics(
        *(
            np.stack([part[begin:end].sum(axis=0) for begin, end in spans])
            for part in (mask.astype(np.int64), share, np.maximum(wide, 0))
        )
    )


def activations(n_tokens, d_ff, kind, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n_tokens, d_ff, generator=generator)
    if kind == "ties":
        z = (2 * z).round() / 2
    elif kind == "relu":
        z = z.clamp_min(0)
    elif kind == "two-values":
        z = torch.where(z > 0.3, 1.5, -0.25)
    elif kind == "wide":
        z = z * 10.0 ** torch.randint(-3, 4, z.shape, generator=generator)
    if n_tokens > 3:
        z[1] = 0.0
        z[2] = -z[2].abs()
        z[3, ::2] = -0.0
    return z.to(dtype)


def assert_same(found, expected):
    assert np.array_equal(found.counts, expected.counts)
    np.testing.assert_allclose(found.energy, expected.energy, rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(found.activation, expected.activation, rtol=1e-5, atol=1e-6)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@DTYPES
@pytest.mark.parametrize("kind", ["plain", "ties", "relu", "two-values", "wide"])
@pytest.mark.parametrize("alpha", [0.01, 0.4, 0.75, 1.0])
def test_the_loop_equals_the_definition(dtype, kind, alpha):
    starts = np.array([0, 4, 5, 11, 12])
    for seed, d_ff in enumerate((1, 2, 37, 96, 257)):
        z = activations(12, d_ff, kind, dtype, seed)
        assert_same(activation_statistics(z, starts, alpha), reference(z, starts, alpha))


@DTYPES
@pytest.mark.parametrize("kind", ["plain", "ties", "two-values"])
@pytest.mark.parametrize("d_ff", [16384, 16385, 32769, 40000])
def test_the_loop_equals_the_definition_in_wide_layers(dtype, kind, d_ff):
    starts = np.array([0, 1, 4])
    z = activations(4, d_ff, kind, dtype, seed=d_ff)
    assert_same(activation_statistics(z, starts, 0.4), reference(z, starts, 0.4))


@DTYPES
def test_every_neuron_positive_in_a_wide_layer(dtype):
    z = torch.ones(2, 33000).to(dtype)
    found = activation_statistics(z, np.array([0, 2]), 1.0)
    assert (found.counts == 2).all()
    few = activation_statistics(z, np.array([0, 2]), 0.5).counts[0]
    assert (few[:16500] == 2).all()
    assert not few[16500:].any()


@DTYPES
def test_extreme_values(dtype):
    finfo = torch.finfo(dtype)
    big = 1e18 if dtype != torch.float16 else finfo.max  # its square must fit into float32
    z = torch.tensor([[big, finfo.tiny, finfo.smallest_normal / 2, 1.0, -big, 0.0, -0.0]]).to(dtype)
    starts = np.array([0, 1])
    for alpha in (0.25, 0.5, 0.75, 1.0):
        found = activation_statistics(z, starts, alpha)
        assert np.array_equal(found.counts, reference(z, starts, alpha).counts)
        assert found.counts.sum() == round(4 * alpha)
        np.testing.assert_allclose(found.energy[0, [0, 4]], [0.5, 0.5], rtol=1e-3)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_the_loop_equals_the_definition_for_any_values(data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    d_ff, n_tokens = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 4))
    value = st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, 0.5, -1.0, 2.0]), st.floats(-60000, 60000, width=16, allow_subnormal=False)
    )
    rows = data.draw(st.lists(st.lists(value, min_size=d_ff, max_size=d_ff), min_size=n_tokens, max_size=n_tokens))
    alpha = data.draw(st.sampled_from([0.05, 0.1, 0.25, 0.4, 0.5, 0.8, 1.0]))
    z, starts = torch.tensor(rows).to(dtype), np.array([0, n_tokens])
    found = activation_statistics(z, starts, alpha)
    assert np.array_equal(found.counts, reference(z, starts, alpha).counts)


def test_the_loop_reads_a_slice_of_a_larger_tensor():
    large = activations(9, 80, "ties", torch.bfloat16, seed=0)
    for z in (large[:, 7:40], large.T[:9, :9], large[::2]):
        starts = np.array([0, 2, len(z)])
        assert_same(activation_statistics(z, starts, 0.4), reference(z.contiguous(), starts, 0.4))


@DTYPES
def test_any_number_of_threads_gives_the_same(dtype, monkeypatch):
    z = activations(40, 50, "ties", dtype, seed=1)
    starts = np.array([0, 3, 3, 9, 20, 21, 40])
    one = activation_statistics(z, starts, 0.4)
    for n_threads in (2, 3, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n_threads: n)
        many = activation_statistics(z, starts, 0.4)
        for name in ("counts", "energy", "activation"):
            assert np.array_equal(getattr(many, name), getattr(one, name))


def test_float64():
    z, starts = activations(6, 50, "ties", torch.float64, seed=2), np.array([0, 2, 6])
    try:
        found = activation_statistics(z, starts, 0.4)
    except CoreInferSimError:  # a refusal would do as well
        return
    assert_same(found, reference(z, starts, 0.4))


def test_activations_that_require_gradients_are_read():
    z = torch.randn(3, 8, requires_grad=True)
    starts = np.array([0, 3])
    assert_same(activation_statistics(z * 2, starts, 0.4), reference((z * 2).detach(), starts, 0.4))


def test_energy_of_almost_nothing_is_finite():
    z = torch.full((1, 8), 1e-20)
    assert np.isfinite(activation_statistics(z, np.array([0, 1]), 0.4).energy).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@DTYPES
@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.4, 1.0])
def test_a_gpu_gives_the_same(dtype, alpha):
    starts = np.array([0, 4, 5, 5, 12])
    for kind in ("plain", "ties", "relu", "two-values"):
        for d_ff in (37, 211, 5000):
            z = activations(12, d_ff, kind, dtype, seed=d_ff)
            assert_same(activation_statistics(z.cuda(), starts, alpha), activation_statistics(z, starts, alpha))
