"""The lean decode step: the same as transformers' own forward code, for any batch, type and cache."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from calls import (
    N_NEW,
    CallAt,
    RowPredictor,
    Snapshot,
    assert_same_output,
    by_hand,
    generate,
    left_padded,
    logits,
    random_predictor,
    selection,
    token_ids,
)
from tiny_models import save_tiny_checkpoint, tiny_model
from transformers import DynamicCache, StoppingCriteriaList

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.base.errors import ConfigError, GenerationError
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.choosing.predictors import FixedPredictor
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.cutting import compact_projections
from coreinfer_sim.engines.lean import kv_cache
from coreinfer_sim.engines.lean.compact import WholeMLP, held_mlp
from coreinfer_sim.engines.lean.engine import LeanEngine
from coreinfer_sim.engines.lean.matrix import Matrix
from coreinfer_sim.engines.lean.relu_mlp import ReluMLP
from coreinfer_sim.engines.steps import StepInputs
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.index.compensated import LayerCompensation
from coreinfer_sim.models.mlps import find_mlps

LEAN = ("llama", "llama-relu-bias", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def plain_mistral(models):
    """With full attention, as the later Mistral models have; the tiny one slides a window."""
    model = tiny_model("mistral")
    model.config.sliding_window = None
    return model


@pytest.fixture(params=LEAN)
def model(request, models, plain_mistral):
    return plain_mistral if request.param == "mistral" else models[request.param]


def both(model, predictor, ids, **options):
    """Generate with either engine."""
    found = []
    for engine in ("lean", "transformers"):
        sparse = SparseModel(model, predictor, engine=engine)
        found.append(generate(sparse, ids, **options))
        assert sparse.latest.engine == engine
    return found


def compensated(model, keep_ratio=0.5, seed=3):
    """A selection with random compensation."""
    g = torch.Generator().manual_seed(seed)
    chosen, d = selection(model, keep_ratio), find_mlps(model)[0].d_model

    def draw(*shape):
        return torch.randn(*shape, generator=g) / 8

    repairs = {}
    for number, ids in chosen.ids.items():
        delta = draw(d, len(ids))
        repairs[number] = LayerCompensation(draw(d), delta)
    return NeuronSelection("test", chosen.ids, compensation=repairs)


@pytest.mark.parametrize("mode", ["dense", "random"])
def test_one_row(model, mode):
    predictor = make_predictor(mode, find_mlps(model), keep_ratio=0.4)
    assert_same_output(*both(model, predictor, token_ids(1, 9)), 1e-5)


def test_compensation(model):
    chosen = compensated(model)
    assert_same_output(*both(model, FixedPredictor(chosen), token_ids(1, 9)), 1e-4)


def test_neurons_are_those_of_the_compact_modules(model):
    layer, chosen = find_mlps(model)[1], compensated(model)
    ids, repair = chosen.ids[1], chosen.compensation[1]
    parts = [getattr(layer.owner, name) for name in layer.projections]
    gate, up, down = (Matrix.of(part.weight, part.bias) for part in parts)
    dense = WholeMLP((gate, up), down)
    own, modules = held_mlp(dense, ids, repair), compact_projections(layer, ids, repair)
    for matrix, name in zip(own.parts, layer.projections, strict=True):
        module = modules[name]
        assert torch.allclose(matrix.weight, module.weight, atol=1e-6)
        bias = torch.zeros(matrix.n_out) if matrix.bias is None else matrix.bias[: matrix.n_out]
        assert torch.allclose(bias, torch.zeros(()) if module.bias is None else module.bias, atol=1e-6)


@pytest.mark.parametrize("n_rows", [2, 3, 5, 9])
def test_rows_of_unlike_selections_and_lengths(model, n_rows):
    """Rows are grouped by selection; each decodes as it would alone."""
    chosen = [selection(model, 0.3 + 0.1 * (n % 3), seed=n % 3) for n in range(3)]
    rows = [token_ids(1, 3 + n, seed=n) for n in range(n_rows)]
    ids, mask = left_padded(*rows)
    mine = [chosen[n % 3] for n in range(n_rows)]
    batch = generate(SparseModel(model, RowPredictor(*mine), engine="lean"), ids, attention_mask=mask)
    for n, row in enumerate(rows):
        alone = generate(SparseModel(model, FixedPredictor(mine[n]), engine="transformers"), row)
        assert torch.equal(batch.sequences[n, -N_NEW:], alone.sequences[0, -N_NEW:])
        assert (logits(batch)[n] - logits(alone)[0]).abs().max() <= 1e-4


@pytest.mark.parametrize("options", [{"num_beams": 3, "output_logits": False}, {"num_return_sequences": 3}])
def test_several_texts_of_one_prompt(model, options):
    predictor = RowPredictor(selection(model, seed=1), selection(model, seed=2))
    ids = token_ids(2, 6)
    found = []
    for engine in ("lean", "transformers"):
        torch.manual_seed(0)
        sparse = SparseModel(model, predictor, engine=engine)
        found.append(generate(sparse, ids, do_sample="num_return_sequences" in options, **options).sequences)
        assert sparse.latest.engine == engine
    assert torch.equal(*found)


def step(engine, cache, chosen, token=7):
    """Decode one token in one row; return its logits [vocabulary]."""
    (held,) = engine.prepare([chosen])
    row = np.zeros(1, np.int64), np.zeros(1, bool), 1
    return engine.step(StepInputs(torch.tensor([[token]]), cache, {}, *row, engine.model), [([0], held)]).logits[0, 0]


def test_sixteen_bits(model):
    """Weights and cache are read as they are stored; the arithmetic is float32, so logits differ by rounding alone."""
    for dtype in (torch.bfloat16, torch.float16):
        small = type(model)(model.config).to(dtype).eval()
        small.load_state_dict(model.state_dict())
        wide = type(model)(model.config).eval()
        wide.load_state_dict(small.state_dict())
        chosen = selection(small)
        ids = token_ids(1, 9)
        # The prompt's cache comes from the same narrow prefill, so that only decode is compared.
        with torch.no_grad():
            cache = small(input_ids=ids, use_cache=True).past_key_values
        engine = LeanEngine(small, find_mlps(small), DecodeConfig())
        wide_cache = DynamicCache(config=wide.config)
        for number, layer in enumerate(cache.layers):
            wide_cache.update(layer.keys.float(), layer.values.float(), number)
        other = LeanEngine(wide, find_mlps(wide), DecodeConfig())
        one, two = step(engine, cache, chosen), step(other, wide_cache, chosen)
        assert cache.layers[0].keys.dtype == dtype and cache.get_seq_length() == 10
        assert (one - two).abs().max() <= (0.05 if dtype == torch.bfloat16 else 0.01) * two.abs().max()


@pytest.mark.parametrize(("weights", "most"), [("bf16", 0.05), ("int8", 0.2), ("int4", 1)])
def test_few_bits_are_near(model, weights, most):
    """Blocks of 32 weights share a scale; the down projection of held neurons keeps 6 bits at least."""
    chosen = selection(model, 0.6)
    sparse = SparseModel(model, FixedPredictor(chosen), weights=weights)
    found = generate(sparse, token_ids(1, 9), 2)
    expected = generate(SparseModel(model, FixedPredictor(chosen)), token_ids(1, 9), 2)
    gap = (found.logits[1] - expected.logits[1]).abs().max()
    assert 0 < gap <= most * expected.logits[1].abs().max()
    engine = LeanEngine(model, find_mlps(model), DecodeConfig(weights=weights))
    mlps = engine.cut(chosen).values()
    if all(isinstance(mlp, ReluMLP) for mlp in mlps):  # they lie by neuron, and what is zero is not read
        assert sparse.latest.read.mlp_per_step < 0.95 * sum(mlp.n_bytes for mlp in mlps)
        return
    kinds = {"bf16": ["bfloat16"] * 3, "int8": ["Q8_0"] * 3, "int4": ["Q4_0", "Q4_0", "Q6_0"]}[weights]
    assert all([part.kind for part in mlp.parts] == kinds for mlp in mlps)
    assert sparse.latest.read.mlp_per_step == sum(part.n_bytes for mlp in mlps for part in mlp.parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["stored", "int8", "int4"])
def test_forced_text_equals_single_steps_in_every_type(models, dtype, weights):
    """One layer stays dense; keys and values are rounded as the cache holds them."""
    model = tiny_model("qwen3").to(dtype)
    chosen = selection(model, 0.5, sparse_layers="1:")
    engine = LeanEngine(model, find_mlps(model), DecodeConfig(weights=weights))
    with torch.no_grad():
        cache = model(input_ids=token_ids(1, 9), use_cache=True).past_key_values
    new = token_ids(1, 5, seed=1)
    (held,) = engine.prepare([chosen])
    found = engine.forced(new, cache, held)
    expected = torch.stack([step(engine, cache, chosen, token) for token in new[0].tolist()])
    # a sum in another order may round a key to its neighbour
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float16: 2e-3}[dtype]
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    assert engine.read().n_steps == 10


def test_some_layers_stay_dense(model):
    predictor = random_predictor(model, sparse_layers="1:")
    assert_same_output(*both(model, predictor, token_ids(2, 5)), 1e-4)


def test_a_cache_goes_on_in_either_engine(model):
    """What the lean step leaves in the cache is what the model's own code would have left."""
    chosen = selection(model)
    cache, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
    first = generate(
        SparseModel(model, FixedPredictor(chosen), engine="lean"), token_ids(1, 6), 4, past_key_values=cache
    )
    tokens, _ = by_hand(model, chosen, token_ids(1, 6), 4, expected)
    assert torch.equal(first.sequences, tokens)
    assert cache.get_seq_length() == expected.get_seq_length() == 9
    for one, two in zip(cache.layers, expected.layers, strict=True):
        assert torch.allclose(one.keys, two.keys, atol=1e-5) and torch.allclose(one.values, two.values, atol=1e-5)
    ids = torch.cat([first.sequences, token_ids(1, 5, seed=1)], 1)
    second = generate(SparseModel(model, FixedPredictor(chosen), engine="lean"), ids, 4, past_key_values=cache)
    tokens, steps = by_hand(model, chosen, ids, 4, expected)
    assert torch.equal(second.sequences, tokens)
    assert (logits(second) - steps).abs().max() <= 1e-4


