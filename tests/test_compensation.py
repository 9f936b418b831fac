"""Compensation is the least-squares answer, and calibration sees just what decode will see, in every family."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from coreinfer_sim_cli.main import main
from safetensors.torch import save_file
from tiny_models import BY_KEY, N_LAYERS, VOCABULARY, tiny_model
from transformers import OPTForCausalLM

from coreinfer_sim.base.corpus import Sentence
from coreinfer_sim.base.errors import BuildError, ConfigError, IndexFormatError
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.settings import BuildConfig, CompensationConfig, CorpusConfig, Mode, Ranking, Score, Start
from coreinfer_sim.building.build import build_index
from coreinfer_sim.building.shards import PartialSums
from coreinfer_sim.choosing.index_sets import default_sets
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.choosing.selection import NeuronSelection, compact_bytes, n_within
from coreinfer_sim.engines.compact import compact_model, install, installed, linear_parameters
from coreinfer_sim.fitting import sets as compensating
from coreinfer_sim.fitting.budgets import PROBE, layer_costs, neurons_of, share_out
from coreinfer_sim.fitting.calibration import (
    CalibrationText,
    Fit,
    _advance,
    _batches,
    _moments,
    decoder_blocks,
    fit_each_alone,
    fit_layers,
)
from coreinfer_sim.fitting.comparing import Kind, choose_kinds, compare_sets, plain_set
from coreinfer_sim.fitting.least_squares import (
    RIDGE,
    RIDGES,
    Moments,
    best_ridge,
    compensate,
    left_over,
    surgeon_score,
)
from coreinfer_sim.fitting.reading import packs, read_densely
from coreinfer_sim.fitting.sets import (
    Training,
    _begun,
    make_distiller,
    make_fitter,
    trained_together,
    trainings,
)
from coreinfer_sim.fitting.students import Distillation, training_bytes
from coreinfer_sim.fitting.texts import CalibrationCorpus, calibration_text, save_selection
from coreinfer_sim.fitting.training import (
    _sound_gradients,
    distil,
    distil_jointly,
    divergences_of,
    n_decoded,
    training_on,
)
from coreinfer_sim.generation.text import TextGenerator
from coreinfer_sim.index.clustering import Clustering
from coreinfer_sim.index.compensated import LayerCompensation, load_compensated
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import ProfileInfo, compensation_file, manifest_checksum
from coreinfer_sim.models.loading import LanguageModel, load_model
from coreinfer_sim.models.mlps import find_mlps

COMPENSATION = CompensationConfig(keep_ratios=(0.5, 0.7), tokens=300, distil_tokens=200)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments_of(features, targets, weights=None):
    moments = Moments(features.shape[1], targets.shape[1])
    weights = torch.ones(len(features)) if weights is None else weights
    for part in range(0, len(features), 100):
        rows = slice(part, part + 100)
        moments.add(features[rows], targets[rows], weights[rows])
    return moments


@pytest.fixture
def correlated(monkeypatch):
    """Neurons that say much of each other, with next to no ridge: z [500, 12], W [6, 12], bias [6]."""
    monkeypatch.setattr("coreinfer_sim.fitting.least_squares.RIDGE", 1e-7)
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


@torch.no_grad()
def reads_of(model, layer, ids):
    """Return activation site and output of a layer's MLP, each [n_tokens, width]."""
    found = {}
    hook = layer.output.register_forward_hook(lambda _m, i, o: found.update(z=i[0], y=o.clone()))
    model(ids, use_cache=False)
    hook.remove()
    return [found[name].reshape(-1, found[name].shape[-1]) for name in "zy"]


