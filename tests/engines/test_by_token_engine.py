"""The lean engine where each token reads a share of the held neurons."""

from __future__ import annotations

import pytest
import torch
from calls import RowPredictor, generate, left_padded, logits, selection, token_ids
from tiny_models import tiny_model

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.choosing.predictors import FixedPredictor, ReadingPredictor
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.in_transformers import TransformersEngine
from coreinfer_sim.engines.lean.engine import LeanEngine
from coreinfer_sim.engines.lean.planes import TokenMLP
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.index.compensated import LayerCompensation
from coreinfer_sim.models.mlps import dense_bytes, find_mlps

FAMILIES = ["llama", "llama-relu-bias", "qwen2", "qwen3"]
WEIGHTS = ["stored", "bf16", "int8", "int4"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Thresholds of these tests' own passages."""
    folder = tmp_path_factory.getbasetemp() / "by-token"
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(folder))
    return folder


def passages():
    return [token_ids(1, 100, seed=50 + n)[0] for n in range(6)]


def engine_of(family="llama", weights="stored", measured=True):
    model = tiny_model(family)
    engine = LeanEngine(model, find_mlps(model), DecodeConfig(weights=weights))
    if measured:
        engine.calibrate(passages)
    return engine


def reading(ratio, ids=None, compensation=None):
    return NeuronSelection("all", {} if ids is None else ids, compensation=compensation, read_ratio=ratio)


def sparse_model(engine, *selections):
    predictor = RowPredictor(*selections) if len(selections) > 1 else FixedPredictor(selections[0])
    return SparseModel(engine.model, predictor, config=engine.config, engines=[engine])


def forced(engine, ids, chosen):
    """Logits of a text without a prompt, and what it read."""
    engine.release()
    (held,) = engine.prepare([chosen])
    found = engine.forced(ids, None, held)
    return found, engine.read()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_what_was_measured_on_a_corpus_takes_the_place_of_passages(weights):
    """By the name of the layout; of the texts, what stands behind the prompt counts."""
    texts = [(token_ids(1, 60, seed=70 + n)[0], 20) for n in range(5)]
    done = []
    found = engine_of(weights=weights, measured=False).histograms(texts, done.append)
    assert done == [1] * 5 and len(found) == 1
    ((name, counts),) = found.items()
    layers = find_mlps(tiny_model("llama"))
    assert (counts.sum(1) == 5 * 40 * layers[0].d_ff).all()

    def unwanted():
        raise AssertionError("nothing is measured anew")

    engine = engine_of(weights=weights, measured=False)
    engine.calibrate(unwanted, known={**found, "another": counts[:1]})
    shares = [forced(engine, token_ids(1, 60, seed=70 + n), reading(0.3))[1].read_ratio for n in range(5)]
    assert abs(sum(shares) / 5 - 0.3) <= 0.03
    for other in ({name: counts[:, 1:]}, {f"{name}?": counts}):
        engine = engine_of(weights=weights, measured=False)
        with pytest.raises(AssertionError, match="measured anew"):
            engine.calibrate(unwanted, known=other)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_single_steps_equal_forced_text(family, weights):
    """Of three texts two exactly: where an estimate ties with its threshold, the order of sums decides.

    A step of one row and a forced text of many add up in different orders, and so do different processors. A neuron at
    the threshold is read by one and left out by the other, which moves the logits a little.
    """
    engine, chosen, errors = engine_of(family, weights), reading(0.3), []
    engine.take_over()
    for seed in range(3):
        ids = token_ids(1, 9, seed=seed)
        found = generate(sparse_model(engine, chosen), ids, 12)
        new = found.sequences[:, 9:]
        prompt = engine.model(input_ids=ids, use_cache=True).past_key_values
        (held,) = engine.prepare([chosen])
        expected = engine.forced(new[:, :-1], prompt, held)
        errors.append(float((logits(found)[0, 1:] - expected).abs().max() / expected.abs().max()))
    assert sorted(errors)[1] <= 2e-4 and max(errors) <= 2e-2
    dense = engine.forced(new[:, :-1], prompt, engine.prepare([NeuronSelection("dense")])[0])
    assert (dense - expected).abs().max() > 1e-3 * expected.abs().max()  # something was left out


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_neurons_are_read_at_ratio_1(family, weights):
    """By the very same weights and loops as dense decode."""
    engine, ids = engine_of(family, weights), token_ids(1, 30)
    dense, read = forced(engine, ids, NeuronSelection("dense"))
    every, read_again = forced(engine, ids, reading(1.0))
    assert torch.equal(dense, every) and read == read_again
    if engine.skips_zeros:
        assert 0.3 < read.read_ratio < 0.7
    else:
        assert read.read_ratio == pytest.approx(1.0)
    one, other = (generate(sparse_model(engine, each), ids) for each in (NeuronSelection("dense"), reading(1.0)))
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("weights", ["stored", "int8", "int4"])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.45])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_share_that_is_read_lies_near_the_ratio(family, ratio, weights):
    engine = engine_of(family, weights)
    _, read = forced(engine, token_ids(1, 100, seed=9), reading(ratio))
    assert read.n_steps == 100
    assert abs(read.read_ratio - ratio) <= 0.05