def test_the_cache_grows_past_its_room(models, monkeypatch):
    monkeypatch.setattr(kv_cache, "SPARE", 2)
    model = models["llama"]
    assert_same_output(*both(model, random_predictor(model), token_ids(2, 5), max_new_tokens=30), 1e-4)


def test_finished_rows_cost_nothing(models):
    model = models["llama"]
    ids = token_ids(3, 6)
    plain = generate(SparseModel(model, random_predictor(model), engine="transformers"), ids)
    end = int(plain.sequences[1, 6 + 2])  # the second row ends with its third new token
    others = plain.sequences[[0, 2], 6:]
    seen = []

    class Noting(LeanEngine):
        def step(self, inputs, groups):
            seen.append(np.flatnonzero(~inputs.finished).tolist())
            return super().step(inputs, groups)

    engine = Noting(model, find_mlps(model), DecodeConfig(engine="lean"))
    options = {"eos_token_id": end, "pad_token_id": 0}
    found = generate(
        SparseModel(model, random_predictor(model), config=engine.config, engines=[engine]), ids, **options
    )
    expected = generate(SparseModel(model, random_predictor(model), engine="transformers"), ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert seen[0] == [0, 1, 2]
    assert 1 not in seen[-1] or bool((others == end).any())


def test_no_row_finishes_where_no_end_token_is_asked_for(models, monkeypatch):
    model = models["llama"]
    ids = token_ids(3, 6)
    sparse = SparseModel(model, random_predictor(model), engine="lean")
    free = generate(sparse, ids).sequences
    monkeypatch.setattr(model.generation_config, "eos_token_id", int(free[1, 6 + 2]))
    monkeypatch.setattr(model.generation_config, "pad_token_id", 0)
    assert not torch.equal(generate(sparse, ids).sequences, free)
    assert torch.equal(generate(sparse, ids, eos_token_id=None).sequences, free)


def test_the_model_is_untouched(model):
    before = Snapshot(model)
    generate(SparseModel(model, random_predictor(model), engine="lean"), token_ids(2, 6))
    before.check()
    assert "forward" not in vars(model)


def test_stopping_in_the_middle_leaves_the_model_whole(models):
    model = models["llama"]
    before = Snapshot(model)

    def fail():
        raise KeyboardInterrupt

    sparse = SparseModel(model, random_predictor(model), engine="lean")
    with pytest.raises(KeyboardInterrupt):
        generate(sparse, token_ids(1, 6), stopping_criteria=StoppingCriteriaList([CallAt(9, fail)]))
    before.check()
    assert "forward" not in vars(model)
    assert len(generate(sparse, token_ids(1, 6)).logits) == N_NEW


def test_several_threads_are_refused_or_right(models):
    model = models["llama"]
    sparse = SparseModel(model, random_predictor(model), engine="lean")
    expected = {n: generate(sparse, token_ids(1, 6, seed=n), 24).sequences for n in range(4)}
    found, refused = {}, []

    def run(n):
        try:
            found[n] = generate(sparse, token_ids(1, 6, seed=n), 24).sequences
        except GenerationError:
            refused.append(n)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) + len(refused) == 4 and found
    assert all(torch.equal(tokens, expected[n]) for n, tokens in found.items())


