"""Products of a model's own linear layers: every kernel gives torch's product, and what is fastest is measured and kept."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from tiny_models import TINY_FAMILIES, tiny_model
from torch import nn

from coreinfer_sim import SparseModel, make_predictor
from coreinfer_sim.engines.products import _MANY, KERNELS, Products, _Product
from coreinfer_sim.models.loading import usable
from coreinfer_sim.models.mlps import find_mlps


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path))
    return tmp_path


def _linear(n_out=24, n_in=40, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(n_in, n_out, bias=bias).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n_rows", [1, 2, 5, _MANY - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kernel_gives_the_product(dtype, n_rows, bias):
    linear = _linear(dtype=dtype, bias=bias)
    product = _Product(linear, {})
    x = torch.randn(n_rows, 40).to(dtype)
    names = product.candidates(n_rows)
    assert ("torch mv" in names) == (n_rows == 1)
    assert ("torch linear, widened" in names) == (n_rows > 1 and dtype is not torch.float32)
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    for name in names:
        found = KERNELS[name](product, x)
        assert found.dtype is dtype
        assert torch.allclose(found.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


def test_a_transposed_view_is_left_to_torch(monkeypatch):
    plain, view, products = _linear(40, 40), _linear(40, 40), Products()
    view.weight = nn.Parameter(torch.randn(40, 40).T, requires_grad=False)
    products.choose([view], 1)
    assert not products.microseconds
    products.choose([plain, view], 1)
    ((key, found),) = products.microseconds.items()
    products.microseconds[key] = {name: 1.0 if name == "compiled loops" else 2.0 for name in found}
    used = []
    loops = KERNELS["compiled loops"]
    monkeypatch.setitem(
        KERNELS, "compiled loops", lambda product, x: (used.append(product.weight), loops(product, x))[1]
    )
    products._take()
    x = torch.randn(1, 40)
    expected = F.linear(x, view.weight, view.bias)
    with products.used_by(nn.Sequential(plain, view)):
        plain(x)
        assert torch.equal(view(x), expected)
    assert [weight is plain.weight for weight in used] == [True]


def test_layers_use_the_kernel_that_was_measured_to_be_the_fastest(monkeypatch):
    def slow(product, x):
        raise AssertionError("the slower kernel was used")

    linear, products = _linear(), Products()
    products.choose([linear], 1)
    ((key, found),) = products.microseconds.items()
    assert key == (("float32", 4, 5), 0)
    assert set(found) == {"torch linear", "torch mv", "compiled loops"}
    assert all(value > 0 for value in found.values())
    for name in found:
        products.microseconds[key] = {each: 1.0 if each == name else 2.0 for each in found}
        with monkeypatch.context() as only:
            for each in found:
                if each != name:
                    only.setitem(KERNELS, each, slow)
            products._take()
            with products.used_by(nn.Sequential(linear)):
                assert linear(torch.ones(3, 40)[:1]).shape == (1, 24)
    assert "forward" not in vars(linear)


def test_what_was_measured_is_kept_on_disk_and_not_measured_again(cache, monkeypatch):
    Products().choose([_linear()], 1)
    (path,) = (cache / "products").iterdir()
    assert json.loads(path.read_text())["microseconds"][0]["shape"] == ["float32", 4, 5]

    def again(group, n_rows):
        raise AssertionError("measured twice")

    monkeypatch.setattr("coreinfer_sim.engines.products._measure", again)
    Products().choose([_linear()], 1)
    with pytest.raises(AssertionError, match="twice"):
        Products().choose([_linear(n_out=100)], 1)


@pytest.mark.parametrize("content", ["", "[]", '{"microseconds": [{"shape": 3}]}', '{"microseconds": 4}', "\x00"])
def test_a_damaged_file_is_measured_anew(cache, content):
    Products().choose([_linear()], 1)
    (path,) = (cache / "products").iterdir()
    path.write_text(content)
    products = Products()
    assert not products.microseconds
    products.choose([_linear()], 1)
    assert Products().microseconds == products.microseconds


def test_a_folder_that_cannot_be_written_costs_only_the_measurement(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path / "file"))
    products = Products()
    products.choose([_linear()], 1)
    assert products.microseconds


def test_many_rows_are_widened_where_the_processor_lacks_the_type():
    linear, products = _linear(dtype=torch.bfloat16), Products()
    x = torch.randn(32, 40).bfloat16()
    with products.used_by(nn.Sequential(linear)):
        found = linear(x)
    if usable(torch.bfloat16, "cpu") is torch.float32:
        exact = F.linear(x.float(), linear.weight.float(), linear.bias.float()).bfloat16()
        assert torch.equal(found, exact)
    else:
        assert torch.equal(found, linear(x))


def test_gradients_go_through_torch():
    linear = _linear().requires_grad_(True)
    with Products().used_by(nn.Sequential(linear)):
        linear(torch.ones(1, 40)).sum().backward()
    assert linear.weight.grad is not None


def test_the_layer_is_not_kept_alive_by_its_own_forward_code():
    import gc
    import weakref

    linear = _linear()
    Products().use([linear])
    gone = weakref.ref(linear)
    gc.disable()
    try:
        del linear
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("key", [family.key for family in TINY_FAMILIES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_decodes_by_the_measured_kernels(key, dtype):
    model = tiny_model(key).to(dtype)
    layers = find_mlps(model)
    sparse = SparseModel(model, make_predictor("random", layers, keep_ratio=0.5), engine="transformers")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model(ids).logits
    out = sparse.generate(ids, max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 8)
    assert sparse._products.microseconds
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())
