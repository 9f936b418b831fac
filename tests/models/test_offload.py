"""Dense MLPs in host memory: they pass through the device in prefill, and decode is that of the whole model.

The same tests run on a GPU where there is one.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import TINY_FAMILIES, save_tiny_checkpoint, tiny_model

from coreinfer_sim import SparseModel, make_predictor
from coreinfer_sim.base.errors import BudgetError, ModelError
from coreinfer_sim.generation.memory_plan import MIB, Use, load_on_device
from coreinfer_sim.models.budgeted import keep_on_host
from coreinfer_sim.models.loading import load_model
from coreinfer_sim.models.mlps import find_mlps
from coreinfer_sim.models.offload import HostLinear, Staging

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)


def _weights(n_layers, device):
    torch.manual_seed(0)
    pinned = device.type == "cuda"
    layers = [[torch.randn(6, 4), torch.randn(4, 6)] for _ in range(n_layers)]
    return [[part.pin_memory() if pinned else part for part in layer] for layer in layers]


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4])
def test_layers_come_in_any_order(device, n_layers):
    weights = _weights(n_layers, device)
    staging = Staging(weights, device)
    orders = [*range(n_layers), *range(n_layers), *reversed(range(n_layers)), 0, n_layers - 1]
    for number in orders:
        for _ in range(2):
            found = staging.weights_of(number)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(found, weights[number], strict=True))
            assert found[0].device.type == device.type


def test_the_device_holds_two_layers_and_the_next_one_comes_early(device):
    weights = _weights(5, device)
    staging = Staging(weights, device)
    assert staging.n_bytes == 0 and staging.held == []
    for number in range(5):
        staging.weights_of(number)
        assert sorted(staging.held) == ([number, number + 1] if number < 4 else [3, 4])
    assert staging.n_bytes == 2 * 48 * 4


@pytest.mark.parametrize("key", [family.key for family in TINY_FAMILIES])
def test_every_family_computes_as_if_it_were_whole(key, device):
    whole, split = tiny_model(key).to(device), tiny_model(key)
    keep_on_host(split, find_mlps(split), device)
    layers = find_mlps(split)
    assert all(layer.away and layer.output.weight.device.type == "cpu" for layer in layers)
    assert split.device.type == device.type
    assert sum(layer.n_bytes for layer in layers) == sum(layer.n_bytes for layer in find_mlps(whole))
    ids = IDS.to(device)
    with torch.no_grad():
        assert torch.allclose(split(ids).logits, whole(ids).logits, atol=1e-5)
    for keep_ratio, sparse_layers in ((0.5, ":"), (0.5, "1:")):
        texts = [
            SparseModel(
                model,
                make_predictor("random", find_mlps(model), keep_ratio=keep_ratio, sparse_layers=sparse_layers),
                engine="transformers",
            ).generate(ids, max_new_tokens=6, do_sample=False)
            for model in (whole, split)
        ]
        assert torch.equal(*texts)
    assert all(isinstance(getattr(layer.owner, name), HostLinear) for layer in layers for name in layer.projections)


def test_sparse_prefill_brings_no_dense_layer(device):
    model = tiny_model("llama")
    keep_on_host(model, find_mlps(model), device)
    layers = find_mlps(model)
    sparse = SparseModel(model, make_predictor("random", layers, keep_ratio=0.5), prefill="sparse")
    sparse.generate(IDS.to(device), max_new_tokens=3, do_sample=False)
    assert layers[0].output.staging.n_bytes == 0


def test_a_compensated_mlp_is_cut_in_host_memory(device):
    from coreinfer_sim.engines.cutting import compact_projections
    from coreinfer_sim.index.compensated import LayerCompensation

    model = tiny_model("qwen2")
    layer = find_mlps(model)[0]
    ids = torch.arange(0, layer.d_ff, 2)
    torch.manual_seed(0)
    repair = LayerCompensation(torch.randn(layer.d_model), torch.randn(layer.d_model, len(ids)))
    expected = compact_projections(layer, ids, repair)
    keep_on_host(model, find_mlps(model), device)
    found = compact_projections(find_mlps(model)[0], ids, repair)
    for name, module in expected.items():
        assert found[name].weight.device.type == device.type
        assert torch.equal(found[name].weight.cpu(), module.weight)
        assert (found[name].bias is None) == (module.bias is None)


def _use(n_kept):
    return lambda _tokenizer, layers: Use([n_kept] * len(layers), 5, 8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def test_loading_on_a_device(checkpoint, device):
    loaded, plan = load_on_device(checkpoint, 1 << 34, _use(24), device=str(device))
    whole = load_model(checkpoint, "stored", str(device))
    assert loaded.model.dtype == whole.model.dtype
    mlps = sum(layer.n_bytes for layer in whole.layers)
    assert sum(n for name, n in plan.parts.items() if name.startswith("reading")) >= 2 * mlps // len(whole.layers)
    assert "cutting neurons" not in plan.parts and plan.parts["libraries and index"] == 0
    assert loaded.position_limit == plan.position_limit
    texts = [
        SparseModel(each.model, make_predictor("random", each.layers, keep_ratio=0.5)).generate(
            IDS.to(device), max_new_tokens=6, do_sample=False
        )
        for each in (whole, loaded)
    ]
    assert torch.equal(*texts)


def test_a_budget_too_small_for_the_device_names_the_smallest(checkpoint, device):
    with pytest.raises(BudgetError, match=r"budget is 10\.0 MiB, but this needs \d+MiB .*give at least"):
        load_on_device(checkpoint, 10 * MIB, _use(24), device=str(device))


def test_a_device_that_is_not_there(checkpoint):
    with pytest.raises(ModelError, match="the device 'nowhere' cannot be used"):
        load_on_device(checkpoint, 1 << 34, _use(24), device="nowhere")