def test_more_reading_is_nearer_to_dense():
    engine, ids = engine_of("llama"), token_ids(1, 60, seed=9)
    dense, _ = forced(engine, ids, NeuronSelection("dense"))
    far = [float((forced(engine, ids, reading(ratio))[0] - dense).square().mean()) for ratio in (0.2, 0.5, 0.8, 0.95)]
    assert far == sorted(far, reverse=True) and far[-1] < far[0] / 20


@pytest.mark.parametrize("weights", WEIGHTS)
def test_bytes_are_estimates_and_the_records_that_were_read(weights):
    engine, chosen, ids = engine_of("llama", weights), reading(0.3), token_ids(1, 9)
    layers = find_mlps(engine.model)
    mlps = [engine._weights.token_mlp(layer.number) for layer in layers]
    n_neurons = sum(layer.d_ff for layer in layers)
    sparse = sparse_model(engine, chosen)
    generate(sparse, ids, 12)
    for read, n_steps in ((sparse.latest.read, 11), (forced(engine, token_ids(1, 40), chosen)[1], 40)):
        assert read.n_steps == n_steps
        n_read = round(read.read_ratio * n_steps * n_neurons)
        assert 0 < n_read < n_steps * n_neurons
        of_records = n_read * mlps[0].record_bytes
        assert read.mlp == n_steps * sum(mlp.estimate_bytes for mlp in mlps) + of_records
        assert read.per_step - read.mlp_per_step == engine.other_bytes()
    assert engine.neurons_read() == [{}]
    (held,) = engine.prepare([chosen])
    assert held.n_bytes == 0 and not held.layers  # all lie in the model's own


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_watched_call_tells_which_neurons_its_tokens_read(weights):
    """As many as were counted, of the held ones alone, and the same for a row in a batch; the text does not change."""
    held = selection(tiny_model("llama"), 0.6).ids
    engine = engine_of("llama", weights)
    every, cut, ids = reading(0.3), reading(0.25, {0: held[0], 2: held[2]}), token_ids(2, 9)
    told = []

    def watched(chosen, row):
        sparse = sparse_model(engine, chosen)
        found = []
        given = {"attention_mask": torch.ones_like(row), "max_new_tokens": 12, "do_sample": False}
        with sparse.turns.call():
            output, facts = sparse.generate_beside_others(row, None, watch=found.append, **given)
        assert torch.equal(output, generate(sparse_model(engine, chosen), row, 12).sequences)
        return found, facts.read

    for chosen, row in ((every, ids[:1]), (cut, ids[1:])):
        found, read = watched(chosen, row)
        assert len(found) == read.n_steps == 11
        n_neurons = sum(layer.d_ff for layer in engine.layers)
        n_read = sum(len(step.get(layer.number, range(layer.d_ff))) for step in found for layer in engine.layers)
        assert n_read == round(read.read_ratio * read.n_steps * n_neurons)
        assert len({tuple(step[0].tolist()) for step in found}) > 1  # each token chose anew
        told.append(found)
    assert all(sorted(step) == [0, 1, 2] for step in told[0])
    for number in (0, 2):
        assert all(set(step[number].tolist()) <= set(held[number].tolist()) for step in told[1])


