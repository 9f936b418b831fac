"""Decode through torch.compile: the same tokens, and nothing compiled anew when the cluster changes."""

from __future__ import annotations

import pytest
import torch
from calls import RowPredictor
from tiny_models import tiny_model
from transformers import CompileConfig

from coreinfer_sim.base.errors import ConfigError, GenerationError
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.choosing.predictors import FixedPredictor
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.models.mlps import find_mlps


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def eager():
    """Trace as for any backend, and run what was traced as it is: nothing here tests the C++ compiler."""
    config = CompileConfig(backend="eager", mode="default")
    config._compile_all_devices = True
    return config


def ids_of(n_rows, n_positions, seed=0):
    return torch.randint(4, 60, (n_rows, n_positions), generator=torch.Generator().manual_seed(seed))


def generate(sparse, ids, **options):
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    return sparse.generate(ids, attention_mask=torch.ones_like(ids), **options)


def random_sets(model, n):
    """As many selections of 40 % of the neurons, as unlike as chance makes them."""
    layers = find_mlps(model)
    return [
        FixedPredictor(make_predictor("random", layers, keep_ratio=0.4, seed=seed).select(None, None, 1)[0])
        for seed in range(n)
    ]


@pytest.mark.parametrize("key", ["llama", "phi3", "gpt2", "gemma2"])  # the last one's cache compiles a full window anew
def test_a_change_of_cluster_compiles_nothing_anew(key):
    model = tiny_model(key)
    first, second, third = random_sets(model, 3)
    sparse = SparseModel(model, first, engine="compiled")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number, (predictor, n_prompt) in enumerate([(first, 5), (second, 5), (third, 8), (first, 3)]):
        sparse.predictor = predictor
        ids = ids_of(1, n_prompt, number)
        with torch.compiler.set_stance("fail_on_recompile" if number and key != "gemma2" else "default"):
            found = generate(sparse, ids, compile_config=eager())
        assert sparse.latest.engine == "compiled"
        plain = SparseModel(model, predictor, engine="transformers")
        assert torch.equal(found, generate(plain, ids))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert "get_compiled_call" not in vars(model) and "forward" not in vars(model)


def test_batches_and_beams():
    model = tiny_model("llama")
    sets = random_sets(model, 2)

    first, second = (each.select(None, None, 1)[0] for each in sets)
    for predictor, n_rows, options in ((RowPredictor(first, second, first), 3, {}), (sets[0], 2, {"num_beams": 2})):
        found = generate(
            SparseModel(model, predictor, engine="compiled"), ids_of(n_rows, 5), compile_config=eager(), **options
        )
        expected = generate(SparseModel(model, predictor, engine="transformers"), ids_of(n_rows, 5), **options)
        assert torch.equal(found, expected)


def test_an_output_that_is_kept_keeps_its_cache():
    model = tiny_model("llama")
    sparse = SparseModel(model, random_sets(model, 1)[0], engine="compiled")
    options = {"compile_config": eager(), "return_dict_in_generate": True}
    first = generate(sparse, ids_of(1, 5), **options)
    keys = first.past_key_values.layers[0].keys.clone()
    generate(sparse, ids_of(1, 5, seed=1), **options)
    assert torch.equal(first.past_key_values.layers[0].keys, keys)
    sparse.close()


def test_what_the_compiled_engine_cannot_serve():
    model = tiny_model("llama")
    predictor = make_predictor("stability", find_mlps(model), keep_ratio=0.4)
    with pytest.raises(ConfigError, match="compiled: it multiplies weights as they are stored"):
        SparseModel(model, predictor, engine="compiled", weights="int8")
    sparse = SparseModel(model, predictor, engine="compiled")
    for options in ({"cache_implementation": "static"}, {"past_key_values": object()}):
        with pytest.raises(GenerationError, match="brings its own cache"):
            generate(sparse, ids_of(1, 5), **options)
