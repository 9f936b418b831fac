"""Linear layers on a CPU multiply by one fixed rule, and give what torch gives."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from calls import Snapshot, token_ids
from tiny_models import tiny_model
from torch import nn

from coreinfer_sim.engines import linear
from coreinfer_sim.engines.lean.matrix import Joined, Matrix
from coreinfer_sim.engines.linear import FEW, MANY, MatrixProduct, Product, products_of, use_products, widened_product

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Relative, of one number in the type."""


def layer_of(dtype, n_in=24, n_out=40, bias=True, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(n_in, n_out, bias=bias).requires_grad_(False).to(dtype)


def rows_of(*shape, dtype, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_float32(layer, x):
    """The product of the rounded numbers, in float32."""
    return F.linear(x.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())


@pytest.mark.parametrize("widens", [False, True], ids=["own-instructions", "none"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("n_rows", [1, 2, FEW - 1, FEW, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_and_number_of_rows_equals_torch(monkeypatch, dtype, n_rows, bias, widens):
    """Also as a processor computes that has no instructions for 16 bits."""
    monkeypatch.setattr(linear, "usable", lambda kind, _device: torch.float32 if widens else kind)
    layer, x = layer_of(dtype, bias=bias), rows_of(n_rows, 24, dtype=dtype)
    expected, torchs = in_float32(layer, x), F.linear(x, layer.weight, layer.bias)
    use_products([layer])
    found = layer(x)
    assert found.dtype == dtype and found.shape == (n_rows, 40)
    scale = expected.abs().max()
    assert (found.float() - expected).abs().max() <= ROUNDING[dtype] * scale
    assert (found.float() - torchs.float()).abs().max() <= 2 * ROUNDING[dtype] * scale


@pytest.mark.parametrize("units", [False, True], ids=["no-matrix-instructions", "matrix-instructions"])
@pytest.mark.parametrize("n_rows", [MANY - 1, MANY])
def test_many_rows_of_packed_weights_go_where_the_processor_is_fastest(monkeypatch, n_rows, units):
    """Of one matrix, and of one that holds gate and up."""
    monkeypatch.setattr(linear, "has_matrix_products", lambda: units)
    matrix, x = Matrix.of(rows_of(48, 64, dtype=torch.float32), None, "Q8_0"), rows_of(n_rows, 64, dtype=torch.float32)
    expected = matrix.times_narrowed(x) if units and n_rows >= MANY else matrix.times(x)
    assert torch.equal(MatrixProduct(matrix)(x), expected)
    assert torch.equal(MatrixProduct(Joined((matrix, matrix)))(x), torch.cat([expected, expected], 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24,), (1, 1, 24), (2, 5, 24), (0, 24)])
def test_leading_dimensions_stay(dtype, shape):
    layer, x = layer_of(dtype), rows_of(*shape, dtype=dtype)
    expected = in_float32(layer, x)
    use_products([layer])
    found = layer(x)
    assert found.shape == (*shape[:-1], 40)
    assert torch.allclose(found.float(), expected, atol=4 * ROUNDING[dtype], rtol=4 * ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_transposed_view_is_left_to_torch(monkeypatch, dtype):
    """The compiled loops would need a copy of it."""
    monkeypatch.setattr(linear, "usable", lambda kind, _device: kind)
    layer = layer_of(dtype)
    layer.weight = nn.Parameter(rows_of(24, 40, dtype=dtype).T, requires_grad=False)
    x = rows_of(1, 24, dtype=dtype)
    expected = F.linear(x, layer.weight, layer.bias)
    assert Product(layer).matrix is None
    use_products([layer])
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("of_weights", [False, True], ids=["of-inputs", "of-weights"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_go_through_torch(dtype, of_weights):
    layer = layer_of(dtype).requires_grad_(of_weights)
    plain = copy.deepcopy(layer)
    use_products([layer])
    gradients = []
    for each in (layer, plain):
        x = rows_of(3, 24, dtype=dtype).requires_grad_(not of_weights)
        y = each(x)
        y.float().square().sum().backward()
        gradients.append((y.detach(), each.weight.grad if of_weights else x.grad))
    (y, gradient), (own_y, own_gradient) = gradients
    assert torch.equal(y, own_y) and torch.equal(gradient, own_gradient) and gradient.abs().max() > 0
    with torch.no_grad():  # and none is kept where nobody wants one
        assert not layer(rows_of(3, 24, dtype=dtype)).requires_grad


@pytest.mark.parametrize("bias", [None, torch.arange(3000.0)], ids=["plain", "bias"])
def test_widened_products_go_some_weights_at_a_time(bias):
    weight, x = rows_of(3000, 1024, dtype=torch.bfloat16), rows_of(3, 1024, dtype=torch.float32)
    expected = F.linear(x, weight.float(), bias)
    assert torch.allclose(widened_product(x, weight, bias), expected, atol=1e-3)


def test_a_model_multiplies_by_the_rule_within_the_block():
    model = tiny_model("llama").bfloat16()
    before, ids = Snapshot(model), token_ids(1, 3)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with products_of(model):
            assert all("forward" in vars(each) for each in model.modules() if type(each) is nn.Linear)
            found = model(input_ids=ids).logits
            with products_of(model):  # a block within leaves the outer one as it was
                pass
            assert "forward" in vars(model.lm_head)
    before.check()
    assert not any("forward" in vars(each) for each in model.modules())
    assert (found.float() - expected.float()).abs().max() <= 0.05 * expected.abs().max()


def test_the_block_ends_after_an_error():
    model = tiny_model("llama")
    with pytest.raises(ZeroDivisionError), products_of(model):
        raise ZeroDivisionError
    assert not any("forward" in vars(each) for each in model.modules())


def test_layers_that_are_more_than_linear_are_left_alone():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    modules = [Scaled(24, 40), nn.Embedding(3, 4), layer_of(torch.float32)]
    assert use_products(modules) == modules[2:]
    assert use_products(modules) == []


def test_nothing_is_written(monkeypatch, tmp_path):
    """The rule is fixed: nothing is measured, so nothing is kept."""
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    layers = [layer_of(dtype) for dtype in DTYPES]
    use_products(layers)
    for layer in layers:
        for n_rows in (1, FEW, 100):
            layer(rows_of(n_rows, 24, dtype=layer.weight.dtype))
    assert list(tmp_path.iterdir()) == []