def test_fewer_bytes_are_read_than_by_dense_decode():
    """Of wide MLPs: a tiny one's records are mostly what fills the lines up."""
    config = tiny_model("llama").config
    config.hidden_size, config.intermediate_size, config.num_attention_heads, config.head_dim = 256, 512, 4, 64
    model = type(tiny_model("llama"))(config).eval()
    layers = find_mlps(model)
    for weights, most in (("bf16", 0.55), ("int8", 0.7), ("int4", 0.75)):
        engine = LeanEngine(model, layers, DecodeConfig(weights=weights))
        engine.calibrate(passages)
        _, dense = forced(engine, token_ids(1, 20), NeuronSelection("dense"))
        _, read = forced(engine, token_ids(1, 20), reading(0.2))
        assert read.mlp < most * dense.mlp and read.other == dense.other


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("n_rows", [2, 5])
def test_rows_of_a_batch_decode_as_they_would_alone(n_rows, weights):
    engine = engine_of("llama", weights)
    every, held = reading(0.3), reading(0.25, selection(engine.model, 0.6).ids)
    kinds = [every, held, NeuronSelection("dense"), selection(engine.model, 0.5, seed=4)]
    mine = [kinds[n % 4] for n in range(n_rows)]
    rows = [token_ids(1, 3 + n, seed=n) for n in range(n_rows)]
    ids, mask = left_padded(*rows)
    batch = generate(sparse_model(engine, *mine), ids, attention_mask=mask)
    for n, row in enumerate(rows):
        alone = generate(sparse_model(engine, mine[n]), row)
        assert torch.equal(batch.sequences[n, ids.shape[1] :], alone.sequences[0, row.shape[1] :])
        assert (logits(batch)[n] - logits(alone)[0]).abs().max() <= 1e-4


def test_rows_of_one_choice_share_what_they_read():
    engine, chosen, ids = engine_of(), reading(0.3), token_ids(3, 9)
    mlp = engine._weights.token_mlp(0)
    sparse = sparse_model(engine, chosen)
    generate(sparse, ids)
    together, alone = sparse.latest.read, []
    for row in ids:
        generate(sparse, row[None])
        alone.append(sparse.latest.read)
    estimates = 3 * mlp.estimate_bytes * together.n_steps
    records = [each.mlp - estimates for each in alone]
    assert max(records) <= together.mlp - estimates < sum(records)
    # a token reads what it would read alone
    assert together.read_ratio == pytest.approx(sum(each.read_ratio for each in alone) / 3)


def test_rows_that_have_ended_read_nothing():
    """Whichever of the groups they were in."""
    engine, ids = engine_of(), token_ids(2, 9)
    choices = reading(0.2), reading(0.5, selection(engine.model, 0.7).ids)
    free = generate(sparse_model(engine, *choices), ids, 12).sequences[:, 9:]
    for row in range(2):
        others = set(free[1 - row].tolist())
        ends = next((n, int(token)) for n, token in enumerate(free[row]) if int(token) not in others and n < 8)
        sparse = sparse_model(engine, *choices)
        generate(sparse, ids, 12, eos_token_id=ends[1], pad_token_id=0)
        read = sparse.latest.read
        parts = []
        for own, n_new in ((row, ends[0] + 1), (1 - row, 12)):
            alone = sparse_model(engine, choices[own])
            generate(alone, ids[own : own + 1], n_new)
            parts.append(alone.latest.read)
        assert read.n_steps == 11
        assert read.mlp == sum(each.mlp for each in parts)


def test_a_token_that_reads_all_in_a_batch_reads_all():
    engine, ids = engine_of(), token_ids(2, 9)
    sparse = sparse_model(engine, NeuronSelection("dense"), reading(0.3))
    generate(sparse, ids)
    alone = sparse_model(engine, reading(0.3))
    generate(alone, ids[1:])
    assert sparse.latest.read.read_ratio == pytest.approx((1 + alone.latest.read.read_ratio) / 2)
    assert sparse.latest.read.mlp == alone.latest.read.mlp + dense_bytes(engine.layers) * sparse.latest.read.n_steps


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_held_neurons_are_read_by_token(family, weights):
    """Also with compensation, and a layer that is not named."""
    engine = engine_of(family, weights)
    ids = dict(selection(engine.model, 0.6).ids)
    del ids[1]
    d_model = engine.layers[0].d_model
    repairs = {n: LayerCompensation(torch.randn(d_model) / 8, torch.randn(d_model, len(ids[n])) / 8) for n in ids}
    for repair in (None, repairs):
        chosen = reading(0.25, ids, repair)
        found, read = forced(engine, token_ids(1, 40), chosen)
        (held,) = engine.prepare([chosen])
        assert sorted(held.layers) == [0, 2] and all(isinstance(mlp, TokenMLP) for mlp in held.layers.values())
        assert held.n_bytes == sum(mlp.n_bytes for mlp in held.layers.values())
        assert 0.1 < read.read_ratio < 0.25 + 0.02  # what is not held is not read
        (named,) = engine.neurons_read()
        assert sorted(named) == [0, 2] and torch.equal(named[0], ids[0])
        # a higher ratio approaches the held set itself, but for what int4 rounds in another way
        whole = NeuronSelection("held", ids, compensation=repair)
        expected, _ = forced(engine, token_ids(1, 40), whole)
        near, _ = forced(engine, token_ids(1, 40), reading(0.9999, ids, repair))
        assert (near - expected).square().mean() < (found - expected).square().mean() / (1 if weights == "int4" else 4)