def test_merged_weights_give_the_compensated_output(model):
    layers = find_mlps(model)
    layer = layers[0]
    input_ids = torch.randint(4, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    z, _ = reads_of(model, layer, input_ids)
    kept = torch.arange(0, layer.d_ff, 3)
    weight, bias = linear_parameters(layer.output)
    repair = LayerCompensation(drawn(layer.d_model, seed=1), drawn(layer.d_model, len(kept), seed=2))
    wanted = z[:, kept] @ (weight[:, kept] + repair.delta).T + repair.bias + (0 if bias is None else bias)
    compact = compact_model(layers, NeuronSelection("test", {0: kept}, compensation={0: repair}))
    n_bytes = sum(p.numel() * p.element_size() for module in compact[0].values() for p in module.parameters())
    dense = install(layers, compact)
    try:
        _, found = reads_of(model, layer, input_ids)
    finally:
        install(layers, dense)
    assert torch.allclose(found, wanted, atol=2e-4 * wanted.abs().max())
    assert compact_bytes(layer, len(kept), repair) == n_bytes


def language_model_of(model):
    return LanguageModel(model, None, "tiny", find_mlps(model))


def some_texts(n=12, seed=0):
    random = np.random.default_rng(seed)
    texts = []
    for _ in range(n):
        length = int(random.integers(12, 60))
        texts.append(
            CalibrationText(random.integers(4, VOCABULARY, length).tolist(), int(random.integers(1, length - 4)))
        )
    return texts


@torch.inference_mode()
def test_the_sparse_stream_is_what_decode_reads(model):
    language_model = language_model_of(model)
    layers, blocks = language_model.layers, decoder_blocks(language_model)
    texts = some_texts(5)
    kept = {n: torch.arange(n % 2, layers[n].d_ff, 2) for n in range(N_LAYERS)}
    batches = list(_batches(language_model, blocks, texts, Fit()))
    assert sum(len(batch.dense) for batch in batches) == len(texts)
    for layer, block in zip(layers, blocks, strict=True):
        selection = NeuronSelection("test", {layer.number: kept[layer.number]})
        for batch in batches:
            batch.dense_out = batch.calls[layer.number](block, batch.dense)
        with installed(layers, selection):
            _advance(layer, block, batches)
    found = []
    hook = blocks[-1].register_forward_hook(lambda _m, _i, o: found.append(o[0] if isinstance(o, tuple) else o))
    rows = [(batch, row) for batch in batches for row in range(len(batch.dense))]
    for text, (batch, row) in zip(sorted(texts, key=lambda text: -len(text.ids)), rows, strict=True):
        prompt, completion = text.ids[: text.n_prompt], text.ids[text.n_prompt :]
        cache = model(torch.tensor([prompt]), use_cache=True).past_key_values
        with installed(layers, NeuronSelection("test", kept)):
            model(torch.tensor([completion]), past_key_values=cache, use_cache=True)
        decoded = found[-1].reshape(-1, layers[0].d_model)
        stream = batch.sparse[row, text.n_prompt : len(text.ids)]
        assert torch.allclose(stream, decoded, atol=1e-4 * decoded.abs().max())
    hook.remove()


@torch.inference_mode()
def divergence(model, texts, selection):
    """Mean KL to the dense model after the prompts, which are read densely."""
    total = n = 0
    for text in texts:
        ids = torch.tensor([text.ids])
        dense = model(ids, use_cache=False).logits[0, text.n_prompt :].log_softmax(-1)
        cache = model(ids[:, : text.n_prompt], use_cache=True).past_key_values
        with installed(find_mlps(model), selection):
            own = model(ids[:, text.n_prompt :], past_key_values=cache, use_cache=True).logits[0].log_softmax(-1)
        total += (dense.exp() * (dense - own)).sum().item()
        n += len(dense)
    return total / n


@pytest.mark.parametrize("ranking", list(Ranking))
def test_fitted_sets_beat_plain_ones_in_every_family(model, ranking):
    language_model = language_model_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    texts = some_texts(40)
    n = language_model.layers[0].d_ff // 2
    fitted = fit_layers(language_model, texts, [n] * N_LAYERS, Fit(ranking=ranking, ridge=RIDGE))
    assert all(len(ids) == n and (ids.diff() > 0).all() for ids in fitted.ids.values())
    plain = replace(fitted, compensation=None)
    bar = 0.95 if language_model.layers[0].family.post_norm else 0.8  # a norm follows, which sees no squared errors
    assert divergence(model, texts, fitted) < bar * divergence(model, texts, plain)
    assert all((before[name] == value).all() for name, value in model.state_dict().items())


def test_a_ridge_chosen_on_held_texts_serves_unseen_ones_no_worse(model):
    language_model, texts, unseen = language_model_of(model), some_texts(40), some_texts(20, seed=1)
    n = [language_model.layers[0].d_ff // 2] * N_LAYERS
    chosen, least = (
        divergence(model, unseen, fit_layers(language_model, texts, n, Fit(ridge=r))) for r in (None, RIDGE)
    )
    assert chosen < 1.02 * least


def test_distillation_learns_in_every_family(model):
    language_model = language_model_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    texts = some_texts(30)
    fitted = fit_layers(language_model, texts, [language_model.layers[0].d_ff // 2] * N_LAYERS, Fit())
    blank = {n: replace(c, delta=0 * c.delta, bias=0 * c.bias) for n, c in fitted.compensation.items()}
    fitted = replace(fitted, compensation=blank)  # a tiny model's closed form leaves little to learn
    reported = []
    weight = linear_parameters(language_model.layers[0].output)[0]
    rate = 3e-3 / float(weight.square().mean().sqrt())  # tiny models' weights are smaller than what there is to learn
    settings = Distillation(learning_rate=rate, rate_of_change=None, tokens_per_step=200)
    (distilled,) = distil(language_model, [fitted], texts * 3, settings, reported.append)
    assert divergence(model, texts, distilled) < 0.9 * divergence(model, texts, fitted)
    assert sum(reported) == 3 * sum(len(text.ids) for text in texts)
    assert distilled.ids is fitted.ids
    for number, repair in distilled.compensation.items():
        was = vars(fitted.compensation[number])
        assert {n: v.shape for n, v in vars(repair).items() if v is not None} == {
            n: v.shape for n, v in was.items() if v is not None
        }
        assert not any(v.requires_grad for v in vars(repair).values() if v is not None)
    assert all((before[name] == value).all() for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_sets_that_are_trained_together_learn_what_each_would_alone(tiny_checkpoint):
    language_model = load_model(tiny_checkpoint, dtype="float32")
    texts, d_ff = some_texts(20), language_model.layers[0].d_ff
    starts = [fit_layers(language_model, texts, [n] * N_LAYERS, Fit()) for n in (d_ff // 2, d_ff // 4)]
    reported = []
    together = distil(language_model, starts, texts, Distillation(), reported.append)
    assert sum(reported) == sum(len(text.ids) for text in texts)  # read once for both
    for start, found in zip(starts, together, strict=True):
        (alone,) = distil(language_model, [start], texts, Distillation())
        for number, repair in alone.compensation.items():
            assert torch.equal(repair.delta, found.compensation[number].delta)
            assert not torch.equal(repair.delta, start.compensation[number].delta)


@pytest.mark.parametrize("jointly", [False, True], ids=["alone", "jointly"])
def test_training_moves_weights_by_what_the_fit_moved_them(tiny_checkpoint, jointly):
    language_model = load_model(tiny_checkpoint, dtype="float32")
    texts, d_ff = some_texts(20), language_model.layers[0].d_ff
    fitted = fit_layers(language_model, texts, [d_ff // 2] * N_LAYERS, Fit())

    def moved(share, settings):
        """How far training moves a layer's weights, over how far a fit did that is ``share`` of the true one."""
        small = {n: replace(c, delta=share * c.delta) for n, c in fitted.compensation.items()}
        start = replace(fitted, compensation=small)
        if jointly:
            ((found,),) = distil_jointly(language_model, [[start]], texts, [0] * len(texts), settings)
        else:
            (found,) = distil(language_model, [start], texts, settings)
        steps = [found.compensation[n].delta - small[n].delta for n in range(N_LAYERS)]
        return [float(step.norm() / small[n].delta.norm()) for n, step in enumerate(steps)]

    settings = Distillation(tokens_per_step=1)
    most = settings.rate_of_change * len(texts)  # one text a step, all steps in one direction
    for share in (1e-3, 1e-4):
        assert all(0.1 * most < each <= most for each in moved(share, settings))
        assert min(moved(share, replace(settings, rate_of_change=None))) > 2 * most
    unbound = moved(1e3, replace(settings, rate_of_change=None))
    assert moved(1e3, settings) == unbound  # the rate that goes by the weights is the most


def fitted_blankly(language_model, texts, n_sets):
    """Sets of different neurons whose compensation adds nothing yet, and a rate that suits so small a model."""
    layers = language_model.layers
    n_kept = [layer.d_ff // 2 for layer in layers]
    fitted = [fit_layers(language_model, texts[i::n_sets], n_kept, Fit()) for i in range(n_sets)]
    blank = [
        replace(
            each, compensation={n: replace(c, delta=0 * c.delta, bias=0 * c.bias) for n, c in each.compensation.items()}
        )
        for each in fitted
    ]
    rate = 3e-3 / float(linear_parameters(layers[0].output)[0].square().mean().sqrt())
    return blank, Distillation(learning_rate=rate, rate_of_change=None, tokens_per_step=200)


def test_sets_that_learn_jointly_share_what_they_learn_in_every_family(model):
    language_model, texts = language_model_of(model), some_texts(30)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blank, settings = fitted_blankly(language_model, texts, 2)
    reported = []
    (trained,) = distil_jointly(
        language_model, [blank], texts * 3, [i % 2 for i in range(30)] * 3, settings, reported.append
    )
    assert sum(reported) == 3 * sum(len(text.ids) for text in texts)
    for number, (was, found) in enumerate(zip(blank, trained, strict=True)):
        assert divergence(model, texts[number::2], found) < 0.95 * divergence(model, texts[number::2], was)
    for number in range(N_LAYERS):
        ids, other_ids = (each.ids[number] for each in trained)
        shared, places, other_places = np.intersect1d(ids, other_ids, return_indices=True)
        own, other = (each.compensation[number] for each in trained)
        assert 0 < len(shared) < len(ids) and torch.equal(own.bias, other.bias)
        assert torch.equal(own.delta[:, places], other.delta[:, other_places])
        assert not own.delta.requires_grad and own.delta.abs().sum() > 0
    assert all((before[name] == value).all() for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_texts_of_a_pack_and_filling_are_read_as_one_by_one_in_every_family(model, monkeypatch):
    texts = some_texts(7)
    n_last = [n_decoded(text) // (1 + i % 3) for i, text in enumerate(texts)]
    assert len(set(n_last)) > 3 and len({len(text.ids) for text in texts}) > 3
    if len(list(packs(model, texts))) > 1:
        assert model.config.model_type == "bloom" or model.config.sliding_window < 20  # such texts go one by one
        assert list(packs(model, texts)) == [[i] for i in range(7)]
        return
    together = read_densely(model, texts, n_last)
    assert (len(together.ids) % 32, len(together.seen) % 32) == (0, 0)
    monkeypatch.setattr("coreinfer_sim.fitting.reading._LENGTH_STEP", 1)
    alone = [read_densely(model, [text], [n]) for text, n in zip(texts, n_last, strict=True)]
    wanted = torch.cat([reading.log_probabilities for reading in alone])
    assert together.n_last == len(wanted) == sum(n_last) < len(together.ids)
    assert torch.allclose(together.log_probabilities[: len(wanted)], wanted, atol=1e-4)
    layers = find_mlps(model)
    half = NeuronSelection("half", {layer.number: torch.arange(layer.d_ff // 2) for layer in layers})
    with torch.no_grad():
        assert together.divergences(model).abs().max() < 1e-4
        with installed(layers, half):
            apart = torch.cat([reading.divergences(model) for reading in alone])
            assert apart.mean() > 1e-3 and torch.allclose(together.divergences(model), apart, atol=1e-4)


def test_packs_hold_what_fits_and_long_texts_are_read_alone(models, monkeypatch):
    monkeypatch.setattr("coreinfer_sim.fitting.reading._TOKENS_AT_ONCE", {"cpu": 100})
    texts = [CalibrationText([1] * n, n // 2) for n in (40, 60, 1, 300, 30, 70)]
    assert list(packs(models["llama"], texts)) == [[0, 1], [2], [3], [4, 5]]
    assert list(packs(models["bloom"], texts)) == [[i] for i in range(6)]
    assert list(packs(models["llama"], [])) == []


@pytest.mark.parametrize("joint", [False, True])
def test_training_on_packs_learns_what_it_does_one_by_one(models, monkeypatch, joint):
    language_model, texts = language_model_of(models["llama"]), some_texts(20)
    sets, settings = fitted_blankly(language_model, texts, 2)
    settings = replace(settings, tokens_per_step=100_000)  # a step for each reader

    def train(most):
        monkeypatch.setattr("coreinfer_sim.fitting.reading._TOKENS_AT_ONCE", {"cpu": most})
        if not joint:
            return distil(language_model, sets, texts, settings)
        return distil_jointly(language_model, [sets], texts, [i % 2 for i in range(20)], settings)[0]

    for one, several in zip(train(0), train(100), strict=True):
        for number in range(N_LAYERS):
            change, other = one.compensation[number].delta, several.compensation[number].delta
            assert change.abs().sum() > 0
            assert float((change - other).abs().mean()) < 0.02 * float(change.abs().mean())


@pytest.mark.parametrize("joint", [False, True])
def test_training_that_is_broken_off_ends_as_it_would_have(models, tmp_path, monkeypatch, joint):
    monkeypatch.setattr("coreinfer_sim.fitting.training._KEPT_EVERY", 0.0)
    language_model, texts = language_model_of(models["llama"]), some_texts(20)
    sets, settings = fitted_blankly(language_model, texts, 2)
    settings = replace(settings, tokens_per_step=50)
    path, left = tmp_path / "training" / "1.safetensors", []

    def train(checkpoint, report=None):
        if not joint:
            return distil(language_model, sets, texts, settings, report, checkpoint)
        return distil_jointly(language_model, [sets], texts, [0, 1] * 10, settings, report, checkpoint)[0]

    def interrupted(n_tokens):
        left.append(n_tokens)
        if len(left) == 5:
            raise KeyboardInterrupt

    def counted(*arguments):
        n_read.append(len(arguments[1]))
        return read_densely(*arguments)

    n_read = []
    monkeypatch.setattr("coreinfer_sim.fitting.training.read_densely", counted)
    wanted = train(None)
    assert sum(n_read) == len(texts)
    with pytest.raises(KeyboardInterrupt):
        train(path, interrupted)
    n_read.clear()
    assert path.exists() and all(p.requires_grad for p in language_model.model.parameters())
    reported = []
    found = train(path, reported.append)
    assert sum(reported) == sum(len(text.ids) for text in texts) and len(reported) < len(texts)  # steps at a time
    assert 0 < sum(n_read) < len(texts)  # what was done is not read again
    for one, two in zip(wanted, found, strict=True):
        assert all(torch.equal(one.compensation[n].delta, two.compensation[n].delta) for n in range(N_LAYERS))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BuildError, match="cannot be read"):
        train(path)


def test_divergences_of_packs_are_those_of_texts_one_by_one(models, monkeypatch):
    language_model, texts = language_model_of(models["llama"]), some_texts(20)
    sets, _ = fitted_blankly(language_model, texts, 2)
    compact = [compact_model(language_model.layers, each) for each in sets]
    reported = []
    together = divergences_of(language_model, texts, compact, reported.append)
    assert sum(reported) == 20 > len(reported)
    monkeypatch.setattr("coreinfer_sim.fitting.reading._TOKENS_AT_ONCE", {"cpu": 0})
    alone = divergences_of(language_model, texts, compact, lambda _n: None)
    assert np.min(alone) > 0
    np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_steps_are_larger_on_a_gpu_where_there_are_enough(monkeypatch):
    texts = some_texts(20)
    n_tokens = sum(n_decoded(text) for text in texts)
    assert training_on("cpu", texts, 1.0) == training_on("cuda", texts, 1.0) == Distillation(1.0)
    monkeypatch.setattr("coreinfer_sim.fitting.training._ENOUGH_STEPS", 2)
    large = training_on("cuda", texts, 1.0)
    assert large.tokens_per_step == min(1000, n_tokens // 2) > Distillation.tokens_per_step


def test_training_stops_at_gradients_that_are_no_numbers(models):
    language_model, texts = language_model_of(models["llama"]), some_texts(4)
    (start, _), settings = fitted_blankly(language_model, texts, 2)
    repair = start.compensation[0]
    broken = replace(start, compensation={**start.compensation, 0: replace(repair, bias=repair.bias * float("inf"))})
    with pytest.raises(BuildError, match="step 1 of 1 is nan, expected a finite one"):
        distil(language_model, [broken], texts, replace(settings, tokens_per_step=100_000))


def test_short_completions_leave_the_prompts_end_to_be_read_sparsely():
    assert n_decoded(CalibrationText(list(range(100)), 60)) == 40
    assert n_decoded(CalibrationText(list(range(100)), 97)) == 32
    assert n_decoded(CalibrationText(list(range(20)), 18)) == 19
    assert n_decoded(CalibrationText([1], 0)) == 0


def test_narrow_passes_give_the_moments_of_wide_ones(model):
    language_model = language_model_of(model)
    layers, blocks, fit = language_model.layers, decoder_blocks(language_model), Fit()
    first, second = layers[:2]
    kept = torch.arange(1, second.d_ff, 3)
    with torch.inference_mode():
        batches = list(_batches(language_model, blocks, some_texts(40), fit))
        for batch in batches:
            batch.dense_out = batch.calls[first.number](blocks[0], batch.dense)
        with installed(layers, NeuronSelection("test", {first.number: torch.arange(0, first.d_ff, 2)})):
            _advance(first, blocks[0], batches)
        wide, _ = _moments(second, blocks[1], batches, fit)
        narrow, _ = _moments(second, blocks[1], batches, fit, kept)
    expected = wide.of(kept)
    assert narrow.n_tokens == expected.n_tokens
    for name in ("gram", "cross", "features", "targets"):
        torch.testing.assert_close(getattr(narrow, name), getattr(expected, name), rtol=1e-4, atol=1e-3)


def test_ranking_by_energy_needs_no_products_of_all_neurons(models):
    language_model, texts = language_model_of(models["llama"]), some_texts(100)
    n = [language_model.layers[0].d_ff // 2] * N_LAYERS
    fit, taken = Fit(Ranking.ENERGY), []
    short = fit_layers(language_model, texts, n, fit)
    long = fit_layers(language_model, texts, n, fit, keep=lambda number, _moments: taken.append(number))
    assert taken == list(range(N_LAYERS))
    for number, ids in long.ids.items():
        assert (short.ids[number] == ids).all()
        torch.testing.assert_close(
            short.compensation[number].delta, long.compensation[number].delta, rtol=1e-2, atol=1e-3
        )


def test_dense_layers_stay_dense(models):
    language_model = language_model_of(models["llama"])
    d_ff = language_model.layers[0].d_ff
    fitted = fit_layers(language_model, some_texts(), [d_ff, d_ff // 3, d_ff], Fit())
    assert set(fitted.ids) == set(fitted.compensation) == {1}


def test_taking_back_earlier_errors_helps(models):
    model = models["llama"]
    language_model, texts = language_model_of(model), some_texts(60)
    n = [language_model.layers[0].d_ff // 3] * N_LAYERS
    with_carry, without = (fit_layers(language_model, texts, n, Fit(carry=carry)) for carry in (1.0, 0.0))
    assert divergence(model, texts, with_carry) < divergence(model, texts, without)


@pytest.mark.parametrize("ranking", list(Ranking))
def test_costs_are_the_divergence_of_a_layer_alone(models, ranking):
    language_model, fit = language_model_of(models["llama"]), Fit(ranking)
    fitted_on, measured_on = some_texts(20), some_texts(5, seed=1)
    costs = layer_costs(language_model, fitted_on, measured_on, fit)
    d_ff = language_model.layers[0].d_ff
    assert costs.shape == (N_LAYERS, d_ff) and (costs >= 0).all() and (np.diff(costs) <= 1e-6).all()
    for layer, ids, repair, _left in fit_each_alone(language_model, fitted_on, PROBE, fit):
        alone = NeuronSelection("test", {layer.number: ids}, compensation={layer.number: repair})
        expected = divergence(models["llama"], measured_on, alone)
        assert costs[layer.number, n_within(layer, PROBE) - 1] == pytest.approx(expected, rel=1e-3)


def test_budgets_follow_the_costs():
    falling = np.linspace(1, 0, 64)
    shares = share_out(np.stack([falling, 10 * falling**2, 0 * falling]), 0.4, 1 / 16)
    assert shares.mean() == pytest.approx(0.4)
    assert shares[1] > shares[0] > shares[2] == 1 / 16
    assert share_out(np.ones((3, 64)), 0.4, 1 / 16).mean() == pytest.approx(0.4)


def test_bytes_stay_within_the_keep_ratio(model):
    layers = find_mlps(model)
    dense = sum(layer.n_bytes for layer in layers)
    kept = neurons_of(layers, range(N_LAYERS), 0.6, None)
    repair = LayerCompensation(drawn(32))
    used = sum(compact_bytes(layer, n, repair) for layer, n in zip(layers, kept, strict=True))
    assert 0.5 * dense < used <= 0.6 * dense
    assert n_within(layers[0], 1e-9) == 1


class Letters:
    """A tokenizer of one token a letter."""

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.mark.parametrize(
    ("prompt", "text", "max_tokens", "expected", "n_prompt"),
    [
        ("ab", "ab\ncd", 99, "ab\ncd", 2),
        ("ab", "ab", 99, "ab", 1),
        ("ab", "Q: ab A: c", 99, "Q: ab A: c", 5),
        ("abcdef", "abcdefgh", 6, "adefgh", 4),
        ("ab", "ab" + "c" * 50, 10, "ab" + "c" * 8, 2),
        ("abcdefgh", "abcdefgh" + "c" * 50, 10, "aefgh" + "c" * 5, 5),
        ("other", "abcd", 3, "abc", 1),
    ],
)
def test_where_the_prompt_ends(prompt, text, max_tokens, expected, n_prompt):
    language_model = LanguageModel(None, Letters(), "letters", [])
    found = calibration_text(language_model, Sentence("0", prompt, text, len(text)), max_tokens)
    assert "".join(map(chr, found.ids)) == expected and found.n_prompt == n_prompt


@pytest.fixture(scope="module")
def built(tiny_checkpoint, encoder, tmp_path_factory):
    """An index with compensated sets at two keep ratios, built by two workers."""
    folder = tmp_path_factory.mktemp("compensated")
    topics = ["stars and planets", "bread and cheese", "judges and courts"]
    rows = [{"question": f"Tell me of {topics[i % 3]}, {i}.", "answer": f"They are {i} and more."} for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    build_index(
        tiny_checkpoint,
        CorpusConfig(str(folder / "rows.jsonl"), template="{question} {answer}"),
        folder / "index",
        BuildConfig(clusters=3, compensation=COMPENSATION),
        encoder=encoder,
        workers=2,
    )
    return folder / "index"


def test_an_index_brings_its_compensated_sets(built, tiny_checkpoint, encoder):
    index = SemanticIndex.load(built, encoder)
    language_model = load_model(tiny_checkpoint)
    assert index.wanted_sets() == (0.5, True) and index.has_compensation(0.7) and not index.has_compensation(0.6)
    dense = sum(layer.n_bytes for layer in language_model.layers)
    for ratio in (0.5, 0.7):
        chosen = index.selection(index.lookup("Tell me of planets.")[0], ratio)
        assert chosen.compensation is not None and chosen.mode == "similarity"
        assert 0.85 * ratio * dense < chosen.mlp_bytes(language_model.layers) <= ratio * dense
    assert index.global_selection(0.5).compensation is not None
    assert index.selection(index.lookup("stars")[0], 0.6).compensation is None
    assert index.selection(index.lookup("stars")[0], 0.5, "paper").compensation is None
    assert index.selection(index.lookup("stars")[0], 0.5, compensated=False).compensation is None
    part = index.selection(index.lookup("stars")[0], 0.5, layers="1:")
    assert set(part.ids) == set(part.compensation) == {1, 2}


def test_a_compensated_index_generates(built, tiny_checkpoint, encoder):
    language_model = load_model(tiny_checkpoint)
    predictor = make_predictor("similarity", language_model.layers, SemanticIndex.load(built, encoder))
    run = TextGenerator(language_model, predictor).generate("Tell me of bread.", max_new_tokens=5, do_sample=False)
    assert run.selection.compensation is not None and run.selection.mode in ("similarity", "global")


def test_a_damaged_set_is_refused_when_it_is_read(built, encoder, tmp_path):
    copy = shutil.copytree(built, tmp_path / "index")
    path = copy / compensation_file(0.5, None)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    index = SemanticIndex.load(copy, encoder)
    with pytest.raises(IndexFormatError, match="has the checksum"):
        index.global_selection(0.5)
    path.unlink()
    with pytest.raises(IndexFormatError, match="lacks"):
        SemanticIndex.load(copy, encoder)


def test_sets_of_earlier_releases_are_read_unless_they_were_stored_in_factors(tmp_path):
    ids, bias, path = torch.arange(4, dtype=torch.int32), drawn(6), tmp_path / "set"
    nothing = {"0.left": torch.zeros(6, 0), "0.right": torch.zeros(0, 4)}
    for more, delta in (({"0.left": drawn(6, 4)}, drawn(6, 4)), (nothing, None)):
        save_file({"0.ids": ids, "0.bias": bias, **more}, path)
        _, repairs = load_compensated(path, 6, 2)
        assert torch.equal(repairs[0].bias, bias)
        assert repairs[0].delta is None if delta is None else torch.equal(repairs[0].delta, delta)
    bypass = {"0.bypass_in": drawn(2, 6), "0.bypass_out": drawn(6, 2)}
    factors = {"0.left": drawn(6, 2), "0.right": drawn(2, 4)}
    for more, form in (({"0.left": drawn(6, 4), **bypass}, "with a bypass"), (factors, "in two factors")):
        save_file({"0.ids": ids, "0.bias": bias, **more}, path)
        with pytest.raises(
            IndexFormatError, match=f"stored {form}, which this release does not read; build the index anew"
        ):
            load_compensated(path, 6, 2)


def test_strange_shapes_are_refused(tmp_path):
    good = NeuronSelection("t", {0: torch.arange(4)}, compensation={0: LayerCompensation(drawn(6), drawn(6, 4))})
    save_selection(tmp_path / "good", good)
    ids, repairs = load_compensated(tmp_path / "good", 6, 2)
    assert set(ids) == {0} and torch.allclose(repairs[0].delta.float(), drawn(6, 4), atol=0.02)
    bad = replace(good, compensation={0: LayerCompensation(drawn(6), drawn(6, 3))})
    save_selection(tmp_path / "bad", bad)
    with pytest.raises(IndexFormatError, match="do not fit 4 neurons"):
        load_compensated(tmp_path / "bad", 6, 2)
    (tmp_path / "none").write_bytes(b"no safetensors")
    with pytest.raises(IndexFormatError, match="cannot be read"):
        load_compensated(tmp_path / "none", 6, 2)


def test_some_texts_are_held_out_of_every_fit(tmp_path):
    assignment = np.array([0] * 40 + [1] * 7 + [2] * 900)
    clustering = Clustering(centroids=np.zeros((3, 2), np.float32), assignment=assignment, similarity=np.ones(947))
    sentences = [Sentence(str(i), "p", f"p{i:04d}", 5) for i in range(947)]
    language_model = SimpleNamespace(tokenizer=Letters())
    corpus = CalibrationCorpus(language_model, sentences, clustering, BuildConfig(), 100, tmp_path)
    held = corpus.held_out
    assert [int(held[assignment == cluster].sum()) for cluster in range(3)] == [5, 0, 48]
    one = replace(clustering, centroids=np.zeros((1, 2), np.float32), assignment=0 * assignment)
    assert replace(corpus, clustering=one).held_out.sum() == 48
    for cluster in (None, 0, 1, 2):
        _, texts = corpus.texts(cluster, 10**9)
        read = {int("".join(map(chr, text.ids[1:]))) for text in texts}
        assert read == set(np.flatnonzero(~held & (True if cluster is None else assignment == cluster)))


@pytest.mark.parametrize("distil_tokens", [20, 10**6])
def test_training_reads_the_fits_own_texts_last_or_not_at_all(tiny_checkpoint, tmp_path, monkeypatch, distil_tokens):
    language_model = load_model(tiny_checkpoint)
    sentences = [Sentence(str(i), f"Tell me of {i}.", f"Tell me of {i}. It is {i} and more.", 9) for i in range(24)]
    clustering = Clustering(np.zeros((2, 2), np.float32), np.arange(24) % 2, np.ones(24))
    settings = replace(COMPENSATION, keep_ratios=(0.5,), tokens=20, distil_tokens=distil_tokens)
    config = BuildConfig(clusters=2, compensation=settings)
    corpus = CalibrationCorpus(language_model, sentences, clustering, config, 64, tmp_path)
    fitted, trained = [], []

    def watch(name, place, texts):
        """Note the texts that a function of the module is given as its argument at ``place``."""
        function = getattr(compensating, name)

        def watched(*args, **more):
            texts.append([tuple(text.ids) for text in args[place]])
            return function(*args, **more)

        monkeypatch.setattr(compensating, name, watched)

    watch("fit_layers", 1, fitted)
    watch("distil", 2, trained)
    fit = make_fitter(corpus, {"0.5": [language_model.layers[0].d_ff // 2] * N_LAYERS}, None)
    train = make_distiller(corpus, None, 0.5)
    for number in range(3):
        fit(number)
    for number in range(3):
        train(number)
    for of_fit, of_training in zip(fitted, trained, strict=True):
        again = [text in of_fit for text in of_training]
        assert not again[0] and again == sorted(again)
        assert sum(again) == (len(of_fit) if distil_tokens == 10**6 else 0)


def test_clusters_begin_to_learn_jointly_with_what_the_corpus_set_has_learnt(tiny_checkpoint, tmp_path, monkeypatch):
    language_model = load_model(tiny_checkpoint)
    texts = ["{0}, {0}! 12345 + 67890 = {0}?" if i % 2 else "Tell me of it. It is this and more." for i in range(24)]
    sentences = [Sentence(str(i), text.format(i)[:12], text.format(i), 9) for i, text in enumerate(texts)]
    clustering = Clustering(np.zeros((2, 2), np.float32), np.arange(24) % 2, np.ones(24))
    settings = replace(COMPENSATION, keep_ratios=(0.5,), distil_from=Start.JOINT)
    config = BuildConfig(clusters=2, compensation=settings)
    corpus = CalibrationCorpus(language_model, sentences, clustering, config, 64, tmp_path)
    begun = []

    def watched(language_model, families, *args):
        begun.extend(families)
        return distil_jointly(language_model, families, *args)

    monkeypatch.setattr(compensating, "distil_jointly", watched)
    fit = make_fitter(corpus, {"0.5": [language_model.layers[0].d_ff // 2] * N_LAYERS}, None)
    train = make_distiller(corpus, None, 0.5)
    for number in range(3):
        fit(number)
    train(0)
    before, after = (corpus.load(folder / compensation_file(0.5, None)) for folder in (tmp_path / "fitted", tmp_path))
    fitted = [corpus.load(tmp_path / "fitted" / compensation_file(0.5, c)) for c in range(2)]
    train(1)
    assert len(begun) == 1
    n_apart = 0
    for own, start in zip(fitted, begun[0], strict=True):
        for number, ids in own.ids.items():
            of_all = before.ids[number].tolist()
            common = [(i, of_all.index(n)) for i, n in enumerate(ids.tolist()) if n in of_all]
            n_apart += len(ids) - len(common)
            assert torch.equal(start.ids[number], ids)
            mine, theirs = zip(*common, strict=True)
            was, found, old, new = (each.compensation[number] for each in (own, start, before, after))
            wanted = was.delta.float()
            wanted[:, list(mine)] += (new.delta.float() - old.delta.float())[:, list(theirs)]
            assert not torch.equal(wanted, was.delta.float()) and torch.equal(found.delta, wanted.bfloat16())
            assert torch.equal(found.bias, was.bias.float() + new.bias.float() - old.bias.float())
    assert n_apart > 0


def test_the_better_set_is_found_on_held_out_texts(tiny_checkpoint, tmp_path):
    language_model = load_model(tiny_checkpoint)
    layers = language_model.layers
    sentences = [Sentence(str(i), f"Tell me of {i}.", f"Tell me of {i}. It is {i} and more.", 9) for i in range(48)]
    clustering = Clustering(np.zeros((2, 2), np.float32), np.arange(48) % 2, np.ones(48))
    config = BuildConfig(clusters=2, compensation=replace(COMPENSATION, keep_ratios=(0.5,)))
    n = [layers[0].d_ff // 2] * N_LAYERS
    corpus = CalibrationCorpus(language_model, sentences, clustering, config, 64, tmp_path)
    _, texts = corpus.texts(None, 10**6)
    good = fit_layers(language_model, texts, n, Fit())
    bad = replace(good, compensation={k: replace(c, delta=5 + 0 * c.delta) for k, c in good.compensation.items()})
    for cluster, selection in ((None, good), (0, bad), (1, good)):
        save_selection(tmp_path / compensation_file(0.5, cluster), selection)
    sums = PartialSums.zeros(np.arange(2), N_LAYERS, layers[0].d_ff)
    sums.energy[:] = np.random.default_rng(0).permutation(layers[0].d_ff)
    reported = []

    def plain(ratio, cluster):
        assert ratio == 0.5
        return plain_set(sums, range(N_LAYERS), n, cluster, layers[0].d_model)

    found = compare_sets(corpus, plain, reported.append)["0.5"]
    means = {c: {kind: np.mean(values) for kind, values in each.items()} for c, each in found.items()}
    assert means["0"]["corpus"] < means["0"]["plain"] < means["0"]["own"]
    assert found["1"]["corpus"] == found["1"]["own"] and len(found["1"]["own"]) == 3
    assert choose_kinds(found, 2) == {None: Kind.OWN, 0: Kind.CORPUS, 1: Kind.OWN}
    assert sum(reported) == corpus.held_out.sum() == 6
    short = [replace(each, text="a") if i % 2 else each for i, each in enumerate(sentences)]
    compared = compare_sets(replace(corpus, sentences=short), plain, reported.append)
    assert compared == {"0.5": {"0": found["0"]}}  # one token leaves nothing to decode
    held = [corpus.text(i) for i in np.flatnonzero(corpus.held_out & (clustering.assignment == 0))]
    for name, selection in (("corpus", good), ("plain", replace(plain(0.5, 0), compensation=None))):
        assert means["0"][name] == pytest.approx(by_text(language_model.model, held, selection), rel=1e-2)


def test_what_decodes_is_what_served_the_held_out_texts_best():
    own, corpus, plain = Kind.OWN, Kind.CORPUS, Kind.PLAIN

    def kinds(found, n_clusters):
        named = {str(c): {kind: list(values) for kind, values in each.items()} for c, each in found.items()}
        chosen = choose_kinds(json.loads(json.dumps(named)), n_clusters)
        return [chosen[c] for c in (None, *range(n_clusters))]

    level, worse = {own: (1, 2), corpus: (1, 2), plain: (2, 3)}, {own: (3, 4), corpus: (1, 3), plain: (2, 4)}
    assert kinds({0: level, 1: worse}, 3) == [own, own, corpus, own]  # the last has no texts
    harmed = {own: (2.0, 2.2, 2.1), corpus: (3, 3, 3), plain: (1.0, 1.3, 1.2)}
    assert kinds({0: harmed, 1: {**harmed, corpus: (1.5, 1.6, 1.7)}}, 2) == [plain, plain, plain]
    assert kinds({0: harmed, 1: {**harmed, corpus: (0.1, 0.2, 0.1)}}, 2) == [
        own,
        own,
        corpus,
    ]  # all texts decide together
    assert kinds({0: {**harmed, plain: (0.0, 5.0, 0.9)}}, 2) == [own, own, own]  # within the noise
    assert kinds({0: {own: (9,), corpus: (9,), plain: (1,)}}, 2) == [own, own, own]  # one text says nothing
    alone = {corpus: (2.0, 2.1), plain: (1.0, 1.1)}
    assert kinds({0: alone}, 1) == [plain, corpus]
    assert kinds({0: {**alone, plain: (2.0, 2.2)}}, 1) == kinds({}, 1) == [own, corpus]


def test_a_plain_set_is_the_neurons_of_highest_energy():
    rng = np.random.default_rng(0)
    sums = PartialSums(np.arange(2), *rng.integers(0, 1000, (3, 2, 2, 12)))
    for cluster in (None, 0, 1):
        chosen = plain_set(sums, [1, 2], [12, 5, 12], cluster, 6)
        energy = sums.energy.sum(0) if cluster is None else sums.energy[cluster]
        assert list(chosen.ids) == [1] and set(chosen.ids[1].tolist()) == set(np.argsort(-energy[0])[:5].tolist())
        assert chosen.compensation[1].delta is None and not chosen.compensation[1].bias.any()


def by_text(model, texts, selection):
    """The mean over texts of each one's divergence a token."""
    return sum(divergence(model, [text], selection) for text in texts) / len(texts)


def test_clusters_that_the_corpus_serves_better_hold_its_set(tiny_checkpoint, encoder, tmp_path, monkeypatch):
    rows = [
        {"question": f"Tell me of {'stars' if i % 2 else 'bread'}, {i}.", "answer": f"It is {i}."} for i in range(48)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    corpus = CorpusConfig(str(tmp_path / "rows.jsonl"), template="{question} {answer}")
    config = BuildConfig(clusters=2, compensation=replace(COMPENSATION, keep_ratios=(0.5,)))

    def found(*arguments):
        measured = compare_sets(*arguments)
        assert set(measured["0.5"]) == {"0", "1"}
        level = {"corpus": [1.0, 1.0], "plain": [3.0, 3.0]}
        return {"0.5": {"0": {**level, "own": [2.0, 2.0]}, "1": {**level, "own": [1.0, 1.0]}}}

    monkeypatch.setattr("coreinfer_sim.fitting.stages.compare_sets", found)
    index = build_index(tiny_checkpoint, corpus, tmp_path / "index", config, encoder=encoder)
    assert index.manifest.served_by_corpus(0.5) == [0]
    files = [(tmp_path / "index" / compensation_file(0.5, each)).read_bytes() for each in (None, 0, 1)]
    assert files[0] == files[1] != files[2]
    described = CliRunner().invoke(main, ["info", str(tmp_path / "index")])
    assert "the whole corpus's set in clusters 0," in described.stdout
    (told,) = json.loads(CliRunner().invoke(main, ["info", str(tmp_path / "index"), "--json"]).stdout)["compensation"]
    assert told["served_by_corpus"] == [0] and told["plain"] is False


@pytest.mark.parametrize("n_clusters", [1, 2])
def test_where_compensation_does_harm_plain_neurons_decode(tiny_checkpoint, encoder, tmp_path, monkeypatch, n_clusters):
    rows = [
        {"question": f"Tell me of {'stars' if i % 2 else 'bread'}, {i}.", "answer": f"It is {i}."} for i in range(48)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    corpus = CorpusConfig(str(tmp_path / "rows.jsonl"), template="{question} {answer}")
    config = BuildConfig(clusters=n_clusters, compensation=replace(COMPENSATION, keep_ratios=(0.5,)))
    fit = compensating.fit_layers

    def spoilt(*arguments, **more):
        fitted = fit(*arguments, **more)
        return replace(fitted, compensation={k: replace(c, bias=c.bias + 9) for k, c in fitted.compensation.items()})

    monkeypatch.setattr(compensating, "fit_layers", spoilt)
    lines = []

    class Told(Progress):
        def say(self, message: str) -> None:
            lines.append(message)

    out = tmp_path / "index"
    index = build_index(tiny_checkpoint, corpus, out, config, encoder=encoder, progress=Told(), workers=1)
    assert any("Keep ratio 0.5: on held-out texts compensation does more harm than good" in line for line in lines)
    for cluster in (None, *range(n_clusters)):
        chosen = index.global_selection() if cluster is None else index.cluster_selection(cluster)
        of = None if n_clusters == 1 else cluster
        n_kept = index.manifest.compensation[0].n_kept
        for number, ids in chosen.ids.items():
            wanted = index.core_neurons(of, n_kept[number] / index.manifest.model.d_ff)[number]
            assert torch.equal(ids, wanted) and chosen.compensation[number].delta is None
    model = load_model(tiny_checkpoint)
    plain = make_predictor("global", model.layers, index)
    run = TextGenerator(model, plain).generate("Tell me of stars.", max_new_tokens=3)
    assert len(run.token_ids) == 3 and run.mlp_bytes_per_token <= 0.5 * run.dense_mlp_bytes_per_token
    assert "plain neurons after all" in CliRunner().invoke(main, ["info", str(out)]).stdout
    verified = CliRunner().invoke(main, ["verify", str(out), "--model", tiny_checkpoint])
    assert verified.exit_code == 0, verified.output


def test_a_single_cluster_holds_the_corpus_set(tiny_checkpoint, encoder, tmp_path):
    rows = [{"question": f"Tell me of stars, {i}.", "answer": f"It is {i}."} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    corpus = CorpusConfig(str(tmp_path / "rows.jsonl"), template="{question} {answer}")
    index = build_index(
        tiny_checkpoint, corpus, tmp_path / "index", BuildConfig(clusters=1, compensation=COMPENSATION), encoder=encoder
    )
    for ratio in COMPENSATION.keep_ratios:
        assert index.manifest.served_by_corpus(ratio) == [0]
        own, everywhere = index.cluster_selection(0, ratio), index.global_selection(ratio)
        assert torch.equal(own.ids[0], everywhere.ids[0]) and own.compensation is not None
    told = CliRunner().invoke(main, ["info", str(tmp_path / "index")])
    assert told.exit_code == 0 and "keep ratio 0.5" in told.stdout and "serves better" not in told.stdout
    assert "up to 300 tokens a cluster, and trained on up to 200\n" in told.stdout and "\n1 cluster:\n" in told.stdout


def test_workers_leave_the_same_files(built, tiny_checkpoint, encoder):
    again = built.with_name("again")
    build_index(
        tiny_checkpoint,
        CorpusConfig(str(built.with_name("rows.jsonl")), template="{question} {answer}"),
        again,
        BuildConfig(clusters=3, compensation=COMPENSATION),
        encoder=encoder,
    )
    files = sorted(path.relative_to(built) for path in built.rglob("*") if path.is_file())
    assert len(files) == 4 + 2 * 4
    assert all((built / name).read_bytes() == (again / name).read_bytes() for name in files)


def test_sets_that_begin_with_the_corpus_s_share_its_neurons(built, tiny_checkpoint, encoder):
    corpus = CorpusConfig(str(built.with_name("rows.jsonl")), template="{question} {answer}")
    settings = replace(COMPENSATION, distil_from=Start.CORPUS, ranking=Ranking.ENERGY)
    config = BuildConfig(clusters=3, compensation=settings)
    folders = [built.with_name(f"specialised-{n_workers}") for n_workers in (1, 2)]
    one, two = (
        build_index(tiny_checkpoint, corpus, folder, config, encoder=encoder, workers=n_workers)
        for n_workers, folder in enumerate(folders, 1)
    )
    everywhere = one.global_selection(0.5)
    for cluster in range(3):
        own = one.cluster_selection(cluster, 0.5)
        assert all(torch.equal(own.ids[i], everywhere.ids[i]) for i in own.ids)
        served = cluster in one.manifest.served_by_corpus(0.5)
        assert served == torch.equal(own.compensation[0].delta, everywhere.compensation[0].delta)
    files = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*") if path.is_file())
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in files)
    assert two.manifest == one.manifest


def test_clusters_that_learn_jointly_keep_their_own_neurons(built, tiny_checkpoint, encoder):
    corpus = CorpusConfig(str(built.with_name("rows.jsonl")), template="{question} {answer}")
    settings = replace(COMPENSATION, distil_from=Start.JOINT)
    config = BuildConfig(clusters=3, compensation=settings)
    folders = [built.with_name(f"joint-{n_workers}") for n_workers in (1, 2)]
    one, _ = (
        build_index(tiny_checkpoint, corpus, folder, config, encoder=encoder, workers=n_workers)
        for n_workers, folder in enumerate(folders, 1)
    )
    own = [one.cluster_selection(c, 0.5) for c in range(3) if c not in one.manifest.served_by_corpus(0.5)]
    everywhere = one.global_selection(0.5)
    assert any(not torch.equal(ids, everywhere.ids[number]) for each in own for number, ids in each.ids.items())
    assert one.manifest.compensation[0].distil_from == "joint"
    files = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*") if path.is_file())
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in files)


def test_a_single_cluster_has_nobody_to_learn_with():
    joint = replace(COMPENSATION, distil_from=Start.JOINT)
    for settings in (joint, COMPENSATION):
        assert trainings(settings, 1) == [Training((None,))]
    assert trainings(joint, 3) == [Training((None,)), Training((0, 1, 2))]
    alone = [(None,), (0,), (1,), (2,)]
    assert [each.clusters for each in trainings(COMPENSATION, 3)] == alone


def test_only_what_is_compensated_decodes_at_the_compensated_keep_ratio(built, tiny_checkpoint, encoder):
    index, layers = SemanticIndex.load(built, encoder), load_model(tiny_checkpoint).layers
    plain, fitted = (index.manifest.settings.gamma, False), (0.5, True)
    assert plain[0] == 0.8
    assert index.wanted_sets() == fitted and index.wanted_sets(compensated=False) == plain
    assert index.wanted_sets(0.7) == (0.7, True) and index.wanted_sets(0.6) == (0.6, False)
    assert index.wanted_sets(0.7, compensated=False) == (0.7, False)
    assert index.global_selection().compensation
    assert len(index.global_selection(compensated=False).ids[0]) == 38  # of 48
    for mode, options, wanted in (
        ("similarity", {}, fitted), ("global", {}, fitted), ("stability", {}, plain), ("hybrid", {}, plain),
        ("similarity", {"score": "paper"}, plain),
        ("global", {"compensated": False}, plain),
    ):  # fmt: skip
        assert (
            default_sets(index, Mode(mode), **{k: Score(v) if k == "score" else v for k, v in options.items()})
            == wanted
        )
        assert make_predictor(mode, layers, index, **options)


@pytest.mark.parametrize(("keep_ratio", "compensated"), [(0.5, True), (0.5, False), (0.6, False), (1.0, False)])
def test_the_profile_says_what_decodes_where_no_keep_ratio_is_named(
    built, tiny_checkpoint, encoder, keep_ratio, compensated, tmp_path
):
    copy = shutil.copytree(built, tmp_path / "index")
    SemanticIndex.load(copy).write_profile(ProfileInfo(keep_ratio, compensated, 0.1, 1.0, 1.0, 1.0, 1, 10))
    index, layers = SemanticIndex.load(copy, encoder), load_model(tiny_checkpoint).layers
    assert index.wanted_sets() == (keep_ratio, compensated)
    assert index.wanted_sets(compensated=False) == (0.8 if compensated else keep_ratio, False)
    assert index.wanted_sets(0.5) == (0.5, True)  # who names a keep ratio has not asked for the profile
    assert bool(index.global_selection().compensation) == compensated
    (chosen,) = make_predictor("similarity", layers, index, fallback="none").select(
        ["Tell me of stars."], None, n_rows=1
    )
    assert bool(chosen.compensation) == compensated
    (named,) = make_predictor("similarity", layers, index, keep_ratio=0.5, fallback="none").select(
        ["Tell me."], None, n_rows=1
    )
    assert named.compensation
    assert (make_predictor("similarity", layers, index).alpha is None) == compensated  # hybrid for unfamiliar prompts
    shown = CliRunner().invoke(main, ["info", str(copy)])
    kind = "compensated sets" if compensated else "plain sets" if keep_ratio < 1 else "dense decode"
    assert f"profile   {kind}, keep ratio {keep_ratio:g}: perplexity +0.0%" in shown.output
    run = ["generate", "Tell me of stars.", "--index", str(copy), "--model", tiny_checkpoint, "--json"]
    for budget in ([], ["--memory-budget", "8GiB"]):  # it counts all that the tests hold
        done = CliRunner().invoke(main, [*run, *budget, "--max-new-tokens", "2"])
        assert done.exit_code == 0, done.stderr


def test_manifests_of_earlier_releases_are_read(built, tmp_path):
    copy = shutil.copytree(built, tmp_path / "index")
    path = copy / "manifest.json"
    SemanticIndex.load(copy).write_profile(ProfileInfo(0.5, True, 0.1, 1.0, 1.0, 1.0, 1, 10))
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["profile"]["compensated"]
    for entry in manifest["compensation"]:
        del entry["plain"]
        entry |= {"rank": None, "bypass_rank": 0}
    path.write_text(json.dumps({**manifest, "sha256": manifest_checksum(manifest)}), encoding="utf-8")
    loaded = SemanticIndex.load(copy).manifest
    assert loaded.profile.compensated and not loaded.compensation[0].plain
    manifest["profile"] |= {"keep_ratio": 0.6, "compensated": True}
    path.write_text(json.dumps({**manifest, "sha256": manifest_checksum(manifest)}), encoding="utf-8")
    with pytest.raises(IndexFormatError, match=r"profile.keep_ratio is 0.6, of which there are no compensated sets"):
        SemanticIndex.load(copy)


def test_a_copy_of_one_layer_does_not_hold_on_to_its_file(built, tiny_checkpoint):
    d_model = load_model(tiny_checkpoint).layers[0].d_model
    _, repairs = load_compensated(built / compensation_file(0.5, 0), d_model, N_LAYERS)
    copied = repairs[0].to("cpu", copy=True)
    assert all(v.untyped_storage().nbytes() == v.nbytes for v in vars(copied).values())


def test_sets_that_do_not_fit_together_are_trained_one_after_the_other(models):
    layers = find_mlps(models["llama"])
    small, large = (training_bytes(layers, ratio) for ratio in COMPENSATION.keep_ratios)
    assert 0 < small < large
    for room, groups in ((small + large, [[0.5, 0.7]]), (large, [[0.5], [0.7]]), (1, [[0.5], [0.7]])):
        assert trained_together(layers, COMPENSATION.keep_ratios, room) == groups


def test_trainings_that_were_broken_off_keep_their_groups(tmp_path):
    for name in ("0-0.2-0.4", "1-0.2", "0-0.6-0.7"):
        (tmp_path / f"{name}.safetensors").touch()
    assert _begun(tmp_path, 0, (0.2, 0.4, 0.6)) == [[0.2, 0.4]]  # 0.7 has been trained since
    assert _begun(tmp_path, 0, (0.6, 0.7)) == [[0.6, 0.7]]
    assert _begun(tmp_path, 1, (0.4,)) == [] == _begun(tmp_path / "none", 0, (0.2, 0.4))


def test_a_norm_behind_the_residual_sum_is_a_norm_behind_the_mlp():
    config = BY_KEY["opt"].config()
    config.do_layer_norm_before = False
    torch.manual_seed(0)
    model = OPTForCausalLM(config).eval()
    language_model, texts = language_model_of(model), some_texts(40)
    assert all(layer.post_norm for layer in language_model.layers)
    assert not any(layer.post_norm for layer in find_mlps(tiny_model("opt")))
    n = [language_model.layers[0].d_ff // 2] * N_LAYERS
    fitted = fit_layers(language_model, texts, n, Fit(ridge=RIDGE))
    assert divergence(model, texts, fitted) < 0.95 * divergence(model, texts, replace(fitted, compensation=None))


def test_a_keep_ratio_whose_sets_are_trained_is_not_trained_again(tiny_checkpoint, tmp_path):
    language_model = load_model(tiny_checkpoint)
    sentences = [Sentence(str(i), f"Tell me of {i}.", f"Tell me of {i}. It is {i} and more.", 9) for i in range(24)]
    clustering = Clustering(np.zeros((1, 2), np.float32), np.zeros(24, int), np.ones(24))
    config = BuildConfig(clusters=1, compensation=COMPENSATION)
    d_ff = language_model.layers[0].d_ff
    n_kept = {f"{ratio:g}": [int(ratio * d_ff)] * N_LAYERS for ratio in COMPENSATION.keep_ratios}
    corpus = CalibrationCorpus(language_model, sentences, clustering, config, 64, tmp_path)
    fit = make_fitter(corpus, n_kept, None)
    for number in range(len(COMPENSATION.keep_ratios)):
        fit(number)
    trained = [tmp_path / compensation_file(ratio, None) for ratio in COMPENSATION.keep_ratios]
    make_distiller(corpus, None, 0.5)(0)
    wanted = [path.read_bytes() for path in trained]
    trained[0].unlink()
    trained[1].write_bytes(b"trained before")
    reported = []
    left = make_distiller(corpus, reported.append, 0.5)(0)
    assert [path.read_bytes() for path in trained] == [wanted[0], b"trained before"]
    assert left + sum(reported) >= COMPENSATION.distil_tokens


def test_tune_and_evaluate_know_compensated_sets(built, tiny_checkpoint, tmp_path):
    copy = shutil.copytree(built, tmp_path / "index")
    rows = [
        {"id": str(i), "prompt": f"Tell me of stars, {i}.", "completion": f"They are {i} and more."} for i in range(10)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = [str(tmp_path / "rows.jsonl"), "--index", str(copy), "--model", tiny_checkpoint, "--json"]
    tuned = CliRunner().invoke(main, ["tune", *arguments, "--part", "0:100", "--max-perplexity-increase", "9000%"])
    assert tuned.exit_code == 0, tuned.stderr
    assert json.loads(tuned.stdout)["profile"]["keep_ratio"] == 0.5
    assert SemanticIndex.load(copy).wanted_sets()[0] == 0.5
    wide = ["--keep-ratio", "0.7", "--max-perplexity-increase", "1e-9"]  # chance favours sparse sets of a random model
    strict = CliRunner().invoke(main, ["tune", *arguments, "--part", "0:100", *wide])
    assert strict.exit_code == 0 and SemanticIndex.load(copy).wanted_sets() == (1.0, False)
    log = ["--log", str(tmp_path / "log.jsonl"), "--part", "0:100"]
    logged = CliRunner().invoke(main, ["tune", *arguments, *log, "--max-perplexity-increase", "9000%"])
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(logged.stdout) == json.loads(tuned.stdout) and len(lines) > 10
    again = CliRunner().invoke(main, ["tune", *arguments, *log, *wide])
    assert json.loads(again.stdout)["profile"]["keep_ratio"] == 1.0  # from the log, whatever profile the index has now
    assert (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines() == lines
    assert CliRunner().invoke(main, ["tune", *arguments, "--keep-ratio", "1"]).exit_code == 1
    nowhere = CliRunner().invoke(main, ["tune", *arguments, "--log", str(tmp_path / "none" / "log.jsonl")])
    assert nowhere.exit_code == 1 and "there is no folder" in nowhere.stderr
    few = CliRunner().invoke(main, ["tune", *arguments, "--part", "0:100", "--limit", "9"])
    assert few.exit_code == 1 and "there are 9 rows to tune on, expected 10 or more" in few.stderr
    many = [{**rows[i % 10], "id": str(i), "prompt": f"Tell me of stars, {i}."} for i in range(48)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many), encoding="utf-8")
    ratios = ["--part", "0:100", "--keep-ratio", "0.5", "--keep-ratio", "0.999", "--max-perplexity-increase", "1e-4"]
    early = CliRunner().invoke(main, ["tune", str(tmp_path / "many.jsonl"), *arguments[1:], *ratios])
    n_rows = {row["contender"]: row["n_rows"] for row in json.loads(early.stdout)["contenders"]}
    assert len(n_rows) == 3 and "similarity/energy else hybrid 0.5" in n_rows  # 0.5 with plain sets as well
    assert n_rows["similarity/compensated else global 0.5"] == 10  # a quarter
    assert n_rows["similarity/energy else hybrid 0.999"] == 40
    scores = ["--score", "energy", "--score", "compensated", "--keep-ratio", "0.5", "--weights", "q8_0"]
    evaluated = CliRunner().invoke(main, ["evaluate", *arguments, *scores, "--contender", "similarity"])
    assert evaluated.exit_code == 0, evaluated.stderr
    plain, fitted = json.loads(evaluated.stdout)
    assert (plain["contender"], fitted["contender"]) == (
        "similarity/energy 0.5 q8_0",
        "similarity/compensated 0.5 q8_0",
    )
    assert fitted["kl"] < plain["kl"]
    unasked = CliRunner().invoke(main, ["evaluate", *arguments, "--limit", "1"])
    names = {row["contender"] for row in json.loads(unasked.stdout)}
    ways = {f"{name}/{score} {ratio}" for name in ("global", "similarity", "random-cluster")
            for score in ("energy", "compensated") for ratio in (0.5, 0.7)}  # fmt: skip
    assert ways | {"dense 16bit", "dense int8", "dense q4_0", "griffin 0.5", "oracle 0.7"} <= names
    missing = CliRunner().invoke(
        main, ["evaluate", *arguments, "--score", "compensated", "--keep-ratio", "0.6", "--contender", "global"]
    )
    assert missing.exit_code == 1 and "no sets compensated at keep ratio 0.6" in missing.stderr
    for ratio, noted in (("0.6", True), ("0.5", False)):
        asked = ["generate", "stars", "--index", str(copy), "--model", tiny_checkpoint, "--max-new-tokens", "2"]
        answer = CliRunner().invoke(main, [*asked, "--keep-ratio", ratio])
        assert answer.exit_code == 0 and ("compensated sets at 0.5, 0.7, not at 0.6" in answer.stderr) == noted
        with socket.create_server(("127.0.0.1", 0)) as taken:  # so that serving ends before it begins
            port = str(taken.getsockname()[1])
            serving = ["serve", "--index", str(copy), "--model", tiny_checkpoint, "--port", port, "--keep-ratio", ratio]
            answer = CliRunner().invoke(main, serving)
        assert answer.exit_code == 1 and "cannot be opened" in answer.stderr
        assert ("compensated sets at 0.5, 0.7, not at 0.6" in answer.stderr) == noted
    described = CliRunner().invoke(main, ["info", str(copy)])
    assert "keep ratio 0.5, sensitivity budget" in described.stdout and "profile" in described.stdout
    assert CliRunner().invoke(main, ["verify", str(copy)]).exit_code == 0
    damaged = copy / compensation_file(0.7, 0)
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.unlink()  # a set that the corpus's serves better is a link to that one
    damaged.write_bytes(content)
    refused = CliRunner().invoke(main, ["verify", str(copy)])
    assert refused.exit_code == 1 and "the file is damaged" in refused.stderr
    looked = CliRunner().invoke(main, ["lookup", str(copy), "stars", "--keep-ratio", "0.5"])
    assert "compensated" in looked.stdout


@pytest.mark.parametrize(
    "settings",
    [
        {"keep_ratios": ()},
        {"keep_ratios": (1.0,)},
        {"keep_ratios": (0.4, 0.5, 0.4)},
        {"keep_ratios": (0.4, 0.4 + 1e-9)},
        {"tokens": 0},
        {"distil_tokens": -1},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError):
        CompensationConfig(**settings)


def test_training_on_a_gpu_does_without_cudnn_attention():
    was = torch.backends.cuda.cudnn_sdp_enabled()
    with _sound_gradients("cuda"):
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    with _sound_gradients("cpu"):
        assert torch.backends.cuda.cudnn_sdp_enabled() == was
