"""MLPs with ReLU of which tokens read what is not zero: layouts, loops, and the engine that decodes by them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from calls import RowPredictor, generate, logits, selection, token_ids
from layouts import PROMPT, Said, folders, text_of
from lean_types import model_named
from rounding import rounded_inputs
from tiny_models import save_tiny_checkpoint, tiny_model

import coreinfer_sim
from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.choosing.predictors import FixedPredictor
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.lean.engine import LeanEngine
from coreinfer_sim.engines.lean.intrinsics import RELU
from coreinfer_sim.engines.lean.matrix import Matrix
from coreinfer_sim.engines.lean.relu import outputs_of_nonzero
from coreinfer_sim.engines.lean.relu_mlp import ReluMLP, of_relu
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.index.compensated import LayerCompensation
from coreinfer_sim.models.loading import load_model
from coreinfer_sim.models.mlps import find_mlps, linear_parameters

KINDS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "Q8_0": (torch.float32, "Q8_0"),
    "Q4_0": (torch.bfloat16, "Q4_0"),
}
SHAPES = [(64, 96), (320, 48), (192, 600)]
"""d_model and n_ff: more neurons than one run of gates holds, inputs that fill no whole line of codes."""
ODD = [(77, 53), (8, 5)]


def gated(kind="float32", d_model=64, n_ff=96, biased=True):
    """Random weights and biases, and the MLP that is laid out of them."""
    dtype, rounded = KINDS[kind]
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return (torch.randn(*shape, generator=g) / shape[-1] ** 0.5).to(dtype)

    weights = draw(n_ff, d_model), draw(n_ff, d_model), draw(d_model, n_ff)
    biases = (draw(n_ff), draw(n_ff), draw(d_model)) if biased else (None, None, None)
    return weights, biases, of_relu(weights, biases, rounded)


def inputs(n_rows, d_model):
    x = torch.randn(n_rows, d_model, generator=torch.Generator().manual_seed(1))
    x[0, : min(40, d_model // 2)] = 0  # a block without a scale
    return x


def by_hand(mlp, x, biases):
    """Gates and outputs of an MLP's own weights, all of them multiplied."""
    gate, up, down = (mlp.rows(part, 0, mlp.n_ff) for part in range(3))
    of_gate, of_up, of_down = (0 if bias is None else bias.float() for bias in biases)
    given = x if mlp.kind in ("float32", "bfloat16", "float16") else rounded_inputs(x)
    gates = given @ gate.T + of_gate
    return gates, (F.relu(gates) * (given @ up.T + of_up)) @ down + of_down


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("kind", "shape"), [*((kind, shape) for kind in KINDS for shape in SHAPES)] + [("bfloat16", each) for each in ODD]
)
def test_nothing_is_left_out(kind, shape, biased):
    weights, biases, mlp = gated(kind, *shape, biased)
    for n_rows in (1, 3, 33):  # one row and four at a time; more than go at once
        x = inputs(n_rows, shape[0])
        gates, expected = by_hand(mlp, x, biases)
        found, n_read = mlp.outputs(x, RELU)
        unsure = int((gates.abs() < 1e-5).sum())  # zero but for the order of sums
        assert 0 <= abs(n_read - int((gates > 0).sum())) <= unsure and n_read < gates.numel()
        most = (
            1e-5 if KINDS[kind][1] is None else 1.5e-2
        )  # of codes, what four neurons give is rounded before it is added
        assert (found - expected).abs().max() <= most * expected.abs().max()
        assert torch.equal(mlp.outputs(x[-1:], RELU)[0][0], found[-1])
    if KINDS[kind][1] is None:
        gate, up, down = ((w.float(), None if b is None else b.float()) for w, b in zip(weights, biases, strict=True))
        dense = F.linear(F.relu(F.linear(x, *gate)) * F.linear(x, *up), *down)
        assert (found - dense).abs().max() <= 1e-5 * dense.abs().max()


@pytest.mark.parametrize("kind", ["bfloat16", "Q4_0"])
def test_mlps_without_up_rows_have_records_of_output_rows(kind):
    (gate, _, down), (of_gate, _, of_down), _ = gated(kind, 192, 600)
    mlp, x = of_relu((gate, down), (of_gate, of_down), KINDS[kind][1]), inputs(5, 192)
    given = rounded_inputs(x) if KINDS[kind][1] else x
    expected = F.relu(given @ mlp.rows(0, 0, 600).T + of_gate.float()) @ mlp.rows(2, 0, 600) + of_down.float()
    found, n_read = mlp.outputs(x, RELU)
    assert (found - expected).abs().max() <= 1.5e-2 * expected.abs().max() and n_read < 5 * 600
    assert [part.n_out for part in mlp.parts] == [600, 192] and mlp.record_bytes < 192 * 2 + 64


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_dense_decode(kind):
    """Gate and up rows to the bit; so are output rows of floats. The others are rounded along the row."""
    weights, _, mlp = gated(kind, 192, 600)
    rounded = KINDS[kind][1]
    for part in range(2):
        expected = weights[part].float() if rounded is None else Matrix.of(weights[part], None, rounded).widened().T
        assert torch.equal(mlp.rows(part, 0, 600), expected) and torch.equal(mlp.rows(part, 16, 33), expected[16:33])
    down, outputs = weights[2].T.contiguous(), {"Q8_0": "Q8_0", "Q4_0": "Q4_1"}.get(kind)
    expected = down.float() if outputs is None else Matrix.of(down, None, outputs).widened().T
    assert torch.allclose(mlp.rows(2, 0, 600), expected, rtol=1e-5, atol=1e-6)
    assert mlp.record_bytes % 64 == 0 and mlp.n_bytes == mlp.gate.n_bytes + 600 * mlp.record_bytes
    assert mlp.n_bytes <= 1.25 * 3 * 600 * 192 * {"float32": 4, "Q8_0": 8.5 / 8, "Q4_0": 5 / 8}.get(kind, 2)