def test_two_ratios_do_not_disturb_each_other():
    engine, ids = engine_of(), token_ids(1, 30)
    held = selection(engine.model, 0.6).ids
    choices = [reading(0.2), reading(0.5), reading(0.2, held), reading(0.5, held), NeuronSelection("held", held)]
    first = [forced(engine, ids, chosen) for chosen in choices]
    again = [forced(engine, ids, chosen) for chosen in reversed(choices)]
    for (logits_, read), (others, other_read) in zip(first, reversed(again), strict=True):
        assert torch.equal(logits_, others) and read == other_read
    assert len({read.mlp for _, read in first}) == 5
    rows = token_ids(2, 9)
    batch = generate(sparse_model(engine, *choices[2:4]), rows)  # of one set, two shares
    for n in range(2):
        alone = generate(sparse_model(engine, choices[2 + n]), rows[n : n + 1])
        assert torch.equal(batch.sequences[n], alone.sequences[0])


def test_what_is_dense_stays_dense(encoder):
    class Unfamiliar:
        mode, needs_text, alpha = "similarity", True, None

        def select(self, prompts, statistics, n_rows):
            return [NeuronSelection("dense"), NeuronSelection("similarity")][:n_rows]

    engine = engine_of()
    chosen = ReadingPredictor(Unfamiliar(), 0.3).select(["a", "b"], None, 2)
    assert [each.read_ratio for each in chosen] == [1.0, 0.3]
    assert forced(engine, token_ids(1, 9), chosen[0])[1].read_ratio == pytest.approx(1.0)
    predictor = make_predictor("all", engine.layers, read_ratio=0.3)
    assert isinstance(predictor, ReadingPredictor) and predictor.mode == "all"
    assert not isinstance(make_predictor("all", engine.layers), ReadingPredictor)


def test_what_was_measured_is_kept(monkeypatch, cache):
    for path in (cache / "thresholds").glob("*"):  # tiny models of other families have the same MLPs
        path.unlink()
    first = engine_of("llama", "int8")

    def never(*_):
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr("coreinfer_sim.engines.lean.measuring.measured_histograms", never)
        later = engine_of("llama", "int8")
    ids = token_ids(1, 20)
    assert torch.equal(forced(first, ids, reading(0.3))[0], forced(later, ids, reading(0.3))[0])
    for path in (cache / "thresholds").iterdir():
        path.write_text("{")
    anew = engine_of("llama", "int8")
    assert torch.equal(forced(first, ids, reading(0.3))[0], forced(anew, ids, reading(0.3))[0])


def test_packed_weights_are_taken_over_where_what_was_measured_is_kept():
    """Nothing then looks at the layers before prefill reads the engine's weights."""
    ids = token_ids(1, 20)
    expected = forced(engine_of("llama", "int8"), ids, reading(0.3))[0]
    engine = engine_of("llama", "int8")
    engine.take_over()
    assert torch.equal(forced(engine, ids, reading(0.3))[0], expected)


def test_what_cannot_read_by_token_says_so():
    engine = engine_of("llama", measured=False)
    with pytest.raises(ConfigError, match="nothing was measured yet: the engine was not calibrated"):
        engine.prepare([reading(0.3)])
    model = tiny_model("llama")
    other = TransformersEngine(model, find_mlps(model), DecodeConfig(engine="transformers"))
    with pytest.raises(
        ConfigError, match="the engine transformers reads all held neurons; leave it out, or use the engine lean"
    ):
        other.prepare([reading(0.3)])
    assert other.prepare([reading(1.0)])