def test_other_families_go_through_transformers(models):
    model = models["bloom"]
    sparse = SparseModel(model, random_predictor(model))
    generate(sparse, token_ids(1, 5))
    assert sparse.latest.engine == "transformers"
    assert sparse.refused is not None and sparse.refused.startswith("lean: bloom is not among the types ")
    for options in ({"engine": "lean"}, {"weights": "int8"}):
        with pytest.raises(ConfigError, match="bloom is not among the types of docs/models.md that it decodes"):
            SparseModel(model, random_predictor(model), **options)
    with pytest.raises(ConfigError, match="transformers: it multiplies weights as they are stored"):
        SparseModel(models["llama"], random_predictor(models["llama"]), engine="transformers", weights="int8")


def test_what_the_lean_engine_cannot_serve(models):
    """By default such a call goes through transformers; where the lean engine was asked for, it says why not."""
    model = tiny_model("llama")  # of our own: transformers leaves hooks where hidden states were asked for
    options = {"cache_implementation": "static"}
    sparse = SparseModel(model, random_predictor(model))
    generate(sparse, token_ids(1, 5), **options)
    assert sparse.latest.engine == "transformers"
    assert sparse.latest.not_first == "lean: the cache is a StaticCache that does not grow with the text in every layer"
    with pytest.raises(ConfigError, match="StaticCache that does not grow"):
        generate(SparseModel(model, random_predictor(model), engine="lean"), token_ids(1, 5), **options)
    adapted = tiny_model("llama")
    attention = adapted.model.layers[1].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    generate(sparse := SparseModel(adapted, random_predictor(adapted)), token_ids(1, 5))
    assert sparse.latest.engine == "transformers"
    with pytest.raises(ConfigError, match="holds a Adapted where a Linear was expected"):
        SparseModel(adapted, random_predictor(adapted), engine="lean")
    with pytest.raises(ConfigError, match="attentions or hidden states"):
        generate(SparseModel(model, random_predictor(model), engine="lean"), token_ids(1, 5), output_hidden_states=True)