def test_threads_share_the_neurons_and_each_record_is_counted_once():
    _, biases, mlp = gated("bfloat16", 77, 600)
    x = inputs(5, 77)
    gates, expected = by_hand(mlp, x, biases)
    for n_threads in (1, 3, 50):  # also more of them than tiles
        out, n_read = torch.full_like(x, 7.0), np.array([100, 1000])
        outputs_of_nonzero(x.numpy(), mlp.words, RELU, n_threads, n_read, out.numpy())
        assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert n_read.tolist() == [100 + int((gates > 0).any(0).sum()), 1000 + int((gates > 0).sum())]


@pytest.mark.parametrize("kind", KINDS)
def test_held_neurons_compensation_and_linear_maps(kind):
    weights, biases, mlp = gated(kind, 128, 53)
    ids = torch.arange(0, 53, 3)
    repair = LayerCompensation(torch.randn(128), torch.randn(128, len(ids)) / 8)
    plain, held, x = mlp.held(ids), mlp.held(ids, repair), inputs(9, 128)
    cut = of_relu(
        (weights[0][ids], weights[1][ids], weights[2][:, ids]),
        (biases[0][ids], biases[1][ids], biases[2]),
        KINDS[kind][1],
    )
    assert torch.equal(plain.records, cut.records) and torch.equal(plain.outputs(x, RELU)[0], cut.outputs(x, RELU)[0])
    wanted = plain.rows(2, 0, 18) + repair.delta.float().T
    assert (held.rows(2, 0, 18) - wanted).abs().max() <= (1e-2 if KINDS[kind][1] is None else 0.1) * wanted.abs().max()
    assert torch.allclose(held.bias[:128], repair.bias.float() + mlp.bias[:128])
    # as prefill multiplies
    for number, part in enumerate(mlp.parts):
        rows = mlp.rows(number, 0, 53)
        weight, given = rows.T if number == 2 else rows, inputs(9, part.n_in)
        assert (part.n_out, part.n_in) == weight.shape and torch.equal(part.widened(), weight.T)
        expected = given @ weight.T + biases[number].float()
        for few in (1, 9):
            made = part.times(given[:few]) if few == 9 else part.of_few(given[:few].numpy())
            assert (made - expected[:few]).abs().max() <= 3e-2 * expected.abs().max()
        assert (part.times_narrowed(given) - expected).abs().max() <= 1e-2 * expected.abs().max()


def engine_of(weights="stored", wide=False):
    model = tiny_model("llama-relu-bias")
    if wide:  # so that codes fill groups
        config = model.config
        config.hidden_size, config.intermediate_size, config.head_dim = 64, 320, 16
        torch.manual_seed(0)
        model = type(model)(config).eval()
    return LeanEngine(model, find_mlps(model), DecodeConfig(weights=weights))


def decoded(engine, ids, *chosen, n_new=8):
    predictor = RowPredictor(*chosen) if len(chosen) > 1 else FixedPredictor(chosen[0])
    sparse = SparseModel(engine.model, predictor, config=engine.config, engines=[engine])
    return generate(sparse, ids, n_new), sparse.latest


DENSE = NeuronSelection("dense")


