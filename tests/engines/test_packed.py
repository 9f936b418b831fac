"""Packed weights: their codes and scales are those of the source, and products are those of the widened weights."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf_blocks import GGUF_KINDS, blocks_of
from rounding import rounded_inputs

from coreinfer_sim.engines.lean.formats import FORMATS, Scales
from coreinfer_sim.engines.lean.matrix import Matrix, from_codes
from coreinfer_sim.engines.lean.packing import lay, room
from coreinfer_sim.models.gguf_codes import QuantisedTensor


def of_gguf(kind, n_out=50, n_in=512, bias=None, order=None):
    raw = blocks_of(kind, n_out, n_in)
    widened = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    matrix = from_codes(QuantisedTensor(kind, n_out, n_in, raw, order), bias)
    return matrix, torch.from_numpy(widened if order is None else widened[order])


WHOLE = [name for name, format_ in FORMATS.items() if not format_.low_bits]


@pytest.mark.parametrize("kind", [*GGUF_KINDS, "Q3_K"])
def test_codes_of_a_file_are_kept_to_the_bit(kind):
    """Also with an output count that fills no tile, and rows in another order."""
    order = np.random.default_rng(1).permutation(50)
    matrix, widened = of_gguf(kind, order=order)
    assert torch.equal(matrix.widened().T, widened)
    assert torch.equal(matrix.widened(16, 40).T, widened[16:40])
    ids = torch.randperm(50)[:21]
    assert torch.equal(matrix.outputs(ids).widened().T, widened[ids])
    assert torch.equal(matrix.rows(ids), widened[ids])


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_a_matrix_takes_little_more_than_the_file(kind):
    """Scales of scales take whole bytes where the file has six bits: 2.8 % of Q4_K."""
    matrix, _ = of_gguf(kind, n_out=64)
    assert matrix.n_bytes <= 1.03 * blocks_of(kind, 64, 512).nbytes


@pytest.mark.parametrize("n_rows", [1, 3, 4, 5, 16])
@pytest.mark.parametrize("kind", WHOLE)
def test_products_are_those_of_the_widened_weights(kind, n_rows):
    """Inputs are rounded to 8 bits, in float32 as in the loops."""
    bias, x = torch.randn(50), torch.randn(n_rows, 512)
    matrix = of_gguf(kind, bias=bias)[0] if kind in GGUF_KINDS else Matrix.of(torch.randn(50, 512), bias, kind)
    x[0, :40] = 0  # a block without a scale
    expected = rounded_inputs(x) @ matrix.widened() + bias
    found = matrix.of_few(x.numpy())
    assert found.shape == (n_rows, 50)
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
    many = x.repeat(30, 1)
    assert torch.equal(matrix.times(many), found.repeat(30, 1))


@pytest.mark.parametrize("n_out", [50, 2100])
@pytest.mark.parametrize("kind", WHOLE)
def test_products_of_weights_that_are_made_bfloat16(kind, n_out):
    """Weights and inputs are rounded once each; sums are bfloat16, too. The larger matrix goes in several parts."""
    bias, x, n_in = torch.randn(n_out), torch.randn(130, 512), 512
    matrix = (
        of_gguf(kind, n_out, n_in, bias)[0] if kind in GGUF_KINDS else Matrix.of(torch.randn(n_out, n_in), bias, kind)
    )
    expected = (x.bfloat16().float() @ matrix.widened().bfloat16().float()).bfloat16().float() + bias
    assert (matrix.times_narrowed(x) - expected).abs().max() <= 0.01 * expected.abs().max()


@pytest.mark.parametrize("n_in", [8, 77, 576, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_floats(dtype, n_in):
    weight, bias, x = torch.randn(37, n_in).to(dtype), torch.randn(37), torch.randn(6, n_in)
    matrix = Matrix.of(weight, bias)
    expected = x @ weight.float().T + bias
    found = matrix.of_few(x.numpy())
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(matrix.of_few(x[2:3].numpy())[0], found[2])  # a row alone is the row of a batch


@pytest.mark.parametrize("n_in", [32, 77, 576])
@pytest.mark.parametrize(("kind", "most"), [("Q8_0", 0.006), ("Q6_0", 0.025), ("Q4_0", 0.09), ("Q4_1", 0.08)])
def test_rounding_is_near(kind, most, n_in):
    """Root mean square error over that of normal weights; odd inputs are filled up with nothing."""
    weight = torch.randn(50, n_in)
    weight[3], weight[4, :32] = 0, 0
    matrix = Matrix.of(weight, None, kind)
    error = matrix.widened().T - weight
    assert error.square().mean().sqrt() <= most * weight.square().mean().sqrt()
    assert not matrix.widened().T[3].any()


def test_four_bits_are_rounded_better_than_by_ggml():
    weight = torch.randn(64, 512)
    theirs = gguf.quants.dequantize(
        gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_0), gguf.GGMLQuantizationType.Q4_0
    )
    ours = Matrix.of(weight, None, "Q4_0").widened().T
    assert (ours - weight).square().mean() < 0.95 * (torch.from_numpy(theirs) - weight).square().mean()


def test_eight_bits_are_rounded_as_by_ggml():
    weight = torch.randn(64, 512)
    theirs = gguf.quants.dequantize(
        gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
    )
    ours = Matrix.of(weight, None, "Q8_0").widened().T
    error, of_theirs = ((each - weight).square().mean() for each in (ours, torch.from_numpy(theirs)))
    assert error < 1.001 * of_theirs


@pytest.mark.parametrize("kind", FORMATS)
def test_the_largest_sums_fit(kind):
    """All codes and inputs at their ends: sums of products in 16 bits would overflow first here."""
    n_out, n_in = 16, 256
    format_ = FORMATS[kind]
    top = 2**format_.bits - 1
    for code in (0, top):
        codes = np.full((n_out, n_in), code, np.uint8)
        ones = np.ones((n_out, n_in // 32), np.float16)
        parts = {"scale": ones, "minimum": ones * 0}
        if format_.scales in (Scales.SUPER_MIN, Scales.SUPER_HALVES):
            small = np.ones((n_out, n_in // 32), np.uint8) if format_.scales is Scales.SUPER_MIN else None
            halves = np.ones((n_out, n_in // 16), np.int8)
            parts = {"d": ones[:, :1], "d_min": ones[:, :1] * 0, "scale": halves if small is None else small}
            parts |= {} if small is None else {"minimum": small}
        made = room(format_, n_out, n_in)
        lay(format_, codes, parts, 0, *made)
        matrix = Matrix(kind, n_out, n_in, *made, None)
        for sign in (1.0, -1.0):
            x = np.full((1, n_in), sign, np.float32)
            expected = sign * n_in * (format_.step * code - format_.zero)
            assert torch.allclose(matrix.of_few(x), torch.tensor(float(expected)), rtol=1e-5)