class Adapted(torch.nn.Module):
    """What an adapter makes of a projection: its weight is still the base's, its output is not."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, x):
        return 2 * self.base(x)


def test_a_beam_may_take_the_row_of_one_that_has_ended(models):
    model, end, ids = models["llama"], 7, token_ids(1, 5)

    def allowed(_row, text):
        n_new = len(text) - ids.shape[1]
        if n_new == 0:
            return [3, 4]
        if n_new == 1:  # one beam must end; the other goes on and then fills both rows
            return [end] if int(text[-1]) == 3 else [5]
        return [8, 9, 11]

    options = {"num_beams": 2, "prefix_allowed_tokens_fn": allowed, "eos_token_id": end, "length_penalty": 9.0}
    options |= {"output_logits": False, "return_dict_in_generate": False}
    lean, stock = both(model, random_predictor(model), ids, **options)
    assert torch.equal(lean, stock)


def test_sparse_prefill_of_more_than_the_cache_holds(models):
    model, ids = models["llama"], token_ids(2, 5)
    predictor = RowPredictor(selection(model, seed=0), selection(model, seed=1))
    lean, stock = (
        generate(SparseModel(model, predictor, engine=engine, prefill="sparse", cache_bytes=1), ids)
        for engine in ("lean", "transformers")
    )
    assert_same_output(lean, stock)


def test_weights_prepared_ahead(models):
    model = models["llama"]
    sparse = SparseModel(model, random_predictor(model), engine="lean")
    thread = threading.Thread(target=sparse.prepare, args=(["a prompt"],))
    thread.start()
    thread.join()
    cache = sparse.engines[0].cache
    held = cache.n_bytes
    assert held > 0
    generate(sparse, token_ids(1, 5))
    assert cache.n_bytes == held


def test_loops_keep_the_number_of_threads_that_torch_was_given(tmp_path):
    """In a process of its own, as numba starts its threads once."""
    program = (
        "import sys, torch; torch.set_num_threads(1); import coreinfer_sim\n"
        "with coreinfer_sim.load(None, sys.argv[1], mode='dense', weights='int8') as generator:\n"
        "    generator.generate('How do stars form?', max_new_tokens=2)\n"
        "print(torch.get_num_threads())"
    )
    folder = save_tiny_checkpoint(tmp_path / "model")
    done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "1"