@pytest.mark.parametrize("weights", ["stored", "bf16", "int8", "int4"])
def test_decode_reads_what_is_not_zero_and_forced_text_equals_steps(weights):
    engine, ids = engine_of(weights, wide=True), token_ids(1, 9)
    assert engine.skips_zeros
    engine.take_over()
    found, facts = decoded(engine, ids, DENSE)
    mlps = [engine._weights.dense_mlp(number) for number in range(3)]
    assert all(isinstance(mlp, ReluMLP) for mlp in mlps)
    n_neurons, n_steps = 3 * 320, 7
    n_read = round(facts.read.read_ratio * n_steps * n_neurons)
    assert 0.2 * n_steps * n_neurons < n_read < 0.8 * n_steps * n_neurons
    assert facts.read.mlp == n_steps * sum(mlp.gate.n_bytes for mlp in mlps) + n_read * mlps[0].record_bytes
    assert facts.read.mlp_per_step < 0.85 * engine.whole_bytes()
    new = found.sequences[:, 9:]
    prompt = engine.model(input_ids=ids, use_cache=True).past_key_values
    (held,) = engine.prepare([DENSE])
    engine.release()
    expected = engine.forced(new[:, :-1], prompt, held)
    assert (logits(found)[0, 1:] - expected).abs().max() <= 2e-4 * expected.abs().max()
    assert abs(engine.read().mlp - facts.read.mlp) <= 3 * mlps[0].record_bytes
    if weights in ("stored", "int8"):  # as all of the model's own weights give
        model = engine_of(wide=True).model
        with torch.no_grad():
            own = model(input_ids=found.sequences).logits[0, 9:-1]
        assert (own - expected).abs().max() <= (1e-4 if weights == "stored" else 0.2) * own.abs().max()


def test_rows_of_a_batch_have_their_own_zeros_and_sets():
    engine = engine_of()
    chosen = [DENSE, selection(engine.model, 0.5, 0), selection(engine.model, 0.5, 1)]
    ids = token_ids(3, 9)
    batch, _ = decoded(engine, ids, *chosen)
    for row, each in enumerate(chosen):
        alone, facts = decoded(engine, ids[row : row + 1], each)
        assert torch.equal(batch.sequences[row], alone.sequences[0])
        assert facts.read.read_ratio < 0.8 * each.keep_ratio(engine.layers)


@pytest.mark.parametrize("weights", ["stored", "int8", "int4"])
def test_a_layout_by_neuron_is_mapped_later_and_prefill_reads_it(weights, cache, tmp_path):
    folder, first, second = tmp_path / "model", Said(), Said()
    save_tiny_checkpoint(folder, hidden_act="relu", hidden_size=64, intermediate_size=320, head_dim=16)
    text = text_of(folder, first, weights=weights)
    assert ["once" in line for line in first.lines] == [True]
    assert [f"-{weights}-by-neuron-" in place.name for place in folders(cache)] == [True]
    assert text_of(folder, second, weights=weights) == text and not second.lines
    # the same as of weights that are laid out in memory
    whole = load_model(str(folder), "stored")
    with coreinfer_sim.load(None, load_model(str(folder), "stored"), mode="dense", weights=weights) as generator:
        generator.take_over()
        run = generator.generate(PROMPT, max_new_tokens=12, ignore_eos=True)
    assert run.text == text and run.skips_zeros and run.read_ratio < 0.8
    assert run.as_dict()["skips_zeros"] and run.mlp_bytes_per_token < run.dense_mlp_bytes_per_token
    # no weight lies twice: the model's own modules multiply by the layout
    with coreinfer_sim.load(None, str(folder), mode="dense", weights=weights) as generator:
        for layer, own in zip(generator.language_model.layers, whole.layers, strict=True):
            for name in layer.projections:
                weight, _ = linear_parameters(getattr(layer.owner, name))
                expected = getattr(own.owner, name).weight
                error = (weight - expected).abs().max() / expected.abs().max()
                assert error <= {"stored": 0, "int8": 0.01, "int4": 0.15}[weights]


def test_other_activations_are_read_whole(tmp_path):
    model = tiny_model("llama")
    assert not LeanEngine(model, find_mlps(model), DecodeConfig()).skips_zeros
    folder = save_tiny_checkpoint(tmp_path / "model")
    with coreinfer_sim.load(None, str(folder), mode="dense") as generator:
        run = generator.generate(PROMPT, max_new_tokens=4, ignore_eos=True)
    assert not run.skips_zeros and run.read_ratio == 1


@pytest.mark.parametrize("name", ["opt", "arcee", "nemotron"])
@pytest.mark.parametrize("weights", ["stored", "int8"])
def test_plain_mlps_skip_zeros_too(name, weights):
    """Two of these square what is not zero."""
    model = model_named(name)
    expected = model(input_ids=token_ids(1, 9)).logits[0]
    engine = LeanEngine(model, find_mlps(model), DecodeConfig(weights=weights))
    assert engine.skips_zeros == (weights == "stored" or model.config.hidden_size % 64 == 0)
    engine.take_over()
    found, facts = decoded(engine, token_ids(1, 9), DENSE)
    if engine.skips_zeros:
        assert 0.1 < facts.read.read_ratio < 0.9 and facts.read.mlp_per_step < engine.whole_bytes()
    (held,) = engine.prepare([DENSE])
    forced = engine.forced(token_ids(1, 9), None, held)
    assert (forced - expected).abs().max() <= (1e-4 if weights == "stored" else 0.2) * expected.abs().max()
    prompt = engine.model(input_ids=token_ids(1, 9), use_cache=True).past_key_values
    text = engine.forced(found.sequences[:, 9:-1], prompt, held)
    assert (logits(found)[0, 1:] - text).abs().max() <= 2e-4 * text.abs().max()
